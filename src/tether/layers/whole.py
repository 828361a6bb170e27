"""Parameters that are trained whole: biases beside the sites, and modules of `modules_to_save`.

The base's own values are the anchor and stay in the base; only the displacement is kept here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tether.layers.record import Layer, Record, Take, contiguous_copy, to_value
from tether.value import Trained


class BiasLayer(Layer):
    """The displacement of the bias of a module that is no site."""

    db: Tensor
    b0: Tensor

    def __init__(self, path: str, bias: Trained, record: Record, dtype: torch.dtype) -> None:
        """Copy a bias.

        Args:
            path: of the base module.
            bias: with its anchor.
            record: shared by the adapter's layers.
            dtype: of the displacement, float32 at least.
        """
        super().__init__(path, record)
        assert bias.anchor is not None
        wide = torch.promote_types(dtype, torch.float32)
        self.add("db", contiguous_copy(bias.trainable, wide))
        self.register_buffer("b0", contiguous_copy(bias.anchor, bias.anchor.dtype))

    def bias(self, take: Take = to_value) -> Trained:
        """The bias now, as a value.

        Args:
            take: how to copy a tensor.

        Returns:
            copies on the CPU.
        """
        return Trained(take(self.held("db")), take(self.held("b0")))

    def forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """The output with the bias's displacement added.

        Args:
            module: the base module.
            output: its output so far.

        Returns:
            output + db along its channels, rounded once to the output's dtype.
        """
        spatial = getattr(module, "kernel_size", ())
        db = self.db.view(-1, *[1] * len(spatial)) if spatial else self.db
        change = -self.record.weight * db
        # As in SiteLayer: a change of zero leaves every bit.
        return (output - (change + 0.0)).to(output.dtype)


class ModuleLayer(Layer):
    """The displacement of every parameter of a module that is trained whole."""

    def __init__(
        self, path: str, state: Mapping[str, Trained], record: Record, dtype: torch.dtype
    ) -> None:
        """Copy the displacements.

        Args:
            path: of the base module.
            state: parameter name -> value with its anchor, which stays in the base.
            record: shared by the adapter's layers.
            dtype: of the displacements, float32 at least.
        """
        super().__init__(path, record)
        wide = torch.promote_types(dtype, torch.float32)
        self.keys = tuple(state)
        for number, value in enumerate(state.values()):
            self.add(f"d{number}", contiguous_copy(value.trainable, wide))

    def bind(self, module: nn.Module) -> None:
        """Remember the base module, without becoming its parent.

        Args:
            module: that carries this layer.
        """
        self.inner = (_Inner(module),)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The displacements, under the names of the parameters they move.

        Yields:
            ("weight", displacement) and so on.
        """
        yield from zip(self.keys, self._parameters.values(), strict=True)

    def state(self, module: nn.Module, take: Take = to_value) -> dict[str, Trained]:
        """The parameters now, as values.

        Args:
            module: the base module, which holds the anchor.
            take: how to copy a tensor.

        Returns:
            parameter name -> copies on the CPU.
        """
        return {name: self.parameter(module, name, take) for name in self.keys}

    def parameter(self, module: nn.Module, name: str, take: Take = to_value) -> Trained:
        """One parameter now, as a value.

        Args:
            module: the base module, which holds the anchor.
            name: of the parameter.
            take: how to copy a tensor.

        Returns:
            copies on the CPU.
        """
        own = dict(zip(self.keys, self._parameters, strict=True))
        return Trained(take(self.held(own[name])), take(module.get_parameter(name)))

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the module gives with its parameters moved; its own output at the start.

        Args:
            module: the base module.
            args: its positional inputs.
            kwargs: its named inputs.

        Returns:
            its output with every parameter p replaced by p + dp, rounded to p's dtype.
        """
        moved = {}
        for name, displacement in self.trained():
            start = module.get_parameter(name)
            change = displacement * -self.record.weight + 0.0
            moved[f"inner.{name}"] = (start - change).to(start.dtype)
        result: Tensor = functional_call(self.inner[0], moved, args, kwargs)
        return result


class _Inner(nn.Module):
    """Calls a module's own forward, without the hook that we are in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.inner.forward(*args, **kwargs)
        return result
