"""`tether residual`: a quantised residual base, and the adapter that completes it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.cli.lora import lora_fields
from tether.config import LoraConfig
from tether.integrations.residual import ADAPTER, KINDS, ResidualReport, save_residual

NAME = "residual"


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub id, unquantised. Only read.")],
    output: Annotated[Path, typer.Option("--out", help="Folder to write: new, or empty.")],
    quantize: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}, of bitsandbytes.")] = "nf4",
    rank: Annotated[int, typer.Option(help="Rank r.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha/r. Default: r.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Module name or glob; repeat for more. Default: all-linear."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Module name or glob to leave out; repeatable.")
    ] = None,
    layers: Annotated[
        list[int] | None, typer.Option(help="Index of a layer to adapt; repeatable.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="1: QPiSSA. More: as in LoftQ, each from what the last one lost.")
    ] = 1,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write W − s·B·A, quantised (QPiSSA), as a model folder of its own, with A and B in it.

    MODEL stays as it is. The folder is another base: the adapter in it belongs to it alone, and
    fits no other. To train on a quantised base without another copy of it, no residual is needed.
    """
    del rank, alpha, target, exclude, layers
    with guarded(json_, debug):
        use_all_cores()
        config = LoraConfig(**lora_fields(context.params))
        with Bars(quiet=json_).task("Writing and measuring") as task:
            report = save_residual(
                model, output, config, quantize=quantize, rounds=rounds, progress=task
            )
        _show(report, json_)


def _show(report: ResidualReport, as_json: bool) -> None:
    adapter = report.path / ADAPTER
    if as_json:
        print_json(report.to_dict() | {"written": [str(report.path), str(adapter)]})
        return
    table = Table(Column("site", overflow="fold"), "|W − Q(W)|", "|W − Q(W − sBA) − sBA|")
    for path, site in report.sites.items():
        table.add_row(path, f"{site.plain:.4g}", f"{site.residual:.4g}")
    out.print(table)
    out.print(
        f"{', '.join(report.quantization)}: {report.reduction:.1%} of the error of quantising is "
        "gone (nuclear norm, all sites)"
    )
    out.print(f"wrote {report.path} and {adapter}", soft_wrap=True)
