"""How well an importance predicts the true one: coefficients by scope, and choices among pairs.

The true importance is the squared change of the loss. Ranks, and so Spearman and Kendall, are those
of the absolute change as well; Pearson is that of the squares. The importance is taken as the
criterion ranks by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from compress.networks.groups import Units

Values = NDArray[np.float64]
Coefficient = Literal["spearman", "kendall", "pearson"]

COEFFICIENTS: tuple[Coefficient, ...] = ("spearman", "kendall", "pearson")
SCOPES = ("layers", "all", "residual", "other")
FEWEST = 3
"""Two points always lie on a line."""
BY_SQUARE = "oracle, squared change"
BY_CHANGE = "oracle, signed change"


@dataclass(frozen=True)
class Span:
    """The units of one layer (group) and whether a residual addition ties them."""

    name: str
    units: NDArray[np.int64]
    residual: bool = False


@dataclass(frozen=True)
class Agreement:
    """One coefficient of one criterion."""

    by_layer: Mapping[str, float | None]
    """None where it is not defined: less than three units, or all of one value."""
    layers: float | None
    """Mean over the layers where it is defined."""
    all: float | None
    """All units together."""
    residual: float | None
    """The units of residual streams together."""
    other: float | None
    """All other units together."""

    @property
    def undefined(self) -> int:
        """Number of layers that the mean leaves out."""
        return sum(value is None for value in self.by_layer.values())


def correlation(first: Values, second: Values, coefficient: Coefficient) -> float | None:
    """Correlate two vectors of the same length.

    Pairs with a number that is not finite are left out.

    Returns:
        The coefficient, -1 to 1; None if it is not defined: less than three pairs are left, or one
        of the vectors is constant.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    finite = np.isfinite(first) & np.isfinite(second)
    first, second = first[finite], second[finite]
    if len(first) < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    function = {
        "spearman": stats.spearmanr,
        "kendall": stats.kendalltau,
        "pearson": stats.pearsonr,
    }[coefficient]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nearly constant vectors
        value = float(function(first, second)[0])
    return value if np.isfinite(value) else None


def agreement(
    importance: Values, changes: Values, spans: Sequence[Span], coefficient: Coefficient
) -> Agreement:
    """Correlate an importance with the squared change of the loss.

    Args:
        importance: (units,) by unit.
        changes: (units,) signed change of the loss by unit.
        spans: the layers whose units count; all other units are left out.
        coefficient: which.
    """
    squares = np.square(changes)

    def over(units: NDArray[np.int64]) -> float | None:
        return correlation(importance[units], squares[units], coefficient)

    by_layer = {span.name: over(span.units) for span in spans}
    defined = [value for value in by_layer.values() if value is not None]
    return Agreement(
        by_layer,
        layers=float(np.mean(defined)) if defined else None,
        all=over(_joined(spans)),
        residual=over(_joined([span for span in spans if span.residual])),
        other=over(_joined([span for span in spans if not span.residual])),
    )


def _joined(spans: Sequence[Span]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *(span.units for span in spans)])


# Pairs: removing two units together, and which two each way of choosing would take


@dataclass(frozen=True)
class Pick:
    """The pair that a way of choosing takes: the two units that it holds least important."""

    by: str
    units: tuple[int, int]
    change: float
    """Change of the loss when both are removed."""
    regret: float
    """By how much the loss is above that of the best pair."""
    rank: int
    """1 is the best pair."""


@dataclass(frozen=True)
class Pairs:
    """All pairs of some units."""

    units: Units
    """(pairs, 2)."""
    changes: Values
    """(pairs,) change of the loss when both are removed."""
    best: Pick
    """The pair with the lowest loss, by trying all."""
    picks: tuple[Pick, ...]
    sum_pearson: float | None
    """Of the sum of the two single changes with the change of the pair."""
    sum_spearman: float | None


def judge_pairs(
    units: Units, changes: Values, singles: Values, importances: Mapping[str, Values]
) -> Pairs:
    """Compare what would be chosen with the best pair.

    Args:
        units: (pairs, 2), every pair of some units once.
        changes: (pairs,) change of the loss.
        singles: change of the loss by unit, one removed at a time.
        importances: of every criterion, by unit.
    """
    sums = singles[units].sum(1)
    ways = {BY_CHANGE: singles, BY_SQUARE: np.square(singles), **importances}
    return Pairs(
        units,
        changes,
        best=_pick("all pairs tried", units, changes, int(np.argmin(changes))),
        picks=tuple(
            _pick(name, units, changes, _chosen(units, values)) for name, values in ways.items()
        ),
        sum_pearson=correlation(sums, changes, "pearson"),
        sum_spearman=correlation(sums, changes, "spearman"),
    )


def _chosen(units: Units, importance: Values) -> int:
    """Return the position of the pair of the two least important units; ties by unit."""
    candidates = np.unique(units)
    two = candidates[np.argsort(importance[candidates], kind="stable")[:2]]
    return int(np.flatnonzero(np.isin(units, two).all(axis=1))[0])


def _pick(by: str, units: Units, changes: Values, index: int) -> Pick:
    first, second = units[index].tolist()
    change = float(changes[index])
    rank = 1 + int(np.count_nonzero(changes < change))
    return Pick(by, (first, second), change, change - float(changes.min()), rank)
