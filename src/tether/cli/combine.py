"""`tether combine`: several adapters of one base as one."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

from tether import combine, formats
from tether.cli.console import (
    Bars,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.errors import ConfigError, UnknownNameError, nearest
from tether.export import save_as_lora

NAME = "combine"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_METHODS: dict[str, Callable[..., combine.Combined]] = {
    "linear": combine.linear,
    "cat": combine.cat,
    "svd": combine.svd,
    "ties": combine.ties,
    "dare": combine.dare,
}
# The options that each method takes, and which of them it cannot do without.
_OPTIONS = {
    "linear": ((), ()),
    "cat": ((), ()),
    "svd": (("rank", "tolerance"), ()),
    "ties": (("rank", "density", "majority"), ("rank", "density")),
    "dare": (("rank", "density", "seed", "then"), ("rank", "density")),
}


def command(
    adapters: Annotated[
        list[Path], typer.Argument(help="Native files or PEFT folders of one base. Only read.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="OUT",
            help="Folder for a plain LoRA, or a name in .safetensors for native.",
        ),
    ],
    method: Annotated[str, typer.Option(help=f"{', '.join(_METHODS)}.")] = "linear",
    weight: Annotated[
        list[float] | None, typer.Option(help="One for each adapter, in order. Default: 1 each.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank (svd, ties, dare).")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error of each site (svd).")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Part of the entries to keep (ties, dare).")
    ] = None,
    majority: Annotated[
        str | None, typer.Option(help="total or frequency (ties). Default: total.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is dropped (dare). Default: 0.")] = None,
    then: Annotated[
        str | None, typer.Option(help="linear or ties, after dropping (dare). Default: linear.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.")] = "float32",
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Combine adapters of one base into one plain LoRA.

    linear and cat are exact sums; svd is the best sum of a rank; ties and dare look at every entry
    of the changes. No base model is needed, and none is loaded.
    """
    with guarded(json_, debug):
        use_all_cores()
        given: dict[str, Any] = {"rank": rank, "tolerance": tolerance, "density": density}
        given |= {"majority": majority, "seed": seed, "then": then}
        settings = _settings(method, {key: v for key, v in given.items() if v is not None})
        _check_output(output, adapters, dtype)
        bars = Bars(quiet=json_)
        values = [formats.load(path) for path in adapters]
        with bars.task("Combining") as task:
            result = _METHODS[method](values, weight or None, **settings, progress=task)
        facts = _facts(result) | _write(result, output, dtype, bars) | {"method": method}
        _show(facts, json_)


def _settings(method: str, given: dict[str, Any]) -> dict[str, Any]:
    if method not in _METHODS:
        raise UnknownNameError(f"method {method!r} is not one. {nearest(method, _METHODS)}")
    allowed, needed = _OPTIONS[method]
    for name in given:
        if name not in allowed:
            users = [other for other, (names, _) in _OPTIONS.items() if name in names]
            raise ConfigError(
                f"--{name} says nothing to {method}; leave it out, or use --method "
                f"{' or '.join(users)}."
            )
    for name in needed:
        if name not in given:
            raise ConfigError(f"{method} needs --{name}.")
    return given


def _check_output(output: Path, adapters: list[Path], dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one. {nearest(dtype, _DTYPES)}")
    if output.suffix == ".safetensors" and dtype != "float32":
        raise ConfigError("a native file is always float32; leave out --dtype.")
    target = output.resolve()
    for adapter in adapters:
        source = adapter.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise ConfigError(
                f"{output}: is the adapter {adapter} itself, or one lies in the other; choose "
                "another OUT."
            )


def _facts(result: combine.Combined) -> dict[str, Any]:
    return {
        "weights": result.adapter.config["weights"],
        "error": result.error,
        "sites": {
            path: {"rank": site.rank, "norm": site.norm, "error": site.error}
            for path, site in result.sites.items()
        },
    }


def _write(result: combine.Combined, output: Path, dtype: str, bars: Bars) -> dict[str, Any]:
    """Write it; `rounding` is what the dtype of a folder costs besides."""
    rank = max(site.rank for site in result.sites.values())
    common = {"written": str(output), "rank": rank, "dtype": dtype}
    if output.suffix == ".safetensors":
        formats.save(result.adapter, output)
        return common | {"format": "native", "rounding": 0.0}
    with bars.task("Writing") as task:
        report = save_as_lora(result.adapter, output, dtype=_DTYPES[dtype], progress=task)
    return common | {"format": "lora", "rounding": report.error}


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    table = Table(Column("site", overflow="fold"), "rank", "|ΔW|", "relative error")
    for path, site in facts["sites"].items():
        table.add_row(path, str(site["rank"]), f"{site['norm']:.4g}", f"{site['error']:.2e}")
    out.print(table)
    weights = ", ".join(f"{weight:g}" for weight in facts["weights"])
    out.print(f"{facts['method']} of weights {weights}: rank {facts['rank']}, {facts['dtype']}")
    out.print(f"relative error of all {facts['error']:.2e}, and of writing {facts['rounding']:.2e}")
    out.print(f"wrote {facts['written']}", soft_wrap=True)
