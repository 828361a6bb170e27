"""What an anchor depends on, as a name; and the names of files."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.errors import ConfigError, HeaderError
from tether.formats import container
from tether.layout import Kind, Layout
from tether.methods import Method, method_settings
from tether.value import Json

VERSION = 1  # raised when entries of before are no longer what is wanted
MAX_TEXT = 2**20  # characters of a key, and of an entry's metadata

_FIELDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "sha256": (str,),
    "shape": (list,),
    "dtype": (str,),
    "kind": (str,),
    "method": (str,),
    "settings": (dict,),
    "algorithm": (int,),
    "seed": (int, type(None)),
}
_FILE = re.compile(r"r([1-9][0-9]{0,8})-s([0-9.e+-]{1,30})\.safetensors")
_TEMPORARY = re.compile(r"\.(.{1,60})\.[a-z0-9_]{8}")  # of fs.atomic_file
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Key:
    """All that an anchor depends on, but its rank and scaling.

    Attributes:
        text: canonical JSON: version, the tensor's sha256, shape, dtype and layout, the method's
            name, settings and algorithm, and the seed of a method that is not deterministic.
    """

    text: str

    @classmethod
    def of(
        cls, sha256: str, shape: Sequence[int], dtype: str, kind: Kind, method: Method, seed: int
    ) -> "Key":
        """The key of one weight under one method.

        Args:
            sha256: hex digest of the stored weight's bytes, as in its fingerprint.
            shape: of the stored weight.
            dtype: "float32", "bfloat16", …
            kind: of its layout.
            method: that chooses the start.
            seed: of the generator that this site's start is given; it enters only if the method
                is not deterministic.

        Returns:
            the key.

        Raises:
            ConfigError: the method's settings are no JSON values; its starts cannot be cached.
        """
        values: dict[str, Json] = {
            "version": VERSION,
            "sha256": sha256,
            "shape": list(shape),
            "dtype": dtype,
            "kind": kind,
            "method": method.name,
            "settings": method_settings(method),
            "algorithm": getattr(method, "algorithm", 1),
            "seed": None if getattr(method, "deterministic", False) else seed,
        }
        try:
            return cls(_canonical(values))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"method {method.name!r}: its settings cannot be named in a cache: {error}."
            ) from error

    @classmethod
    def parse(cls, text: str, where: str) -> "Key":
        """A key out of a file.

        Args:
            text: as in `text`.
            where: what to call it in the message.

        Returns:
            the key.

        Raises:
            HeaderError: it is none that this version of tether makes.
        """
        values = table(container.parse_json(text, where, MAX_TEXT), _FIELDS, where)
        if values["version"] != VERSION:
            raise HeaderError(
                f"{where}: version {values['version']}; this tether reads {VERSION}. Remove it, "
                "unless another tether uses it."
            )
        check_sha256(values["sha256"], where)
        if any(type(size) is not int for size in values["shape"]):
            raise HeaderError(f"{where}: the shape is not of whole numbers.")
        key = cls(text)
        try:
            canonical = _canonical(values) == text
            _ = key.layout
        except ConfigError as error:
            raise HeaderError(f"{where}: {error}") from error
        if not canonical:
            raise HeaderError(f"{where}: is not canonical JSON.")
        return key

    @property
    def name(self) -> str:
        """The folder of its entries: sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def values(self) -> dict[str, Any]:
        """What the text says."""
        values: dict[str, Any] = json.loads(self.text)
        return values

    @property
    def layout(self) -> Layout:
        """How the weight is stored."""
        values = self.values
        return Layout(values["kind"], tuple(values["shape"]))


def file_name(rank: int, scaling: float) -> str:
    """The name of an entry's file.

    Args:
        rank: of its factors.
        scaling: that they were made with.

    Returns:
        "r16-s1.0.safetensors".
    """
    return f"r{rank}-s{float(scaling)!r}.safetensors"


def parse_file_name(name: str) -> tuple[int, float] | None:
    """The inverse of `file_name`, strictly.

    Args:
        name: of any file.

    Returns:
        (rank, scaling), or None for a name that `file_name` does not make.
    """
    match = _FILE.fullmatch(name)
    if match is None:
        return None
    try:
        rank, scaling = int(match[1]), float(match[2])
    except ValueError:
        return None
    if not (math.isfinite(scaling) and scaling > 0 and file_name(rank, scaling) == name):
        return None
    return rank, scaling


def is_temporary(name: str) -> bool:
    """Whether a name is that of an entry which is being written, or was when that broke off.

    Args:
        name: of any file.

    Returns:
        True if so.
    """
    match = _TEMPORARY.fullmatch(name)
    return match is not None and parse_file_name(match[1]) is not None


def is_key_folder(place: Path) -> bool:
    """Whether a folder's name and that of the one above it are those of a key.

    Args:
        place: the folder.

    Returns:
        True if so.
    """
    return _SHA256.fullmatch(place.name) is not None and place.name[:2] == place.parent.name


def check_sha256(value: str, where: str) -> str:
    """Raise unless a text is a sha256 in hexadecimal.

    Args:
        value: the text.
        where: what to call it in the message.

    Returns:
        the text.

    Raises:
        HeaderError: it is not.
    """
    if _SHA256.fullmatch(value) is None:
        raise HeaderError(f"{where}: {value!r:.80} is no sha256.")
    return value


def table(value: Json, kinds: Mapping[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    """Raise unless a JSON value is a table of exactly these fields.

    Args:
        value: out of a file.
        kinds: field -> the types it may have, exactly.
        where: what to call it in the message.

    Returns:
        the value.

    Raises:
        HeaderError: a field is missing, of another type, or too many.
    """
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise HeaderError(f"{where}: has other fields than {list(kinds)}.")
    for name, kind in kinds.items():
        if type(value[name]) not in kind:
            raise HeaderError(f"{where}: {name!r} cannot be of type {type(value[name]).__name__}.")
    return value


def _canonical(values: Mapping[str, Json]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
