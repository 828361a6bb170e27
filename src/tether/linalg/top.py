"""The largest singular triplets, by the cheapest way that is good enough, with a certificate."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.errors import ConfigError
from tether.linalg.bottom import backward_error, gram_eigenvectors
from tether.linalg.checks import check_rank
from tether.linalg.estimate import CLUSTER, EPS, ROUNDING, Estimate, Unseen, estimate, rounded
from tether.linalg.lanczos import Apply, Lanczos
from tether.linalg.precision import full_precision
from tether.linalg.tall import Tall, fast_bfloat16
from tether.linalg.triplets import Certificate, TruncatedSVD, finish

CRITERIA = ("product", "excess")
_SMALL = 256  # short sides up to this: all eigenvectors of the Gram matrix cost less
_GRAM = 1024  # short sides up to this: one Gram matrix costs less than two products a step
# Product errors above this are not estimated within a factor of 3 of the truth.
_LOOSEST = 2e-2
_STEEPEST = 3e-2  # nor where the angles, all alike, are above this
# An estimate was 0.6 to 1.1 times the truth on weights of a real spectrum, and half of it on flat
# ones: stop when it is this much below the tolerance, rounding aside. The excess goes with the
# square of the error.
_MARGINS = {"product": 0.5, "excess": 0.25}
_EXACT = 1e-6  # product errors that are rounding
_FINE = 5e-6  # tolerances that ask for float64 in the small matrix too
_RANGE = (1e-30, 1e30)  # scales at which float32 is not at its end


@dataclass(frozen=True, slots=True)
class Aim:
    """What is wanted of the leading `rank` triplets.

    Attributes:
        rank: how many.
        tolerance: largest error accepted.
        criterion: of which error.
    """

    rank: int
    tolerance: float
    criterion: str

    @property
    def precision(self) -> torch.dtype:
        """Of the eigenvectors of the small matrix; the half step on W sets their mixing right."""
        fine = self.criterion == "product" and self.tolerance < _FINE
        return torch.float64 if fine else torch.float32

    @property
    def rough(self) -> bool:
        """Whether bfloat16 products are good enough: they reach 2e-3, and an excess of 1e-7."""
        return self.tolerance >= (1e-2 if self.criterion == "product" else 5e-7)

    @property
    def limit(self) -> float:
        """Estimates up to this are good enough."""
        certain = ROUNDING if self.criterion == "product" else 0.0
        return certain + _MARGINS[self.criterion] * (self.tolerance - certain)

    def met(self, found: Estimate) -> bool:
        """Whether an estimate is good enough.

        Args:
            found: the estimate.

        Returns:
            True if it is.
        """
        if self.criterion == "excess" and found.product <= _EXACT:
            return True  # of a weight of low rank, whose best residual is rounding
        sound = found.product <= _LOOSEST and found.angle <= _STEEPEST
        return sound and self.error(found) <= self.limit

    def error(self, found: Estimate) -> float:
        """The error that counts.

        Args:
            found: the estimate.

        Returns:
            its product or excess.
        """
        return found.product if self.criterion == "product" else found.excess


@torch.no_grad()
def top_svd(
    weight: Tensor,
    rank: int,
    tolerance: float = 1e-5,
    *,
    criterion: str = "product",
    seed: int = 0,
) -> TruncatedSVD:
    """The `rank` largest singular triplets, and an estimate of their error.

    Block Lanczos on WᵀW until the estimate meets the tolerance, then Rayleigh-Ritz on the weight
    itself, with float64 for all small matrices; on small weights, and where Lanczos does not
    converge, all eigenvectors of WᵀW in float64.

    Args:
        weight: (m, n), any floating dtype, on any device, finite; read, never written. A weight
            in half precision of more than 2²⁶ values is read in panels; only the dense route
            copies it whole, in float64. A float64 weight is rounded to float32, but for the
            dense route.
        rank: 1 <= rank <= min(m, n).
        tolerance: largest error accepted; a product error above 2e-2 is never
            accepted.
        criterion: of which error: "product", |P − W_r|_F / |W_r|_F, or "excess",
            |W − P|_F / |W − W_r|_F − 1, which is met much earlier.
        seed: of the first block of vectors. Results of two seeds, devices or numbers of threads
            agree within the certificate; of the same ones they are the same bits.

    Returns:
        TruncatedSVD with its certificate.

    Raises:
        RankTooLargeError: the rank is not possible.
        ConfigError: tolerance or criterion is not one.
        ConvergenceError: not even the dense way meets the tolerance, by its backward error.
    """
    check_rank(weight, rank)
    if criterion not in CRITERIA:
        raise ConfigError(f"criterion {criterion!r} is not one of {', '.join(CRITERIA)}.")
    if not 0 < tolerance < math.inf:
        raise ConfigError(f"tolerance must be a positive number, not {tolerance!r}.")
    with full_precision():
        return _solve(weight, Aim(rank, tolerance, criterion), seed)


def _solve(weight: Tensor, aim: Aim, seed: int) -> TruncatedSVD:
    """By the cheapest way that meets the aim."""
    tall = Tall.of(weight)
    short = min(weight.shape)
    ordinary = tall.norm > 0 and _RANGE[0] < tall.scale < _RANGE[1]
    if short <= _SMALL or 3 * aim.rank > short or not ordinary:
        return _dense(weight, aim, "")
    if aim.criterion == "product" and aim.tolerance <= ROUNDING:
        return _dense(weight, aim, f"tolerance {aim.tolerance:.1e} is below float32's rounding")
    reason = ""
    if short > _GRAM and aim.rough and fast_bfloat16(weight.device):
        found = _iterate(tall, aim, seed, "bfloat16", "")
        if isinstance(found, TruncatedSVD):
            return found
        reason = found
    found = _iterate(tall, aim, seed, "gram" if short <= _GRAM else "lanczos", reason)
    return found if isinstance(found, TruncatedSVD) else _dense(weight, aim, found)


def _iterate(tall: Tall, aim: Aim, seed: int, route: str, before: str) -> TruncatedSVD | str:
    """Lanczos; or why it was given up, after what was given up before."""
    n, block = tall.matrix.shape[1], _block(aim.rank)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(block, n, generator=generator).to(tall.matrix.device)
    process = Lanczos.begin(_operator(tall, route), start, min(n, 16 * block))
    wanted = aim.rank + guards(aim.rank)
    # With a Gram matrix a step costs less than a check, so the first one is later.
    check = max(3 * aim.rank, wanted + (12 if route == "gram" else 8) * block)
    history = [(0, 1.0)]
    while process.size + 2 * block <= n:
        process.step()
        if process.size < check and process.size + 2 * block <= n:
            continue
        values, coefficients, couplings = process.ritz(wanted, aim.precision)
        values, couplings = rounded(values, couplings)
        # As of a half step in float64: what its rounding adds, a float64 half step can take away.
        known = (aim.rank, process.unseen(), tall.norm, n)
        found = estimate(values, couplings, *known, torch.float64)
        if aim.met(found):
            rough = estimate(values, couplings, *known, torch.float32)
            precision = torch.float32 if aim.met(rough) else torch.float64
            rows = process.vectors(coefficients).to(precision)
            result, found = _polish(tall, rows, aim, process.unseen(), (route, before))
            if aim.met(found):
                return result
            if route == "bfloat16":
                break  # this is as far as it goes
        history.append((process.size, aim.error(found)))
        if _stalled(history):
            break  # what is left is rounding
        check = _next_check(history, aim.limit, block)
    error = aim.error(found)
    reason = f"{route}: {aim.criterion} error {error:.1e} after {process.size} of {n} vectors"
    return f"{before}; {reason}" if before else reason


def _stalled(history: list[tuple[int, float]]) -> bool:
    """Whether the error converged, and then not by half in the last four checks."""
    return len(history) > 5 and 2 * history[-1][1] > history[-5][1] and history[-5][1] < 0.1


def _operator(tall: Tall, route: str) -> Apply:
    if route == "bfloat16":
        return tall.rough()
    if route == "lanczos":
        return tall.normal
    gram = tall.gram()
    return lambda rows: rows @ gram


def _block(rank: int) -> int:
    """Vectors that are multiplied at a time.

    Never fewer than 16, where the products are slow. On 4096×4096 and rank 64 or 128, 24 took 12 %
    less time than 32, and 12 to 14 % less than 48.
    """
    return 16 if rank <= 16 else 24


def guards(rank: int) -> int:
    """How many triplets beyond the rank are computed.

    They keep the triplets on both sides of the cut apart, and are thrown away.

    Args:
        rank: of the result.

    Returns:
        their number.
    """
    return max(8, min(32, rank // 4))


def _next_check(history: list[tuple[int, float]], limit: float, block: int) -> int:
    """The size at which the error is expected to come below the limit."""
    (before, larger), (size, error) = history[-2:]
    if not 0 < limit < error < larger:
        return size + 3 * block
    rate = math.log(larger / error) / (size - before)
    # Convergence becomes faster: aim short, the more so by the first check alone, and never far.
    short = 0.85 if before else 0.6
    ahead = short * math.log(error / limit) / rate
    return size + max(block, min(int(ahead), 4 * block))


def _polish(
    tall: Tall, rows: Tensor, aim: Aim, unseen: Unseen, route: tuple[str, str]
) -> tuple[TruncatedSVD, Estimate]:
    """Rayleigh-Ritz on W, from vectors that nearly span its leading right space.

    The products are of the dtype of `rows`; everything small is float64. So even by float32
    products, singular values a thousandth of the largest apart are told from each other a hundred
    times as well as by a float32 SVD.
    """
    r = aim.rank
    # Eigenvectors in float32 are orthonormal to 1e-6 only, which would pass for an error.
    rows = torch.linalg.qr(rows.T.double())[0].T.to(rows.dtype)
    basis, inner = torch.linalg.qr(tall.image(rows).T.double())
    back = tall.back(basis.T.to(rows.dtype)).T.double()  # Wᵀ·basis (n, l)
    right, small = torch.linalg.qr(back)
    left, s, turned = torch.linalg.svd(small.T)
    # Before this half step: u' = basis·p, v' = rowsᵀ·qᵀ with W·v' = u'·s'. Its residual costs
    # nothing, and does not rest on what Lanczos believes.
    p, before, q = torch.linalg.svd(inner)
    residual = back @ p - (q @ rows.double()).T * before
    weighted = residual * before
    couplings = (weighted.T @ weighted).cpu()
    known = (r, unseen, tall.norm, tall.matrix.shape[1])
    found = estimate(before.square().cpu(), couplings, *known, rows.dtype)
    error = float(residual[:, :r].norm() / before[:r].norm())
    certificate = Certificate(route[0], found.product, found.excess, found.unique, route[1])
    triplets = ((basis @ left)[:, :r], s[:r] * tall.scale, (turned[:r] @ right.T))
    return finish(triplets, tall.wide, error, certificate), found


def _dense(weight: Tensor, aim: Aim, fallback: str) -> TruncatedSVD:
    """All eigenvectors of WᵀW in float64, then Rayleigh-Ritz, which recovers what squaring lost."""
    rank = aim.rank
    wide = weight.shape[0] < weight.shape[1]
    matrix = (weight.T if wide else weight).double()
    vectors = gram_eigenvectors(matrix)[:, -(rank + guards(rank)) :]
    basis = torch.linalg.qr(matrix @ vectors)[0]
    left, s, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    u = basis @ left
    r = slice(rank)
    residual = torch.cat(
        [matrix @ right[r].T - u[:, r] * s[r], (u[:, r].T @ matrix - s[r, None] * right[r]).T]
    )
    error = backward_error(residual, s[r], weight.shape, aim.tolerance)
    apart = bool(len(s) == rank or s[rank - 1] - s[rank] > CLUSTER * s[0])
    # What is left is the rounding of the result to float32.
    energy = float(s[r].square().sum())
    tail = max(float(matrix.square().sum()) - energy, EPS**2 * energy)
    excess = EPS**2 * energy / (2 * tail) if energy > 0 else 0.0
    certificate = Certificate("dense", EPS, excess, apart, fallback)
    return finish((u[:, r], s[r], right[r]), wide, error, certificate)
