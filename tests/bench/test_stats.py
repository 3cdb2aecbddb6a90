from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bench.stats import (
    median,
    median_ratio_interval,
    percentile,
    percentile_bounds,
    queries_needed,
    summary,
)

SAMPLES = st.lists(st.floats(0.01, 1e4), min_size=1, max_size=200)


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [
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
    ],
)
def test_percentile_follows_trtexec(count: int, percent: float, expected: float) -> None:
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
    found = median_ratio_interval(blocks, blocks, confidence=0.95, seed=0)
    assert (found.ratio, found.low, found.high, found.at_least, found.at_most) == (1, 1, 1, 1, 1)
    assert found.rounds == 4


def test_what_slows_whole_rounds_cancels() -> None:
    drift = np.exp(np.random.default_rng(0).normal(0, 0.5, 30))
    found = median_ratio_interval(drift, 0.7 * drift, confidence=0.95, seed=0)
    assert found.low == pytest.approx(0.7)
    assert found.high == pytest.approx(0.7)


def test_one_sided_bounds_lie_inside_the_interval() -> None:
    rng = np.random.default_rng(1)
    dense, pruned = rng.lognormal(0, 0.1, (2, 25))
    found = median_ratio_interval(dense, pruned, confidence=0.9, seed=4)
    assert found.low < found.at_least < found.at_most < found.high
    wider = median_ratio_interval(dense, pruned, confidence=0.8, seed=4)
    # A one-sided bound at 90 % is an end of the two-sided interval at 80 %.
    assert (wider.low, wider.high) == (found.at_least, found.at_most)


def test_bootstrap_is_reproducible_and_bounded_in_memory() -> None:
    dense, pruned = np.random.default_rng(2).lognormal(0, 0.1, (2, 3000))
    first, second = (
        median_ratio_interval(dense, pruned, confidence=0.95, seed=7, resamples=400)
        for _ in range(2)
    )
    assert first == second
    assert first.ratio == np.median(pruned) / np.median(dense)


@pytest.mark.parametrize(
    ("dense", "pruned", "words"),
    [([1.0, 2.0], [1.0], "paired"), ([], [], "sample"), ([1.0], [0.0], "duration")],
)
def test_ratio_refuses(dense: list[float], pruned: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        median_ratio_interval(dense, pruned, confidence=0.95, seed=0)


@pytest.mark.parametrize("rounds", [8, 20, 60])
def test_bootstrap_interval_covers(rounds: int) -> None:
    rng, truth, runs = np.random.default_rng(rounds), 0.7, 400
    missed = too_high = too_low = 0
    for run in range(runs):
        shared = rng.normal(0, 0.05, rounds)  # what a busy machine does to a whole round
        dense = np.exp(shared + rng.normal(0, 0.05, rounds))
        pruned = truth * np.exp(shared + rng.normal(0, 0.05, rounds))
        found = median_ratio_interval(dense, pruned, confidence=0.95, seed=run, resamples=400)
        missed += not found.low <= truth <= found.high
        too_high += found.at_least > truth
        too_low += found.at_most < truth
    assert max(missed, too_high, too_low) <= binom.ppf(0.999, runs, 0.05)
    assert missed >= binom.ppf(0.001, runs, 0.02), "wider than it says"
