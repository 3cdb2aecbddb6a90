from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binom, norm

from bench.statistics.shares import (
    exact_bounds,
    images_needed,
    images_to_resolve,
    mcnemar_p,
    most_shown,
    paired_drop,
    resolution,
    share_of,
    tango_interval,
    trials_to_show,
)


def flags(worse: int, better: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    dense, pruned = np.ones(images, dtype=bool), np.ones(images, dtype=bool)
    pruned[:worse] = False
    dense[worse : worse + better] = False
    return dense, pruned


def score_by_likelihood(drop: float, worse: int, better: int, images: int) -> float:
    """Tango's statistic with the restricted likelihood maximised numerically."""

    def cost(only_pruned: float) -> float:
        shares = (only_pruned + drop, only_pruned, 1 - drop - 2 * only_pruned)
        counts = (worse, better, images - worse - better)
        return -sum(n * math.log(p) for n, p in zip(counts, shares, strict=True) if n)

    low, high = max(0.0, -drop) + 1e-12, (1 - drop) / 2 - 1e-12
    best = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    difference = worse - better - images * drop
    return difference / math.sqrt(images * (2 * best + drop * (1 - drop)))


@pytest.mark.parametrize(
    ("worse", "better", "images", "confidence", "expected"),
    [
        # R package PropCIs 0.3-0, scoreci.mp(25, 28, 618, 0.90), which reports (c - b) / n
        (28, 25, 618, 0.90, (-0.0148, 0.0247)),
        # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014) 2850: airway data, 1/7 of 21
        (1, 7, 21, 0.95, (-0.517, -0.026)),
    ],
)
def test_published_intervals(
    worse: int, better: int, images: int, confidence: float, expected: tuple[float, float]
) -> None:
    digits = 4 if images > 100 else 3
    found = tango_interval(worse, better, images, tail=(1 - confidence) / 2)
    assert tuple(round(bound, digits) for bound in found) == expected


@pytest.mark.parametrize(
    ("worse", "better", "images"), [(12, 5, 360), (40, 20, 160), (3, 1, 50), (0, 6, 200)]
)
def test_interval_against_a_numerical_likelihood(worse: int, better: int, images: int) -> None:
    z = norm.ppf(0.975)
    observed = (worse - better) / images
    low = brentq(lambda d: score_by_likelihood(d, worse, better, images) - z, -0.6, observed - 1e-6)
    high = brentq(lambda d: score_by_likelihood(d, worse, better, images) + z, observed + 1e-6, 0.6)
    assert tango_interval(worse, better, images, tail=0.025) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 5000))
def test_interval_brackets_and_mirrors(worse: int, better: int, images: int) -> None:
    low, high = tango_interval(worse, better, images, tail=0.05)
    assert -1 <= low < (worse - better) / images < high <= 1
    mirrored = tango_interval(better, worse, images, tail=0.05)
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_no_flips_still_leaves_doubt() -> None:
    found = paired_drop(*flags(0, 0, 360), confidence=0.95)
    z2 = norm.ppf(0.95) ** 2
    assert found.drop_pp == 0
    assert found.at_most_pp == pytest.approx(100 * z2 / (360 + z2))
    assert found.at_least_pp == pytest.approx(-found.at_most_pp)
    assert found.low_pp < found.at_least_pp < 0 < found.at_most_pp < found.high_pp
    assert (found.mcnemar_p, found.agreement) == (1.0, 1.0)


def test_paired_drop_counts_flips() -> None:
    found = paired_drop(*flags(30, 10, 1000), confidence=0.95)
    assert (found.images, found.flips_to_wrong, found.flips_to_right) == (1000, 30, 10)
    assert found.drop_pp == pytest.approx(2.0)
    assert found.agreement == pytest.approx(0.96)
    assert found.mcnemar_p == pytest.approx(exact_mcnemar(30, 10), rel=1e-12)


@pytest.mark.parametrize(
    ("dense", "pruned"), [([], []), ([True], [True, False]), ([[True]], [[True]])]
)
def test_paired_drop_refuses_what_is_not_paired(dense: list[bool], pruned: list[bool]) -> None:
    with pytest.raises(ValueError, match="pair"):
        paired_drop(dense, pruned, confidence=0.95)


def exact_mcnemar(worse: int, better: int) -> float:
    """The definition, in whole numbers: twice the tail of a fair coin."""
    flips = worse + better
    tail = term = 1
    for k in range(min(worse, better)):
        term = term * (flips - k) // (k + 1)
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**flips)))


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_exact_binomial(worse: int, better: int) -> None:
    assert mcnemar_p(worse, better) == pytest.approx(exact_mcnemar(worse, better), rel=1e-12)


def test_mcnemar_of_large_counts_does_not_overflow() -> None:
    assert mcnemar_p(5000, 5400) == pytest.approx(exact_mcnemar(5000, 5400), rel=1e-12)


@pytest.mark.parametrize(
    ("worse", "better"), [(0.0, 0.0), (0.005, 0.005), (0.03, 0.01), (0.06, 0.05), (0.002, 0.0)]
)
def test_interval_covers(worse: float, better: float) -> None:
    images, runs = 360, 600
    rng = np.random.default_rng(11)
    truth = worse - better
    missed = passed = failed = 0
    counts = rng.multinomial(images, [worse, better, 1 - worse - better], size=runs)
    for lost, won, _ in counts.tolist():
        low, high = tango_interval(lost, won, images, tail=0.025)
        missed += not low <= truth <= high
        at_least, at_most = tango_interval(lost, won, images, tail=0.05)
        passed += at_most < truth  # a limit just below the truth would be passed
        failed += at_least > truth
    # Counts are discrete: the exact error of a score interval swings around its level.
    assert max(missed, passed, failed) <= binom.ppf(0.999, runs, 0.065)


def test_resolution_falls_with_images_and_rises_with_flips() -> None:
    z2 = norm.ppf(0.95) ** 2
    assert resolution(360, confidence=0.95) == pytest.approx(100 * z2 / (360 + z2))
    assert resolution(3600, confidence=0.95) < resolution(360, confidence=0.95)
    assert resolution(360, confidence=0.95, flips=0.06) > resolution(360, confidence=0.95)
    # The textbook z sqrt(flips / images) for many images: 1.645 sqrt(0.1 / 50 000).
    assert resolution(50_000, confidence=0.95, flips=0.10) == pytest.approx(0.23, abs=0.005)


def test_images_needed_decides_and_one_fewer_does_not() -> None:
    for worse, better, limit in ((0, 0, 0.5), (6, 4, 1.0), (20, 2, 1.0)):
        needed = images_needed(limit, worse=worse, better=better, images=360, confidence=0.95)
        assert needed is not None
        for count, decided in ((needed, True), (needed - 1, False)):
            scale = count / 360
            low, high = tango_interval(worse * scale, better * scale, count, tail=0.05)
            assert (high <= limit / 100 or low > limit / 100) is decided


def test_no_number_of_images_decides_a_drop_on_the_limit() -> None:
    assert images_needed(1.0, worse=4, better=0, images=400, confidence=0.95) is None


@pytest.mark.parametrize("limit", [0.1, 0.5, 1.0, 3.0])
def test_images_to_resolve_a_drop(limit: float) -> None:
    z2 = norm.ppf(0.95) ** 2
    needed = images_to_resolve(limit, confidence=0.95)
    # Without flips the bound is z^2 / (n + z^2).
    assert needed == math.ceil(z2 * (100 / limit - 1))


def test_no_number_of_images_resolves_a_drop_of_zero() -> None:
    assert images_to_resolve(0.0, confidence=0.95) is None


# A share alone

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, st.sampled_from([0.01, 0.025, 0.05]))
def test_each_bound_leaves_its_tail(counts: tuple[int, int], tail: float) -> None:
    """The definition: at the bound, what was seen or more extreme has that probability."""
    successes, count = counts
    low, high = exact_bounds(successes, count, tail=tail)
    assert low <= successes / count <= high
    if successes:
        assert binom.sf(successes - 1, count, low) == pytest.approx(tail, rel=1e-6)
    if successes < count:
        assert binom.cdf(successes, count, high) == pytest.approx(tail, rel=1e-6)


def test_where_all_succeed_the_bound_has_a_closed_form() -> None:
    found = share_of(300, 300, confidence=0.95)
    assert (found.share, found.high, found.at_most) == (1.0, 1.0, 1.0)
    assert found.at_least == pytest.approx(math.exp(math.log(0.05) / 300))
    assert found.low < found.at_least
    assert most_shown(300, confidence=0.95) == pytest.approx(found.at_least)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.999])
def test_the_fewest_trials_that_show_a_share(share: float) -> None:
    needed = trials_to_show(share, confidence=0.95)
    assert needed is not None
    assert share_of(needed, needed, confidence=0.95).at_least >= share
    assert share_of(needed - 1, needed - 1, confidence=0.95).at_least < share


def test_a_share_of_all_cannot_be_shown() -> None:
    assert trials_to_show(1.0, confidence=0.95) is None
    assert trials_to_show(0.0, confidence=0.95) == 1


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        share_of(successes, count, confidence=0.95)
