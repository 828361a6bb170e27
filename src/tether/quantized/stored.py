"""A quantised weight as the base holds it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tether.errors import UnsupportedModuleError
from tether.fingerprints import fingerprint_tensor, raw_bytes
from tether.provenance import Fingerprint
from tether.value import Json


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A quantised weight, seen without a copy.

    Attributes:
        kind: the library and its format: "bitsandbytes nf4", …
        shape: of the weight that it stands for.
        parts: what is stored: codes, scales, tables; name -> tensor.
        settings: what else the values depend on, JSON.
        expand: gives the values, float32, in `shape`.
        lost: why what was stored can no longer be told, where that is so; else "".
    """

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    settings: Mapping[str, Json]
    expand: Callable[[], Tensor]
    lost: str = ""

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The values that are stored.

        Returns:
            float32, of `shape`, on the weight's device: a new tensor.
        """
        return self.expand().detach()

    def digest(self) -> str:
        """sha256 over what is stored: kind, shape, settings and every part.

        Returns:
            hex digest. The dtype that a library computes in is no part of it.

        Raises:
            UnsupportedModuleError: the library has overwritten what was stored.
        """
        if self.lost:
            raise UnsupportedModuleError(self.lost)
        about: list[Json] = [self.kind, list(self.shape), dict(self.settings)]
        about += [
            [name, str(part.dtype), list(part.shape)] for name, part in sorted(self.parts.items())
        ]
        found = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + b"\0")
        for _, part in sorted(self.parts.items()):
            found.update(raw_bytes(part))
        return found.hexdigest()

    def fingerprint(self, digest: str | None = None, dense: Tensor | None = None) -> Fingerprint:
        """By which this base is recognised, and a differently quantised one refused.

        Args:
            digest: as of `digest`, where it is known.
            dense: as of `dequantize`, where it is at hand.

        Returns:
            dtype is the kind, `sha256` that of what is stored; the rounded digests and the norm
            are those of the values.
        """
        found = fingerprint_tensor(self.dequantize() if dense is None else dense)
        own = self.digest() if digest is None else digest
        return replace(found, dtype=self.kind, sha256=own)
