"""The limit of a decomposition: its products with the weight, alone.

What a decomposition spends besides them is what its code could still save. The products are seen
below torch's functions, while it runs once; then matrices of the same shapes, layouts and dtypes
are multiplied, as many.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the two operands are among the arguments.
_PRODUCTS = {
    name: first
    for first, names in ((0, ("mm", "bmm", "mv")), (1, ("addmm", "baddbmm", "addmv")))
    for name in names
}
# Operations whose result is the weight again, in another dtype, layout or scale.
_COPIES = {"_to_copy", "clone", "copy", "contiguous", "mul", "div"}
Operand = tuple[tuple[int, ...], bool, torch.dtype]


class Products(TorchDispatchMode):
    """Records the products in which the weight, a copy of it or a part of it is an operand.

    Attributes:
        found: the two operands of each: shape, whether it is transposed, dtype.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # The tensors themselves: the storage of one that is gone may be another's.
        self._known = [weight]
        self.found: list[tuple[Operand, Operand]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _PRODUCTS:
            first, second = args[_PRODUCTS[name] :][:2]
            if self._is_known(first) or self._is_known(second):
                self.found.append((_operand(first), _operand(second)))
        elif name in _COPIES and any(self._is_known(a) for a in args if isinstance(a, Tensor)):
            self._known.append(result)
        return result

    def _is_known(self, tensor: Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(known.untyped_storage().data_ptr() == place for known in self._known)

    def forget(self) -> None:
        """Let go of the copies; what was found stays."""
        self._known.clear()

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes in which the weight was multiplied."""
        return {dtype for pair in self.found for _, _, dtype in pair}

    def columns(self) -> int:
        """How many vectors the weight was multiplied with, from either side."""
        return sum(min(*a[0][-2:], *b[0][-2:]) for a, b in self.found)


def _operand(tensor: Tensor) -> Operand:
    transposed = tensor.ndim > 1 and tensor.stride(-1) != 1 and tensor.stride(-2) == 1
    return tuple(tensor.shape), transposed, tensor.dtype


def of(work: Callable[[], Any], weight: Tensor) -> Products:
    """Run once and see the products.

    Args:
        work: uses `weight`.
        weight: the matrix; products with others do not count.

    Returns:
        what was seen.
    """
    with Products(weight) as seen:
        work()
    seen.forget()
    return seen


def alone(found: Iterable[tuple[Operand, Operand]]) -> Callable[[Any], None]:
    """The same products with numbers of no meaning; the operands are made now, once each."""
    made: dict[tuple[int, Operand], Tensor] = {}
    pairs = [
        tuple(_make(made, place, operand) for place, operand in enumerate(pair)) for pair in found
    ]

    def multiply(_: Any) -> None:
        for first, second in pairs:
            torch.matmul(first, second)

    return multiply


def _make(made: dict[tuple[int, Operand], Tensor], place: int, operand: Operand) -> Tensor:
    if (place, operand) not in made:
        shape, transposed, dtype = operand
        stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        tensor = torch.randn(stored).to(dtype)
        made[place, operand] = tensor.mT if transposed else tensor
    return made[place, operand]
