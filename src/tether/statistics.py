"""How sure a measured mean or difference is: standard errors and paired bootstrap intervals.

Source: Cochran 1977, Sampling Techniques, sec. 2.11 and 6.4 (ratio estimator); Efron and
Tibshirani 1993, An Introduction to the Bootstrap, sec. 13.3 (percentile interval).
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tether.errors import ConfigError, UnknownNameError, nearest

Floats = npt.NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 20  # draws held in memory at a time


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean.

    Attributes:
        value: the mean.
        error: its standard error; None where one unit alone was measured.
    """

    value: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two means on the same units are apart.

    Attributes:
        value: first minus second.
        error: its standard error; None where one unit alone was measured.
        low: lower end of the interval; None as `error`.
        high: upper end.
        level: of the interval, such as 0.95.
        resamples: that the interval was made of.
    """

    value: float
    error: float | None
    low: float | None
    high: float | None
    level: float
    resamples: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains 0, or there is none: the sign is then not sure."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """The difference as JSON values.

        Returns:
            every attribute, and within_noise.
        """
        return {
            "value": self.value,
            "error": self.error,
            "interval": None if self.low is None else [self.low, self.high],
            "level": self.level,
            "resamples": self.resamples,
            "within_noise": self.within_noise,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What several models scored on the same units, such as the loss of each sequence.

    Attributes:
        sums: key of the model -> (units,) summed score of each unit.
        counts: (units,) how many scores are in each sum, such as tokens; each at least 1.
    """

    sums: Mapping[Hashable, Floats]
    counts: npt.NDArray[np.int64]

    def mean(self, key: Hashable) -> Estimate:
        """The mean score of a model.

        Args:
            key: of the model.

        Returns:
            mean over all that was counted, with the standard error over units.

        Raises:
            UnknownNameError: there is no such model.
        """
        return ratio(self._of(key), self.counts)

    def difference(
        self,
        first: Hashable,
        second: Hashable,
        *,
        resamples: int = RESAMPLES,
        level: float = LEVEL,
        seed: int = 0,
    ) -> Difference:
        """How far two models are apart, unit by unit.

        Args:
            first: key of a model.
            second: key of the one that is taken off.
            resamples: of the bootstrap.
            level: of the interval.
            seed: of the bootstrap.

        Returns:
            mean of first minus mean of second.

        Raises:
            UnknownNameError: there is no such model.
        """
        return paired(
            self._of(first),
            self._of(second),
            self.counts,
            resamples=resamples,
            level=level,
            seed=seed,
        )

    def _of(self, key: Hashable) -> Floats:
        if key not in self.sums:
            known = nearest(str(key), map(str, self.sums))
            raise UnknownNameError(f"there are no scores of {key!r}. {known}")
        return self.sums[key]


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> Estimate:
    """The mean of grouped values, R = Σxᵢ/Σnᵢ, with the groups as independent units.

    error² = N/(N − 1) · Σ(xᵢ − R·nᵢ)² / (Σnᵢ)², which for equal nᵢ is s/√N, and for 0 and 1 as
    values √(p(1 − p)/(N − 1)). It is too small where units depend on each other, as blocks cut
    from one text do.

    Args:
        sums: (N,) sum of each unit's values, finite.
        counts: (N,) number of each unit's values, positive; None for 1 each.

    Returns:
        R and its standard error.

    Raises:
        ConfigError: no unit, shapes that differ, values that are not finite, or a count below 1.
    """
    x, n = _checked(sums, counts)
    value = float(x.sum() / n.sum())
    if len(x) == 1:
        return Estimate(value, None)
    residual = float(np.square(x - value * n).sum())
    return Estimate(value, math.sqrt(len(x) / (len(x) - 1) * residual) / float(n.sum()))


def paired(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Difference:
    """How far the means of two measurements of the same units are apart.

    The interval is the percentile bootstrap's: units are drawn with replacement, both measurements
    of a unit together. With fewer than about 20 units it is too narrow.

    Args:
        first: (N,) sum of each unit's values, finite.
        second: (N,) the same of the other measurement.
        counts: (N,) number of each unit's values, positive; None for 1 each.
        resamples: how often N units are drawn.
        level: share of the resamples that the interval holds, in (0, 1).
        seed: the same seed draws the same units, so that intervals of one N belong together.

    Returns:
        first minus second, per counted value.

    Raises:
        ConfigError: as `ratio`; or fewer than 1 resample, or a level outside (0, 1).
    """
    if not (isinstance(resamples, int) and resamples >= 1 and 0 < level < 1):
        raise ConfigError(
            f"resamples {resamples!r} must be at least 1, and level {level!r} between 0 and 1."
        )
    x, n = _checked(first, counts)
    y, _ = _checked(second, counts)
    if len(x) != len(y):
        raise ConfigError(f"{len(x)} and {len(y)} units: give both measurements of the same units.")
    change = x - y
    found = ratio(change, n)
    if found.error is None:
        return Difference(found.value, None, None, None, level, resamples)
    drawn = _resampled(change, n, resamples, np.random.default_rng(seed))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(found.value, found.error, float(low), float(high), level, resamples)


def _resampled(x: Floats, n: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """The ratio of each resample; the same whatever the chunk."""
    size = max(1, _CHUNK // len(x))
    found = np.empty(resamples)
    for first in range(0, resamples, size):
        rows = min(size, resamples - first)
        chosen = generator.integers(len(x), size=(rows, len(x)))
        found[first : first + rows] = x[chosen].sum(axis=1) / n[chosen].sum(axis=1)
    return found


def _checked(sums: npt.ArrayLike, counts: npt.ArrayLike | None) -> tuple[Floats, Floats]:
    x = np.asarray(sums, dtype=np.float64)
    n = np.ones_like(x) if counts is None else np.asarray(counts, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0 or n.shape != x.shape:
        raise ConfigError(
            f"sums {x.shape} and counts {n.shape} must be of one length, and of at least one unit."
        )
    if not (np.isfinite(x).all() and np.isfinite(n).all() and (n >= 1).all()):
        raise ConfigError("sums must be finite, and counts at least 1.")
    return x, n
