"""`tether convert`: an adapter as a plain LoRA folder, or as a native file."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Column, Table

from tether import algebra, formats, rescue
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.cli.verified import Inputs, Limits, verified
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
    anchor: Annotated[
        Path | None,
        typer.Option(help="PEFT folder saved before training, of an adapter on a residual model."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model. Alone: compute PiSSA's or OLoRA's start."),
    ] = None,
    residual: Annotated[
        Path | None,
        typer.Option(help="Folder of the model saved without the adapter; goes with --base."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            "--max-rank",
            help="Largest rank, such as a server's limit. Default: twice the trained one, exact.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of each site's change.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    verify: Annotated[
        str | None,
        typer.Option(help="Text (.txt, .jsonl) on which to compare logits; loads the --base."),
    ] = None,
    verify_tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of the logits.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write an adapter as the plain LoRA that peft and other software read.

    No model is loaded. The error is measured on the written numbers. What peft trained from PiSSA,
    OLoRA, CorDA or LoRA-GA needs its initial factors: give --anchor, or --residual and --base, or
    for PiSSA and OLoRA --base alone; weights are then read one at a time.
    """
    with guarded(json_, debug):
        use_all_cores()
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not one. {nearest(dtype, _DTYPES)}")
        if output.suffix == ".safetensors" and dtype != "float32":
            raise ConfigError("a native file is always float32; leave out --dtype.")
        bars = Bars(quiet=json_)
        limits = Limits(rank, tolerance, _DTYPES[dtype])
        if verify is not None:
            inputs = Inputs(adapter, anchor, base, residual)
            report = verified(inputs, output, limits, verify, verify_tolerance, bars)
            _show(report, json_)
            return
        if verify_tolerance is not None:
            raise ConfigError("--verify-tolerance goes with --verify TEXT.")
        if anchor or base or residual:
            job = rescue.open_rescue(adapter, anchor, base, residual)
            with bars.task("Rescuing") as task:
                found = rescue.write(
                    job,
                    output,
                    rank=rank,
                    tolerance=tolerance,
                    dtype=_DTYPES[dtype],
                    progress=task,
                )
            _show_rescue(found, json_)
            return
        _convert(adapter, output, limits, bars, json_)


def _convert(adapter: Path, output: Path, limits: Limits, bars: Bars, json_: bool) -> None:
    rescue.check_output(output, {"adapter": adapter})
    value = formats.load(adapter)
    if output.suffix == ".safetensors":
        if limits.reduced:
            value = algebra.to_lora(value, limits.rank, limits.tolerance)
        formats.save(value, output)
        _show_native(output, json_)
        return
    with bars.task("Converting") as task:
        report = save_as_lora(
            value,
            output,
            rank=limits.rank,
            tolerance=limits.tolerance,
            dtype=limits.dtype,
            progress=task,
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
    for line in str(report).splitlines()[1:]:
        out.print(line, soft_wrap=True)
    out.print(f"wrote {report.path}", soft_wrap=True)


def _show_rescue(report: rescue.WriteReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict() | {"written": str(report.path)})
        return
    found, source = report.rescue, report.rescue.source
    extra = {"anchor": (), "residual": ("left over",), "base": ("gap",)}[source]
    table = Table(
        Column("site", overflow="fold"), "rank", "|ΔW|", "|ΔW|/|s·B0·A0|", *extra, "uncertainty",
        "relative error",
    )  # fmt: skip
    for path, written in report.sites.items():
        site = found.sites[path]
        shares = {
            "anchor": (),
            "residual": (f"{site.left_over:.1e}",),
            "base": ("-" if site.gap is None else f"{site.gap:.1e}",),
        }
        moved = f"{site.change / site.anchor:.2%}" if site.anchor > 0 else "-"
        table.add_row(
            path, str(written.rank), f"{written.norm:.4g}", moved, *shares[source],
            f"{site.uncertainty:.1e}", f"{written.error:.2e}",
        )  # fmt: skip
    out.print(table)
    out.print(_sureness(found), soft_wrap=True)
    out.print(f"rank {report.rank}, {report.dtype}, relative error of all {report.error:.2e}")
    out.print(f"wrote {report.path}", soft_wrap=True)


def _sureness(found: rescue.RescueReport) -> str:
    """One sentence on how the initial factors were found and how far to trust them."""
    worst, site = found.worst, found.sites[found.worst]
    if found.source == "residual":
        left = max(found.sites, key=lambda path: found.sites[path].left_over)
        return (
            f"{found.method}: base − residual, cut to the adapter's rank; at most "
            f"{found.sites[left].left_over:.1e} of it is left over, at {left}: the rounding of the "
            f"residual model, {found.uncertainty:.1e} of the change"
        )
    if found.source == "base":
        return (
            f"{found.method}: start computed again from the base; estimated uncertainty "
            f"{found.uncertainty:.1e} of the change, least sure {worst} with {site.uncertainty:.1e}"
        )
    if found.uncertainty > 0:
        return (
            f"{found.method}: initial factors as saved; adapter and anchor are stored in different "
            f"precisions, and that rounding may be {found.uncertainty:.1e} of the change"
        )
    return f"{found.method}: initial factors as saved, exact"
