"""What a list of singular values says: how many directions count, and how much each holds."""

from torch import Tensor


def effective_rank(values: Tensor) -> float:
    """How many directions a matrix has in effect (Roy and Vetterli 2007, of the squares).

    Args:
        values: (k,), singular values, not negative.

    Returns:
        exp(−Σ p·ln p) with p = σ²/Σσ²: 1 for a single direction, k for k equal ones; 0 where all
        are 0.
    """
    squares = values.square()
    total = float(squares.sum())
    if total == 0:
        return 0.0
    shares = squares[squares > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def energy(values: Tensor) -> Tensor:
    """The share of |M|²_F that the best approximation of each rank holds.

    Args:
        values: (k,), singular values, descending.

    Returns:
        (k,), Σ_{i<=r} σ_i² / Σσ² for r = 1 … k, ending with 1; zeros where all are 0.
    """
    sums = values.square().cumsum(0)
    total = float(sums[-1]) if len(sums) else 0.0
    return sums / total if total > 0 else sums
