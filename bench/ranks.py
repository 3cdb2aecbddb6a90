"""Rank statistics of a series: what is robust to any single value of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BIAS_STEPS = 2  # more gain nothing, and make much of chance in short series
_BISECTIONS = 36  # of the range of the values: to 1.5e-11 of it


def autocorrelation_time(values: Floats) -> float:
    """Return how many consecutive values (n,) tell as much as one independent value, 1 to n / 2.

    Of their ranks, so that no single value decides; by the initial positive sequence of Geyer,
    "Practical Markov chain Monte Carlo", Statistical Science 7 (1992) 473-483.
    """
    ranks = _ranks(values)
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


def pair_averages(values: Floats, places: Sequence[float]) -> Floats:
    """Return some of the sorted averages of all pairs (n,), each value with itself among them.

    ``places`` (m,) count from 0; the result is (m,). By bisection on how many averages are no
    larger, since the averages of many values would not fit into memory.
    """
    values, wanted = np.sort(values), np.asarray(places) + 1
    low, high = np.full(len(wanted), values[0]), np.full(len(wanted), values[-1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        ordered = np.searchsorted(values, 2 * middle[:, None] - values, side="right").sum(axis=1)
        with_itself = np.searchsorted(values, middle, side="right")
        enough = (ordered + with_itself) / 2 >= wanted
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


def _ranks(values: Floats) -> Floats:
    """Return ranks about their mean; equal values share one."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2
