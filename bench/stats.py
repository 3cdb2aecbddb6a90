"""Latency statistics: pure functions of samples.

The ratio of two latencies is a ratio of medians over rounds that timed both networks back to back,
with a percentile bootstrap over rounds (Efron and Tibshirani 1993, chapter 13). It carries a
two-sided interval for people (``low``, ``high``) and the two one-sided bounds that verdicts use
(``at_least``, ``at_most``), every one at the stated confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Numbers = Sequence[float] | npt.NDArray[Any]

TAIL_CONFIDENCE = 0.99
"""Level of the bounds of p99; MLPerf Inference's early stopping uses the same."""

MOST_COUNT = 10**12
"""No data set and no run of timed calls is larger."""

FEWEST_ROUNDS = 8
"""With fewer rounds the bootstrap covers less than it says; docs/measuring.md has the figures."""

_QUANTILES = np.linspace(0, 1, 201)
_CHUNK = 1_000_000  # resampled values held at once: 8 MB


@dataclass(frozen=True, kw_only=True)
class LatencySummary:
    """Per-call latency in milliseconds; percentiles as trtexec defines them."""

    calls: int
    median_ms: float
    mean_ms: float
    min_ms: float
    max_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    p99_at_least_ms: float | None
    """One-sided lower bound of the true p99; None when there are too few calls for one."""
    p99_at_most_ms: float | None
    """One-sided upper bound of the true p99; None when there are too few calls for one."""
    variation: float
    """Standard deviation over mean."""
    quantiles_ms: tuple[float, ...]
    """Observed calls at 0, 0.5, 1, ... 100 % of the sorted ones: enough to draw them."""


@dataclass(frozen=True)
class Blocks:
    """Block medians of one measurement, (rounds,) each; entry i of both is of round i."""

    pruned: Numbers
    reference: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class RatioInterval:
    """A ratio of median latencies: below 1 is faster."""

    ratio: float
    low: float
    high: float
    at_least: float
    at_most: float
    confidence: float
    rounds: int


def percentile(samples: Numbers, percent: float) -> float:
    """Return the percentile as trtexec does: an observed value, never an interpolation.

    On N sorted samples it is the one at index N - 1 - int((1 - percent/100) N), at least 0.
    """
    values = _checked(samples)
    # Multiplied out before dividing: (1 - 90/100) * 10 is just below 1 in binary.
    excluded = int((100 - percent) * len(values) / 100)
    return float(np.sort(values)[max(len(values) - 1 - excluded, 0)])


def median(samples: Numbers) -> float:
    """Return the median; an even count averages the middle pair."""
    return float(np.median(_checked(samples)))


def summary(samples_ms: Numbers) -> LatencySummary:
    """Summarise per-call latencies (n,) in milliseconds.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    values = np.sort(_checked(samples_ms))
    mean = float(values.mean())
    at_least, at_most = percentile_bounds(values, 99, confidence=TAIL_CONFIDENCE)
    return LatencySummary(
        calls=len(values),
        median_ms=median(values),
        mean_ms=mean,
        min_ms=float(values[0]),
        max_ms=float(values[-1]),
        p90_ms=percentile(values, 90),
        p95_ms=percentile(values, 95),
        p99_ms=percentile(values, 99),
        p99_at_least_ms=at_least,
        p99_at_most_ms=at_most,
        variation=float(values.std() / mean) if mean else 0.0,
        quantiles_ms=tuple(np.quantile(values, _QUANTILES, method="inverted_cdf").tolist()),
    )


def percentile_bounds(
    samples: Numbers, percent: float, *, confidence: float
) -> tuple[float | None, float | None]:
    """Bound the true percentile from below and above, assuming only independent samples.

    The upper bound is the early-stopping estimate of the MLPerf Inference rules: with t the most
    samples that may exceed the percentile with probability at most 1 - confidence, the largest
    sample after the t - 1 worst are discarded. The lower bound is the matching order statistic.
    Both are None below ``queries_needed``.
    """
    values = np.sort(_checked(samples))
    count = len(values)
    below = _binomial_cdf(count, 1 - percent / 100)
    allowed = int(np.searchsorted(below, 1 - confidence, side="right")) - 1
    if allowed < 1:
        return None, None
    # The first m with P(at least m samples exceed the percentile) <= 1 - confidence.
    surprising = int(np.searchsorted(below, confidence, side="left")) + 1
    return float(values[count - surprising]), float(values[count - allowed])


def queries_needed(percent: float, *, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return the fewest queries that bound a percentile: 64 for p90, 662 for p99 at 99 %."""
    rare = 1 - percent / 100

    def enough(n: int) -> bool:
        # P(at most one of n samples exceeds the percentile).
        return (1 - rare) ** n + n * rare * (1 - rare) ** (n - 1) <= 1 - confidence

    return first_count(enough)


def median_ratio_interval(
    reference_blocks: Numbers,
    pruned_blocks: Numbers,
    *,
    confidence: float,
    seed: int,
    resamples: int = 10_000,
) -> RatioInterval:
    """Return median(pruned) / median(reference) with a percentile bootstrap over rounds.

    Both arguments hold one latency per round, (rounds,): entry i of each was measured in the same
    round, so rounds are resampled jointly and what slowed both networks cancels.

    Raises:
        ValueError: lengths that differ, no rounds, or values that are not finite and positive.
    """
    blocks = Blocks(pruned_blocks, reference_blocks)
    level = _level(blocks, resamples, np.random.default_rng(seed))
    return _interval(level.found, level.draws, confidence, level.rounds)


def change_interval(
    then: Blocks,
    now: Blocks,
    *,
    confidence: float,
    seed: int,
    resamples: int = 10_000,
) -> RatioInterval:
    """Return how a latency changed between two measurements: now over then, above 1 is slower.

    It is the change of the ratio of medians, or without a reference that of the median. The two
    were measured at different times, so their rounds are resampled independently of each other.

    Raises:
        ValueError: as ``median_ratio_interval``.
    """
    rng = np.random.default_rng(seed)
    before, after = (_level(blocks, resamples, rng) for blocks in (then, now))
    rounds = min(before.rounds, after.rounds)
    return _interval(after.found / before.found, after.draws / before.draws, confidence, rounds)


@dataclass(frozen=True)
class _Level:
    """A median or a ratio of medians, with its bootstrap draws."""

    found: float
    draws: Floats
    rounds: int


def _level(blocks: Blocks, resamples: int, rng: np.random.Generator) -> _Level:
    pruned = _positive(blocks.pruned)
    # A median is a ratio to a reference that never changes.
    reference = np.ones(len(pruned)) if blocks.reference is None else _positive(blocks.reference)
    if len(reference) != len(pruned):
        raise ValueError(f"{len(reference)} reference blocks cannot be paired with {len(pruned)}")
    draws = _resampled_ratios(reference, pruned, resamples, rng)
    return _Level(float(np.median(pruned) / np.median(reference)), draws, len(pruned))


def _interval(found: float, draws: Floats, confidence: float, rounds: int) -> RatioInterval:
    tail = 1 - confidence
    low, high, at_least, at_most = np.quantile(draws, [tail / 2, 1 - tail / 2, tail, 1 - tail])
    return RatioInterval(
        ratio=found,
        low=float(low),
        high=float(high),
        at_least=float(at_least),
        at_most=float(at_most),
        confidence=confidence,
        rounds=rounds,
    )


def _resampled_ratios(
    reference: Floats, pruned: Floats, resamples: int, rng: np.random.Generator
) -> Floats:
    rounds = len(reference)
    ratios = np.empty(resamples)
    step = max(1, _CHUNK // rounds)
    for start in range(0, resamples, step):
        rows = rng.integers(0, rounds, size=(min(step, resamples - start), rounds))
        medians = np.median(pruned[rows], axis=1), np.median(reference[rows], axis=1)
        ratios[start : start + len(rows)] = medians[0] / medians[1]
    return ratios


def _binomial_cdf(count: int, share: float) -> Floats:
    """Return P(X <= k) for k = 0..count, X binomial; in logs, where large counts fit."""
    k = np.arange(1, count + 1)
    log_choose = np.concatenate([[0.0], np.cumsum(np.log(count - k + 1) - np.log(k))])
    k = np.arange(count + 1)
    mass = np.exp(log_choose + k * math.log(share) + (count - k) * math.log1p(-share))
    return np.cumsum(mass)


def first_count(holds: Callable[[int], bool]) -> int:
    """Return by bisection the first count up to ``MOST_COUNT`` from which a condition holds."""
    low, high = 0, MOST_COUNT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _positive(blocks: Numbers) -> Floats:
    values = _checked(blocks)
    if values.min() <= 0:
        raise ValueError("a block without duration has no ratio")
    return values


def _checked(samples: Numbers) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("a statistic needs at least one sample")
    if not np.isfinite(values).all():
        raise ValueError("a sample is not finite")
    return values
