"""A pruning step under a limit of time: planned to the end, a part of it taken now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.errors import BudgetError
from compress.latency.times import LocalTimes, Times, network_milliseconds
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import Candidate, Scores, weighed_by_depth

MOST_LOCAL = 5
"""Choices with a table that is a sum over layers near one network only, until one is within."""
TIGHTER = 1e-3


class Planner:
    """Plans the masks of a network whose budget is a time.

    Args:
        graph: its channel graph.
        times: its latency table.
        allowed: the groups and branches that may go.
    """

    def __init__(self, graph: ChannelGraph, times: Times, allowed: Sequence[Candidate]) -> None:
        self.graph, self.times, self.allowed = graph, times, allowed
        self.chooser = Chooser(graph, times, allowed)

    def cost_of(self, kept: Mask) -> float:
        """Return milliseconds, as the table predicts them."""
        return network_milliseconds(self.graph, self.times, self.graph.closed(kept))

    def fastest(self) -> float:
        """Return the fewest milliseconds that a choice is found to take."""
        return self.chooser.fastest(self.graph.everything())

    def choose(self, scores: Scores, kept: Mask, limit: float, *, end: float, least: float) -> Mask:
        """Return the mask of a step on the way to the best one within the final limit.

        Nothing goes on the way that need not go in the end. Blocks go first: what remains learns to
        do without them while channels go. The end is planned anew when one is gone, because those
        that are left are then worth more.

        Args:
            scores: (units,) importance that adds up, of branches as well.
            kept: the present mask.
            limit: milliseconds of this step.
            end: milliseconds of the last one.
            least: fewer than these are not wanted in the end, where finer pieces can do that.

        Raises:
            BudgetError: the final limit cannot be reached from this mask.
        """
        mask = kept
        while self.cost_of(mask) > limit:
            worth = weighed_by_depth(scores, mask, self.graph)
            goal = self._best(worth, mask, end, least=least)
            going = [b.unit for b in self.graph.removable if mask[b.unit] and not goal[b.unit]]
            if not going:
                return self._best(worth, mask, limit, towards=goal)
            mask = mask.copy()
            mask[min(going, key=lambda unit: worth[unit])] = False
            mask = self.graph.closed(mask)
        return mask

    def _best(self, scores: Scores, kept: Mask, limit: float, **wanted: Any) -> Mask:
        """Return the best mask within a limit, by choices under limits of a table near it.

        Args:
            scores: (units,) importance.
            kept: the present mask.
            limit: milliseconds.
            **wanted: of ``Chooser.choose``.
        """
        found, chooser, most = None, self.chooser, limit
        for _ in range(MOST_LOCAL):
            mask = self.graph.closed(chooser.choose(scores, kept, most, **wanted).mask)
            reached = self.cost_of(mask)
            if found is not None and (mask == found).all():
                break
            if reached <= limit:
                found, most = mask, limit
            else:
                most *= limit / reached * (1 - TIGHTER)
            if not isinstance(self.times, LocalTimes):
                break
            chooser = Chooser(self.graph, self.times.around(self.graph, mask), self.allowed)
        if found is None:
            raise BudgetError(f"no choice of widths is known to take {limit:.4g} ms")
        return found
