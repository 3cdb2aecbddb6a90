"""The least of a sum of functions that each ask only a few variables: exact, by elimination.

A *factor* has two values at each of its variables' options: a loss and a time. Minimising
``loss + price * time`` takes one variable after the other out of the sum: what remains of it is a
factor on its neighbours, the least over its options (Dechter, "Bucket elimination", 1999). On a
chain this is dynamic programming. What is left behind answers two questions at no cost: how much
each option of a variable adds to the least sum, and so which choices come next after the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Choice = NDArray[np.int64]
"""The option of every variable; its last dimension is the number of variables."""

LOSS, TIME, RULE = range(3)
STRATA = 16
"""Of times, from each of which beginnings are kept when there are too many."""
MOST_JOINT = 2**22
"""Entries of the largest table."""


class Factor(Protocol):
    """A function of a few variables."""

    @property
    def scope(self) -> tuple[int, ...]:
        """Its variables, ascending."""

    @property
    def part(self) -> int:
        """LOSS, TIME or RULE: a rule is 0, or infinite where options do not go together."""

    def table(self, free: tuple[int, ...], at: Choice) -> Values:
        """Return the values by the options of the ``free`` variables; others are as in ``at``."""


@dataclass(frozen=True)
class Table:
    """A factor that is written out."""

    scope: tuple[int, ...]
    values: Values
    part: int = LOSS

    def table(self, free: tuple[int, ...], at: Choice) -> Values:
        """Return the values by the options of the free variables."""
        return self.values[tuple(slice(None) if v in free else int(at[v]) for v in self.scope)]


@dataclass(frozen=True)
class Plan:
    """In which order variables are eliminated, and which must be held so that tables fit."""

    order: tuple[int, ...]
    held: tuple[int, ...] = ()
    work: int = 0
    """Entries of all tables."""


def plan(
    sizes: Sequence[int],
    scopes: Sequence[tuple[int, ...]],
    most: int = MOST_JOINT,
    prefer: Sequence[int] = (),
) -> Plan:
    """Return an order of small tables: always the variable next whose table is smallest.

    Args:
        sizes: options of each variable.
        scopes: the variables of each factor.
        most: entries of the largest table; where more are needed, variables are held.
        prefer: variables that are not held while others can be.
    """
    near: dict[int, set[int]] = {v: set() for v in range(len(sizes))}
    for scope in scopes:
        for v in scope:
            near[v].update(scope)
            near[v].discard(v)
    joint = {v: _joint(sizes, v, near[v]) for v in near}
    order: list[int] = []
    held: list[int] = []
    work = 0
    while near:
        v = min(joint, key=lambda u: (joint[u], -sizes[u]))
        if too_large := joint[v] > most:
            v = max(near, key=lambda u: (u not in prefer, len(near[u]), sizes[u]))
        (held if too_large else order).append(v)
        work += 0 if too_large else joint[v]
        around = near.pop(v)
        del joint[v]
        for u in around:
            near[u].discard(v)
            if not too_large:
                near[u] |= around - {u}
            joint[u] = _joint(sizes, u, near[u])
    return Plan(tuple(order), tuple(held), work)


def _joint(sizes: Sequence[int], variable: int, near: set[int]) -> int:
    product = sizes[variable]
    for v in near:
        product *= sizes[v]
    return product


class Sums:
    """The factors with some variables held, added up where they share their variables.

    Args:
        factors: all of them.
        at: the options of variables that are held.
        planned: which those are, and the order of the others.
    """

    def __init__(self, factors: Sequence[Factor], at: Choice, planned: Plan) -> None:
        self.at, self.order = at, planned.order
        self.variables = at.shape[-1]
        held = set(planned.held)
        self._sums: dict[tuple[int, ...], list[Values]] = {}
        for factor in factors:
            free = tuple(v for v in factor.scope if v not in held)
            parts = self._sums.setdefault(free, [np.zeros(())] * 3)
            parts[factor.part] = parts[factor.part] + factor.table(free, at)

    def weighted(self, loss: float, time: float) -> list[tuple[tuple[int, ...], Values]]:
        """Return scope and values of ``loss`` times the losses and ``time`` times the times."""
        return [
            (scope, loss * losses + time * times + rules)
            for scope, (losses, times, rules) in self._sums.items()
        ]


class Elimination:
    """The least of a weighted sum, and what every choice has above it.

    Args:
        sums: the factors.
        loss: weight of the losses.
        time: weight of the times.

    Attributes:
        least: the least sum.
        price: weight of the times.
    """

    def __init__(self, sums: Sums, loss: float, time: float) -> None:
        self.sums, self.price = sums, time
        self._buckets: list[tuple[int, list[tuple[tuple[int, ...], Values]]]] = []
        pending = sums.weighted(loss, time)
        for v in sums.order:
            bucket = [_with_last(scope, table, v) for scope, table in pending if v in scope]
            pending = [(scope, table) for scope, table in pending if v not in scope]
            around = tuple(sorted({u for scope, _ in bucket for u in scope}))
            pending.append((around, _least(bucket, around)))
            self._buckets.append((v, bucket))
        self.least = float(sum(table for _, table in pending))

    def above(self, step: int, chosen: Choice) -> Values:
        """Return (choices, options) what each option of a variable adds to the least sum.

        Args:
            step: which variable, in the opposite of the order of elimination.
            chosen: (choices, variables) the options of the variables before.
        """
        _, bucket = self._buckets[-1 - step]
        values: Values = np.zeros((1, 1))
        for scope, table in bucket:
            values = values + (table[tuple(chosen[:, v] for v in scope)] if scope else table[None])
        return values - values.min(-1, keepdims=True)

    def first(self) -> Choice:
        """Return a choice that has the least sum."""
        chosen = self.sums.at[None].copy()
        for step, v in enumerate(reversed(self.sums.order)):
            chosen[0, v] = np.argmin(self.above(step, chosen)[0])
        return chosen[0]

    def asked_after(self, step: int) -> list[int]:
        """Return the variables chosen until a step on which later ones depend."""
        left = self._buckets[: len(self._buckets) - 1 - step]
        later = {v for v, _ in left}
        return sorted({u for _, bucket in left for scope, _ in bucket for u in scope} - later)


def _with_last(scope: tuple[int, ...], table: Values, v: int) -> tuple[tuple[int, ...], Values]:
    return tuple(u for u in scope if u != v), np.moveaxis(table, scope.index(v), -1)


def _least(bucket: list[tuple[tuple[int, ...], Values]], around: tuple[int, ...]) -> Values:
    """Return the least sum of tables whose last dimension is one variable's, by those around it."""
    aligned = []
    for scope, table in bucket:
        shape = [1] * len(around)
        for u, length in zip(scope, table.shape[:-1], strict=True):
            shape[around.index(u)] = length
        aligned.append(table.reshape([*shape, -1]))
    aligned.sort(key=lambda table: table.size)  # the whole is only written once
    return reduce(np.add, aligned, np.zeros(1)).min(-1)


def near_least(
    priced: Elimination, timed: Elimination, most: float, limit: float, width: int
) -> tuple[Choice, Values, Values, bool]:
    """Return choices of little loss whose time is within a limit.

    Variables are chosen one after the other. A beginning of a choice is followed no further when
    the best end that it can have breaks a bound, or when another with which all that follows is
    the same has neither more loss nor more time.

    Args:
        priced: of losses and times at a price.
        timed: of times.
        most: the largest priced sum.
        limit: the largest time.
        width: the most beginnings that are followed at once.

    Returns:
        (choices, variables) options; (choices,) priced sums; (choices,) times; whether the choice
        of least loss is certainly among these.
    """
    sums, price = priced.sums, priced.price
    chosen, complete = sums.at[None].copy(), True
    total, time = np.array([priced.least]), np.array([timed.least])
    for step, v in enumerate(reversed(sums.order)):
        totals = total[:, None] + priced.above(step, chosen)
        times = time[:, None] + timed.above(step, chosen)
        rows, options = np.nonzero((totals <= most) & (times <= limit))
        total, time = totals[rows, options], times[rows, options]
        chosen = chosen[rows]
        chosen[:, v] = options
        kept = _undominated(chosen[:, priced.asked_after(step)], total - price * time, time)
        if len(kept) > width:
            complete = False
            kept = kept[_spread(total[kept], time[kept], width)]
        chosen, total, time = chosen[kept], total[kept], time[kept]
    return chosen, total, time, complete


def _undominated(states: Choice, losses: Values, times: Values) -> Choice:
    """Return the rows than which no other of the same state has less loss and no more time."""
    state = _numbered(states)
    order = np.lexsort((losses, times, state))
    rank = np.empty(len(losses), np.int64)
    rank[np.argsort(losses, kind="stable")] = np.arange(len(losses))
    # Later states are shifted below all earlier ones, so that each has a minimum of its own.
    shifted = (rank - state * len(losses))[order]
    before = np.minimum.accumulate(np.append(np.iinfo(np.int64).max, shifted))[:-1]
    return order[shifted < before]


def _numbered(states: Choice) -> Choice:
    """Return a number for each row, the same for the same rows."""
    numbers = np.zeros(len(states), np.int64)
    for column in states.T:
        if len(numbers) and numbers.max() >= 2**31:
            numbers = np.unique(numbers, return_inverse=True)[1]
        numbers = numbers * (column.max(initial=0) + 1) + column
    return np.unique(numbers, return_inverse=True)[1]


def _spread(totals: Values, times: Values, width: int) -> Choice:
    """Return so many rows: the least sums among those of about the same time, of all times."""
    by_time = np.argsort(times, kind="stable")
    stratum = np.empty(len(times), np.int64)
    stratum[by_time] = np.arange(len(times)) * STRATA // len(times)
    order = np.lexsort((totals, stratum))
    starts = np.searchsorted(stratum[order], np.arange(STRATA))
    place = np.arange(len(order)) - starts[stratum[order]]
    return order[np.argsort(place, kind="stable")[:width]]
