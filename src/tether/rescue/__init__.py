"""Adapters of peft that live on a residual model, told as changes of the base. No model is loaded.

peft's PiSSA, OLoRA, CorDA and LoRA-GA write the base over, W_res = W − s·B0·A0, and save A and B,
which mean nothing without B0·A0. Given what tells it, the adapter becomes anchored:

    ΔW = W_res + s·B·A − W = s·(B·A − B0·A0) = s·(B·dA + dB·A0)
"""

import os
from dataclasses import replace
from pathlib import Path

from tether import formats
from tether.rescue.recover import Rescue, RescuedSite, open_rescue
from tether.rescue.report import RescueReport, SiteRescue
from tether.rescue.write import WriteReport, WrittenSite, check_output, write
from tether.value import Adapter

__all__ = [
    "Rescue",
    "RescueReport",
    "RescuedSite",
    "SiteRescue",
    "WriteReport",
    "WrittenSite",
    "check_output",
    "load",
    "open_rescue",
    "write",
]

Name = str | os.PathLike[str]


def load(
    path: Name,
    *,
    anchor: Name | None = None,
    base: Name | None = None,
    residual: Name | None = None,
) -> Adapter:
    """Read an adapter: a native file, or a folder that peft or `save_as_lora` wrote.

    A folder that peft trained from PiSSA, OLoRA, CorDA or LoRA-GA also needs what tells its
    initial factors: `anchor`, or `residual` and `base`, or for PiSSA and OLoRA `base` alone. No
    model is loaded: weights are read one at a time.

    Args:
        path: of a native file or a PEFT folder. Only read.
        anchor: folder of the adapter as it was saved before training. The result is exact.
        base: folder of the base model. Alone, the start is computed again; its weights must be
            the numbers that were trained on. With `anchor` it only adds fingerprints.
        residual: folder of the model that was saved without the adapter; its rounding is left
            out of the change, see `SiteRescue.left_over`.

    Returns:
        the adapter, float32, on the CPU, anchored where it needed rescue. A native file gives
        back what was saved, bit for bit.

    Raises:
        ConfigError: what was given cannot be meant together.
        FormatError: and its kinds, naming the file, what is wrong and what to do.
        RescueError: what was given does not belong to the adapter, or is not sure enough.
    """
    given = [None if name is None else Path(name) for name in (anchor, base, residual)]
    if given == [None, None, None]:
        return formats.load(path)
    rescue = open_rescue(Path(path), *given)
    layers, prints, reports = {}, {}, {}
    for site in rescue.sites():
        layers[site.path], reports[site.path] = site.layer, site.report
        if site.fingerprint is not None:
            prints[site.path] = site.fingerprint
    RescueReport(rescue.name, rescue.method, reports).check(rescue.folder.path)
    shapes = rescue.shapes
    origin = replace(shapes.provenance, fingerprints=prints)
    folder = rescue.folder
    return replace(
        shapes,
        layers=layers,
        provenance=origin,
        biases={path: folder.bias(path) for path in shapes.biases},
        modules={
            path: {name: folder.module(path, name) for name in state}
            for path, state in shapes.modules.items()
        },
    )
