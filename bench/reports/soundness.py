"""Figures that belong together: a report may come from anybody, and what judges it divides by them.

Pages and verdicts take figures as measured. One that no measurement gives is refused when a report
is read, so that nothing after that need expect it.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator

from bench.statistics.paired import PairedDrop
from bench.statistics.shares import Share
from bench.statistics.stats import MOST_COUNT, QUANTILES, LatencySummary, RatioInterval

LEAST_MS, MOST_MS = 1e-6, 1e9
"""Milliseconds: from a nanosecond to eleven days."""
MOST_RATIO = (MOST_MS / LEAST_MS) ** 2
"""Between two ratios of such times."""
LARGEST = 2**53
"""Whole numbers up to this are exact as floating point numbers."""


def _sound_summary(found: LatencySummary) -> LatencySummary:
    _require(min(found.median_ms, found.max_ms) > 0, "a latency is zero")
    return _sound_stage(found)


def _sound_stage(found: LatencySummary) -> LatencySummary:
    times = (found.min_ms, found.median_ms, found.mean_ms, found.p90_ms, found.p95_ms)
    tails = (found.p99_ms, found.p99_at_least_ms, found.p99_at_most_ms, found.max_ms)
    known = [time for time in (*times, *tails, *found.quantiles_ms) if time is not None]
    _require(all(0 <= time <= MOST_MS for time in known), "a latency is no time")
    _require(1 <= found.calls <= LARGEST, "calls is no count")
    _require(0 <= found.variation <= MOST_MS, "variation is no share")
    _require(len(found.quantiles_ms) == len(QUANTILES), f"there are {len(QUANTILES)} quantiles")
    return found


def _sound_blocks(found: tuple[float, ...]) -> tuple[float, ...]:
    _require(all(LEAST_MS <= time <= MOST_MS for time in found), "a block has no duration")
    return found


def _sound_interval(found: RatioInterval) -> RatioInterval:
    ratios = (found.low, found.at_least, found.ratio, found.at_most, found.high)
    _require(all(1 / MOST_RATIO <= each <= MOST_RATIO for each in ratios), "a ratio is no ratio")
    _require(found.low <= found.ratio <= found.high, "the interval misses its ratio")
    _require(0 < found.confidence < 1, "confidence is no level")
    _require(1 <= found.rounds <= LARGEST, "rounds is no count")
    return found


def sound_share(found: Share) -> Share:
    """Return a share whose figures agree with each other.

    Raises:
        ValueError: they do not.
    """
    bounds = (found.low, found.at_least, found.share, found.at_most, found.high)
    _require(all(0 <= each <= 1 for each in bounds), "a share is no share")
    _require(found.low <= found.share <= found.high, "the interval misses its share")
    _require(1 <= found.count <= MOST_COUNT, "count is no count")
    _require(0 < found.confidence < 1, "confidence is no level")
    return found


def sound_drop(found: PairedDrop) -> PairedDrop:
    """Return a drop whose figures agree with each other.

    Raises:
        ValueError: they do not.
    """
    bounds = (found.low_pp, found.at_least_pp, found.drop_pp, found.at_most_pp, found.high_pp)
    _require(1 <= found.images <= MOST_COUNT, "images is no count")
    _require(min(found.flips_to_wrong, found.flips_to_right) >= 0, "flips are counted from 0")
    flips = found.flips_to_wrong + found.flips_to_right
    _require(flips <= found.images, "there are more flips than images")
    _require(all(-100 <= each <= 100 for each in bounds), "a drop lies within 100 pp")
    _require(0 <= found.resolution_pp <= 100, "resolution_pp lies within 100 pp")
    _require(0 < found.confidence < 1, "confidence is no level")
    _require(0 <= found.mcnemar_p <= 1, "mcnemar_p is no probability")
    drop = 100 * (found.flips_to_wrong - found.flips_to_right) / found.images
    _require(math.isclose(found.drop_pp, drop, abs_tol=1e-9), "the drop is not that of its flips")
    agreement = 1 - flips / found.images
    _require(math.isclose(found.agreement, agreement, abs_tol=1e-9), "agreement misses the flips")
    return found


def _require(holds: bool, otherwise: str) -> None:
    if not holds:  # also where a NaN is compared
        raise ValueError(otherwise)


Summary = Annotated[LatencySummary, AfterValidator(_sound_summary)]
Stage = Annotated[LatencySummary, AfterValidator(_sound_stage)]
"""A step of a call may be too short for a clock."""
Blocks = Annotated[tuple[float, ...], AfterValidator(_sound_blocks)]
Interval = Annotated[RatioInterval, AfterValidator(_sound_interval)]
Drop = Annotated[PairedDrop, AfterValidator(sound_drop)]
