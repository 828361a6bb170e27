"""What all commands share: options, progress, errors in one line, JSON or tables."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tether.errors import TetherError
from tether.training.report import Reporter

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of tables.")
]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep anchors in the user's cache.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# Wide enough for the paths of sites where there is no terminal to fit into.
_WIDTH = None if sys.stdout.isatty() else 120
# No markup: names from files and paths are shown as they are.
out = Console(highlight=False, markup=False, emoji=False, width=_WIDTH)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def guarded(as_json: bool, debug: bool) -> Iterator[None]:
    """Show an error as one line that says what, where and what to do; exit code 2.

    Args:
        as_json: print it as a JSON object on standard output too.
        debug: let it through with its traceback.

    Yields:
        nothing.

    Raises:
        typer.Exit: with code 2, after an error was shown; 130 after Ctrl-C.
    """
    try:
        with _plain_warnings():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        err.print("interrupted")
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            raise
        name, message = type(error).__name__, " ".join(str(error).split())
        if not isinstance(error, TetherError):
            message = f"{message} (unexpected; --debug shows where)"
        show_error(name, message, as_json)
        raise typer.Exit(2) from error


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show a warning as one line, without the place in the code that it came from."""
    before = warnings.showwarning

    def show(message: Warning | str, *_: object) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


def show_error(name: str, message: str, as_json: bool) -> None:
    """Print an error as one line, and as a JSON object on standard output if asked.

    Args:
        name: its kind.
        message: what, where and what to do.
        as_json: whether to print the object too.
    """
    if as_json:
        print_json({"error": name, "message": message})
    print(f"error: {name}: {message}", file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object.

    Args:
        value: JSON values.
    """
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def shown(value: object) -> str:
    """As text on one line: what a file says must not steer the terminal.

    Args:
        value: from a file.

    Returns:
        its text, with escapes for what cannot be printed.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def use_all_cores() -> None:
    """Let torch use the cores this process may run on, where the user has not said otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )


class Bars(Reporter):
    """Progress bars on standard error, with rate and time to go."""

    def __init__(self, quiet: bool = False) -> None:
        """Choose where to draw.

        Args:
            quiet: draw nothing; neither is anything drawn where there is no terminal.
        """
        self._quiet = quiet or not sys.stderr.isatty()
        self._progress: Progress | None = None

    @contextmanager
    def task(self, title: str) -> Iterator[Any]:
        """Draw a bar for the length of the block; within another one, below it.

        Args:
            title: what is done.

        Yields:
            the bar.
        """
        if self._quiet:
            with super().task(title) as silent:
                yield silent
        elif self._progress is not None:
            yield from self._bar(self._progress, title)
        else:
            with _progress() as self._progress:
                try:
                    yield from self._bar(self._progress, title)
                finally:
                    self._progress = None

    def _bar(self, progress: Progress, title: str) -> Iterator["_Bar"]:
        outer = bool(progress.tasks)
        bar = _Bar(progress, progress.add_task(title, total=None, note=""))
        try:
            yield bar
        finally:
            if outer:
                progress.remove_task(bar.id)


class _Bar:
    """One bar."""

    def __init__(self, progress: Progress, task_id: Any) -> None:
        self._progress, self.id = progress, task_id

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self.id, completed=done, total=total)

    def note(self, text: str) -> None:
        self._progress.update(self.id, note=text)


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


def _progress() -> Progress:
    # The stream as it is now: it is redirected while libraries that draw their own bars run.
    console = Console(file=sys.stderr, highlight=False)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
