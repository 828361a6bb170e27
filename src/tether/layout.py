"""How a weight is stored, and its view as a matrix."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from tether.errors import ConfigError

Kind = Literal["linear", "transposed", "embedding", "conv"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is stored, and its view as an (out, in) matrix.

    Attributes:
        kind: "linear": stored (out, in). "transposed": transformers' Conv1D, stored (in, out).
            "embedding": stored (in, out) = (tokens, width). "conv": stored (out, channels,
            *kernel), in = channels·∏kernel.
        shape: shape of the stored weight.
        common: False for a convolution with a dilation or a padding mode other than zeros, which
            other libraries' LoRA layers ignore; such a site is not exported to them.
    """

    kind: Kind
    shape: tuple[int, ...]
    common: bool = True

    def __post_init__(self) -> None:
        """Check kind and number of dimensions."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"layout kind {self.kind!r} is none of {get_args(Kind)}.")
        low, high = (3, 5) if self.kind == "conv" else (2, 2)
        if not low <= len(self.shape) <= high or any(n < 1 for n in self.shape):
            raise ConfigError(f"layout {self.kind!r} cannot have shape {self.shape}.")

    @property
    def out_features(self) -> int:
        """Rows of the matrix view."""
        return self.shape[1] if self.kind in ("transposed", "embedding") else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix view."""
        return math.prod(self.shape) // self.out_features

    def matrix(self, weight: Tensor) -> Tensor:
        """View a stored weight as (out, in), without copying.

        Args:
            weight: of shape `shape`.

        Returns:
            a view (out, in).
        """
        return weight.T if self.kind in ("transposed", "embedding") else weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`: view an (out, in) matrix in the weight's own shape.

        Args:
            matrix: (out, in).

        Returns:
            a view of shape `shape`.
        """
        if self.kind in ("transposed", "embedding"):
            return matrix.T
        return matrix.reshape(self.shape)
