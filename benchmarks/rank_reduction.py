"""Cutting a low-rank change to half its rank: from its factors, and from the dense matrix.

One 2048×2048 site, as an adapter of rank 16 becomes when it is made plain (rank 32), cut back to
rank 16: `algebra.compress`, which measures its error too, beside `torch.linalg.svd` of ΔW. In
turns, on one thread, in seconds of CPU, so that other work on the machine hardly counts. Both give
the best approximation; their errors are printed beside the times.

    python benchmarks/rank_reduction.py [--size 2048] [--rank 16] [--repeats 3]
"""

import statistics
import time
from collections.abc import Callable

import torch
import typer
from rich.console import Console
from rich.table import Table

from tether import algebra
from tether.value import Factors, LayerAdapter, Layout


def change(size: int, rank: int) -> LayerAdapter:
    """A plain layer of twice the rank, whose singular values fall."""
    generator = torch.Generator().manual_seed(0)
    falling = torch.logspace(0, -2, 2 * rank)
    a = falling[:, None] * torch.randn(2 * rank, size, generator=generator)
    b = torch.randn(size, 2 * rank, generator=generator)
    return LayerAdapter(Factors(a, b), None, 1.0, Layout("linear", (size, size)))


def from_dense(layer: LayerAdapter, rank: int) -> LayerAdapter:
    u, s, vt = torch.linalg.svd(algebra.delta(layer), full_matrices=False)
    root = s[:rank].sqrt()
    factors = Factors(root[:, None] * vt[:rank], u[:, :rank] * root)
    return LayerAdapter(factors, None, 1.0, layer.layout)


def timed(work: Callable[[], LayerAdapter]) -> tuple[float, LayerAdapter]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def main(size: int = 2048, rank: int = 16, repeats: int = 3) -> None:
    """Measure both in turns and print the ratio of the medians."""
    torch.set_num_threads(1)
    layer = change(size, rank)
    ways: dict[str, Callable[[], LayerAdapter]] = {
        "factors (algebra.compress)": lambda: algebra.compress(layer, rank).layer,
        "dense (torch.linalg.svd)": lambda: from_dense(layer, rank),
    }
    algebra.compress(layer, rank)  # the first call loads libraries
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, float] = {}
    for _ in range(repeats):
        for name, work in ways.items():
            # A thousandth of the time: a hundredth of a second is measured more than once.
            for _ in range(20 if name.startswith("factors") else 1):
                spent, result = timed(work)
                seconds[name].append(spent)
            errors[name] = algebra.relative_error(layer, result)
    table = Table("", "median CPU seconds", "fastest", "relative error")
    for name, all_of in seconds.items():
        table.add_row(
            name, f"{statistics.median(all_of):.4f}", f"{min(all_of):.4f}", f"{errors[name]:.6f}"
        )
    console = Console(width=100, highlight=False)
    console.print(table)
    fast, slow = (statistics.median(all_of) for all_of in seconds.values())
    console.print(
        f"{size}×{size}, rank {2 * rank} to {rank}, 1 thread: {slow / fast:.0f} times as fast"
    )


if __name__ == "__main__":
    typer.run(main)
