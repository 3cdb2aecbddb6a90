"""Latencies and their ratios: pure functions of samples.

A round times both networks back to back, in an order drawn at random, so whatever slows the machine
for both hits either one with equal probability: a round's ratio is above the true one as often as
below. The ratio is the median over rounds, with the interval of the sign test between two of the
sorted rounds, which assumes nothing else of them (Conover, Practical Nonparametric Statistics,
1999, section 3.2). Rounds that resemble the ones before them count for less: the variance is that
of independent rounds times their autocorrelation time, and the quantiles are Student's.

Distributions and ranks are scipy's, which takes long to import and so is imported where it is used.

Every interval has two sides for people (``low``, ``high``) and the two one-sided bounds that
verdicts use (``at_least``, ``at_most``), every one at the stated confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.statistics.shares import first_count

Floats = npt.NDArray[np.float64]
Numbers = Sequence[float] | npt.NDArray[Any]

TAIL_CONFIDENCE = 0.99
"""Level of the bounds of p99; MLPerf Inference's early stopping uses the same."""

FEWEST_ROUNDS = 8
"""Fewer rounds cannot show that they resemble each other."""

DRIFT_SHARE = 0.5
"""How much more or less than the reference another network may be slowed, as a share of what slowed
the reference (of its logarithm). Of 532 pairs of measurements of one network, beside programs that
filled cores and caches, 10 failed at 1.03 without it, and none from .3 on (docs/results.md)."""

QUANTILES = np.linspace(0, 1, 201)
"""Shares of the sorted calls that ``LatencySummary.quantiles_ms`` holds."""

_BIAS_STEPS = 2  # more gain nothing, and make much of chance in short series


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
    reference: Numbers


@dataclass(frozen=True, kw_only=True)
class RatioInterval:
    """A ratio of latencies: below 1 is faster."""

    ratio: float
    low: float
    high: float
    at_least: float
    at_most: float
    confidence: float
    rounds: int

    @property
    def reach(self) -> float:
        """How far the interval reaches from the ratio, as a share of it."""
        return max(self.high - self.ratio, self.ratio - self.low) / self.ratio


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
    values = np.sort(_checked(samples))
    return float(values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


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
        quantiles_ms=tuple(np.quantile(values, QUANTILES, method="inverted_cdf").tolist()),
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
    from scipy.stats import binom

    values = np.sort(_checked(samples))
    count = len(values)
    exceeding = binom(count, 1 - percent / 100)
    allowed = int(exceeding.ppf(1 - confidence))  # the fewest that are this probable, or more so
    allowed -= exceeding.cdf(allowed) > 1 - confidence
    if allowed < 1:
        return None, None
    # The first m with P(at least m samples exceed the percentile) <= 1 - confidence.
    surprising = int(exceeding.ppf(confidence)) + 1
    return float(values[count - surprising]), float(values[count - allowed])


def queries_needed(percent: float, *, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return the fewest queries that bound a percentile: 64 for p90, 662 for p99 at 99 %."""
    from scipy.stats import binom

    def enough(count: int) -> bool:
        return bool(binom.cdf(1, count, 1 - percent / 100) <= 1 - confidence)

    return first_count(enough)


def median_ratio_interval(
    reference_blocks: Numbers,
    pruned_blocks: Numbers,
    *,
    confidence: float,
) -> RatioInterval:
    """Return the median ratio of pruned over reference.

    Both arguments hold one latency per round, (rounds,): entry i of each was measured in the same
    round, so what slowed both networks cancels.

    Raises:
        ValueError: lengths that differ, no rounds, or values that are not finite and positive.
    """
    return _ratio_median(Blocks(pruned_blocks, reference_blocks), confidence).as_ratio(confidence)


def change_interval(then: Blocks, now: Blocks, *, confidence: float) -> RatioInterval:
    """Return how the ratio to the reference changed between two measurements: now over then.

    Above 1 is slower. The two intervals are combined as those of independent measurements (Zou and
    Donner, Statistics in Medicine 27 (2008) 1693-1702). The reference is one network, so where its
    own time moved (``drift``), the machine was in another state, which may have moved the pruned
    network by ``DRIFT_SHARE`` of that more or less: as far as that both bounds move out.

    Raises:
        ValueError: as ``median_ratio_interval``.
    """
    changed = _ratio_median(now, confidence).minus(_ratio_median(then, confidence))
    doubt = DRIFT_SHARE * abs(math.log(drift(then, now)))
    return changed.wider(doubt, doubt).as_ratio(confidence)


def median_change_interval(then: Blocks, now: Blocks, *, confidence: float) -> RatioInterval:
    """Return how the pruned network's own latency changed between two measurements: now over then.

    As ``change_interval``, but a machine that became slower, as the reference shows, may account
    for 1 + ``DRIFT_SHARE`` of that, so the lower bound leaves room for it; one that became faster
    may hide as much, for which the upper bound does.

    Raises:
        ValueError: as ``median_ratio_interval``.
    """
    before, after = (_median(_logs(blocks.pruned), confidence) for blocks in (then, now))
    slower = (1 + DRIFT_SHARE) * math.log(drift(then, now))
    changed = after.minus(before)
    return changed.wider(max(slower, 0.0), max(-slower, 0.0)).as_ratio(confidence)


def drift(then: Blocks, now: Blocks) -> float:
    """Return the time of the reference now over then: what the machine itself became slower by.

    It is the gap between the middle halves of its rounds, and 1 where these meet: the machine was
    in the same states, and within a measurement the ratio does not hang on them.
    """
    (low_then, high_then), (low, high) = (
        np.quantile(_logs(blocks.reference), (0.25, 0.75)) for blocks in (then, now)
    )
    return math.exp(max(low - high_then, 0.0) - max(low_then - high, 0.0))


def median_interval(blocks: Numbers, *, confidence: float) -> RatioInterval:
    """Return the latency of one network, in the unit of its blocks (rounds,), with its bounds.

    It is the median over the blocks, bounded as in ``median_ratio_interval``: a ratio to one unit.

    Raises:
        ValueError: as ``median_ratio_interval``.
    """
    return _median(_logs(blocks), confidence).as_ratio(confidence)


def autocorrelation_time(values: Floats) -> float:
    """Return how many consecutive values (n,) tell as much as one independent value, 1 to n / 2.

    Of their ranks, so that no single value decides; by the initial positive sequence of Geyer,
    "Practical Markov chain Monte Carlo", Statistical Science 7 (1992) 473-483.
    """
    from scipy.stats import rankdata

    ranks = rankdata(values) - (len(values) + 1) / 2
    count, time = len(ranks), 1.0
    products = np.correlate(ranks, ranks, mode="full")[count - 1 :]
    if products[0] == 0:
        return time
    for _ in range(_BIAS_STEPS):
        # About their own mean, values are correlated by -time / n less than they really are.
        correlations = products / products[0] + time / count
        correlations[0] = 1.0
        pairs = correlations[: count // 4 * 2].reshape(-1, 2).sum(axis=1)
        positive = pairs[: np.argmax(pairs <= 0)] if (pairs <= 0).any() else pairs
        time = min(max(1.0, float(2 * positive.sum() - 1)), max(1.0, count / 2))
    return time


@dataclass(frozen=True, kw_only=True)
class _Median:
    """Median of the logs of the rounds, with its bounds."""

    found: float
    low: float
    high: float
    at_least: float
    at_most: float
    rounds: int

    def minus(self, other: _Median) -> _Median:
        """Return the difference of two independent medians, with square-and-add bounds."""
        found = self.found - other.found

        def lower(mine: float, theirs: float) -> float:
            return found - math.hypot(self.found - mine, theirs - other.found)

        def upper(mine: float, theirs: float) -> float:
            return found + math.hypot(mine - self.found, other.found - theirs)

        return _Median(
            found=found,
            low=lower(self.low, other.high),
            high=upper(self.high, other.low),
            at_least=lower(self.at_least, other.at_most),
            at_most=upper(self.at_most, other.at_least),
            rounds=min(self.rounds, other.rounds),
        )

    def wider(self, below: float, above: float) -> _Median:
        """Return it with its bounds that much further away."""
        return replace(
            self,
            low=self.low - below,
            at_least=self.at_least - below,
            high=self.high + above,
            at_most=self.at_most + above,
        )

    def as_ratio(self, confidence: float) -> RatioInterval:
        return RatioInterval(
            ratio=math.exp(self.found),
            low=math.exp(self.low),
            high=math.exp(self.high),
            at_least=math.exp(self.at_least),
            at_most=math.exp(self.at_most),
            confidence=confidence,
            rounds=self.rounds,
        )


def _ratio_median(blocks: Blocks, confidence: float) -> _Median:
    """Estimate the median log of the pruned blocks over those of the reference."""
    logs, reference = _logs(blocks.pruned), _logs(blocks.reference)
    if len(reference) != len(logs):
        raise ValueError(f"{len(reference)} reference blocks cannot be paired with {len(logs)}")
    return _median(logs - reference, confidence)


def _median(logs: Floats, confidence: float) -> _Median:
    """Estimate the median of the logs (rounds,)."""
    from scipy.special import stdtrit

    rounds, tail, repeats = len(logs), 1 - confidence, autocorrelation_time(logs)
    # Of how many rounds lie below the true ratio: the standard deviation.
    spread = math.sqrt(rounds * repeats) / 2
    reach = stdtrit(max(1.0, rounds / repeats - 1), [1 - tail / 2, 1 - tail]) * spread
    outside = np.maximum(np.floor(rounds / 2 - 0.5 - reach), 0).astype(int)
    ordered = np.sort(logs)
    (low, at_least), (high, at_most) = ordered[outside], ordered[rounds - 1 - outside]
    return _Median(
        found=median(logs),
        low=float(low),
        high=float(high),
        at_least=float(at_least),
        at_most=float(at_most),
        rounds=rounds,
    )


def _logs(blocks: Numbers) -> Floats:
    values = _checked(blocks)
    if values.min() <= 0:
        raise ValueError("a block without duration has no ratio")
    return np.log(values)


def _checked(samples: Numbers) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("a statistic needs at least one sample")
    if not np.isfinite(values).all():
        raise ValueError("a sample is not finite")
    return values
