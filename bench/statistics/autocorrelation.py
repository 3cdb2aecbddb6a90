"""How alike the values of a series are that follow each other, by their ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_BIAS_STEPS = 2  # more gain nothing, and make much of chance in short series


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


def _ranks(values: Floats) -> Floats:
    """Return ranks about their mean; equal values share one."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse] - (len(values) + 1) / 2
