"""LoRA: random A, zero B. The start is the base model; no anchor.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; A as in the authors' code, Kaiming uniform
with a = √5, which is uniform on ±1/√in.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tether.methods.base import Context, register
from tether.value import Factors


@register("lora")
@dataclass(frozen=True, slots=True)
class Lora:
    """A uniform on ±1/√in, B zero."""

    name: ClassVar[str]
    lifts: ClassVar[bool] = False
    any_dtype: ClassVar[bool] = True

    def start(self, weight: Tensor, rank: int, context: Context) -> Factors:
        """Draw A; B·A = 0.

        Args:
            weight: (out, in); only its shape and device are used.
            rank: 1 <= rank <= min(out, in).
            context: the generator is used.

        Returns:
            A (rank, in), B (out, rank) = 0, float32.
        """
        out_features, in_features = weight.shape
        uniform = torch.rand(rank, in_features, generator=context.generator)
        a = (2 * uniform - 1) / math.sqrt(in_features)
        return Factors(
            A=a.to(weight.device), B=torch.zeros(out_features, rank, device=weight.device)
        )
