"""What `tether compare` says: tables and sentences, or one JSON object."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from tether.cli.console import out, shown
from tether.report.compare import interval
from tether.report.compared import Compared
from tether.training.behaviour import Behaviour

_NAMED = 3  # sites that only one has, named in the terminal


def to_json(compared: Compared, paths: Sequence[Path]) -> dict[str, Any]:
    """All values as JSON values.

    Args:
        compared: adapters by their letters.
        paths: of the adapters, in order.

    Returns:
        "adapters" and "pairs" by letter, and "base", None without one. An infinite number is None.
    """
    about: dict[str, Any] = {}
    for (letter, one), path in zip(compared.adapters.items(), paths, strict=True):
        losses = {
            form: {"error": _finite(loss.error), "worst": _finite(max(loss.sites.values()))}
            for form, loss in one.losses.items()
        }
        about[letter] = {"path": str(path), **asdict(one), "losses": losses}
    pairs = {letter: pair.to_dict() for letter, pair in compared.pairs.items()}
    found = compared.behaviour
    return {
        "adapters": about,
        "pairs": pairs,
        "base": None if found is None else _on_base(found, list(compared.adapters)),
    }


def _on_base(found: Behaviour, letters: Sequence[str]) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for letter in (None, *letters):
        mean = found.scores.mean(letter)
        entry: dict[str, Any] = {"loss": mean.value, "error": mean.error}
        if letter != "A":
            entry["minus_a"] = found.scores.difference(letter, "A").to_dict()
            entry["logits"] = asdict(found.agreements[letter])
        models["base" if letter is None else letter] = entry
    texts = [
        {"prompt": g.prompt, "texts": {key or "base": text for key, text in g.texts.items()}}
        for g in found.generations
    ]
    counts = found.scores.counts
    return {
        "sequences": len(counts),
        "tokens": int(counts.sum()),
        "models": models,
        "texts": texts,
    }


def show(compared: Compared) -> None:
    """Print tables, and for each pair a sentence.

    Args:
        compared: adapters by their letters.
    """
    out.print(_adapters(compared))
    out.print(_pairs(compared))
    if compared.behaviour is not None:
        out.print(_losses(compared.behaviour, list(compared.adapters)))
        for each in compared.behaviour.generations:
            out.print(f"after {shown(repr(each.prompt))}:", soft_wrap=True)
            for letter, text in each.texts.items():
                out.print(f"  {letter or 'base'}: {shown(repr(text))}", soft_wrap=True)
    for letter, pair in compared.pairs.items():
        out.print(f"{letter} against A: {shown(pair.verdict)}", soft_wrap=True)
        for which, names in (("A", pair.only_a), (letter, pair.only_b)):
            if names:
                rest = len(names) - _NAMED
                more = f" and {rest} more (--json has all)" if rest > 0 else ""
                listed = ", ".join(map(shown, names[:_NAMED]))
                out.print(f"only in {which}: {listed}{more}", soft_wrap=True)


def _adapters(compared: Compared) -> Table:
    forms = list(compared.adapters["A"].losses)
    name = Column("adapter", overflow="fold")
    table = Table("", name, "form", "sites", "rank", "size", *(f"error in {f}" for f in forms))
    for letter, one in compared.adapters.items():
        losses = (f"{one.losses[form].error:.2%}" for form in forms)
        size = f"{one.bytes / 1e6:.2f} MB"
        table.add_row(letter, shown(one.name), one.form, str(one.sites), one.rank, size, *losses)
    return table


def _pairs(compared: Compared) -> Table:
    worst = Column("worst site", overflow="fold")
    table = Table("", "sites shared", "relative error", worst, "its error", "cosine", "overlap")
    for letter, pair in compared.pairs.items():
        table.add_row(
            f"{letter} – A",
            str(len(pair.shared)),
            f"{pair.error:.2e}",
            shown(pair.worst),
            f"{pair.sites[pair.worst].error:.2e}",
            "–" if pair.cosine is None else f"{pair.cosine:.6f}",
            "–" if pair.overlap is None else f"{pair.overlap:.4f}",
        )
    return table


def _losses(found: Behaviour, letters: Sequence[str]) -> Table:
    logits = ("max |Δlogit|", "KL, nats", "same first choice")
    table = Table("", "loss", "±", "minus A", "95% interval", *logits)
    for letter in (None, *letters):
        mean = found.scores.mean(letter)
        row = [letter or "base", f"{mean.value:.6f}"]
        row.append("–" if mean.error is None else f"{mean.error:.4f}")
        if letter != "A":
            apart, near = found.scores.difference(letter, "A"), found.agreements[letter]
            row += [f"{apart.value:+.3g}", interval(apart.low, apart.high)]
            row += [f"{near.largest:.3g}", f"{near.divergence:.3g}", f"{near.same:.2%}"]
        table.add_row(*row)
    return table


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
