"""Telling a person how far a run is; what shows it is the caller's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work in progress."""

    def __call__(self, done: int, total: int) -> None:
        """Report progress.

        Args:
            done: units done.
            total: units in all.
        """

    def note(self, text: str) -> None:
        """Show a short text beside the bar.

        Args:
            text: such as "loss 2.71".
        """


class Reporter:
    """Shows nothing; the command line's subclass draws bars."""

    @contextmanager
    def task(self, title: str) -> Iterator[Task]:
        """Announce a piece of work for the length of the block.

        Args:
            title: what is done.

        Yields:
            the task, to be called with progress.
        """
        del title
        yield _Silent()


class _Silent:
    def __call__(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
