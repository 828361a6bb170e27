"""`tether anchors`: find the anchors of a model on disk, one weight in memory at a time."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tether import formats
from tether.cli.console import (
    Bars,
    CacheOption,
    DebugOption,
    JsonOption,
    guarded,
    out,
    print_json,
    use_all_cores,
)
from tether.cli.lora import (
    AlphaOption,
    AlphaPatternOption,
    DoraOption,
    ExcludeOption,
    InitOption,
    LayersOption,
    RankOption,
    RankPatternOption,
    RsloraOption,
    TargetOption,
    lora_fields,
)
from tether.config import LoraConfig
from tether.errors import ConfigError
from tether.integrations import hub, smollm2
from tether.start import Found, Search, find
from tether.value import Adapter

NAME = "anchors"


def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id. Default: SmolLM2-135M from its wheel. Only read."),
    ] = None,
    output: Annotated[Path, typer.Option("--out", help="Native file to write.")] = Path(
        "anchors.safetensors"
    ),
    init: InitOption = "pissa",
    rank: RankOption = 16,
    alpha: AlphaOption = None,
    rslora: RsloraOption = False,
    target: TargetOption = None,
    exclude: ExcludeOption = None,
    layers: LayersOption = None,
    rank_pattern: RankPatternOption = None,
    alpha_pattern: AlphaPatternOption = None,
    dora: DoraOption = False,
    seed: Annotated[int, typer.Option(help="Of the start's random numbers.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Weights at a time. Default: one per core.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file in --out.")
    ] = False,
    cache: CacheOption = True,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find the start of an adapter on a model that is not loaded: one weight a core at a time.

    The file is an adapter that has not been trained: attach it, or train from it. Each anchor is
    kept in the cache as soon as it is found, so a run that was interrupted goes on where it
    stopped, and training the same model finds them there.
    """
    with guarded(json_, debug):
        use_all_cores()
        if output.is_dir():  # before the work, not after it
            raise ConfigError(f"{output}: is a folder. Give --out the name of a file.")
        if output.exists() and not overwrite:
            raise ConfigError(f"{output}: is there already. Choose another --out, or --overwrite.")
        config = LoraConfig(**lora_fields(context.params), seed=seed)
        bars = Bars(quiet=json_)
        folder, name = _folder(model, bars)
        skeleton = hub.skeleton(folder)
        # What others will load it by, not where the cache keeps it.
        skeleton.config._name_or_path = name  # type: ignore[union-attr]
        began = time.monotonic()
        with bars.task("Finding the anchors") as task:
            found = find(skeleton, config, Search(folder, workers, cache), task)
        seconds = time.monotonic() - began
        formats.save(found.adapter, output)
        facts = _facts(found, seconds) | {"written": [str(output)]}
        if json_:
            print_json(facts)
        else:
            _print(facts)


def _folder(model: str | None, bars: Bars) -> tuple[str, str]:
    """The model's folder, and the name it goes by."""
    if model is not None:
        return hub.fetch(model), model
    with bars.task("Preparing the default model (once)"):
        folder = str(smollm2.folder())
    return folder, folder


def _facts(found: Found, seconds: float) -> dict[str, Any]:
    adapter = found.adapter
    certificates = adapter.provenance.certificates
    return {
        "method": adapter.provenance.method,
        "sites": len(adapter.layers),
        "cached": found.cached,
        "seconds": round(seconds, 2),
        "worst_product_error": max((c.product_error for c in certificates.values()), default=None),
        "not_unique": [path for path, c in certificates.items() if not c.unique],
        "fallback": {path: c.fallback for path, c in certificates.items() if c.fallback},
        "bytes": _size(adapter),
    }


def _size(adapter: Adapter) -> int:
    pairs = [p for layer in adapter.layers.values() for p in (layer.trainable, layer.anchor) if p]
    return sum(factor.nbytes for pair in pairs for factor in (pair.A, pair.B))


def _print(facts: dict[str, Any]) -> None:
    table = Table("", "", show_header=False)
    table.add_row("method", facts["method"])
    table.add_row("sites", f"{facts['sites']}, {facts['cached']} of them out of the cache")
    table.add_row("time", f"{facts['seconds']:.1f} s")
    worst = facts["worst_product_error"]
    if worst is not None:
        table.add_row("largest error of an anchor", f"{worst:.1e} of |B0·A0|")
    out.print(table)
    for path in facts["not_unique"]:
        out.print(
            f"{path}: the rank cuts a cluster of equal singular values; other anchors are as good"
        )
    for path, reason in facts["fallback"].items():
        out.print(f"{path}: found the slow way: {reason}")
    out.print(f"wrote {facts['written'][0]} ({facts['bytes'] / 1e6:.1f} MB)", soft_wrap=True)
