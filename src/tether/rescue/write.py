"""A rescued adapter to a file, site by site: only one site's tensors are in memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from tether import algebra
from tether.errors import ConfigError, NonFiniteError
from tether.provenance import Fingerprint
from tether.rescue.recover import Rescue, RescuedSite
from tether.rescue.report import RescueReport, SiteRescue
from tether.rescue.sinks import Sink, native_file, peft_folder
from tether.value import Adapter, Factors, Json, LayerAdapter, Progress


@dataclass(frozen=True, slots=True)
class WrittenSite:
    """What one site became.

    Attributes:
        rank: of the factors that carry its change, before zero rows are added.
        norm: |ΔW|_F.
        error: |ΔW − ΔW'|_F / |ΔW|_F, ΔW' from the numbers in the file.
    """

    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What `write` wrote.

    Attributes:
        path: of the file or folder.
        format: "native" or "peft".
        dtype: of the tensors.
        rank: of the largest site.
        sites: site path -> report.
        rescue: how the initial factors were found.
    """

    path: Path
    format: str
    dtype: str
    rank: int
    sites: Mapping[str, WrittenSite]
    rescue: RescueReport

    @property
    def error(self) -> float:
        """Relative Frobenius error of all sites' changes taken together."""
        total = sum(site.norm**2 for site in self.sites.values())
        lost = sum((site.norm * site.error) ** 2 for site in self.sites.values())
        return float((lost / total) ** 0.5) if total > 0 else 0.0

    def to_dict(self) -> dict[str, Json]:
        """The report as JSON values.

        Returns:
            path, format, dtype, rank, error, for each site rank, norm and error, and the rescue.
        """
        return {
            "path": str(self.path),
            "format": self.format,
            "dtype": self.dtype,
            "rank": self.rank,
            "error": self.error,
            "sites": {path: asdict(site) for path, site in self.sites.items()},
            "rescue": self.rescue.to_dict(),
        }


def write(
    rescue: Rescue,
    path: Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> WriteReport:
    """Write a rescued adapter: a native file where the name ends so, else a plain LoRA folder.

    Where ranks follow from `tolerance`, the sites are recovered twice: once for their ranks.

    Args:
        rescue: checked, not yet done.
        path: ending in ".safetensors" for an anchored native file, else the folder of a plain
            LoRA. It may not be, hold or lie in a folder that is read.
        rank: largest rank of any site; None for no limit (2r). A native file is then plain.
        tolerance: largest relative error of any site's ΔW from reducing its rank; likewise.
        dtype: of a folder: float32, bfloat16 or float16; a native file is float32.
        progress: called with (sites done, sites in all).

    Returns:
        what was written, measured.

    Raises:
        ConfigError: rank, tolerance, dtype or path cannot be meant.
        UnsupportedAdapterError: a site that PEFT cannot express, by name.
        RescueError: the initial factors cannot be what was given; nothing is written.
        WriteError: it cannot be written; what was there stays.
    """
    check_output(path, rescue.inputs)
    to_native = path.suffix == ".safetensors"
    if to_native and dtype != torch.float32:
        raise ConfigError("a native file is always float32; leave out dtype.")
    shapes = _shapes(rescue, rank, tolerance, to_native)
    opened = native_file(shapes, path) if to_native else peft_folder(shapes, path, dtype)
    found: dict[str, SiteRescue] = {}
    written: dict[str, WrittenSite] = {}
    prints: dict[str, Fingerprint] = {}
    with opened as sink:
        for site in rescue.sites():
            stored, layer_rank = _store(site, sink, shapes, rank, tolerance)
            error = algebra.relative_error(site.layer, stored)
            found[site.path] = site.report
            written[site.path] = WrittenSite(layer_rank, site.report.change, error)
            if site.fingerprint is not None:
                prints[site.path] = site.fingerprint
            if progress is not None:
                progress(len(found), len(shapes.layers))
        _store_wholes(sink, rescue)
        result = RescueReport(rescue.name, rescue.method, found)
        result.check(rescue.folder.path)
        sink.finish(prints)
    largest = max(site.rank for site in written.values())
    kind, name = "native" if to_native else "peft", str(dtype).removeprefix("torch.")
    return WriteReport(path, kind, name, largest, written, result)


def _store_wholes(sink: Sink, rescue: Rescue) -> None:
    """Write what is trained whole, which lives on no residual: one parameter at a time."""
    for path in rescue.shapes.biases:
        sink.add_bias(path, rescue.folder.bias(path))
    for path, state in rescue.shapes.modules.items():
        for name in state:
            sink.add_module(path, name, rescue.folder.module(path, name))


def check_output(path: Path, inputs: Mapping[str, Path]) -> None:
    """Raise if writing to a path could change what is read.

    Args:
        path: to be written.
        inputs: what it is called -> a file or folder that is read.

    Raises:
        ConfigError: it is one of them, lies in one, or holds one.
    """
    target = path.resolve()
    for name, given in inputs.items():
        source = given.resolve()
        if target == source:
            raise ConfigError(f"{path}: is the {name} itself; choose another OUT.")
        if source in target.parents or target in source.parents:
            where = "lies in" if source in target.parents else "holds"
            raise ConfigError(f"{path}: {where} the {name} {given}; choose an OUT beside it.")


def _shapes(rescue: Rescue, rank: int | None, tolerance: float | None, to_native: bool) -> Adapter:
    """What will be written, without values."""
    if rank is not None and rank < 1:
        raise ConfigError(f"rank {rank} must be at least 1.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError(f"tolerance {tolerance} must be between 0 and 1.")
    shapes = rescue.shapes
    if to_native and rank is None and tolerance is None:
        return shapes
    if tolerance is None:
        ranks = {path: _plain_rank(layer, rank) for path, layer in shapes.layers.items()}
    else:
        ranks = {s.path: _plain(s, rank, tolerance).rank for s in rescue.sites()}
    layers = {}
    for path, layer in shapes.layers.items():
        rows, columns = layer.trainable.shape
        factors = Factors(
            torch.empty(ranks[path], columns, device="meta"),
            torch.empty(rows, ranks[path], device="meta"),
        )
        layers[path] = replace(layer, trainable=factors, anchor=None)
    return replace(shapes, layers=layers)


def _plain_rank(layer: LayerAdapter, rank: int | None) -> int:
    """The rank that `algebra.compress` gives a site for a largest rank."""
    full = layer.rank if layer.anchor is None else 2 * layer.rank
    return full if rank is None or rank >= full else min(rank, *layer.trainable.shape)


def _plain(site: RescuedSite, rank: int | None, tolerance: float | None) -> LayerAdapter:
    try:
        return algebra.compress(site.layer, rank, tolerance).layer
    except (ConfigError, NonFiniteError) as error:
        raise type(error)(f"site {site.path!r}: {error}") from None


def _store(
    site: RescuedSite, sink: Sink, shapes: Adapter, rank: int | None, tolerance: float | None
) -> tuple[LayerAdapter, int]:
    """Write one site in the form announced: the numbers in the file, and their rank."""
    layer = site.layer
    if shapes.layers[site.path].anchor is None:
        layer = _plain(site, rank, tolerance)
    return sink.add(site.path, layer), layer.rank
