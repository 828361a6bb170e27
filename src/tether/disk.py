"""What the operating system does for a write: flush, exchange names, and its errors by name."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.errors import WriteError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def named_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the file and what to do.

    Args:
        target: what is written, for the message.

    Yields:
        nothing.

    Raises:
        WriteError: in place of theirs.
    """
    try:
        yield
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise WriteError(f"{str(target)!r}: cannot be written: it has a null byte.") from error
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space, or write elsewhere.",
            errno.EDQUOT: "Free some of your quota, or write elsewhere.",
            errno.EFBIG: "Files of this size are not allowed here; write elsewhere.",
        }.get(error.errno or 0, "Check the path and its permissions.")
        reason = error.strerror or str(error)
        raise WriteError(f"{target}: cannot be written: {reason}. {advice}") from error
    except Exception as error:
        # safetensors reports the operating system's errors as its own.
        if type(error).__name__ == "SafetensorError":
            raise WriteError(
                f"{target}: cannot be written: {error}. Free some space, or write elsewhere."
            ) from error
        raise


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk.

    Args:
        path: of it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some systems cannot sync a folder; the rename itself is still atomic there.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux).

    Args:
        one: a file or folder.
        other: another, on the same disk.

    Returns:
        False where the system cannot; then nothing has changed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    first, second = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0)


def real(path: str | os.PathLike[str]) -> Path:
    """The place itself, so that a link to it stays a link.

    Args:
        path: with or without links.

    Returns:
        where it leads.
    """
    return Path(os.path.realpath(path))


def default_mode(mode: int) -> int:
    """The permissions a file made in the ordinary way would have: mkstemp makes private ones.

    Args:
        mode: before the user's mask.

    Returns:
        after it.
    """
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask
