"""The only file that writes. A write is whole or did not happen; until then the old stays."""

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tether.disk import default_mode as _default_mode
from tether.disk import exchange as _exchange
from tether.disk import named_errors as _named_errors
from tether.disk import real as _real
from tether.disk import sync as _sync
from tether.errors import WriteError


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, durable: bool = True, follow: bool = True
) -> Iterator[Path]:
    """Write a file aside and rename it into place.

    Args:
        path: of the file; its folder is made if missing.
        durable: flush it to the disk. Without, the file may be damaged after a power failure: for
            what is checked when read, and can be made again.
        follow: write to where a link of that name leads. Without, the link is replaced: for
            folders that others may write to, who could lead the write elsewhere.

    Yields:
        a temporary path in the same folder, to be written within the block.

    Raises:
        WriteError: the disk is full, or the folder cannot be written; `path` is as it was.
    """
    with _named_errors(Path(path)):
        target = _real(path) if follow else _real(Path(path).parent) / Path(path).name
        if target.is_dir() and not target.is_symlink():
            raise WriteError(f"{path}: is a folder; give the name of a file.")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        temporary = Path(name)
        try:
            os.close(handle)
            yield temporary
            temporary.chmod(_default_mode(0o666))
            if durable:
                _sync(temporary)
            temporary.replace(target)
            if durable:
                _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], files: Collection[str]) -> Iterator[Path]:
    """Build a folder aside and rename it into place, replacing an older one of the same kind.

    Args:
        path: of the folder.
        files: names that the folder may hold. An existing folder that holds anything else is not
            ours to replace.

    Yields:
        a temporary folder beside it, to be filled within the block.

    Raises:
        WriteError: the disk is full, the place cannot be written, or `path` holds other files;
            `path` is as it was.
    """
    with _named_errors(Path(path)):
        target = _real(path)
        check_replaceable(target, files)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(_default_mode(0o666))
                _sync(file)
            temporary.chmod(_default_mode(0o777))
            _sync(temporary)
            _swap(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file in one rename.

    Args:
        path: of the file.
        text: its content, written as UTF-8.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def new_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a new file for writing piece by piece, to be renamed into place by an atomic block.

    Args:
        path: of a file that is not there yet, or of the temporary one of an atomic block.

    Returns:
        the file; the caller closes it.
    """
    return open(path, "wb")


def copy_file(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a file's bytes, links followed, within an atomic block.

    Args:
        source: the file; only read.
        path: of the copy.
    """
    shutil.copyfile(source, path)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a log.

    Args:
        path: of the log; made if missing.
        line: without its end.

    Raises:
        WriteError: the log cannot be written.
    """
    with _named_errors(Path(path)), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, where there is one.

    Args:
        path: of the file.

    Raises:
        WriteError: it cannot be removed.
    """
    with _named_errors(Path(path)):
        Path(path).unlink(missing_ok=True)


def remove_empty(path: str | os.PathLike[str]) -> bool:
    """Remove a folder if nothing is in it.

    Args:
        path: of the folder.

    Returns:
        True if it was removed.
    """
    try:
        Path(path).rmdir()
    except OSError:
        return False
    return True


def touch(path: str | os.PathLike[str]) -> None:
    """Set a file's time of change to now; a link is not followed.

    Args:
        path: of a file that is there.

    Raises:
        WriteError: it cannot be set.
    """
    with _named_errors(Path(path)):
        os.utime(path, follow_symlinks=False)


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a folder and its parents.

    Args:
        path: of the folder.

    Raises:
        WriteError: it cannot be made.
    """
    with _named_errors(Path(path)):
        Path(path).mkdir(parents=True, exist_ok=True)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a folder for the files written within the block.

    Args:
        path: of the folder; one that is there is kept, whatever happens.

    Yields:
        nothing; if the block fails, a folder that was made for it is removed again.
    """
    there = Path(path).exists()
    make_directory(path)
    try:
        yield
    except BaseException:
        if not there:
            shutil.rmtree(path, ignore_errors=True)
        raise


def publish_directory(built: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Flush a folder that was built under another name, with all in it, and rename it into place.

    Args:
        built: the folder, on the same disk; gone afterwards.
        path: its name from now on. A folder that is there is replaced in one step and removed.

    Raises:
        WriteError: it cannot be written; `path` is as it was.
    """
    with _named_errors(Path(path)):
        source, target = Path(built), _real(path)
        for inside in (*source.rglob("*"), source):
            _sync(inside)
        _swap(source, target)
        _sync(target.parent)
        shutil.rmtree(source, ignore_errors=True)


def discard_directory(path: str | os.PathLike[str], aside: str | os.PathLike[str]) -> None:
    """Remove a folder and all in it. Under its own name it is whole until it is gone.

    Args:
        path: of the folder; nothing happens where there is none.
        aside: the name that it has while it is being removed, on the same disk.

    Raises:
        WriteError: it cannot be removed.
    """
    with _named_errors(Path(path)):
        if not Path(path).is_dir():
            return
        Path(aside).parent.mkdir(parents=True, exist_ok=True)
        if Path(path) != Path(aside):
            shutil.rmtree(aside, ignore_errors=True)
            Path(path).rename(aside)
        shutil.rmtree(aside)


def check_replaceable(target: Path, files: Collection[str]) -> None:
    """Raise unless a folder may be replaced: it is missing, or holds nothing but `files`.

    Args:
        target: the folder.
        files: names that are ours.

    Raises:
        WriteError: naming what would be lost.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise WriteError(f"{target}: is a file; give the name of a folder.")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise WriteError(f"{target}: is the current folder, or holds it; give another folder.")
    others = sorted(i.name for i in target.iterdir() if i.name not in files or i.is_dir())
    if others:
        raise WriteError(
            f"{target}: holds {others[0]!r}"
            + (f" and {len(others) - 1} more files" if len(others) > 1 else "")
            + " that are not part of an adapter; replacing the folder would lose them. "
            "Choose another folder."
        )


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; whatever was there ends up under the name `new`."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # No atomic exchange on this system. Between the two renames the target is missing, but
        # both folders are whole.
        old = new.with_name(new.name + ".old")
        try:
            target.rename(old)
            new.rename(target)
        finally:
            if not target.exists() and old.exists():
                old.rename(target)
            elif old.exists():
                shutil.rmtree(old, ignore_errors=True)
