"""One entry of the cache: a file, written and read strictly.

It holds float32 tensors `A` (rank, in) and `B` (out, rank), and the metadata
1. `format` = "tether-anchor";
2. `entry`: JSON with the key's text, the scaling, the digests and the norm of the base tensor that
   the key does not hold, the certificate or null, and the sha256 of both tensors;
3. `digest`: sha256 of `entry`, followed by a zero byte.
Rank and scaling are the file name's, the key's name is the folder's. What breaks any of these is
refused.
"""

import dataclasses
import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tether.cache.key import MAX_TEXT, Key, check_sha256, parse_file_name, table
from tether.errors import DigestError, HeaderError, NotAnAdapterError, ShapeMismatchError
from tether.formats import container
from tether.formats.native import digest, digest_texts
from tether.linalg import Certificate, check_finite
from tether.provenance import Fingerprint
from tether.value import Factors, Json

FORMAT = "tether-anchor"
_FIELDS: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "scaling": (float,),
    "fingerprint": (dict,),
    "certificate": (dict, type(None)),
    "digests": (dict,),
}
_FINGERPRINT: dict[str, tuple[type, ...]] = {
    "sha256_bfloat16": (str,),
    "sha256_float16": (str,),
    "norm": (float,),
}
_CERTIFICATE: dict[str, tuple[type, ...]] = {
    "route": (str,),
    "product_error": (float, type(None)),
    "excess": (float, type(None)),
    "unique": (bool,),
    "fallback": (str,),
}


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A start that was found before.

    Attributes:
        factors: float32, on the CPU.
        scaling: that they were made with.
        fingerprint: of the base tensor, all of it: a hit needs no second hashing.
        certificate: of the decomposition that gave these factors, if known. One of its numbers
            that is not finite is kept as NaN.
    """

    factors: Factors
    scaling: float
    fingerprint: Fingerprint
    certificate: Certificate | None = None


def storable(entry: Entry) -> bool:
    """Whether a file can hold an entry.

    Args:
        entry: any.

    Returns:
        False if its factors are not finite float32, or the norm of its base is beyond float64.
    """
    factors = (entry.factors.A, entry.factors.B)
    return (
        all(f.dtype == torch.float32 and bool(f.isfinite().all()) for f in factors)
        and math.isfinite(entry.fingerprint.norm)
        and math.isfinite(entry.scaling)
        and entry.scaling > 0
    )


def check_key(key: Key, entry: Entry) -> None:
    """Raise unless an entry is one of a key.

    Args:
        key: what it is to be found by.
        entry: what was found.

    Raises:
        ShapeMismatchError: its factors or its fingerprint are another tensor's.
    """
    layout, values, origin = key.layout, key.values, entry.fingerprint
    here = (layout.out_features, layout.in_features)
    if entry.factors.shape != here or entry.factors.rank > min(here):
        raise ShapeMismatchError(
            f"factors of rank {entry.factors.rank} for {entry.factors.shape} are none of the key's "
            f"weight, a matrix {here}."
        )
    found = (origin.sha256, list(origin.shape), origin.dtype)
    if found != (values["sha256"], values["shape"], values["dtype"]):
        raise ShapeMismatchError(
            f"the fingerprint {origin.dtype} {origin.shape} sha256 {origin.sha256[:12]}… is not of "
            f"the key's weight {values['dtype']} {values['shape']} {values['sha256'][:12]}…."
        )


def write(path: Path, key: Key, entry: Entry) -> None:
    """Write an entry.

    Args:
        path: a temporary one.
        key: of the entry.
        entry: storable.
    """
    # Copies: a file holds every tensor by itself, also where two share memory.
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in (("A", entry.factors.A), ("B", entry.factors.B))
    }
    text = json.dumps(
        {
            "key": key.text,
            "scaling": float(entry.scaling),
            "fingerprint": {name: getattr(entry.fingerprint, name) for name in _FINGERPRINT},
            "certificate": _certificate_values(entry.certificate),
            "digests": {name: digest(tensor) for name, tensor in tensors.items()},
        },
        allow_nan=False,
    )
    metadata = {"format": FORMAT, "entry": text, "digest": digest_texts(text)}
    save_file(tensors, path, metadata)


def read(path: Path) -> Entry:
    """Read an entry and check all of it.

    Args:
        path: of the file, in its place in the cache, which tells the key that it must be of.

    Returns:
        the entry, in memory of its own.

    Raises:
        FormatError: and its kinds: it is damaged, of another key, or another kind of file.
        NonFiniteError: a factor holds NaN or Inf.
        OSError: it cannot be read.
    """
    # A link is not followed: it may lead out of the cache, and what is there is no entry of ours.
    if not stat.S_ISREG(path.lstat().st_mode):
        raise NotAnAdapterError(f"{path}: is a folder, a link or a device, not an entry.")
    name = parse_file_name(path.name)
    if name is None:
        raise NotAnAdapterError(f"{path}: is not the name of an entry.")
    try:
        fields, found, tensors = _open(path, *name)
    except RuntimeError as error:
        # Torch cannot map it: another process removed it, since it was looked at, or memory is out.
        raise HeaderError(f"{path}: cannot be opened: {error}") from error
    for letter, tensor in tensors.items():
        if digest(tensor) != fields["digests"][letter]:
            raise DigestError(f"{path}: tensor {letter!r}: not the bytes that were written.")
        check_finite(tensor, f"{path}: {letter}")
    factors = Factors(tensors["A"], tensors["B"])
    origin = _fingerprint(path, found.values, fields["fingerprint"])
    return Entry(factors, name[1], origin, _certificate(path, fields["certificate"]))


def _open(path: Path, rank: int, scaling: float) -> tuple[dict[str, Any], Key, dict[str, Tensor]]:
    """The metadata, the key and the tensors of an entry that is where it belongs."""
    with container.opened(path) as file:
        fields = _header(path, file.metadata() or {})
        found = Key.parse(fields["key"], f"{path}: key")
        if found.name != path.parent.name:
            raise HeaderError(f"{path}: is of another key than its place says.")
        if fields["scaling"] != scaling:
            raise HeaderError(f"{path}: its scaling is {fields['scaling']}, not {scaling}.")
        return fields, found, _tensors(path, file, found, rank)


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if set(metadata) != {"format", "entry", "digest"} or metadata["format"] != FORMAT:
        raise HeaderError(f"{path}: not an entry of an anchor cache.")
    if digest_texts(metadata["entry"]) != metadata["digest"]:
        raise DigestError(f"{path}: its metadata is not what was written.")
    where = f"{path}: metadata 'entry'"
    fields = table(container.parse_json(metadata["entry"], where, MAX_TEXT), _FIELDS, where)
    table(fields["digests"], {"A": (str,), "B": (str,)}, f"{path}: digests")
    return fields


def _tensors(path: Path, file: Any, key: Key, rank: int) -> dict[str, Tensor]:
    """A and B, of the key's shape: checked before anything of that size is read."""
    layout = key.layout
    wanted = {"A": [rank, layout.in_features], "B": [layout.out_features, rank]}
    if set(file.keys()) != set(wanted) or rank > min(layout.out_features, layout.in_features):
        raise HeaderError(f"{path}: rank {rank} or its tensors' names do not fit {layout}.")
    for name, shape in wanted.items():
        part = file.get_slice(name)
        if part.get_dtype() != "F32" or list(part.get_shape()) != shape:
            raise HeaderError(
                f"{path}: {name} is {part.get_dtype()} {part.get_shape()}, not F32 {shape}."
            )
    # Copied before they are checked: the file they are mapped from may change.
    return {name: file.get_tensor(name).clone() for name in wanted}


def _fingerprint(path: Path, values: dict[str, Any], read: Json) -> Fingerprint:
    where = f"{path}: fingerprint"
    fields = table(read, _FINGERPRINT, where)
    rounded = {n: check_sha256(fields[n], where) for n in _FINGERPRINT if n != "norm"}
    own = rounded.get(f"sha256_{values['dtype']}", values["sha256"])
    if own != values["sha256"] or fields["norm"] < 0:
        raise HeaderError(f"{where}: contradicts the key, or itself.")
    return Fingerprint(
        shape=tuple(values["shape"]),
        dtype=values["dtype"],
        sha256=values["sha256"],
        norm=fields["norm"],
        **rounded,
    )


def _certificate_values(certificate: Certificate | None) -> Json:
    if certificate is None:
        return None
    values = dataclasses.asdict(certificate)
    for name in ("product_error", "excess"):
        # JSON has no NaN and no Inf.
        values[name] = float(values[name]) if math.isfinite(values[name]) else None
    return values


def _certificate(path: Path, read: Json) -> Certificate | None:
    if read is None:
        return None
    fields = table(read, _CERTIFICATE, f"{path}: certificate")
    for name in ("route", "fallback"):
        # It is shown to people.
        if not fields[name].isprintable():
            raise HeaderError(f"{path}: certificate: {name!r} is no plain text.")
    for name in ("product_error", "excess"):
        fields[name] = math.nan if fields[name] is None else fields[name]
    return Certificate(**fields)
