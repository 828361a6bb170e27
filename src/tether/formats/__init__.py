"""Files: an adapter <-> bytes. Nothing in a file is imported, compiled or opened as a path."""

import os
from pathlib import Path

from tether.errors import NotAnAdapterError
from tether.formats import native, native_read, peft_read
from tether.value import Adapter

__all__ = ["load", "save"]


def save(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter to one native file, exactly. See `tether.formats.native`.

    Args:
        adapter: anchored or plain.
        path: of the file, by custom "….safetensors"; replaced in one rename.

    Raises:
        WriteError: it cannot be written; what was there stays.
        NonFiniteError: a factor holds NaN or Inf.
    """
    native.save(adapter, path)


def load(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: a native file, or a folder that peft or `save_as_lora` wrote.

    Args:
        path: of a native file or a PEFT folder. Only read.

    Returns:
        the adapter, float32, on the CPU. A native file gives back what was saved, bit for bit.

    Raises:
        FormatError: and its kinds, naming the file, what is wrong and what to do.
    """
    source = Path(path)
    if source.is_dir():
        return peft_read.load(source)
    if not source.exists():
        raise NotAnAdapterError(f"{source}: no such file or folder.")
    return native_read.load(source)
