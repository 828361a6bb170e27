"""Orthogonal: both factors random, acting in orthogonal halves of the rank, so B·A = 0. No anchor.

Source: datta0.github.io/posts/rethink-lora-init (the `init_lora_weights="orthogonal"` of peft).
There both factors are also turned by one random orthogonal (r, r) matrix. That turn changes
neither B·A nor the path of gradient descent, but leaves B·A = 0 true only up to rounding; without
it the product is exactly zero in every dtype, and any rank is allowed, not only even ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tether.methods.base import Context, register
from tether.value import Factors


@register("orthogonal")
@dataclass(frozen=True, slots=True)
class Orthogonal:
    """A normal in the first half of the rank, B normal in the second, zero elsewhere.

    Attributes:
        std: standard deviation of the entries that are not zero.
    """

    std: float = 0.1
    name: ClassVar[str]
    lifts: ClassVar[bool] = False
    any_dtype: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        """Draw both factors; B·A = 0 exactly.

        Args:
            weight: (out, in); only its shape and device are used.
            rank: 1 <= rank <= min(out, in); of an odd rank A gets the larger half.
            context: the generator is used.

        Returns:
            A (rank, in), B (out, rank), float32.
        """
        out_features, in_features = weight.shape
        half = (rank + 1) // 2
        a, b = torch.zeros(rank, in_features), torch.zeros(out_features, rank)
        a[:half] = self.std * torch.randn(half, in_features, generator=context.generator)
        b[:, half:] = self.std * torch.randn(out_features, rank - half, generator=context.generator)
        return Factors(A=a.to(weight.device), B=b.to(weight.device))
