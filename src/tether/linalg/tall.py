"""A weight of any dtype and orientation as a tall float32 matrix, read in panels of rows."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# A weight in half precision is copied to float32 whole up to this many values (256 MiB); above
# it, panel by panel at every reading.
WHOLE = 1 << 26
# Values of a panel (4 MiB): both products of a step find it in the cache. On a 4096×4096 weight
# with 16 vectors a step takes 20 ms by such panels and 27 ms without.
PANEL = 1 << 20
_USUAL = 20  # exponents of weights that need no scale
_PARTS = 6  # strips of a Gram matrix
_SMALLEST, _LARGEST = 1e-15, 1e18  # norms whose squares float32 holds


def panels(matrix: Tensor, size: int = PANEL) -> Iterator[Tensor]:
    """The rows of a matrix in float32; a copy only where the dtype is another.

    The panels depend on the shape alone, so that equal values give equal bits in any dtype.

    Args:
        matrix: (m, n), any floating dtype and strides.
        size: values of a panel, at most, but for one row.

    Yields:
        (rows, n) blocks, in order.
    """
    for panel in torch.split(matrix, max(1, size // matrix.shape[1])):
        yield panel.float()


@dataclass(frozen=True, slots=True)
class Tall:
    """W, or its transposed where that is the taller one, divided by `scale`.

    Blocks of vectors are rows: (k, n) for the short side, (k, m) for the long one. In this
    orientation the products run at the speed of the matrix library also for few vectors.

    Attributes:
        matrix: (m, n), m >= n: float32 where it is held whole, else of the weight's dtype.
        wide: whether it is the transposed of the weight.
        scale: 1, or, of a very large or small weight, a power of two near its mean singular
            value, so that products stay in range.
        norm: Frobenius norm of matrix / scale.
    """

    matrix: Tensor
    wide: bool
    scale: float
    norm: float

    @classmethod
    def of(cls, weight: Tensor) -> "Tall":
        """Look at a weight.

        Args:
            weight: (m, n), any floating dtype, finite.

        Returns:
            the view; norm 0 for a zero matrix, and for one that is beyond float32.
        """
        wide = weight.shape[0] < weight.shape[1]
        matrix = weight.T if wide else weight
        if matrix.numel() <= WHOLE:
            matrix = matrix.float()
        # Row norms in float32, their sum in float64: good to 1e-7 at the speed of one reading.
        rows = torch.cat([panel.norm(dim=1) for panel in panels(matrix)])
        norm = float(rows.double().norm())
        if not _SMALLEST < norm < _LARGEST:
            # The squares of very large or small values are out of range.
            norm = math.sqrt(sum(float(p.double().square().sum()) for p in panels(matrix)))
        if norm == 0 or not math.isfinite(norm):
            return cls(matrix, wide, 1.0, 0.0)
        exponent = round(math.log2(norm / math.sqrt(matrix.shape[1])))
        scale = 1.0 if abs(exponent) < _USUAL else 2.0**exponent
        return cls(matrix, wide, scale, norm / scale)

    def image(self, rows: Tensor) -> Tensor:
        """rows·Wᵀ.

        Args:
            rows: (k, n), float32 or float64, which is the arithmetic's too.

        Returns:
            (k, m), of the dtype of `rows`.
        """
        rows = rows / self.scale
        size = _size(rows)
        blocks = [rows @ panel.to(rows.dtype).T for panel in panels(self.matrix, size)]
        return torch.cat(blocks, dim=1)

    def back(self, rows: Tensor) -> Tensor:
        """rows·W.

        Args:
            rows: (k, m), float32 or float64, which is the arithmetic's too.

        Returns:
            (k, n), of the dtype of `rows`.
        """
        total, start = rows.new_zeros(len(rows), self.matrix.shape[1]), 0
        for panel in panels(self.matrix, _size(rows)):
            some = rows[:, start : start + len(panel)] / self.scale
            total.addmm_(some, panel.to(rows.dtype))
            start += len(panel)
        return total

    def normal(self, rows: Tensor) -> Tensor:
        """rows·WᵀW, reading W once.

        Args:
            rows: (k, n), float32.

        Returns:
            (k, n), float32.
        """
        rows, total = rows / self.scale, torch.zeros_like(rows)
        for panel in panels(self.matrix):
            total.addmm_((rows @ panel.T) / self.scale, panel)
        return total

    def rough(self) -> Callable[[Tensor], Tensor]:
        """`normal` by bfloat16 products with a bfloat16 copy of W: good to about 1e-3.

        Returns:
            rows -> rows·WᵀW, float32.
        """
        half = self.matrix.bfloat16()

        def apply(rows: Tensor) -> Tensor:
            image = (rows / self.scale).bfloat16() @ half.T
            return ((image / self.scale) @ half).float()

        return apply

    def gram(self) -> Tensor:
        """WᵀW, float32; half of it is multiplied, the rest mirrored.

        Returns:
            (n, n).
        """
        n = self.matrix.shape[1]
        total = torch.zeros(n, n, device=self.matrix.device)
        parts = [slice(i * n // _PARTS, (i + 1) * n // _PARTS) for i in range(_PARTS)]
        for panel in panels(self.matrix):
            scaled = panel if self.scale == 1 else panel / self.scale
            for part in parts:
                total[part, part.start :].addmm_(scaled[:, part].T, scaled[:, part.start :])
        for part in parts:
            total[part.stop :, part] = total[part, part.stop :].T
        return total


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones.

    Args:
        device: of the weight.

    Returns:
        True for CUDA since compute capability 8, and for processors with AVX512_BF16 or AMX.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n, bool)() for n in known)


def _size(rows: Tensor) -> int:
    """Values of a panel in a single product: the whole weight, but no whole float64 copy of it."""
    return WHOLE if rows.dtype == torch.float32 else PANEL
