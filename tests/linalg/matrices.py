"""Matrices of given spectra, and what float64 says of them."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tether.linalg import TruncatedSVD

# Singular values of SmolLM2-135M's layer 14 gate_proj, 576 wide, over the largest: (index, value).
REAL = (
    (0, 1.0), (1, 0.81), (2, 0.795), (3, 0.748), (4, 0.741), (5, 0.726), (6, 0.711), (7, 0.695),
    (9, 0.678), (11, 0.665), (13, 0.658), (15, 0.641), (18, 0.626), (22, 0.605), (26, 0.589),
    (31, 0.562), (37, 0.542), (44, 0.524), (52, 0.505), (62, 0.484), (74, 0.462), (88, 0.442),
    (104, 0.418), (124, 0.396), (148, 0.372), (176, 0.347), (210, 0.318), (250, 0.29),
    (290, 0.264), (330, 0.241), (370, 0.216), (410, 0.194), (450, 0.173), (490, 0.151),
    (520, 0.133), (540, 0.12), (555, 0.109), (565, 0.0962), (571, 0.0747), (575, 0.0461),
)  # fmt: skip


def real(n: int) -> Tensor:
    """The spectrum of a real weight, resampled to n values."""
    index, value = np.array(REAL).T
    return torch.from_numpy(7 * np.exp(np.interp(np.linspace(0, 575, n), index, np.log(value))))


def steps(n: int, top: int, gap: float) -> Tensor:
    """`top` values from 2 to 1.5, the cut, then from 1.5 − 2·gap down to 0.7."""
    below = 1.5 - 2 * gap - 0.8 * torch.arange(n - top, dtype=torch.float64) / n
    return torch.cat([torch.linspace(2, 1.5, top, dtype=torch.float64), below])


def flat_gap(n: int, top: int, gap: float) -> Tensor:
    """`top` values of 1 + gap to 1 + 2·gap above values of 1."""
    above = 1 + gap * torch.linspace(2, 1, top, dtype=torch.float64)
    return torch.cat([above, torch.ones(n - top, dtype=torch.float64)])


def outlier(n: int, size: float) -> Tensor:
    """One value of `size`, and others as of a real weight, the largest 1."""
    return torch.cat([torch.tensor([size], dtype=torch.float64), real(n)[1:] / real(n)[1]])


def low_rank(n: int, rank: int) -> Tensor:
    return torch.cat([torch.linspace(3, 1, rank), torch.zeros(n - rank)]).double()


SPECTRA = {
    "real": real,
    "steep": lambda n: torch.logspace(0, -8, n, dtype=torch.float64),
    "power": lambda n: 1 / torch.arange(1, n + 1, dtype=torch.float64),
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "line": lambda n: torch.linspace(1.5, 0.5, n, dtype=torch.float64),
    "low rank": lambda n: low_rank(n, 9),
    "outlier": lambda n: outlier(n, 1e4),
    "outlier 1e3": lambda n: torch.cat([torch.tensor([1e3]), torch.linspace(1.5, 0.5, n - 1)]),
    "step 16": lambda n: flat_gap(n, 16, 1e-2),
    "step 16 of 1e-3": lambda n: flat_gap(n, 16, 1e-3),
    "gap 1e-3": lambda n: steps(n, 16, 1e-3),
    "gap 1e-5": lambda n: steps(n, 16, 1e-5),
    "cluster": lambda n: torch.cat([steps(n, 15, 0.1)[:15], steps(n, 15, 0.1)[15].expand(3),
                                    steps(n, 15, 0.1)[18:]]),
}  # fmt: skip


def with_spectrum(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """A random float32 matrix whose singular values are `s`, to the rounding of its entries."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(k, len(s), generator=generator, dtype=torch.float64))[0]
        for k in (m, n)
    )
    return ((u * s.double()) @ v.T).float()


@dataclass(frozen=True, eq=False)
class Case:
    """A weight and its exact triplets, float64."""

    weight: Tensor
    u: Tensor
    s: Tensor
    vt: Tensor


def exact_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vt)


@functools.lru_cache(maxsize=64)
def case(name: str, m: int, n: int, seed: int = 0) -> Case:
    """By the name of a spectrum, or "random"; made once."""
    if name == "random":
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    else:
        weight = with_spectrum(m, n, SPECTRA[name](min(m, n)), seed)
    return Case(weight, *exact_svd(weight))


def product(svd: TruncatedSVD) -> Tensor:
    return (svd.u.double() * svd.s.double()) @ svd.vt.double()


def true_errors(svd: TruncatedSVD, of: Case) -> tuple[float, float]:
    """|P − W_r|/|W_r|, and |W − P|/|W − W_r| − 1."""
    r = len(svd.s)
    best = (of.u[:, :r] * of.s[:r]) @ of.vt[:r]
    found, weight = product(svd), of.weight.double()
    tail = math.sqrt(float(of.s[r:].square().sum()))
    error = float((found - best).norm() / best.norm())
    return error, float((weight - found).norm()) / tail - 1 if tail > 0 else 0.0


def assert_conventions(svd: TruncatedSVD, weight: Tensor, rank: int) -> None:
    """Shapes, dtype, orthonormality, order, signs."""
    m, n = weight.shape
    assert [tuple(t.shape) for t in (svd.u, svd.s, svd.vt)] == [(m, rank), (rank,), (rank, n)]
    for tensor in (svd.u, svd.s, svd.vt):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
    one = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(svd.u.double().T @ svd.u.double(), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(svd.vt.double() @ svd.vt.double().T, one, rtol=0, atol=1e-6)
    assert (svd.s >= 0).all()
    assert (svd.s.diff() <= 0).all()
    largest = svd.vt.gather(1, svd.vt.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def assert_triplets(svd: TruncatedSVD, exact: tuple[Tensor, Tensor, Tensor]) -> None:
    """Equal to the exact triplets, up to the common sign of a pair."""
    u, s, vt = exact
    torch.testing.assert_close(svd.s.double(), s, rtol=1e-6, atol=1e-7 * float(s[0]))
    left, right = (svd.u.double() * u).sum(0), (svd.vt.double() * vt).sum(1)
    torch.testing.assert_close(left.abs(), torch.ones_like(left), rtol=0, atol=1e-6)
    torch.testing.assert_close(right, left, rtol=0, atol=1e-6)
