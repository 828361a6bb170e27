"""float32 products that are float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products in float32, whatever `torch.set_float32_matmul_precision` says.

    TF32 and bfloat16 products are wrong by 1e-3, which is more than the anchors of a real weight
    are apart. The setting is the process's: around work in threads, enter this before them.

    Yields:
        nothing; afterwards the setting is as it was.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
