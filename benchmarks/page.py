"""docs/benchmarks.md from the records of the other scripts.

python benchmarks/page.py bench-out/*.json --output docs/benchmarks.md
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from measure import LIMIT, Row, Side, number, wanted

from tether import fs

HEAD = """# Benchmarks

How long it takes to find the anchor of a weight, side by side with peft {peft}, and how far the
result is from the true one; and what a training step costs. `make bench` measures all of it anew
and writes this page; nothing on it is typed by hand.

- Machine: {processor}, {cores} cores, {system}.
- Versions: {versions}.
- Measured on {date}.

## How

Both sides run in one process and take turns. Times are medians: seconds of CPU at one thread, and
seconds on the wall at all threads, here {threads}. A ratio is their CPU time by ours, unless the
row says otherwise. peft's side is its own code, called as it calls it itself.

The large weights are made from SmolLM2-135M: the singular values of one of its weights, resampled
to the size, between random orthogonal factors. Their spectrum is flat at the cut, as real ones
are. Results are compared with singular triplets in float64, whose residual is checked. The
*product error* is |B·A − W_r| / |W_r| in the Frobenius norm; the *excess* is |W − B·A| / |W − W_r|
less 1; the *angle*, in radians, is the largest between the spaces of A and of W_r. For OLoRA, W_r
is W projected on its first r columns.

The *limit* is what the work cannot do without. For one weight: the matrix products with it that
our run made, alone. For a model: one SHA-256 over the bytes of the adapted weights. For a training
step: the frozen base's forward and backward pass.

A step's *activations* are what autograd keeps from the forward for the backward pass, beside
parameters and above the frozen base, counted storage by storage; *all* adds the adapter's factors
(anchors too), gradients and AdamW's state. Where a processor has no bfloat16 products, the base is
nearly all that a bfloat16 step takes; the rows "sites" time the adapters alone.
"""


BUSY = """
Other work ran on this machine meanwhile. It stretches times on the wall by as much as it pleases,
so they are left out of the table; seconds of CPU it stretches a little, on both sides.
"""


def page(records: Sequence[dict[str, Any]], busy: bool = False) -> str:
    """The text of the page.

    Args:
        records: what `measure.record` wrote, at least one.
        busy: whether the machine was not idle, so that times on the wall are no measure.

    Returns:
        Markdown.
    """
    rows = [Row.from_json(row) for record in records for row in record["rows"]]
    left_out = [reason for record in records for reason in record["left_out"]]
    parts = [
        _head(records) + (BUSY if busy else ""),
        f"## Times\n\n{_times(rows, ('cpu',) if busy else ('cpu', 'wall'))}",
        f"## Wanted and reached\n\n{_targets(rows)}",
        f"## Accuracy\n\n{_accuracy(rows)}",
        f"## What is timed\n\n{_how(rows)}",
    ]
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {reason}" for reason in left_out) + "\n")
    return "\n".join(parts)


def _head(records: Sequence[dict[str, Any]]) -> str:
    for name in ("machine", "versions"):
        values = [record[name] for record in records]
        if any(value != values[0] for value in values):
            raise ValueError(f"the records differ in their {name}: {values}. Measure them anew.")
    machine, versions = records[0]["machine"], records[0]["versions"]
    return HEAD.format(
        **machine,
        peft=versions.get("peft", ""),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        date=" and ".join(sorted({record["date"] for record in records})),
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def _times(rows: Iterable[Row], clocks: Sequence[str]) -> str:
    units = {"cpu": "CPU s", "wall": "wall s"}
    head = [f"{side}, {units[clock]}" for clock in clocks for side in ("ours", "theirs")]
    return table(
        ("work", *head, "limit, CPU s", "ratio"),
        (
            (
                row.name,
                *(
                    seconds(row.sides[side], clock)
                    for clock in clocks
                    for side in (row.ours, row.theirs)
                ),
                seconds(row.sides.get(LIMIT), "cpu"),
                f"{row.ratio():.3g}",
            )
            for row in rows
        ),
    )


def seconds(side: Side | None, clock: str) -> str:
    """A median with three digits, and no exponent."""
    if side is None:
        return ""
    value = side.median(clock)
    return (
        f"{value:.0f}" if value >= 100 else f"{float(f'{value:.3g}'):.6f}".rstrip("0").rstrip(".")
    )


def _targets(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row.verdict()]
    missed = [row for row in chosen if row.misses()]
    text = table(
        ("work", "wanted, aim", "ratio", "result"),
        ((row.name, wanted(row.target), f"{row.ratio():.3g}", row.verdict()) for row in chosen),
    )
    if not chosen:
        return "Nothing was wanted of these rows.\n"
    if not missed:
        return f"{text}\nAll {len(chosen)} were reached.\n"
    sentences = "".join(f"- {row.name}: {'; '.join(row.misses())}.\n" for row in missed)
    return f"{text}\nMissed: {len(missed)} of {len(chosen)}.\n\n{sentences}"


def _accuracy(rows: Iterable[Row]) -> str:
    lines = [
        (row.name, name, _errors(side), "; ".join(f"{k} {v}" for k, v in side.notes.items()))
        for row in rows
        for name, side in row.sides.items()
        if side.accuracy
    ]
    return table(("work", "side", "error", "notes"), lines)


def _errors(side: Side) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in side.accuracy.items())


def _how(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        clock = " The ratio is of times on the wall." if row.clock == "wall" else ""
        clock += " It is ours by theirs." if row.target and row.target.at_most else ""
        beside = "" if row.theirs == "peft" else f" Theirs: {row.theirs}."
        lines.append(f"- **{row.name}**: {row.how}.{beside}{clock}\n")
    return "".join(lines)


def main(
    records: Annotated[list[Path], typer.Argument(help="JSON files of the other scripts.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("docs/benchmarks.md"),
    busy: Annotated[bool, typer.Option("--busy", help="The machine was not idle.")] = False,
) -> None:
    """Write the page."""
    fs.write_text(output, page([json.loads(path.read_text("utf-8")) for path in records], busy))


if __name__ == "__main__":
    typer.run(main)
