"""Finding and storing anchors."""

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tether import fs
from tether.cache.entry import Entry, check_key, read, storable, write
from tether.cache.key import Key, file_name, parse_file_name
from tether.errors import ConfigError, TetherError, WriteError
from tether.methods import Method, Nested

_WARNED: set[Path] = set()  # folders that this process has warned about


def cache_folder() -> Path:
    """Where everything is kept that can be made again: $TETHER_CACHE, or the user's cache folder.

    Returns:
        $TETHER_CACHE, $XDG_CACHE_HOME/tether or ~/.cache/tether; it need not exist.

    Raises:
        ConfigError: none of them is known.
    """
    if os.environ.get("TETHER_CACHE"):
        return Path(os.environ["TETHER_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tether"
    except RuntimeError as error:
        raise ConfigError(
            "no cache folder: this user has no home folder. Set TETHER_CACHE to a folder."
        ) from error


def folder() -> Path:
    """Where anchors are kept.

    Returns:
        the folder; it need not exist.

    Raises:
        ConfigError: no place is known, see `cache_folder`.
    """
    return cache_folder() / "anchors"


def enabled() -> bool:
    """Whether anchors are to be cached.

    Returns:
        False if TETHER_NO_CACHE is set to anything but "" or "0", or no folder is known.
    """
    if os.environ.get("TETHER_NO_CACHE", "") not in ("", "0"):
        return False
    try:
        cache_folder()
    except ConfigError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class AnchorCache:
    """Anchors in a folder, for any number of processes at once.

    Attributes:
        folder: usually `folder()`; it need not exist.
    """

    folder: Path

    def find(self, key: Key, rank: int, scaling: float, method: Method) -> Entry | None:
        """Look a start up; bad entries are as good as missing.

        An entry of this rank and scaling is given back bit for bit. Else, where the method is
        `Nested`, the entry of the smallest rank that is large enough is cut down.

        Args:
            key: of the weight and the method.
            rank: wanted.
            scaling: wanted.
            method: of the key.

        Returns:
            the entry, or None. A start cut to a smaller rank has no certificate.
        """
        entry = _read(self._path(key, rank, scaling))
        if entry is not None or not isinstance(method, Nested):
            return entry
        for larger, was in self._candidates(key, rank, scaling):
            entry = _read(self._path(key, larger, was))
            if entry is None:
                continue
            factors = method.cut(entry.factors, rank, was, scaling)
            # What was said of the larger product and its place in the spectrum is not said of this.
            certificate = entry.certificate if larger == rank else None
            part = replace(entry, factors=factors, scaling=scaling, certificate=certificate)
            # Scalings very far apart overflow.
            if storable(part):
                return part
        return None

    def store(self, key: Key, entry: Entry) -> bool:
        """Keep a start; in one rename, whoever else writes. Not being able to is no error.

        Args:
            key: of the weight and the method.
            entry: the start.

        Returns:
            True if it is kept. False if it cannot be written, of which the user is warned once, or
            if it is not in finite float32.

        Raises:
            ShapeMismatchError: the entry is of another weight than the key.
        """
        check_key(key, entry)
        if not storable(entry):
            return False
        path = self._path(key, entry.factors.rank, entry.scaling)
        try:
            try:
                _write(path, key, entry)
            except WriteError as error:
                # Its folder was empty, and removed by another process before the file was in it.
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                _write(path, key, entry)
        except WriteError as error:
            self._warn(error)
            return False
        return True

    def _path(self, key: Key, rank: int, scaling: float) -> Path:
        return self.folder / key.name[:2] / key.name / file_name(rank, scaling)

    def _candidates(self, key: Key, rank: int, scaling: float) -> list[tuple[int, float]]:
        """(rank, scaling) of entries that may be cut down to what is wanted, the best first."""
        try:
            paths = list((self.folder / key.name[:2] / key.name).iterdir())
        except OSError:
            return []
        found = filter(None, (parse_file_name(path.name) for path in paths))
        large = [item for item in found if item[0] >= rank and item != (rank, scaling)]
        return sorted(large, key=lambda item: (item[0], item[1] != scaling, item[1]))

    def _warn(self, error: WriteError) -> None:
        if self.folder not in _WARNED:
            _WARNED.add(self.folder)
            warnings.warn(
                f"anchors are not kept in {self.folder}: {error} "
                "TETHER_NO_CACHE=1 switches the cache off, TETHER_CACHE moves it.",
                stacklevel=3,
            )


def _read(path: Path) -> Entry | None:
    try:
        entry = read(path)
    except (OSError, TetherError):
        return None
    # The time of last use. It may be another user's file.
    with suppress(WriteError):
        fs.touch(path)
    return entry


def _write(path: Path, key: Key, entry: Entry) -> None:
    # A damaged file is found out when it is read, so nothing waits for the disk; and a link that
    # another user of a shared folder put there is replaced, not written through.
    with fs.atomic_file(path, durable=False, follow=False) as temporary:
        write(temporary, key, entry)
