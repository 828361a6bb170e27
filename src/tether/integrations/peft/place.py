"""One module of the base, and what peft wrapped around it: a LoRA layer under the base's path."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tether import sites
from tether.errors import (
    MetaTensorError,
    ShardedWeightError,
    UnsupportedAdapterError,
    UnsupportedModuleError,
    WeightError,
)
from tether.layers.record import to_value
from tether.value import CHILD, Factors, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One module of the base, and what peft wrapped around it.

    Attributes:
        path: in the base model, without peft's wrappers.
        module: the base's own.
        lora: peft's LoRA layer around it, or None.
        saved: peft's wrapper of a module trained whole, or None.
    """

    path: str
    module: nn.Module
    lora: Any = None
    saved: Any = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that have factors here."""
        return tuple(self.lora.scaling) if self.lora is not None else ()

    @property
    def layout(self) -> Layout:
        """How the base's weight is stored."""
        return sites.layout_of(self.path, self.module)

    @property
    def linear(self) -> bool:
        """Whether peft can take a part out of the weight here: not out of others than these."""
        return self.layout.kind in ("linear", "transposed")

    @property
    def readable(self) -> bool:
        """Whether the weight has values to read: not quantised, sharded or offloaded."""
        try:
            return bool(self.weight.numel())
        except (UnsupportedModuleError, WeightError):
            return False

    @property
    def weight(self) -> Tensor:
        """The weight of the base as it is now: the residual, where an adapter has a part of it."""
        return sites.base_weight(self.path, self.module).detach()

    def scaling(self, name: str) -> float:
        """The scaling of an adapter here, as the forward pass uses it.

        Args:
            name: of the adapter.

        Returns:
            s.
        """
        return float(self.lora.scaling[name])

    def dropout(self, name: str) -> float:
        """Probability of dropping an input of an adapter.

        Args:
            name: of the adapter.

        Returns:
            the probability.
        """
        return float(getattr(self.lora.lora_dropout[name], "p", 0.0))

    def mark(self, name: str) -> nn.Module:
        """A module that peft makes anew with every adapter: it tells one from its successor.

        Args:
            name: of the adapter.

        Returns:
            the module, on the model and on every copy of it.
        """
        mark: nn.Module = self.lora.lora_dropout[name]
        return mark

    def parameters(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """An adapter's own parameters, A and B, in peft's shapes.

        Args:
            name: of the adapter.

        Returns:
            the live parameters.
        """
        if isinstance(self.module, nn.Embedding):
            return self.lora.lora_embedding_A[name], self.lora.lora_embedding_B[name]
        return self.lora.lora_A[name].weight, self.lora.lora_B[name].weight

    def magnitude(self, name: str) -> nn.Parameter | None:
        """DoRA's parameter, in peft's shape.

        Args:
            name: of the adapter.

        Returns:
            the live parameter, or None without DoRA.
        """
        layers = self.lora.lora_magnitude_vector
        return layers[name].weight if name in layers else None

    def factors(self, name: str) -> Factors:
        """An adapter's factors now.

        Args:
            name: of the adapter.

        Returns:
            A (r, in) and B (out, r): copies on the CPU, float32 (or float64).

        Raises:
            ShardedWeightError: they are spread over several processes.
            MetaTensorError: they have no values.
            UnsupportedAdapterError: no (out, in) matrix says what they do.
        """
        if not self.layout.common:
            raise UnsupportedAdapterError(
                f"site {self.path!r}: peft's LoRA ignores the dilation or padding mode of this "
                "convolution, so what was trained is no change of its weight."
            )
        pair = self.parameters(name)
        for parameter in pair:
            if parameter.is_meta:
                raise MetaTensorError(f"site {self.path!r}: the factors are on the meta device.")
            if parameter.numel() == 0:
                raise ShardedWeightError(
                    f"site {self.path!r}: the factors are partitioned (ZeRO-3). Call this within "
                    "deepspeed.zero.GatheredParameters(model.parameters())."
                )
        a, b = (to_value(parameter) for parameter in pair)
        return Factors(a.flatten(1), b.flatten(1))


def places_of(base: nn.Module) -> Iterator[Place]:
    """The base's modules under their own paths.

    Args:
        base: with peft's layers in it.

    Yields:
        parents before their children; a module that has two paths under the first.

    Raises:
        UnsupportedAdapterError: a layer of peft that is no LoRA.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    stack = [("", base)]
    seen: set[int] = set()
    while stack:
        path, outer = stack.pop()
        if id(outer) in seen:
            continue
        seen.add(id(outer))
        module = outer
        if isinstance(outer, LoraLayer):
            module = outer.get_base_layer()
            yield Place(path, module, lora=outer)
        elif isinstance(outer, ModulesToSaveWrapper):
            module = outer.original_module
            if any(isinstance(part, BaseTunerLayer) for part in outer.modules()):
                raise UnsupportedAdapterError(
                    f"module {path!r} is trained whole (modules_to_save) and holds LoRA layers: "
                    "it is changed twice."
                )
            yield Place(path, module, saved=outer)
        elif isinstance(outer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise UnsupportedAdapterError(
                f"module {path!r}: {type(outer).__name__} of peft is no LoRA, and would be lost."
            )
        else:
            yield Place(path, module)
        prefix = path + "." if path else ""
        children = [(prefix + n, c) for n, c in module.named_children() if n != CHILD]
        stack.extend(reversed(children))
