"""Which figures of a report no measurement gives together; whoever reads one refuses them.

Each function returns what it was given, or raises a ValueError that says what cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

from bench.statistics.latency_ratios import (
    QUANTILES,
    LatencySummary,
    RatioInterval,
    median_ratio_interval,
)
from bench.statistics.shares import MOST_COUNT, PairedDrop, Share, tango_interval

YEARS = range(2000, 2200)
"""In which a report may have been made; dates at either end of the calendar have no time zones."""
LEAST_MS, MOST_MS = 1e-6, 1e9
"""Milliseconds: from a nanosecond to eleven days."""
MOST_RATIO = (MOST_MS / LEAST_MS) ** 2
"""Between two ratios of such times."""
LARGEST = 2**53
"""Whole numbers up to this are exact as floating point numbers."""
DERIVED = 1e-9
"""Share by which a figure may differ from the same one derived again."""
MIDDLE = len(QUANTILES) // 2
"""Of the quantiles; the median lies between it and the next one."""


def sound_summary(found: LatencySummary) -> LatencySummary:
    """Check the times of whole calls."""
    require(min(found.median_ms, found.max_ms) > 0, "a latency is zero")
    return sound_stage(found)


def sound_stage(found: LatencySummary) -> LatencySummary:
    """Check the times of a step of a call, which may be too short for a clock."""
    times = (found.min_ms, found.median_ms, found.mean_ms, found.p90_ms, found.p95_ms)
    tails = (found.p99_ms, found.p99_at_least_ms, found.p99_at_most_ms, found.max_ms)
    known = [time for time in (*times, *tails, *found.quantiles_ms) if time is not None]
    require(all(0 <= time <= MOST_MS for time in known), "a latency is no time")
    require(1 <= found.calls <= LARGEST, "calls is no count")
    require(0 <= found.variation <= MOST_MS, "variation is no share")
    require(len(found.quantiles_ms) == len(QUANTILES), f"there are {len(QUANTILES)} quantiles")
    low, below, above, high = (found.quantiles_ms[at] for at in (0, MIDDLE, MIDDLE + 1, -1))
    require(
        low == found.min_ms and high == found.max_ms and below <= found.median_ms <= above,
        "the latency is not that of its quantiles",
    )
    ordered = (found.min_ms, *times[3:], found.p99_ms, found.max_ms)
    rising = all(one <= other for one, other in pairwise(ordered))
    within = low * (1 - DERIVED) <= found.mean_ms <= high * (1 + DERIVED)  # of a rounded sum
    require(rising and within, "the percentiles contradict each other")
    return found


def sound_blocks(found: tuple[float, ...]) -> tuple[float, ...]:
    """Check the medians of blocks."""
    require(all(LEAST_MS <= time <= MOST_MS for time in found), "a block has no duration")
    return found


def sound_interval(found: RatioInterval) -> RatioInterval:
    """Check a ratio of times by itself."""
    ratios = (found.low, found.at_least, found.ratio, found.at_most, found.high)
    require(all(1 / MOST_RATIO <= each <= MOST_RATIO for each in ratios), "a ratio is no ratio")
    require(found.low <= found.ratio <= found.high, "the interval misses its ratio")
    require(0.5 <= found.confidence < 1, "confidence is no level")
    require(1 <= found.rounds <= LARGEST, "rounds is no count")
    return found


def require_blocks_of(found: LatencySummary, blocks: Sequence[float]) -> None:
    """Refuse calls that cannot be those of these blocks: a pooled median lies among theirs.

    Raises:
        ValueError: they cannot.
    """
    below, above = found.quantiles_ms[MIDDLE : MIDDLE + 2]
    least, most = min(blocks), max(blocks)
    within = found.min_ms <= least and most <= found.max_ms and below <= most and least <= above
    require(within, "the latency is not that of its blocks")


def require_ratio_of(
    found: RatioInterval, reference: Sequence[float], other: Sequence[float]
) -> None:
    """Refuse a ratio that is not that of its rounds, or an interval narrower than theirs.

    Raises:
        ValueError: it is.
    """
    derived = median_ratio_interval(reference, other, confidence=found.confidence)
    agrees = math.isclose(found.ratio, derived.ratio, rel_tol=DERIVED)
    require(agrees and found.rounds == derived.rounds, "the ratio is not that of its rounds")
    wide = (
        found.low <= derived.low * (1 + DERIVED)
        and found.at_least <= derived.at_least * (1 + DERIVED)
        and found.at_most >= derived.at_most * (1 - DERIVED)
        and found.high >= derived.high * (1 - DERIVED)
    )
    require(wide, "the interval of the ratio is narrower than that of its rounds")


def sound_share(found: Share) -> Share:
    """Return a share whose figures agree with each other.

    Raises:
        ValueError: they do not.
    """
    bounds = (found.low, found.at_least, found.share, found.at_most, found.high)
    require(all(0 <= each <= 1 for each in bounds), "a share is no share")
    require(found.low <= found.share <= found.high, "the interval misses its share")
    require(1 <= found.count <= MOST_COUNT, "count is no count")
    require(0 < found.confidence < 1, "confidence is no level")
    return found


def sound_drop(found: PairedDrop) -> PairedDrop:
    """Return a drop whose figures agree with each other.

    Raises:
        ValueError: they do not.
    """
    bounds = (found.low_pp, found.at_least_pp, found.drop_pp, found.at_most_pp, found.high_pp)
    require(1 <= found.images <= MOST_COUNT, "images is no count")
    require(min(found.flips_to_wrong, found.flips_to_right) >= 0, "flips are counted from 0")
    flips = found.flips_to_wrong + found.flips_to_right
    require(flips <= found.images, "there are more flips than images")
    require(all(-100 <= each <= 100 for each in bounds), "a drop lies within 100 pp")
    require(0 <= found.resolution_pp <= 100, "resolution_pp lies within 100 pp")
    require(0 < found.confidence < 1, "confidence is no level")
    require(0 <= found.mcnemar_p <= 1, "mcnemar_p is no probability")
    drop = 100 * (found.flips_to_wrong - found.flips_to_right) / found.images
    require(math.isclose(found.drop_pp, drop, abs_tol=1e-9), "the drop is not that of its flips")
    tails = (
        ((1 - found.confidence) / 2, (found.low_pp, found.high_pp)),
        (
            1 - found.confidence,
            (found.at_least_pp, found.at_most_pp),
        ),
    )
    for tail, told in tails:
        counts = (found.flips_to_wrong, found.flips_to_right, found.images)
        derived = [100 * share for share in tango_interval(*counts, tail=tail)]
        alike = [math.isclose(a, b, abs_tol=1e-6) for a, b in zip(told, derived, strict=True)]
        require(all(alike), "the interval of the drop is not that of its flips")
    agreement = 1 - flips / found.images
    require(math.isclose(found.agreement, agreement, abs_tol=1e-9), "agreement misses the flips")
    return found


def sound_date(found: datetime) -> datetime:
    """Check when a report was made."""
    require(found.year in YEARS, f"the year {found.year} is none in which a report was made")
    return found


def require(holds: bool, otherwise: str) -> None:
    """Raise a ValueError that says what cannot be, unless it holds."""
    if not holds:  # also where a NaN is compared
        raise ValueError(otherwise)
