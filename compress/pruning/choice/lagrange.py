"""The least loss within a limit of time: a price of time, and what the price leaves over.

At a price, the least of ``loss + price * time`` is found by elimination. Between the choice that
is just too slow and the one that is just fast enough the price is the slope, until none lies
below their line (the lower convex hull). What the limit still leaves is found among the choices
next above the line: whatever is better than the best so far cannot lie further above it than
that one does. So on small networks the choice is the best there is, and not only one of the hull.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.pruning.choice.elimination import (
    LOSS,
    MOST_JOINT,
    TIME,
    Choice,
    Elimination,
    Factor,
    Sums,
    near_least,
    plan,
)

WIDTHS = (32, 2048)
"""Beginnings of choices that are followed at once: first for a good bound, then for the best."""
MOST_PRICES = 40
MOST_PLANS = 12
HELD_JOINT = 2**14
"""Entries of the largest table where some variables are held whatever it is."""
SAME = 1e-12
"""Relative difference of sums that only rounding tells apart."""


@dataclass(frozen=True)
class Point:
    """A choice with its loss and its time."""

    choice: Choice
    loss: float
    time: float


@dataclass(frozen=True)
class Solution:
    """The best choice found, and the price of time at which it was found."""

    point: Point
    price: float = 0.0
    bound: float = -math.inf
    """No choice within the limit has a smaller loss."""
    proven: bool = False
    """No other choice within the limit has a smaller loss."""


class Problem:
    """Variables with options, and factors of them that are losses or times.

    Args:
        sizes: options of each variable; all first options together have the least loss.
        factors: what is added up.
    """

    def __init__(self, sizes: Sequence[int], factors: Sequence[Factor]) -> None:
        self.factors = factors
        scopes = [factor.scope for factor in factors]
        self.plans = [plan(sizes, scopes, MOST_JOINT)]
        if self.plans[0].held:  # they change often: better small tables than many at once
            together = sorted(set(scopes), key=len, reverse=True)[:MOST_PLANS]
            self.plans = [plan(sizes, scopes, HELD_JOINT, prefer=scope) for scope in together]
        self.first = self.point(np.zeros(len(sizes), np.int64))
        self.last = self.point(np.array(sizes, np.int64) - 1)
        self._sums = Sums(factors, self.first.choice, self.plans[0])

    @property
    def exact(self) -> bool:
        """Whether no variable must be held while others are chosen."""
        return not self.plans[0].held

    def point(self, choice: Choice) -> Point:
        """Return a choice with its loss and time."""
        parts = [0.0, 0.0, 0.0]
        for factor in self.factors:
            parts[factor.part] += float(factor.table((), choice))
        return Point(choice, parts[LOSS], parts[TIME])

    def fastest(self) -> Point:
        """Return the choice with the least time; the fastest found where variables are held."""
        return self._least(0.0, 1.0, (self.first, self.last))[0]

    def within(self, limit: float, fastest: Point, price: float = 0.0) -> Solution:
        """Return the choice with the least loss whose time is at most ``limit``.

        Args:
            limit: the most time.
            fastest: a choice within the limit.
            price: one at which the search may begin; 0 if none is known.
        """
        over, under, best = self.first, fastest, fastest
        if over.time <= limit:
            return Solution(over, price, over.loss, True)
        for _ in range(MOST_PRICES):
            guessed = price > 0
            if not guessed:
                price = (under.loss - over.loss) / (over.time - under.time)
            if price <= 0:  # the fast choice loses nothing
                return Solution(under, 0.0, over.loss, True)
            found, elimination = self._least(1.0, price, (over, under))
            line = min(p.loss + price * p.time for p in (over, under))
            if not guessed and found.loss + price * found.time >= line - SAME * abs(line):
                break
            if found.time <= limit:
                under, best = found, min(best, found, key=lambda point: point.loss)
            else:
                over = found
            last, price = price, 0.0
        return self._left_over(best, fastest, limit, price or last, elimination)

    def _least(
        self, loss: float, time: float, starts: Sequence[Point]
    ) -> tuple[Point, Elimination]:
        """Return a choice with the least weighted sum, and the last elimination."""
        if self.exact:
            elimination = Elimination(self._sums, loss, time)
            return self.point(elimination.first()), elimination
        ends = [self._descend(loss, time, start) for start in starts]
        return min(ends, key=lambda end: loss * end[0].loss + time * end[0].time)

    def _descend(self, loss: float, time: float, best: Point) -> tuple[Point, Elimination]:
        """Hold some variables and choose the others, in turn, until nothing is better."""
        least, improved = math.inf, True
        while improved:
            improved = False
            for planned in self.plans:
                elimination = Elimination(Sums(self.factors, best.choice, planned), loss, time)
                if elimination.least < least - SAME * abs(least):
                    least, improved = elimination.least, True
                    best = self.point(elimination.first())
        return best, elimination

    def _left_over(
        self, best: Point, fastest: Point, limit: float, price: float, elimination: Elimination
    ) -> Solution:
        """Return the best choice near a price, from one that is within the limit."""
        if self.exact:
            best, all_seen = _nearest(self, best, limit, price, elimination)
            return Solution(best, price, elimination.least - price * limit, all_seen)
        found = [self._improved(start, limit, price) for start in (best, fastest)]
        return Solution(min(found, key=lambda point: point.loss), price)

    def _improved(self, best: Point, limit: float, price: float) -> Point:
        """Hold some variables and choose the others within the limit, until nothing is better."""
        before = math.inf
        while best.loss < before:
            before = best.loss
            for planned in self.plans:
                sums = Sums(self.factors, best.choice, planned)
                best, _ = _nearest(self, best, limit, price, Elimination(sums, 1.0, price))
        return best


def _nearest(
    problem: Problem, best: Point, limit: float, price: float, elimination: Elimination
) -> tuple[Point, bool]:
    """Return the best of the choices nearest above the line of a price; whether all were seen."""
    fast = Elimination(elimination.sums, 0.0, 1.0)
    for width in WIDTHS:
        most = best.loss + price * limit
        near, sums, times, all_seen = near_least(elimination, fast, most, limit * (1 + SAME), width)
        for i in np.argsort(sums - price * times, kind="stable"):
            point = problem.point(near[i])
            if point.time <= limit:  # and not only by rounding
                best = min(best, point, key=lambda p: p.loss)
                break
        if all_seen:
            return best, True
    return best, False
