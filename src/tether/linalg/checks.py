"""What a matrix must be before it is decomposed."""

import math

from torch import Tensor

from tether.errors import NonFiniteError, RankTooLargeError


def check_rank(weight: Tensor, rank: int) -> None:
    """Raise RankTooLargeError unless 1 <= rank <= min(weight.shape).

    Args:
        weight: a matrix (m, n).
        rank: how many directions are asked of it.

    Raises:
        RankTooLargeError: naming both values.
    """
    smaller = min(weight.shape)
    if not 1 <= rank <= smaller:
        shape = tuple(weight.shape)
        raise RankTooLargeError(
            f"rank {rank} is not between 1 and min(shape) {smaller} of matrix {shape}."
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise NonFiniteError if `tensor` holds NaN or Inf.

    Args:
        tensor: any shape, any floating dtype.
        name: what to call it in the message.

    Raises:
        NonFiniteError: with the number of bad values and the place of the first.
    """
    # One NaN or Inf makes the sum so. A sum may also overflow: then every value is looked at.
    if math.isfinite(float(tensor.detach().sum())):
        return
    finite = tensor.isfinite()
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    first = tuple(int(i) for i in bad[0])
    value = float(tensor[first])
    raise NonFiniteError(
        f"{name}: {len(bad)} of {tensor.numel()} values are NaN or Inf, the first {value} at "
        f"{first}. Repair or reload these weights."
    )
