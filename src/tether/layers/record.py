"""What the layers of one adapter on one model share, and what every layer is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether.errors import OffloadedError
from tether.linalg import check_finite
from tether.provenance import Provenance
from tether.ranks import is_first
from tether.value import Json


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a batch that an adapter takes part in.

    Attributes:
        total: rows of the batch.
        index: (n,), int64: the rows, on the CPU.
    """

    total: int
    index: Tensor


@dataclass(eq=False)
class Parked:
    """Where the values of an offloaded adapter are, and what it comes back to.

    Attributes:
        active: whether it takes part in the forward pass once it is back.
        path: of the native file, absolute; None for CPU memory.
        digest: of that file.
        by_limit: whether a limit offloaded it, and switching to it brings it back.
    """

    active: bool
    path: Path | None = None
    digest: str = ""
    by_limit: bool = False


@dataclass(eq=False)
class Record:
    """What the layers of one adapter on one model share.

    Attributes:
        name: of the adapter.
        provenance: where it came from.
        config: the settings it was made with.
        targets: names that select its sites.
        excluded: names to leave out of them.
        trainable: whether its factors are trained.
        order: grows with every adapter attached to the model.
        active: whether its layers take part in the forward pass.
        weight: by which its change is multiplied.
        rows: of the batch in which it takes part; None for all.
        merged: whether its change is in the base's weights, as they are now.
        frozen: base parameters that attaching stopped from training.
        enabled_input_grads: whether attaching switched on the model's input gradients.
        parked: where its values are while it is offloaded; None while they are on the model.
        used: the number of the switch that last made it inactive.
        pins: blocks in progress after which it will be active again.
    """

    name: str
    provenance: Provenance
    config: dict[str, Json]
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    trainable: bool
    order: int
    active: bool = True
    weight: float = 1.0
    rows: Rows | None = None
    merged: bool = False
    frozen: list[nn.Parameter] = field(default_factory=list)
    enabled_input_grads: bool = False
    parked: Parked | None = None
    used: int = 0
    pins: int = 0


class Holder(nn.Module):
    """A module whose own tensors may lie elsewhere for a while, with empty ones in their place.

    Attributes:
        away: whether they do.
        parked: name -> value in CPU memory; none where the values are in a file.
        gradients: name of the parameter -> its gradient, in CPU memory.
    """

    def __init__(self) -> None:
        """Everything is here."""
        super().__init__()
        self.away = False
        self.parked: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def own(self) -> dict[str, Tensor]:
        """Parameters and buffers of this module alone.

        Returns:
            name -> the live tensor, empty while away.
        """
        return {n: t for n, t in {**self._parameters, **self._buffers}.items() if t is not None}

    def held(self, name: str) -> Tensor:
        """A tensor's values, here or parked in CPU memory.

        Args:
            name: of the parameter or buffer.

        Returns:
            the tensor itself.

        Raises:
            OffloadedError: the values are in a file.
        """
        if not self.away:
            return self.own()[name]
        if name not in self.parked:
            raise OffloadedError(
                f"{name}: its values are in the file of an offloaded adapter. Call "
                "handle.restore() first."
            )
        return self.parked[name]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """What torch's `state_dict` takes from here: the values, not the empty tensors."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.away:
            destination |= {f"{prefix}{name}": self.held(name) for name in self.own()}


class Layer(Holder):
    """One adapter's part at one module of the base."""

    def __init__(self, path: str, record: Record) -> None:
        """Remember whose part it is.

        Args:
            path: of the base module.
            record: shared by the adapter's layers.
        """
        super().__init__()
        self.path, self.record = path, record

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained here, in a fixed order.

        Yields:
            ("dA", parameter) and so on.
        """
        yield from self.named_parameters(recurse=False)

    def add(self, name: str, value: Tensor) -> None:
        """Register a trained parameter.

        Args:
            name: of the parameter.
            value: its start; finite.
        """
        check_finite(value, f"site {self.path!r}: {name} in {value.dtype}")
        self.register_parameter(name, nn.Parameter(value, requires_grad=self.record.trainable))


def contiguous_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy: FSDP2 shards only contiguous parameters.

    Args:
        tensor: any.
        dtype: of the copy.

    Returns:
        a tensor that shares nothing.
    """
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


def to_value(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float32 (or float64), whole where FSDP2 sharded the tensor.

    Args:
        tensor: of the live model.

    Returns:
        a tensor that shares nothing with the model.
    """
    whole = _whole(tensor)
    wide = torch.promote_types(whole.dtype, torch.float32)
    return whole.detach().to("cpu", wide, copy=True)


def to_first(tensor: Tensor) -> Tensor:
    """As `to_value` on rank 0; on the others as `to_shape`, once they have given their part.

    Args:
        tensor: of the live model; all ranks ask for the same one.

    Returns:
        a tensor that shares nothing with the model.
    """
    if is_first():
        return to_value(tensor)
    _whole(tensor)
    return to_shape(tensor)


def to_shape(tensor: Tensor) -> Tensor:
    """What `to_value` would give, but zeros that take no memory.

    Args:
        tensor: of the live model.

    Returns:
        one zero on the CPU, seen as often as the shape needs.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros((), dtype=wide).expand(tensor.shape)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one every rank gives its part."""
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    return whole


Take = Callable[[Tensor], Tensor]  # to_value, to_first or to_shape
