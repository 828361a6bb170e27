"""`tether inspect`: what an adapter on disk is."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

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
from tether.value import Adapter, LayerAdapter

NAME = "inspect"


def command(
    path: Annotated[Path, typer.Argument(help="Native file or PEFT folder. Only read.")],
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print an adapter's settings, origin, size, and a table of its sites.

    |ΔW|/|W| is the size of the change beside the base weight's; anchor energy is the share of
    |W|² that the anchor took up. Both need the base's norm, which native files carry. Anchor error
    is how far the anchor may be from the exact one, relative to it, where that is known.
    """
    with guarded(json_, debug):
        use_all_cores()
        adapter = formats.load(path)
        rows = {}
        with Bars(quiet=json_).task("Measuring the sites") as task:
            for done, (site, layer) in enumerate(adapter.layers.items(), start=1):
                rows[site] = _row(adapter, site, layer)
                task(done, len(adapter.layers))
        facts = _facts(path, adapter)
        if json_:
            print_json(facts | {"layers": rows})
        else:
            _print(facts, rows)


def _row(adapter: Adapter, site: str, layer: LayerAdapter) -> dict[str, Any]:
    origin = adapter.provenance.fingerprints.get(site)
    weight = origin.norm if origin is not None and origin.norm > 0 else None
    change = algebra.norm(layer)
    certificate = adapter.provenance.certificates.get(site)
    energy = None
    if layer.anchor is not None and weight is not None:
        energy = (algebra.anchor_norm(layer) / weight) ** 2
    return {
        "kind": layer.layout.kind,
        "shape": list(layer.layout.shape),
        "rank": layer.rank,
        "scaling": layer.scaling,
        "norm": change,
        "relative": None if weight is None else change / weight,
        "anchor_energy": energy,
        "certificate": None if certificate is None else asdict(certificate),
    }


def _facts(path: Path, adapter: Adapter) -> dict[str, Any]:
    origin = adapter.provenance
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    factors = [layer.trainable for layer in adapter.layers.values()]
    return {
        "path": str(path),
        "form": "anchored" if adapter.anchored else "plain LoRA",
        "bytes": sum(file.stat().st_size for file in files),
        "sites": len(adapter.layers),
        "trained_parameters": sum(f.A.numel() + f.B.numel() for f in factors),
        "provenance": {
            "method": origin.method,
            "seed": origin.seed,
            "tether_version": origin.tether_version,
            "base_model": origin.base_model,
            "learning_rate": origin.learning_rate,
            "steps": origin.steps,
            "fingerprints": len(origin.fingerprints),
        },
        "config": dict(adapter.config),
    }


def _print(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    about = Table("", "", show_header=False)
    for name in ("path", "form", "sites"):
        about.add_row(name, str(facts[name]))
    about.add_row("size", f"{facts['bytes'] / 1e6:.2f} MB")
    about.add_row("trained parameters", f"{facts['trained_parameters']:,}")
    for name, value in facts["provenance"].items():
        about.add_row(name.replace("_", " "), "unknown" if value is None else str(value))
    for name, value in facts["config"].items():
        about.add_row(f"config: {name}", str(value))
    out.print(about)
    site_column = Column("site", overflow="fold")
    table = Table(
        *(site_column, "shape", "rank", "|ΔW|", "|ΔW|/|W|", "anchor energy", "anchor error")
    )
    for site, row in rows.items():
        relative, energy = row["relative"], row["anchor_energy"]
        table.add_row(
            site,
            "×".join(map(str, row["shape"])),
            str(row["rank"]),
            f"{row['norm']:.4g}",
            "–" if relative is None else f"{relative:.3%}",
            "–" if energy is None else f"{energy:.1%}",
            _anchor_error(row["certificate"]),
        )
    out.print(table)
    for site, row in rows.items():
        if row["certificate"] is not None and row["certificate"]["fallback"]:
            out.print(
                f"{site}: its anchor was found the slow way: {row['certificate']['fallback']}"
            )


def _anchor_error(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return "–"
    return f"{certificate['product_error']:.1e}" if certificate["unique"] else "not unique"
