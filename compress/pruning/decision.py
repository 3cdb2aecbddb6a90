"""Pruning decisions: which groups may lose units, which units go at a step, and when it is over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compress.config import PruneConfig
from compress.errors import BudgetError, ModelError
from compress.latency.times import Times
from compress.networks import cost
from compress.networks.cuts import tensor_of
from compress.networks.groups import ChannelGraph, Mask, Removable
from compress.networks.partition import NETWORK_INPUT
from compress.pruning.goal import Goal, goal_for
from compress.pruning.importance import summary
from compress.pruning.masking import Candidate, Scores, candidates, prune_to, smallest
from compress.pruning.progress import Progress

ORDINARY = frozenset({NETWORK_INPUT, "network output", "nothing reads it"})
"""Reasons that every network has."""
MOST_NAMED = 5
FAR = 0.1
"""Share below the budget that is worth a word."""

Event = tuple[str, dict[str, Any]]
"""What happened: its kind, and plain facts of it."""

log = logging.getLogger("compress")


class Decisions:
    """The pruning steps of one network, as far as numbers take them.

    Args:
        model: the dense network.
        graph: its channel graph.
        settings: how channels are chosen.
        patience: minibatches that ``max_loss`` may put pruning off in all; None has no end.
        times: a latency table, for a budget of time.

    Raises:
        BudgetError: the budget cannot be reached.
        ConfigError: a budget of time without a table.
        TableError: the table does not cover a layer.
        ModelError: there is nothing to prune.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        settings: PruneConfig,
        patience: int | None = None,
        times: Times | None = None,
    ) -> None:
        self.graph, self.patience = graph, patience
        self.settings, self.allowed, self.goal = reachable(model, graph, settings, times)
        report_multiple(settings, self.settings)
        report_untrained(untrained(model, (c.group for c in candidates(graph, self.settings))))
        self._counted: Mask | None = None
        self._reached = False

    def reached(self, kept: Mask) -> bool:
        """Whether the budget holds."""
        if self._counted is not kept:  # asked at every minibatch, and counting takes time
            self._counted, self._reached = kept, self.goal.cost_of(kept) <= self.goal.limit
        return self._reached

    def limit(self, cost: float) -> None:
        """Let another cost be the limit: a measurement has shown what the budget's stands for."""
        self.goal = replace(self.goal, limit=cost)
        self._counted = None

    @property
    def expected_steps(self) -> int:
        """Training steps until the budget is reached, as far as that is known."""
        settings, steps = self.settings, self.settings.steps
        if settings.step_size is not None:
            removed = settings.budget.value
            if settings.budget.kind != "removed":
                dense, least = self.graph.everything(), smallest(self.graph, self.allowed)
                removed = self.goal.channels_of(dense) - self.goal.channels_of(least)
            steps = math.ceil(removed / settings.step_size)
        steps += settings.start_after
        steps = min(steps, settings.max_steps or steps)
        return steps * settings.interval + settings.first_interval_extra

    def step(
        self, at: Progress, importance: Callable[[], Scores], loss: float | None
    ) -> list[Event]:
        """Take one pruning step, or put it off.

        Args:
            at: where the pruning stands; it is moved on.
            importance: ends the interval and returns (units,) importance, where it is needed.
            loss: mean since the last pruning step, where it is known.

        Returns:
            What is to be told.
        """
        limit = self.settings.max_loss
        if limit is not None and loss is not None and loss > limit:
            return self._pause(at, loss)
        return self._remove(at, importance(), loss)

    def _remove(self, at: Progress, importance: Scores, loss: float | None) -> list[Event]:
        settings, before = self.settings, at.kept
        at.step += 1
        if at.step > settings.start_after:
            step = at.step - settings.start_after
            scores = self.goal.order(importance, before, self.allowed, self.graph, settings)
            chosen, at.end = decide(
                scores, before, self.allowed, goal=self.goal, config=settings, step=step, end=at.end
            )
            at.kept = self.graph.closed(chosen)
            report_far(self.goal, at.kept, settings)
        facts = {
            "pruning_step": at.step,
            "loss": loss,
            "importance": summary(importance, before, self.allowed),
            "widths": {c.group.name: int(at.kept[c.group.units].sum()) for c in self.allowed},
            **cost.totals(self.graph, at.kept),
        }
        if self.goal.planner is not None:
            facts["predicted_ms"] = self.goal.cost_of(at.kept)
        events: list[Event] = [("prune_step", facts)]
        most = settings.max_steps
        if most is not None and at.step >= most and not self.reached(at.kept):
            events.append(self._end(at, f"max_steps = {most} pruning steps are taken"))
        return events

    def _pause(self, at: Progress, loss: float) -> list[Event]:
        """Let training go on without removing anything; in the end, give up."""
        at.paused += 1
        events: list[Event] = [("prune_pause", {"loss": loss})]
        if self.patience is not None and at.paused * self.settings.interval > self.patience:
            limit = self.settings.max_loss
            events.append(self._end(at, f"the loss {loss:.3f} stayed above max_loss = {limit}"))
        return events

    def _end(self, at: Progress, reason: str) -> Event:
        at.ended = True
        share = self.goal.cost_of(at.kept) / self.goal.dense
        log.warning(
            "pruning ends before the budget %s, at %.3f of the dense cost: %s",
            self.settings.budget,
            share,
            reason,
        )
        return "prune_end", {"reason": reason}


def prunable(model: nn.Module, graph: ChannelGraph, config: PruneConfig) -> tuple[Candidate, ...]:
    """Return the groups of a network that may be pruned.

    Raises:
        ModelError: there is none; the message names what stands in the way.
    """
    wanted = candidates(graph, config)
    found = tuple(candidate for candidate in wanted if _trained(model, candidate.group))
    require_removable(graph, found, some_frozen=len(found) < len(wanted))
    return found


def reachable(
    model: nn.Module, graph: ChannelGraph, settings: PruneConfig, times: Times | None
) -> tuple[PruneConfig, tuple[Candidate, ...], Goal]:
    """Return what ``within_reach`` finds where groups that nothing trains stay dense."""
    return within_reach(graph, settings, lambda relaxed: prunable(model, graph, relaxed), times)


def within_reach(
    graph: ChannelGraph,
    settings: PruneConfig,
    allowed_by: Callable[[PruneConfig], tuple[Candidate, ...]],
    times: Times | None,
) -> tuple[PruneConfig, tuple[Candidate, ...], Goal]:
    """Return settings with which the budget can be reached, what may go by them, and the goal.

    Args:
        graph: the channel graph.
        settings: what is wanted; ``relax_multiple`` lets the multiple be halved.
        allowed_by: returns what may go by other settings.
        times: a latency table, for a budget of time.

    Raises:
        BudgetError: the budget cannot be reached.
        ModelError: nothing may go.
    """
    relaxed = settings
    while True:
        try:
            allowed = allowed_by(relaxed)
            goal = goal_for(graph, settings.budget, allowed, times)
        except (BudgetError, ModelError):
            by_time = settings.budget.kind == "latency"  # whose table knows multiples only
            if not settings.relax_multiple or by_time or relaxed.channel_multiple == 1:
                raise
            half = relaxed.channel_multiple // 2
            relaxed = relaxed.model_copy(update={"channel_multiple": half})
            continue
        return relaxed, allowed, goal


def require_removable(
    graph: ChannelGraph, allowed: Sequence[Candidate], *, some_frozen: bool = False
) -> None:
    """Raise a ModelError that names what stands in the way if no group may lose a unit."""
    if not any(c.floor < c.group.size for c in allowed):
        raise ModelError(_nothing_to_prune(graph, some_frozen))


def report_multiple(wanted: PruneConfig, relaxed: PruneConfig) -> None:
    """Tell that the multiple of channels gave way to the budget, if it did."""
    if relaxed is not wanted:
        log.warning(
            "%s cannot be reached in multiples of %d channels: widths are multiples of %d",
            *(wanted.budget, wanted.channel_multiple, relaxed.channel_multiple),
        )


def report_far(goal: Goal, kept: Mask, settings: PruneConfig) -> None:
    """Tell that much more went than was asked for, because it goes in large chunks, if it did."""
    left = goal.cost_of(kept)
    if left < goal.limit * (1 - FAR) and settings.channel_multiple > 1:
        log.warning(
            "%s was asked for and %.3f of the dense cost is left: multiples of %d channels come no "
            "closer; a smaller channel_multiple does",
            *(goal.budget, left / goal.dense, settings.channel_multiple),
        )


def report_dense(graph: ChannelGraph) -> None:
    """Tell which groups of a network stay dense, and why, where that is not how networks are."""
    held = [f"{g.name} ({g.frozen})" for g in graph.frozen if g.frozen not in ORDINARY]
    if held:
        more = f" and {len(held) - MOST_NAMED} more" if len(held) > MOST_NAMED else ""
        names = ", ".join(held[:MOST_NAMED])
        log.warning("channel groups that stay dense: %s%s", names, more)


def decide(
    scores: Scores,
    kept: Mask,
    allowed: tuple[Candidate, ...],
    *,
    goal: Goal,
    config: PruneConfig,
    step: int,
    end: Mask | None = None,
) -> tuple[Mask, Mask | None]:
    """Return the mask after one pruning step, and the one that steps are heading for.

    The end is planned at every step, as if it were the last one, and the least important of what
    goes in it goes now. So nothing goes on the way that would have to come back where a large chunk
    ends it: what is gone never does.

    Args:
        scores: (units,) what is ranked.
        kept: the present mask.
        allowed: the groups and branches that may lose units.
        goal: what must hold in the end.
        config: how many steps there are, or channels in a step.
        step: the number of this one, from 1.
        end: the end that the last step planned, which stays where another falls further below the
            goal than is wanted.
    """
    if goal.planner is not None:
        limit = goal.at(step, config.steps)
        return goal.planner.choose(scores, kept, limit, end=goal.limit, least=goal.least), None
    planned = end_of(scores, kept, allowed, goal)
    if end is None or goal.cost_of(planned) >= min(goal.least, goal.cost_of(end)):
        end = planned
    cost_of, limit = goal.cost_of, goal.at(step, config.steps)
    if config.step_size is not None:
        cost_of, limit = goal.channels_of, goal.channels_of(kept) - config.step_size
    if cost_of(end) >= limit:
        return end, end
    going = np.where(end, np.inf, scores)
    return prune_to(going, kept, allowed, cost_of=cost_of, limit=limit), end


def end_of(scores: Scores, kept: Mask, allowed: Sequence[Candidate], goal: Goal) -> Mask:
    """Return a mask in which the goal holds, reached at once."""
    if goal.planner is not None:
        return goal.planner.choose(scores, kept, goal.limit, end=goal.limit, least=goal.least)
    return prune_to(scores, kept, allowed, cost_of=goal.cost_of, limit=goal.limit, least=goal.least)


def untrained(model: nn.Module, groups: Iterable[Removable]) -> list[Removable]:
    """Return the groups, and branches, of which nothing trains what reads them."""
    return [group for group in groups if not _trained(model, group)]


def _trained(model: nn.Module, group: Removable) -> bool:
    return all(tensor_of(model, reader).requires_grad for reader in group.readers)


def report_untrained(groups: Sequence[Removable]) -> None:
    """Tell which groups stay dense because nothing trains what reads them, if any do."""
    if groups:
        names = ", ".join(group.name for group in groups[:MOST_NAMED])
        log.warning("%d groups have frozen readers and stay dense: %s", len(groups), names)


def _nothing_to_prune(graph: ChannelGraph, frozen: bool) -> str:
    if graph.unknown and not graph.prunable:
        return f"nothing to prune: unknown operations touch every group: {', '.join(graph.unknown)}"
    if not graph.prunable:
        reasons = dict.fromkeys(str(g.frozen) for g in graph.frozen if g.frozen not in ORDINARY)
        return f"nothing to prune: every group must stay dense: {', '.join(reasons) or 'no layer'}"
    if frozen:
        return "nothing to prune: every layer that reads prunable channels is frozen"
    return "nothing to prune: no group is above its floor (min_channels, min_share, keep_dense)"
