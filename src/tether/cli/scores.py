"""Scores of a base and its adapters as JSON values, and these as tables."""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from rich.table import Column, Table

from tether.cli.console import out
from tether.statistics import LEVEL, RESAMPLES, Scores
from tether.training.evaluate import Evaluation
from tether.training.labels import Labelled

BASE = "base"
_FEW = 20  # units; below, a percentile interval holds the truth clearly less often than it says


def facts(
    names: Mapping[str, str], losses: Scores, correct: Scores | None = None
) -> dict[str, Any]:
    """Means of the base and each adapter, and the difference of every two.

    Args:
        names: what an adapter is called -> its key in the scores; the base's is None.
        losses: nats, and tokens.
        correct: 1 for a right answer, 0 for a wrong one; None where there are no labels.

    Returns:
        JSON values.
    """

    def mean(key: str | None) -> dict[str, Any]:
        loss = losses.mean(key)
        found = {
            "loss": loss.value,
            "loss_error": loss.error,
            "perplexity": Evaluation(loss.value, 1).perplexity,
            "tokens": int(losses.counts.sum()),
        }
        if correct is not None:
            accuracy = correct.mean(key)
            found |= {"accuracy": accuracy.value, "accuracy_error": accuracy.error}
        return found

    keys: list[tuple[str | None, str | None]] = [(None, None), *names.items()]
    differences = []
    for (other, subtrahend), (name, minuend) in combinations(keys, 2):
        found: dict[str, Any] = {"adapter": name, "minus": other}
        found["loss"] = losses.difference(minuend, subtrahend).to_dict()
        if correct is not None:
            found["accuracy"] = correct.difference(minuend, subtrahend).to_dict()
        differences.append(found)
    return {
        BASE: mean(None),
        "adapters": {name: mean(key) for name, key in names.items()},
        "differences": differences,
    }


def coverage(used: int, total: int, rows: Labelled | None = None) -> dict[str, Any]:
    """What the means were taken over.

    Args:
        used: sequences or rows.
        total: that there are.
        rows: those that were used, of a labelled file.

    Returns:
        JSON values.
    """
    found: dict[str, Any] = {"unit": "sequences", "used": used, "total": total}
    if rows is not None:
        label, share = rows.majority()
        found |= {"unit": "rows", "labels": list(rows.labels)}
        found["majority"] = {"label": label, "accuracy": share}
    return found


def show(found: Mapping[str, Any]) -> None:
    """Print tables of means and differences, and what they were taken over.

    Args:
        found: `facts` and `coverage` together.
    """
    labelled = "labels" in found
    table = Table(
        Column("", overflow="fold"), "loss of the label" if labelled else "held-out loss", "±"
    )
    for title in ("perplexity", "tokens", *(("accuracy", "±") if labelled else ())):
        table.add_column(title)
    for name, mean in {BASE: found[BASE], **found["adapters"]}.items():
        cells = [f"{mean['loss']:.6f}", _error(mean["loss_error"]), f"{mean['perplexity']:.3f}"]
        cells.append(str(mean["tokens"]))
        if labelled:
            cells += [f"{mean['accuracy']:.4f}", _error(mean["accuracy_error"], 4)]
        table.add_row(_shown(name), *cells)
    out.print(table)
    if found["differences"]:
        _show_differences(found, "loss", 6)
        if labelled:
            _show_differences(found, "accuracy", 4)
    _show_coverage(found)


def _show_differences(found: Mapping[str, Any], kind: str, digits: int) -> None:
    table = Table(
        Column("difference", overflow="fold"), kind, "±", f"{LEVEL:.0%} interval", "verdict"
    )
    for pair in found["differences"]:
        difference = pair[kind]
        title = f"{_shown(pair['adapter'])} − {_shown(pair['minus'] or BASE)}"
        interval = difference["interval"]
        ends = "–" if interval is None else " to ".join(f"{end:+.{digits}f}" for end in interval)
        table.add_row(
            title,
            f"{difference['value']:+.{digits}f}",
            _error(difference["error"], digits),
            ends,
            _verdict(difference, digits),
        )
    out.print(table)


def _verdict(difference: Mapping[str, Any], digits: int) -> str:
    if difference["interval"] is None:
        return "unknown"
    if not any(float(f"{end:.{digits}f}") for end in difference["interval"]):
        return "equal in the digits shown"  # however sure it is
    if difference["within_noise"]:
        return "within noise: 0 is in the interval"
    return "lower" if difference["value"] < 0 else "higher"


def _show_coverage(found: Mapping[str, Any]) -> None:
    used, unit = found["used"], found["unit"]
    out.print(f"{used} of {found['total']} {unit}; ± is the standard error over {unit}")
    if found["differences"] and used > 1:
        out.print(f"intervals: paired bootstrap over {unit}, {RESAMPLES} resamples")
    more = "raise --limit" if used < found["total"] else "give more data"
    if used == 1:
        out.print(f"one alone of the {unit} has no error: {more}")
    elif used < _FEW and found["differences"]:
        out.print(f"fewer than {_FEW} {unit}: the intervals are too narrow; {more}")
    if "majority" in found:
        label, share = _shown(found["majority"]["label"]), found["majority"]["accuracy"]
        out.print(
            f"{len(found['labels'])} labels; always answering {label!r} is right in {share:.4f}"
        )


def _error(error: float | None, digits: int = 6) -> str:
    return "–" if error is None else f"{error:.{digits}f}"


def _shown(text: str) -> str:
    """On one line: what a path or a file says must not steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
