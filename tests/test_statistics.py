"""Means, errors and intervals: scipy's numbers, closed forms, and every resample there is."""

import itertools
import math

import numpy as np
import pytest

from tether.errors import ConfigError, UnknownNameError
from tether.statistics import Difference, Scores, paired, ratio

X = np.array([2.1, 1.9, 3.4, 2.8, 2.2, 5.0, 1.1, 2.6])
Y = np.array([2.0, 2.1, 2.9, 2.5, 2.3, 4.1, 1.2, 2.2])
COUNTS = np.array([3, 5, 4, 7, 2, 6, 1, 4])
ROUNDING = 1e-12  # float64 sums of a few numbers near 1


def test_equal_counts_give_the_standard_error_of_the_mean():
    found = ratio(X)
    # scipy.stats.sem(X) of scipy 1.17.1
    assert found.error == pytest.approx(0.4135808350768409, rel=ROUNDING)
    assert found.value == pytest.approx(X.mean(), rel=ROUNDING)
    grouped = ratio(5 * X, np.full(8, 5))
    assert (grouped.value, grouped.error) == pytest.approx((found.value, found.error))


def test_of_right_and_wrong_it_is_the_binomial_error():
    right = np.array([1, 0, 1, 1, 0, 1, 1])
    share = 5 / 7
    found = ratio(right)
    assert found.value == pytest.approx(share)
    assert found.error == pytest.approx(math.sqrt(share * (1 - share) / 6), rel=ROUNDING)
    assert ratio(np.ones(5)).error == 0


def test_a_mean_of_groups_weighs_every_value_alike():
    """And its error is what resampling by hand finds: the linear term of the ratio's variance."""
    generator = np.random.default_rng(3)
    counts = generator.integers(1, 60, size=4000)
    sums = np.array([generator.normal(2, 1, size=n).sum() for n in counts])
    found = ratio(sums, counts)
    assert found.value == pytest.approx(sums.sum() / counts.sum(), rel=ROUNDING)
    # Independent values: s/√(all of them); 4000 groups give the error to about 2 %.
    assert found.error == pytest.approx(1 / math.sqrt(counts.sum()), rel=0.1)
    # Values that agree within a group are worth one each: not so many are independent.
    agreeing = ratio(counts * generator.normal(2, 1, size=4000), counts)
    expected = math.sqrt(np.square(counts).sum()) / counts.sum()
    assert agreeing.error == pytest.approx(expected, rel=0.1)


def test_one_unit_has_no_error():
    assert ratio([3.0], [2]).value == 1.5
    assert ratio([3.0], [2]).error is None
    found = paired([3.0], [1.0])
    assert (found.value, found.error, found.low, found.high) == (2.0, None, None, None)
    assert found.within_noise


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        # scipy.stats.bootstrap(…, paired=True, method="percentile") of scipy 1.17.1, NumPy 2.4.6,
        # with numpy.random.default_rng of the same seed: the same resamples.
        ({"seed": 0}, (0.0, 0.4750000000000001)),
        ({"counts": COUNTS, "seed": 7}, (0.0, 0.10625504032258064)),
        (
            {"counts": COUNTS, "seed": 7, "level": 0.8, "resamples": 999},
            (0.02000000000000005, 0.08888888888888885),
        ),
    ],
)
def test_the_interval_is_that_of_scipy(options, interval):
    found = paired(X, Y, **options)
    assert (found.low, found.high) == pytest.approx(interval, abs=ROUNDING)
    counts = options.get("counts", np.ones(8))
    assert found.value == pytest.approx((X - Y).sum() / counts.sum(), rel=ROUNDING)
    assert found.error == ratio(X - Y, counts).error


def test_the_interval_nears_that_of_every_possible_resample():
    change, counts = np.array([0.3, -0.1, 0.8, 0.25, 0.4]), np.array([1, 4, 2, 3, 2])
    every = np.array(
        [
            change[list(chosen)].sum() / counts[list(chosen)].sum()
            for chosen in itertools.product(range(5), repeat=5)
        ]
    )
    found = paired(change, np.zeros(5), counts, resamples=200_000, level=0.5)
    # Five standard deviations of a share among 200,000 draws; values that are equal count as both.
    sure = 5 * math.sqrt(0.25 * 0.75 / 200_000)
    for end, share in ((found.low, 0.25), (found.high, 0.75)):
        below, up_to = (every < end - ROUNDING).mean(), (every < end + ROUNDING).mean()
        assert below - sure <= share <= up_to + sure


def test_pairs_are_drawn_together():
    """What both measurements share takes no part: apart they would be far from sure."""
    shared = np.random.default_rng(0).normal(0, 100, size=50)
    found = paired(shared + 1.0, shared)
    assert (found.low, found.high) == pytest.approx((1, 1), abs=1e-9)
    assert not found.within_noise


def test_a_difference_of_nothing_is_within_noise():
    noise = np.random.default_rng(1).normal(size=200)
    assert paired(noise, -noise[::-1]).within_noise
    assert paired(X, X).within_noise
    assert not paired(Y, Y + 1).within_noise


@pytest.mark.parametrize(
    ("low", "high", "within"), [(0.0, 1.0, True), (-1.0, 0.0, True), (0.1, 1.0, False)]
)
def test_an_interval_that_ends_at_0_contains_it(low, high, within):
    found = Difference(0.5, 0.1, low, high, 0.95, 10)
    assert found.within_noise is within
    assert found.to_dict()["within_noise"] is within
    assert found.to_dict()["interval"] == [low, high]


def test_the_same_seed_is_the_same_interval_in_any_chunk(monkeypatch):
    whole = paired(X, Y, COUNTS, seed=4)
    monkeypatch.setattr("tether.statistics._CHUNK", 24)
    assert paired(X, Y, COUNTS, seed=4) == whole
    assert paired(X, Y, COUNTS, seed=5) != whole


def test_scores_are_compared_by_name():
    scores = Scores({None: X, "a": Y}, COUNTS)
    assert scores.mean("a") == ratio(Y, COUNTS)
    assert scores.difference("a", None, seed=3) == paired(Y, X, COUNTS, seed=3)
    with pytest.raises(UnknownNameError, match="no scores of 'b'"):
        scores.mean("b")


@pytest.mark.parametrize(
    ("sums", "counts", "said"),
    [
        ([], None, "at least one unit"),
        ([1.0, 2.0], [1], "one length"),
        ([[1.0]], None, "one length"),
        ([1.0, math.nan], None, "finite"),
        ([1.0], [0], "at least 1"),
    ],
)
def test_what_is_no_measurement_is_refused(sums, counts, said):
    with pytest.raises(ConfigError, match=said):
        ratio(sums, counts)


def test_settings_that_cannot_be_meant_are_refused():
    for wrong in ({"resamples": 0}, {"level": 0.0}, {"level": 1.0}, {"level": math.nan}):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            paired(X, Y, **wrong)
    with pytest.raises(ConfigError, match="8 and 7 units"):
        paired(X, Y[:7])
