"""What the layers of one adapter on one model share, and what every layer is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tether.linalg import check_finite
from tether.provenance import Provenance
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
        frozen: base parameters that attaching stopped from training.
        enabled_input_grads: whether attaching switched on the model's input gradients.
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
    frozen: list[nn.Parameter] = field(default_factory=list)
    enabled_input_grads: bool = False


class Layer(nn.Module):
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
    gather = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor if gather is None else gather()
    wide = torch.promote_types(whole.dtype, torch.float32)
    return whole.detach().to("cpu", wide, copy=True)


def to_shape(tensor: Tensor) -> Tensor:
    """What `to_value` would give, but zeros that take no memory.

    Args:
        tensor: of the live model.

    Returns:
        one zero on the CPU, seen as often as the shape needs.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.zeros((), dtype=wide).expand(tensor.shape)


Take = Callable[[Tensor], Tensor]  # to_value, or to_shape
