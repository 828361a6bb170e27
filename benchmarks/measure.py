"""Timing side by side: in turns, medians, accuracy beside them; how it is kept and printed.

Every row is measured twice: seconds of CPU at one thread, which other work on the machine hardly
changes, and seconds on the wall at all threads. In each turn every side does the work once, or
more often where it is short; the sides take turns, so that a slow minute hits all of them.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tether import fs
from tether.cli.console import use_all_cores

PACKAGES = ("tether", "torch", "peft", "transformers")
LIMIT = "limit"
# The note of a side whose result is worse than it says of itself.
BROKEN = "broken"
# Work that takes a hundredth of a second is done again, until this much is spent in one turn.
ENOUGH_SECONDS, MOST_CALLS = 0.3, 10


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do the work.

    Attributes:
        work: what is timed; it is given what `prepare` made.
        prepare: makes the input of one call, outside the time.
    """

    work: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(slots=True)
class Side:
    """What one way took, and what it gave.

    Attributes:
        cpu: seconds of CPU at one thread, of each call.
        wall: seconds on the wall at all threads, of each call.
        accuracy: of its result, by name.
        notes: what it says of its own result.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    accuracy: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def median(self, clock: str) -> float:
        """Seconds by one of the clocks, "cpu" or "wall"."""
        return statistics.median(getattr(self, clock))


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted of a row.

    Attributes:
        at_least: smallest ratio of their time to ours.
        at_most: largest ratio of our time to theirs: where ours can only be longer.
        aim: the ratio hoped for, or words where it is no ratio.
        clock: "cpu" or "wall".
        accuracy: the largest values that our result may have.
    """

    at_least: float | None = None
    at_most: float | None = None
    aim: float | str | None = None
    clock: str = "cpu"
    accuracy: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """One piece of work, by all sides.

    Attributes:
        name: of the work.
        how: what is timed on each side.
        sides: by name.
        ours: the name of our side.
        theirs: the name of the side it is compared with.
        target: what is wanted, if anything.
        limit: what the side named "limit" does, if there is one.
    """

    name: str
    how: str
    sides: dict[str, Side]
    ours: str = "tether"
    theirs: str = "peft"
    target: Target | None = None
    limit: str = ""

    @property
    def clock(self) -> str:
        """By which the sides are compared."""
        return self.target.clock if self.target else "cpu"

    def ratio(self) -> float:
        """Their time by ours; ours by theirs where the target is an "at most"."""
        ours, theirs = (self.sides[name].median(self.clock) for name in (self.ours, self.theirs))
        return ours / theirs if self.target and self.target.at_most else theirs / ours

    def misses(self) -> list[str]:
        """What was wanted and not reached, in words; empty if all was."""
        target, notes = self.target, self.sides[self.ours].notes
        found = [f"certificate {notes[BROKEN]}"] if BROKEN in notes else []
        if target is None:
            return found
        if target.at_least is not None and self.ratio() < target.at_least:
            found.append(f"{self.ratio():.3g} times as fast, at least {target.at_least:g} wanted")
        if target.at_most is not None and self.ratio() >= target.at_most:
            found.append(f"{self.ratio():.3g} times as long, under {target.at_most:g} wanted")
        accuracy = self.sides[self.ours].accuracy
        # Not accuracy > most: NaN is a miss too.
        found += [
            f"{name} {number(accuracy[name])}, at most {number(most, 0)} wanted"
            for name, most in target.accuracy.items()
            if not accuracy[name] <= most
        ]
        return found

    def verdict(self) -> str:
        """ "aim reached", "reached", "missed", or nothing where nothing was wanted."""
        if self.misses():
            return "missed"
        if self.target is None:
            return ""
        aim = self.target.aim
        return "aim reached" if isinstance(aim, int | float) and self.ratio() >= aim else "reached"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Row":
        """A row as `record` wrote it."""
        target = Target(**value["target"]) if value["target"] else None
        sides = {name: Side(**side) for name, side in value["sides"].items()}
        return cls(**value | {"sides": sides, "target": target})


def all_threads() -> int:
    """How many threads the wall is measured with; torch is left at that number."""
    torch.set_num_threads(_THREADS)
    use_all_cores()
    return torch.get_num_threads()


# As the environment has it, before any measurement changed it.
_THREADS = torch.get_num_threads()


def run(
    contenders: Mapping[str, Contender], repeats: int
) -> tuple[dict[str, Side], dict[str, Any]]:
    """Measure all in turns.

    Args:
        contenders: by name; each turn takes them in this order.
        repeats: how many turns at one thread, and again at all threads.

    Returns:
        the times, and the last result of each.
    """
    sides, results = {name: Side() for name in contenders}, {}
    gc.freeze()  # the libraries' own objects, which make each collection slow
    for clock, threads in (("cpu", 1), ("wall", all_threads())):
        torch.set_num_threads(threads)
        for turn in range(1, repeats + 1):
            for name, contender in contenders.items():
                seconds, results[name] = _one_turn(contender, clock)
                getattr(sides[name], clock).extend(seconds)
                where = f"{clock}, threads {threads}, turn {turn} of {repeats}"
                say(f"  {where}: {name} {min(seconds):.4g} s")
    gc.unfreeze()
    return sides, results


def _one_turn(contender: Contender, clock: str) -> tuple[list[float], Any]:
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: list[float] = []
    gc.collect()  # not in the time of the next side
    while not seconds or (sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_CALLS):
        result = None  # what the last call gave goes now, not when the next returns
        given = contender.prepare()
        began = now()
        result = contender.work(given)
        seconds.append(now() - began)
    return seconds, result


def say(text: str) -> None:
    """Tell on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the times depend on besides the code."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        processor = next(named, processor)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": f"{processor} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": cores,
        "threads": all_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def record(rows: Iterable[Row], path: Path, left_out: Iterable[str] = ()) -> None:
    """Write what was measured as JSON.

    Args:
        rows: all so far.
        path: of the file; its folder is made.
        left_out: sentences: what could not be measured here, and why.
    """
    value = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "left_out": list(left_out),
    }
    fs.make_directory(path.parent)
    fs.write_text(path, json.dumps(value, indent=2) + "\n")


def show(rows: Iterable[Row], console: Console | None = None) -> None:
    """Print all rows as one table, and the misses in words."""
    console = console or Console(width=180, highlight=False)
    table = Table("work", "side", "CPU s, 1 thread", "wall s", "ratio", "wanted, aim", "accuracy")
    chosen = list(rows)
    for row in chosen:
        first = (row.ours, row.theirs)
        for name in (*first, *(other for other in row.sides if other not in first)):
            ours, side = name == row.ours, row.sides[name]
            table.add_row(
                row.name if ours else "",
                name,
                f"{side.median('cpu'):.4g}",
                f"{side.median('wall'):.4g}",
                f"{row.ratio():.3g} {row.verdict()}" if ours else "",
                wanted(row.target) if ours else "",
                ", ".join(f"{key} {number(value)}" for key, value in side.accuracy.items()),
            )
    console.print(table)
    for row in chosen:
        for miss in row.misses():
            console.print(f"missed: {row.name}: {miss}")


def number(value: float, digits: int = 1) -> str:
    """An error with so many digits after the first, or a size such as 12.3."""
    return f"{value:.3g}" if 0.1 <= value < 1e4 else f"{value:.{digits}e}"


def wanted(target: Target | None) -> str:
    """A target in a few characters."""
    if target is None:
        return ""
    least = f"≥ {target.at_least:g}" if target.at_least is not None else f"< {target.at_most:g}"
    aim = f"{target.aim:g}" if isinstance(target.aim, int | float) else target.aim
    return f"{least}, aim {aim}" if aim else least
