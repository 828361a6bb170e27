"""`tether merge`: base and adapter as one model folder, written tensor by tensor."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from tether import formats
from tether.checkpoint import Checkpoint
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.errors import ConfigError, nearest
from tether.integrations import hub
from tether.merged import MergeReport, save_merged
from tether.merged.folder import check_outside

NAME = "merge"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base model. Only read.")],
    adapter: Annotated[Path, typer.Argument(help="Native file or PEFT folder. Only read.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the merged model: new, or empty.")
    ],
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(_DTYPES)}. Default: each tensor's own.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Check that the base is the one the adapter was made on.")
    ] = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a model whose weights are those of the base with the adapter's change added.

    The base is not loaded: about one tensor is in memory at a time. The result loads in
    transformers like any model. Where embedding and output head are one tensor and the adapter
    changes either, both are written.
    """
    with guarded(json_, debug):
        use_all_cores()
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one. {nearest(dtype, _DTYPES)}")
        check_outside(output, adapter, "adapter")
        folder = Path(base) if Path(base).is_dir() else Path(hub.fetch(base))
        value = formats.load(adapter)
        with Bars(quiet=json_).task("Merging") as task:
            report = save_merged(
                Checkpoint.open(folder),
                value,
                output,
                dtype=None if dtype is None else _DTYPES[dtype],
                verify=verify,
                progress=task,
            )
        _show(report, json_)


def _show(report: MergeReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict() | {"written": str(report.path)})
        return
    table = Table(Column("changed", overflow="fold"), "|ΔW|", "error of rounding")
    for name, change in report.changes.items():
        table.add_row(name, f"{change.norm:.4g}", f"{change.error:.2e}")
    out.print(table)
    out.print(f"rounding took {report.error:.2e} of all changes' norm")
    if report.untied:
        out.print("output head and embedding are two tensors now (tie_word_embeddings: false)")
    if report.left_out:
        out.print(f"left out of the base's folder: {', '.join(report.left_out)}", soft_wrap=True)
    out.print(f"wrote {report.path} ({report.size / 1e9:.3g} GB)", soft_wrap=True)
