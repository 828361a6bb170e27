"""Native files that hold the only copy of a live adapter: never replaced, checked when read."""

import os
from pathlib import Path

from tether.errors import DigestError, FormatError, NotAnAdapterError, WriteError
from tether.formats import container, native, native_read
from tether.value import Adapter


def digest_of(adapter: Adapter) -> str:
    """The digest that the native file of an adapter has.

    Args:
        adapter: anchored or plain.

    Returns:
        the hex digest; of equal adapters the same.
    """
    tensors = {
        f"{site}.{name}": tensor
        for site, layer in adapter.layers.items()
        for name, tensor in native.layer_tensors(layer).items()
    }
    for stem, value in native.wholes(adapter):
        tensors |= {f"{stem}:{n}": tensor for n, tensor in native.whole_tensors(value).items()}
    digests = {name: native.digest(tensor) for name, tensor in tensors.items()}
    return native.metadata(adapter, digests)["digest"]


def write(adapter: Adapter, path: Path) -> str:
    """Write a native file; one that holds this adapter already is left as it is.

    Args:
        adapter: anchored or plain.
        path: of the file.

    Returns:
        its digest.

    Raises:
        WriteError: it cannot be written, or something else is there.
        NonFiniteError: a factor holds NaN or Inf.
    """
    digest = digest_of(adapter)
    if not os.path.lexists(path):
        native.save(adapter, path)
        return digest
    try:
        there = _load(path)[1]
    except (FormatError, OSError):
        there = "unknown"
    if there != digest:
        raise WriteError(
            f"{path}: is there already and is not this adapter as it is now (its digest is "
            f"{there[:12]}, this adapter's {digest[:12]}); an offloaded adapter may need it. "
            "Give another path, or remove it."
        )
    return digest


def read(path: Path, digest: str, name: str) -> Adapter:
    """Read back what was written.

    Args:
        path: of the file.
        digest: that it had.
        name: of the live adapter, for the message.

    Returns:
        the adapter, bit for bit.

    Raises:
        DigestError: another adapter is there.
        FormatError: the file is missing or damaged.
    """
    who = f"adapter {name!r} was offloaded to {path}"
    advice = "then call handle.restore(); until then it stays offloaded."
    try:
        adapter, found = _load(path)
    except FormatError as error:
        raise type(error)(
            f"{who}, which cannot be read: {error} Put the file that was written there back, "
            f"{advice}"
        ) from error
    except OSError as error:
        raise NotAnAdapterError(
            f"{who}, which cannot be read: {error.strerror}. Check its permissions, {advice}"
        ) from error
    if found != digest:
        raise DigestError(
            f"{who}, where another adapter is now: its digest is {found[:12]}…, written was "
            f"{digest[:12]}…. Put that file back, {advice}"
        )
    return adapter


def _load(path: Path) -> tuple[Adapter, str]:
    """A native file, every byte checked, and its digest."""
    if not path.exists():
        raise NotAnAdapterError(f"{path}: no such file.")
    adapter = native_read.load(path)
    return adapter, container.read(path)[1]["digest"]
