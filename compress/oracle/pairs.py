"""Pairs: what removing two units together does, and which pair each way of choosing would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compress.networks.groups import Units
from compress.oracle.correlation import Values, correlation

BY_SQUARE = "oracle, squared change"
BY_CHANGE = "oracle, signed change"


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
