"""How long `import tether` takes beside `import torch`, each in fresh processes, in turns.

    python benchmarks/import_time.py [--repeats 10] [--output FILE]

Timed is the import statement alone, inside the process: the start of Python itself is the same.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import measure
import typer
from measure import Row, Side, Target

MODULES = ("tether", "torch")
CODE = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print('{{"wall": %r, "cpu": %r}}' % (wall, cpu))
"""


def importing(module: str) -> dict[str, float]:
    """Seconds on the wall and of CPU for one import in a new process."""
    command = [sys.executable, "-c", CODE.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def row_of(modules: tuple[str, str], repeats: int) -> Row:
    """The first module beside the second.

    Args:
        modules: names.
        repeats: processes of each.

    Returns:
        the row.
    """
    sides = {f"import {module}": Side() for module in modules}
    for module in modules:
        importing(module)  # the files are then in memory, and compiled
    for _ in range(repeats):
        for module in modules:
            seconds, side = importing(module), sides[f"import {module}"]
            side.wall.append(seconds["wall"])
            side.cpu.append(seconds["cpu"])
            measure.say(f"  import {module} {seconds['wall']:.2f} s")
    ours, theirs = sides
    how = "the import statement, in fresh processes, files already read once"
    target = Target(at_most=1.5, clock="wall")
    return Row(ours, how, sides, ours=ours, theirs=theirs, target=target)


def main(
    repeats: Annotated[int, typer.Option(help="Processes of each.")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON of what was measured.")] = None,
) -> None:
    """Measure and print."""
    row = row_of(MODULES, repeats)
    if output is not None:
        measure.record([row], output)
    measure.show([row])


if __name__ == "__main__":
    typer.run(main)
