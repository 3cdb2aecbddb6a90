"""Shares of trials, and of images that two networks answer: pure functions of counts.

A share alone has the exact interval of Clopper and Pearson, "The use of confidence or fiducial
limits illustrated in the case of the binomial", Biometrika 26 (1934) 404-413: each bound errs with
at most the stated probability, whatever the true share, also where every trial succeeded.

The accuracy lost on the same images is a difference of paired proportions with the score interval
of Tango, "Equivalence test and confidence interval for the difference in proportions for the
paired-sample design", Statistics in Medicine 17 (1998) 891-908. Unlike the Wald interval it keeps
its width when no image flips, where "no difference seen" must not read as "no difference".

Both carry a two-sided interval for people (``low``, ``high``) and the two one-sided bounds that
verdicts use (``at_least``, ``at_most``), every one at the stated confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

MOST_COUNT = 10**12
"""No data set and no run of timed calls is larger."""

_TOLERANCE = 1e-13  # of a share; doubles near 1 are 2e-16 apart


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


@dataclass(frozen=True, kw_only=True)
class PairedDrop:
    """Accuracy lost on the same images, in percentage points: above 0 is worse."""

    images: int
    drop_pp: float
    low_pp: float
    high_pp: float
    at_least_pp: float
    at_most_pp: float
    confidence: float
    mcnemar_p: float
    """Exact two-sided binomial p that flips to wrong and flips to right are equally likely."""
    flips_to_wrong: int
    """Images that only the reference gets right."""
    flips_to_right: int
    """Images that only the pruned network gets right."""
    agreement: float
    """Share of images that both get right or both get wrong."""
    resolution_pp: float
    """Smallest drop that this many images can rule out at the flips seen here."""


def paired_drop(
    reference_correct: npt.ArrayLike, pruned_correct: npt.ArrayLike, *, confidence: float
) -> PairedDrop:
    """Compare correct/wrong per image, (images,) of bool each, same images in the same order.

    Raises:
        ValueError: no images, or two different numbers of them.
    """
    reference = np.asarray(reference_correct, dtype=bool)
    pruned = np.asarray(pruned_correct, dtype=bool)
    if reference.shape != pruned.shape or reference.ndim != 1 or not reference.size:
        raise ValueError(f"cannot pair {reference.shape} with {pruned.shape}")
    images = len(reference)
    worse, better = int((reference & ~pruned).sum()), int((~reference & pruned).sum())
    low, high = tango_interval(worse, better, images, tail=(1 - confidence) / 2)
    at_least, at_most = tango_interval(worse, better, images, tail=1 - confidence)
    flips = (worse + better) / images
    return PairedDrop(
        images=images,
        drop_pp=100 * (worse - better) / images,
        low_pp=100 * low,
        high_pp=100 * high,
        at_least_pp=100 * at_least,
        at_most_pp=100 * at_most,
        confidence=confidence,
        mcnemar_p=mcnemar_p(worse, better),
        flips_to_wrong=worse,
        flips_to_right=better,
        agreement=1 - flips,
        resolution_pp=resolution(images, flips=flips, confidence=confidence),
    )


def tango_interval(
    worse: float, better: float, images: float, *, tail: float
) -> tuple[float, float]:
    """Return Tango's score interval of (worse - better) / images, as shares.

    ``tail`` is the probability left outside at each end: 0.025 gives the usual 95 % interval.
    """
    z = NormalDist().inv_cdf(1 - tail)

    def score(drop: float) -> float:
        return _tango_score(drop, worse, better, images)

    observed = (worse - better) / images
    return (
        _first(lambda drop: score(drop) <= z, -1.0, observed),
        _first(lambda drop: score(drop) < -z, observed, 1.0),
    )


def mcnemar_p(worse: int, better: int) -> float:
    """Return the exact two-sided McNemar p: binomial(worse + better, 1/2); 1 without flips."""
    from scipy.stats import binomtest

    flips = worse + better
    return float(binomtest(worse, flips).pvalue) if flips else 1.0


def resolution(images: int, *, confidence: float, flips: float = 0.0) -> float:
    """Return the smallest drop in pp that ``images`` can rule out.

    It is the upper bound that two networks of equal accuracy get when the share ``flips`` of the
    images changes between right and wrong, half each way. Without flips it is z^2 / (images + z^2).
    """
    half = flips * images / 2
    return 100 * tango_interval(half, half, images, tail=1 - confidence)[1]


def images_to_resolve(limit_pp: float, *, confidence: float) -> int | None:
    """Return the fewest images that can rule out a drop of ``limit_pp`` when none flips.

    None when no number can, which is for a drop of zero.
    """

    def resolves(count: int) -> bool:
        return resolution(count, confidence=confidence) <= limit_pp

    return first_count(resolves) if resolves(MOST_COUNT) else None


def images_needed(
    limit_pp: float, *, worse: int, better: int, images: int, confidence: float
) -> int | None:
    """Return how many images would decide ``limit_pp`` if flips stayed as frequent as here.

    None when none would: the drop seen is the limit itself.
    """
    limit = limit_pp / 100

    def decides(count: int) -> bool:
        scale = count / images
        low, high = tango_interval(worse * scale, better * scale, count, tail=1 - confidence)
        return high <= limit or low > limit

    return first_count(decides) if decides(MOST_COUNT) else None


def first_count(holds: Callable[[int], bool]) -> int:
    """Return by bisection the first count up to ``MOST_COUNT`` from which a condition holds."""
    low, high = 0, MOST_COUNT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _tango_score(drop: float, worse: float, better: float, images: float) -> float:
    """Score of H0: P(only reference right) - P(only pruned right) = drop; falls with drop."""
    # `only_pruned` is the restricted maximum likelihood estimate: the root of a q^2 + b q + c.
    a = 2 * images
    b = -worse - better + (2 * images - worse + better) * drop
    c = -better * drop * (1 - drop)
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    # The stable form of the larger root: no cancellation when b > 0.
    only_pruned = (-2 * c / (b + root) if b + root else 0.0) if b > 0 else (root - b) / (2 * a)
    variance = images * (2 * only_pruned + drop * (1 - drop))
    difference = worse - better - images * drop
    if variance <= 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return by bisection where a condition that turns true once, from low to high, does so."""
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
