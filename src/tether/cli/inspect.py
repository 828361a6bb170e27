"""`tether inspect`: what an adapter on disk is."""

from collections.abc import Iterator
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
    shown,
    use_all_cores,
)
from tether.provenance import Provenance
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
    is how far the anchor may be from the exact one, relative to it, where that is known. Of a
    quantised base it says which kind, and how far it lies from the original weights if recorded.
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
            "quantization": _quantization(origin),
        },
        "certificates": _certificates(origin),
        "gap": _gap(origin),
        "config": dict(adapter.config),
    }


def _quantization(origin: Provenance) -> str | None:
    """How the base is quantised; None where no fingerprint says."""
    return ", ".join(origin.quantization) or "none" if origin.fingerprints else None


def _certificates(origin: Provenance) -> dict[str, Any] | None:
    """The worst of the anchors' estimated errors, which say nothing of one that is not unique."""
    found = origin.certificates
    if not found:
        return None
    errors = {site: c.product_error for site, c in found.items() if c.unique}
    worst = max(errors, key=errors.__getitem__, default=None)
    return {
        "anchors": len(found),
        "not_unique": len(found) - len(errors),
        "worst": None if worst is None else errors[worst],
        "worst_site": worst,
    }


def _gap(origin: Provenance) -> dict[str, Any] | None:
    """How far a quantised base lies from the original weights, |W_q − W| / |W| of its sites."""
    gaps = origin.gaps.values()
    return {"sites": len(gaps), "smallest": min(gaps), "largest": max(gaps)} if gaps else None


def _summary(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is said of all anchors in one line, and of the base."""
    certificates, gap = facts["certificates"], facts["gap"]
    if certificates is not None:
        parts = []
        if certificates["worst"] is not None:
            parts.append(f"{certificates['worst']:.1e} at worst (estimated)")
        if certificates["not_unique"]:
            parts.append(f"{certificates['not_unique']} of {certificates['anchors']} not unique")
        yield "anchor error", "; ".join(parts)
    if gap is not None:
        yield "from the original weights", f"{gap['smallest']:.3g} to {gap['largest']:.3g} of |W|"


def _print(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    about = Table("", "", show_header=False)
    for name in ("path", "form", "sites"):
        about.add_row(name, shown(facts[name]))
    about.add_row("size", f"{facts['bytes'] / 1e6:.2f} MB")
    about.add_row("trained parameters", f"{facts['trained_parameters']:,}")
    for name, value in facts["provenance"].items():
        about.add_row(name.replace("_", " "), "unknown" if value is None else shown(value))
    for name, value in _summary(facts):
        about.add_row(name, value)
    for name, value in facts["config"].items():
        about.add_row(shown(f"config: {name}"), shown(value))
    out.print(about)
    site_column = Column("site", overflow="fold")
    table = Table(
        *(site_column, "shape", "rank", "|ΔW|", "|ΔW|/|W|", "anchor energy", "anchor error")
    )
    for site, row in rows.items():
        relative, energy = row["relative"], row["anchor_energy"]
        table.add_row(
            shown(site),
            "×".join(map(str, row["shape"])),
            str(row["rank"]),
            f"{row['norm']:.4g}",
            "–" if relative is None else f"{relative:.3%}",
            "–" if energy is None else f"{energy:.1%}",
            _anchor_error(row["certificate"]),
        )
    out.print(table)
    for site, row in rows.items():
        reason = row["certificate"]["fallback"] if row["certificate"] is not None else ""
        if reason:
            out.print(f"{shown(site)}: its anchor was found the slow way: {reason}")


def _anchor_error(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return "–"
    return f"{certificate['product_error']:.1e}" if certificate["unique"] else "not unique"
