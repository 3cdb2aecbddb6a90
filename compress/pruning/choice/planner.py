"""A pruning step under a limit of time: planned to the end, a part of it taken now."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from compress.errors import BudgetError
from compress.latency.times import LocalTimes, Times, network_milliseconds
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.choice.widths import Chooser, Chosen
from compress.pruning.masking import Candidate, Scores

MOST_LOCAL = 5
"""Choices with a table that is a sum over layers near one network only, until one is within."""
TIGHTER = 1e-3


class Planner:
    """Plans the masks of a network whose budget is a time.

    Args:
        graph: its channel graph.
        times: its latency table.
        allowed: the groups and branches that may go.
        room: share of the final limit by which a network may lie below it, where finer pieces can
            do that.
    """

    def __init__(
        self, graph: ChannelGraph, times: Times, allowed: Sequence[Candidate], *, room: float
    ) -> None:
        self.graph, self.times, self.allowed, self.room = graph, times, allowed, room
        self.chooser = Chooser(graph, times, allowed)

    def cost_of(self, kept: Mask) -> float:
        """Return milliseconds, as the table predicts them."""
        return network_milliseconds(self.graph, self.times, self.graph.closed(kept))

    def fastest(self) -> float:
        """Return the fewest milliseconds that a choice is found to take."""
        return self.chooser.fastest(self.graph.everything())

    def choose(self, scores: Scores, kept: Mask, limit: float, end: float) -> Mask:
        """Return the mask of a step on the way to the best one within the final limit.

        Nothing goes on the way that need not go in the end. Blocks go first: what remains learns to
        do without them while channels go.

        Args:
            scores: (units,) importance that adds up, of branches as well.
            kept: the present mask.
            limit: milliseconds of this step.
            end: milliseconds of the last one.

        Raises:
            BudgetError: the final limit cannot be reached from this mask.
        """
        least = end * (1 - self.room)
        goal = self._within(end, lambda by, most: by.choose(scores, kept, most, least=least))
        mask = kept
        for branch in sorted(self.graph.removable, key=lambda branch: scores[branch.unit]):
            if mask[branch.unit] and not goal[branch.unit] and self.cost_of(mask) > limit:
                mask = mask.copy()
                mask[branch.unit] = False
                mask = self.graph.closed(mask)
        if self.cost_of(mask) <= limit:
            return mask
        return self._within(limit, lambda by, most: by.choose(scores, mask, most, towards=goal))

    def _within(self, limit: float, choose: Callable[[Chooser, float], Chosen]) -> Mask:
        """Return the best mask within a limit, chosen by a chooser under a limit of its own."""
        found, chooser, most = None, self.chooser, limit
        for _ in range(MOST_LOCAL):
            mask = self.graph.closed(choose(chooser, most).mask)
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
