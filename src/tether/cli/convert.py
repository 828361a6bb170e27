"""`tether convert`: an adapter as a plain LoRA folder, or as a native file."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from tether import algebra, formats
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.conversion import ConversionReport
from tether.errors import ConfigError, nearest
from tether.export import save_as_lora

NAME = "convert"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command(
    adapter: Annotated[Path, typer.Argument(help="Native file or PEFT folder. Only read.")],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder for a plain LoRA, or a name in .safetensors for native."
        ),
    ],
    rank: Annotated[
        int | None, typer.Option(help="Largest rank. Default: twice the trained rank, exact.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of each site's change.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write an adapter as the plain LoRA that peft and other software read.

    No base model is needed, and none is loaded. The error is measured on the written numbers.
    """
    with guarded(json_, debug):
        use_all_cores()
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one. {nearest(dtype, _DTYPES)}")
        if output.resolve() == adapter.resolve():
            raise ConfigError(f"{output}: is the adapter itself; choose another OUT.")
        bars = Bars(quiet=json_)
        value = formats.load(adapter)
        if output.suffix == ".safetensors":
            if dtype != "float32":
                raise ConfigError("a native file is always float32; leave out --dtype.")
            if rank is not None or tolerance is not None:
                value = algebra.to_lora(value, rank, tolerance)
            formats.save(value, output)
            _show_native(output, json_)
            return
        with bars.task("Converting") as task:
            report = save_as_lora(
                value, output, rank=rank, tolerance=tolerance, dtype=_DTYPES[dtype], progress=task
            )
        _show(report, json_)


def _show_native(output: Path, as_json: bool) -> None:
    if as_json:
        print_json({"written": str(output), "format": "native"})
    else:
        out.print(f"wrote {output}", soft_wrap=True)


def _show(report: ConversionReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict() | {"written": str(report.path)})
        return
    table = Table(Column("site", overflow="fold"), "rank", "|ΔW|", "relative error")
    for path, site in report.sites.items():
        table.add_row(path, str(site.rank), f"{site.norm:.4g}", f"{site.error:.2e}")
    out.print(table)
    out.print(f"rank {report.rank}, {report.dtype}, relative error of all {report.error:.2e}")
    out.print(f"wrote {report.path}", soft_wrap=True)
