"""LoRA with a Gaussian A: the start of the paper's text and of diffusers. No anchor.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; standard deviation 1/r as in peft's
`init_lora_weights="gaussian"`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tether.methods.base import Context, register
from tether.value import Factors


@register("gaussian")
@dataclass(frozen=True, slots=True)
class Gaussian:
    """A normal with standard deviation 1/rank, B zero."""

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
        a = torch.randn(rank, in_features, generator=context.generator) / rank
        return Factors(
            A=a.to(weight.device), B=torch.zeros(out_features, rank, device=weight.device)
        )
