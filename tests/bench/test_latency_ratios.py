from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, quantile_test

from bench.statistics.latency_ratios import (
    Blocks,
    autocorrelation_time,
    change_interval,
    drift,
    median,
    median_change_interval,
    median_interval,
    median_ratio_interval,
    percentile,
    percentile_bounds,
    queries_needed,
    summary,
)

SAMPLES = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=200)


def test_percentile_follows_trtexec() -> None:
    for count, percent, expected in (
        # index max(N - 1 - int((1 - p/100) N), 0), worked out by hand on 1..N
        (10, 90, 9),
        (10, 99, 10),
        (100, 90, 90),
        (100, 95, 95),
        (100, 99, 99),
        (1000, 99, 990),
        (7, 90, 7),
        (20, 95, 19),
        (5, 50, 3),
        (3, 0, 1),
        (1, 99, 1),
    ):
        shuffled = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
        assert percentile(shuffled, percent) == expected


@given(SAMPLES, st.integers(0, 100), st.integers(0, 100))
def test_percentile_is_a_sample_and_rises(samples: list[float], one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert percentile(samples, low) in samples
    assert percentile(samples, low) <= percentile(samples, high)


def test_median_averages_the_middle_pair() -> None:
    assert median([4.0, 1.0, 2.0, 9.0]) == 3.0
    assert median([4.0, 1.0, 2.0]) == 2.0


def test_summary_by_hand() -> None:
    found = summary([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (found.calls, found.min_ms, found.max_ms) == (8, 2.0, 9.0)
    assert (found.median_ms, found.mean_ms) == (4.5, 5.0)
    assert found.variation == pytest.approx(2.0 / 5.0)  # the textbook example of deviation 2
    assert found.p99_at_most_ms is None


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_statistics_refuse_what_is_no_sample(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="sample"):
        summary(samples)


def test_queries_needed_are_those_of_mlperf_early_stopping() -> None:
    assert queries_needed(90) == 64
    assert queries_needed(99) == 662
    assert binom.cdf(1, 662, 0.01) <= 0.01 < binom.cdf(1, 661, 0.01)


def test_p99_has_bounds_from_662_calls_on() -> None:
    samples = np.random.default_rng(0).exponential(size=662)
    assert summary(samples[:661]).p99_at_most_ms is None
    found = summary(samples)
    assert found.p99_at_most_ms == samples.max()
    assert found.p99_at_least_ms is not None
    assert found.p99_at_least_ms < found.p99_ms <= found.p99_at_most_ms


def test_p99_bounds_against_scipy() -> None:
    count, samples = 5000, np.arange(5000.0)
    allowed = max(t for t in range(200) if binom.cdf(t, count, 0.01) <= 0.01)
    surprising = min(m for m in range(200) if binom.sf(m - 1, count, 0.01) <= 0.01)
    expected = (samples[count - surprising], samples[count - allowed])
    assert percentile_bounds(samples, 99, confidence=0.99) == expected


def test_bounds_of_p99_are_the_calls_that_the_binomial_names() -> None:
    """In whole numbers: P(at most k of n calls exceed p99) is ``below[k] / 100**n``."""
    for count in (1, 100, 458, 459, 661, 662, 663, 900, 2000):
        masses = (math.comb(count, k) * 99 ** (count - k) for k in range(count + 1))
        below, whole = [], 0
        for mass in masses:
            whole += mass
            below.append(whole)
        allowed = sum(100 * tail <= 100**count for tail in below) - 1
        expected: tuple[float | None, float | None] = (None, None)
        if allowed >= 1:
            surprising = next(k for k, tail in enumerate(below) if 100 * tail >= 99 * 100**count)
            expected = (count - surprising - 1, count - allowed)
        assert percentile_bounds(np.arange(count), 99, confidence=0.99) == expected


def test_p99_bounds_cover() -> None:
    rng, truth, runs = np.random.default_rng(3), -np.log(0.01), 300
    above = below = 0
    for _ in range(runs):
        low, high = percentile_bounds(rng.exponential(size=1500), 99, confidence=0.99)
        assert low is not None
        assert high is not None
        above += low > truth
        below += high < truth
    assert max(above, below) <= binom.ppf(0.9999, runs, 0.01)


def test_ratio_of_identical_blocks_is_one_exactly() -> None:
    blocks = [1.0, 1.2, 0.9, 1.1]
    found = median_ratio_interval(blocks, blocks, confidence=0.95)
    assert (found.ratio, found.low, found.high, found.at_least, found.at_most) == (1, 1, 1, 1, 1)
    assert found.rounds == 4


def test_what_slows_whole_rounds_cancels() -> None:
    drift = np.exp(np.random.default_rng(0).normal(0, 0.5, 30))
    found = median_ratio_interval(drift, 0.7 * drift, confidence=0.95)
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(0.7)


def test_one_sided_bounds_lie_inside_the_interval() -> None:
    rng = np.random.default_rng(1)
    dense, pruned = rng.lognormal(0, 0.1, (2, 25))
    found = median_ratio_interval(dense, pruned, confidence=0.9)
    assert found.low < found.at_least < found.ratio < found.at_most < found.high
    wider = median_ratio_interval(dense, pruned, confidence=0.8)
    # A one-sided bound at 90 % is an end of the two-sided interval at 80 %.
    assert (wider.low, wider.high) == pytest.approx((found.at_least, found.at_most))


@pytest.mark.parametrize("rounds", [2, 3, 8, 21, 80])
def test_the_ratio_is_the_median_of_the_rounds_and_its_bounds_are_rounds(rounds: int) -> None:
    dense, pruned = np.random.default_rng(rounds).lognormal(0, 0.1, (2, rounds))
    found = median_ratio_interval(dense, pruned, confidence=0.95)
    ratios = pruned / dense
    assert found.ratio == pytest.approx(np.exp(np.median(np.log(ratios))))
    ends = [found.low, found.high, found.at_least, found.at_most]
    assert all(np.isclose(ratios, end, rtol=1e-12).any() for end in ends)


@pytest.mark.parametrize("rounds", [40, 76, 250])
def test_bounds_are_those_of_the_sign_test_of_scipy(rounds: int) -> None:
    drawn = (np.random.default_rng(seed).lognormal(0, 0.1, (2, rounds)) for seed in range(99))
    # Of a sample that looks as independent as it is, which scipy takes for granted.
    dense, pruned = next(x for x in drawn if autocorrelation_time(np.log(x[1] / x[0])) == 1)
    found, ratios = median_ratio_interval(dense, pruned, confidence=0.95), np.sort(pruned / dense)
    for bound, other, side in (
        (found.at_least, 0, "greater"),
        (found.at_most, 1, "less"),
        (found.low, 0, "two-sided"),
        (found.high, 1, "two-sided"),
    ):
        expected = quantile_test(ratios, p=0.5, alternative=side).confidence_interval(0.95)[other]
        # Student's quantile for the normal one may cost a place, never gain one.
        places = np.searchsorted(ratios, [bound * (1 - 1e-9), expected * (1 - 1e-9)])
        assert 0 <= (places[1] - places[0]) * (1 - 2 * other) <= 1


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=2, max_size=40))
def test_the_ratio_of_swapped_networks_is_the_inverse(blocks: list[tuple[float, float]]) -> None:
    dense, pruned = zip(*blocks, strict=True)
    found = median_ratio_interval(dense, pruned, confidence=0.95)
    swapped = median_ratio_interval(pruned, dense, confidence=0.95)
    assert found.low <= found.at_least <= found.ratio <= found.at_most <= found.high
    assert swapped.ratio == pytest.approx(1 / found.ratio)
    assert swapped.low == pytest.approx(1 / found.high)
    assert swapped.at_most == pytest.approx(1 / found.at_least)


def test_the_interval_is_as_wide_as_a_median_is_uncertain() -> None:
    dense, pruned = np.random.default_rng(2).lognormal(0, 0.1, (2, 20_000))
    found = median_ratio_interval(dense, 0.8 * pruned, confidence=0.95)
    assert found.low < 0.8 < found.high
    # The textbook standard error of the median of normal values: sigma sqrt(pi / 2 / n).
    expected = 1.96 * 0.1 * np.sqrt(2) * np.sqrt(np.pi / 2 / 20_000)
    assert np.log(found.high / found.low) / 2 == pytest.approx(expected, rel=0.1)


def test_rounds_that_were_struck_by_something_else_do_not_widen_it() -> None:
    dense, pruned = np.random.default_rng(7).lognormal(0, 0.01, (2, 60))
    struck = pruned.copy()
    struck[::10] *= 40
    calm, found = (median_ratio_interval(dense, x, confidence=0.95) for x in (pruned, struck))
    assert np.log(found.high / found.low) < 2 * np.log(calm.high / calm.low)


@pytest.mark.parametrize(
    ("dense", "pruned", "words"),
    [([1.0, 2.0], [1.0], "paired"), ([], [], "sample"), ([1.0], [0.0], "duration")],
)
def test_ratio_refuses(dense: list[float], pruned: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        median_ratio_interval(dense, pruned, confidence=0.95)


def autoregressive(rng: np.random.Generator, correlation: float, count: int) -> np.ndarray:
    values, shocks = np.zeros(count), rng.normal(size=count)
    values[0] = shocks[0] / np.sqrt(1 - correlation**2)
    for t in range(1, count):
        values[t] = correlation * values[t - 1] + shocks[t]
    return values


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_autocorrelation_time_of_a_known_process(correlation: float) -> None:
    rng = np.random.default_rng(4)
    times = [autocorrelation_time(autoregressive(rng, correlation, 3000)) for _ in range(20)]
    # Of an autoregressive process of order one; ranks lose a little of the correlation.
    assert np.mean(times) == pytest.approx((1 + correlation) / (1 - correlation), rel=0.1)


def test_a_short_series_does_not_look_more_independent_than_it_is() -> None:
    rng = np.random.default_rng(4)
    times = [autocorrelation_time(autoregressive(rng, 0.6, 80)) for _ in range(300)]
    # Without the correction for the mean of the series it comes out at 3.4.
    assert np.median(times) == pytest.approx(4.0, rel=0.08)


@given(SAMPLES)
def test_autocorrelation_time_is_that_of_ranks_and_within_its_range(samples: list[float]) -> None:
    found = autocorrelation_time(np.array(samples))
    assert 1 <= found <= max(1, len(samples) / 2)
    assert autocorrelation_time(np.array(samples) ** 3) == pytest.approx(found)


def test_autocorrelation_time_of_what_does_not_change() -> None:
    assert autocorrelation_time(np.full(30, 2.0)) == 1
    assert autocorrelation_time(np.ones(1)) == 1
    assert autocorrelation_time(np.arange(40.0)) > 12, "a drift tells next to nothing"


def test_median_interval_has_the_unit_of_its_blocks() -> None:
    assert median_interval([4.0] * 9, confidence=0.95).at_most == pytest.approx(4.0)
    blocks = np.random.default_rng(6).lognormal(1, 0.05, 40)
    found, scaled = (median_interval(b, confidence=0.95) for b in (blocks, 1000 * blocks))
    assert found.low < found.at_least < np.exp(1) < found.at_most < found.high
    assert scaled.at_most == pytest.approx(1000 * found.at_most)


def measured(rng: np.random.Generator, ratio: float, rounds: int, speed: float = 1.0) -> Blocks:
    shared = speed * np.exp(rng.normal(0, 0.05, rounds))
    dense, pruned = shared * np.exp(rng.normal(0, 0.05, (2, rounds)))
    return Blocks(ratio * pruned, dense)


def test_a_change_is_that_of_the_ratio_or_of_the_median() -> None:
    rng = np.random.default_rng(8)
    then, now = measured(rng, 0.5, 400), measured(rng, 0.6, 300)
    ratio = change_interval(then, now, confidence=0.95)
    assert ratio.low < 1.2 < ratio.high
    assert ratio.rounds == 300
    median = median_change_interval(then, now, confidence=0.95)
    assert median.ratio == pytest.approx(np.median(now.pruned) / np.median(then.pruned))
    assert median.low < 1.2 < median.high


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.0, 1.3])
def test_what_the_reference_moved_leaves_both_changes_open(speed: float) -> None:
    """By half of it (of its logarithm) the ratio, by one and a half of it the time alone."""
    ones = np.ones(40)
    then, now = Blocks(0.5 * ones, ones), Blocks(0.55 * speed * ones, speed * ones)
    assert drift(then, now) == pytest.approx(speed)
    assert drift(now, then) == pytest.approx(1 / speed)
    ratio = change_interval(then, now, confidence=0.95)
    doubt = max(speed, 1 / speed) ** 0.5
    assert ratio.ratio == pytest.approx(1.1)
    assert (ratio.low, ratio.at_least) == pytest.approx((1.1 / doubt, 1.1 / doubt))
    assert (ratio.high, ratio.at_most) == pytest.approx((1.1 * doubt, 1.1 * doubt))
    alone = median_change_interval(then, now, confidence=0.95)
    assert alone.ratio == pytest.approx(1.1 * speed)
    slower, faster = max(speed, 1.0) ** 1.5, max(1 / speed, 1.0) ** 1.5
    assert (alone.low, alone.at_least) == pytest.approx((1.1 * speed / slower,) * 2)
    assert (alone.high, alone.at_most) == pytest.approx((1.1 * speed * faster,) * 2)


def test_states_that_both_measurements_saw_are_no_drift() -> None:
    fast_and_slow = np.array([1.0, 1.3] * 20)
    mostly_fast, mostly_slow = (np.where(np.arange(40) < n, 1.0, 1.3) for n in (28, 12))
    for then in (fast_and_slow, mostly_fast):
        assert drift(Blocks(then, then), Blocks(mostly_slow, mostly_slow)) == 1
    fast, slow = np.full(40, 1.0), np.full(40, 1.3)
    assert drift(Blocks(fast, fast), Blocks(slow, slow)) == pytest.approx(1.3)


def test_other_load_then_is_no_regression_now() -> None:
    """The state of the machine slows the reference, and the pruned network by a third more or less.

    Of 400 pairs of one network at most 5 % are certainly beyond 1.03; in one state, a network that
    is 10 % slower is nearly always.
    """
    rng, alarms, found = np.random.default_rng(12), 0, 0
    for _ in range(400):
        state, more = np.exp(rng.uniform(0, 0.4)), rng.uniform(-0.33, 0.33)
        then = measured(rng, 0.75, 120)
        now = measured(rng, 0.75 * state**more, 120, speed=state)
        alarms += change_interval(then, now, confidence=0.95).at_least > 1.03
        slower = measured(rng, 0.75 * 1.1, 120)
        found += change_interval(then, slower, confidence=0.95).at_least > 1.03
    assert alarms <= 20
    assert found >= 380


def test_a_change_is_as_uncertain_as_both_measurements_together() -> None:
    rng = np.random.default_rng(9)
    then, now = measured(rng, 0.5, 100), measured(rng, 0.5, 60)
    one, other = (
        median_ratio_interval(x.reference, x.pruned, confidence=0.95)  # type: ignore[arg-type]
        for x in (then, now)
    )
    both = change_interval(then, now, confidence=0.95)
    widths = [np.log(found.high / found.low) for found in (one, other, both)]
    assert widths[2] == pytest.approx(np.hypot(*widths[:2]), rel=0.02)
    assert both.ratio == pytest.approx(other.ratio / one.ratio)
    swapped = change_interval(now, then, confidence=0.95)
    assert (swapped.low, swapped.at_most) == pytest.approx((1 / both.high, 1 / both.at_least))


def test_the_same_measurement_twice_has_not_changed() -> None:
    blocks = measured(np.random.default_rng(1), 0.5, 20)
    assert change_interval(blocks, blocks, confidence=0.95).ratio == 1.0


@pytest.mark.parametrize("rounds", [8, 20, 60])
def test_the_interval_covers(rounds: int) -> None:
    rng, truth, runs = np.random.default_rng(rounds), 0.7, 400
    missed = too_high = too_low = 0
    for _ in range(runs):
        blocks = measured(rng, truth, rounds)
        found = median_ratio_interval(blocks.reference, blocks.pruned, confidence=0.95)  # type: ignore[arg-type]
        missed += not found.low <= truth <= found.high
        too_high += found.at_least > truth
        too_low += found.at_most < truth
    assert max(missed, too_high, too_low) <= binom.ppf(0.999, runs, 0.05)
    assert missed >= binom.ppf(0.001, runs, 0.015), "wider than it says"


def test_the_interval_covers_when_rounds_resemble_each_other() -> None:
    rng, runs, rounds = np.random.default_rng(12), 400, 80
    missed = 0
    for _ in range(runs):
        slow = np.empty((2, rounds))  # either network is slowed for ten rounds at a time
        for own in slow:
            switches = rng.random(rounds) < 0.1
            own[:] = (np.cumsum(switches) + rng.integers(2)) % 2
        dense, pruned = np.exp(0.05 * slow + rng.normal(0, 0.02, (2, rounds)))
        found = median_ratio_interval(dense, pruned, confidence=0.95)
        missed += not found.low <= 1 <= found.high
    # Rounds taken as independent miss four times as often as they say.
    assert missed <= binom.ppf(0.999, runs, 0.06)
