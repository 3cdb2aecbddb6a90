"""A share of independent trials with its exact interval: a pure function of two counts.

Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the
binomial", Biometrika 26 (1934) 404-413: each bound errs with at most the stated probability,
whatever the true share, also where every trial succeeded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share with a two-sided interval for people and the one-sided bounds of verdicts."""

    count: int
    """Trials."""
    share: float
    low: float
    high: float
    at_least: float
    at_most: float
    confidence: float


def share_of(successes: int, count: int, *, confidence: float) -> Share:
    """Return the share of successes among so many trials.

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    if not 0 <= successes <= count or not count:
        raise ValueError(f"{successes} of {count} is no share")
    low, high = exact_bounds(successes, count, tail=(1 - confidence) / 2)
    at_least, at_most = exact_bounds(successes, count, tail=1 - confidence)
    return Share(
        count=count,
        share=successes / count,
        low=low,
        high=high,
        at_least=at_least,
        at_most=at_most,
        confidence=confidence,
    )


def exact_bounds(successes: int, count: int, *, tail: float) -> tuple[float, float]:
    """Return the bounds of Clopper and Pearson that each leave ``tail`` outside."""
    from scipy.stats import beta  # slow to import

    low = beta.ppf(tail, successes, count - successes + 1) if successes else 0.0
    high = beta.ppf(1 - tail, successes + 1, count - successes) if successes < count else 1.0
    return float(low), float(high)


def most_shown(count: int, *, confidence: float) -> float:
    """Return the largest share that so many trials can show to be reached: all succeed."""
    return (1 - confidence) ** (1 / count)


def trials_to_show(share: float, *, confidence: float) -> int | None:
    """Return the fewest trials that can show a share to be reached; None when no number can."""
    if share >= 1:
        return None
    return math.ceil(math.log(1 - confidence) / math.log(share)) if share > 0 else 1
