"""Looking after the cache: how much there is, whether it is sound, and making it smaller."""

import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tether import fs
from tether.cache.entry import read
from tether.cache.key import is_key_folder, is_temporary, parse_file_name
from tether.errors import ConfigError, TetherError, WriteError
from tether.value import Progress

_OUTER = re.compile(r"[0-9a-f]{2}")
_STALE = 3600.0  # seconds after which a temporary file is no longer being written


@dataclass(frozen=True, slots=True)
class Info:
    """What is in a cache.

    Attributes:
        entries: number of files.
        bytes: their size.
        oldest: when the one that was not used for longest was, in seconds since 1970; or None.
        newest: when any was last used, likewise.
    """

    entries: int
    bytes: int
    oldest: float | None
    newest: float | None


@dataclass(frozen=True, slots=True)
class Bad:
    """An entry that is not as it was written.

    Attributes:
        path: of the file.
        reason: what is wrong.
        removed: whether it was removed.
    """

    path: Path
    reason: str
    removed: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """What checking a cache found.

    Attributes:
        checked: number of entries read.
        bad: those that are damaged.
    """

    checked: int
    bad: tuple[Bad, ...]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What pruning a cache did.

    Attributes:
        removed: number of entries removed.
        freed: size of what was removed, in bytes, temporary files included.
        entries: number of those left.
        bytes: their size.
        failed: why files that should have been removed were not.
    """

    removed: int
    freed: int
    entries: int
    bytes: int
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _File:
    """A file in a key's folder with a name that we give."""

    path: Path
    status: os.stat_result

    @property
    def ordinary(self) -> bool:
        return stat.S_ISREG(self.status.st_mode)


def info(folder: Path) -> Info:
    """Count what is there, without reading it.

    Args:
        folder: of the cache; it may be missing.

    Returns:
        Info.

    Raises:
        ConfigError: the folder cannot be read.
    """
    entries = _entries(folder)
    used = [entry.status.st_mtime for entry in entries]
    size = sum(entry.status.st_size for entry in entries)
    return Info(len(entries), size, min(used, default=None), max(used, default=None))


def verify(folder: Path, remove: bool = False, progress: Progress | None = None) -> Verified:
    """Read and check every entry.

    Args:
        folder: of the cache; it may be missing.
        remove: the bad ones; a folder or other thing in place of a file stays.
        progress: called with (entries done, entries in all).

    Returns:
        Verified.

    Raises:
        ConfigError: the folder cannot be read.
    """
    files = [f for f in _files(folder) if parse_file_name(f.path.name) is not None]
    bad: list[Bad] = []
    gone = 0
    for done, file in enumerate(files, start=1):
        try:
            read(file.path)
        except (OSError, TetherError) as error:
            if not os.path.lexists(file.path):
                gone += 1  # another process pruned it
            else:
                removed = remove and file.ordinary and _remove(file.path) is None
                bad.append(Bad(file.path, str(error), removed))
        if progress is not None:
            progress(done, len(files))
    return Verified(len(files) - gone, tuple(bad))


def prune(folder: Path, max_size: int, progress: Progress | None = None) -> Pruned:
    """Remove entries, the least recently used first, until the rest is small enough.

    Temporary files of writes that broke off and empty folders go too. Nothing is removed whose
    name and place are not those of an entry.

    Args:
        folder: of the cache; it may be missing.
        max_size: that the entries may have together, in bytes.
        progress: called with (files done, files in all).

    Returns:
        Pruned.

    Raises:
        ConfigError: the folder cannot be read.
    """
    entries = sorted(_entries(folder), key=lambda f: (f.status.st_mtime_ns, f.path))
    size = sum(entry.status.st_size for entry in entries)
    excess, old = size - max_size, 0
    while old < len(entries) and excess > 0:
        excess -= entries[old].status.st_size
        old += 1
    stale = _stale(folder)
    removed: list[_File] = []
    failed: list[str] = []
    for done, file in enumerate([*stale, *entries[:old]], start=1):
        reason = _remove(file.path)
        if reason is None:
            removed.append(file)
        else:
            failed.append(reason)
        if progress is not None:
            progress(done, len(stale) + old)
    _remove_empty_folders(folder)
    gone = [file.status.st_size for file in removed if not is_temporary(file.path.name)]
    freed = sum(file.status.st_size for file in removed)
    return Pruned(len(gone), freed, len(entries) - len(gone), size - sum(gone), tuple(failed))


def _entries(folder: Path) -> list[_File]:
    return [f for f in _files(folder) if f.ordinary and parse_file_name(f.path.name) is not None]


def _stale(folder: Path) -> list[_File]:
    limit = time.time() - _STALE
    return [
        f
        for f in _files(folder)
        if f.ordinary and is_temporary(f.path.name) and f.status.st_mtime < limit
    ]


def _files(folder: Path) -> Iterator[_File]:
    """Everything in the folders of keys, in a fixed order."""
    for place in _key_folders(folder):
        for path in _children(place):
            try:
                yield _File(path, path.lstat())
            except OSError:
                continue  # removed meanwhile


def _key_folders(folder: Path) -> Iterator[Path]:
    """The folders of keys. Links are not followed: they may lead out of the cache."""
    for above in _outer_folders(folder):
        for place in _children(above):
            if is_key_folder(place) and not place.is_symlink():
                yield place


def _outer_folders(folder: Path) -> list[Path]:
    found = _children(folder, required=True)
    return [path for path in found if _OUTER.fullmatch(path.name) and not path.is_symlink()]


def _children(folder: Path, required: bool = False) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        if not required:
            return []
        raise ConfigError(
            f"{folder}: the cache cannot be read: {error.strerror}. Check its permissions, or set "
            "TETHER_CACHE to another folder."
        ) from error


def _remove(path: Path) -> str | None:
    """Remove a file; why it could not be."""
    try:
        fs.remove(path)
    except WriteError as error:
        return str(error)
    return None


def _remove_empty_folders(folder: Path) -> None:
    for place in [*_key_folders(folder), *_outer_folders(folder)]:
        fs.remove_empty(place)
