"""One pruning decision: which groups may lose units, and which units go at a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from compress.config import PruneConfig
from compress.errors import ModelError
from compress.networks.cuts import tensor_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.partition import NETWORK_INPUT
from compress.pruning.masking import Candidate, Goal, Scores, candidates, prune_to

ORDINARY = frozenset({NETWORK_INPUT, "network output", "nothing reads it"})
"""Reasons that every network has."""
MOST_NAMED = 5

log = logging.getLogger("compress")


def prunable(model: nn.Module, graph: ChannelGraph, config: PruneConfig) -> tuple[Candidate, ...]:
    """Return the groups of a network that may be pruned.

    Raises:
        ModelError: there is none; the message names what stands in the way.
    """
    found: list[Candidate] = []
    frozen: list[Candidate] = []
    for candidate in candidates(graph, config):
        trainable = all(tensor_of(model, r).requires_grad for r in candidate.group.readers)
        (found if trainable else frozen).append(candidate)
    if frozen:
        names = ", ".join(c.group.name for c in frozen[:5])
        log.warning("%d groups have frozen readers and stay dense: %s", len(frozen), names)
    require_removable(graph, found, some_frozen=bool(frozen))
    return tuple(found)


def require_removable(
    graph: ChannelGraph, allowed: Sequence[Candidate], *, some_frozen: bool = False
) -> None:
    """Raise a ModelError that names what stands in the way if no group may lose a unit."""
    if not any(c.floor < c.group.size for c in allowed):
        raise ModelError(_nothing_to_prune(graph, some_frozen))


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
) -> Mask:
    """Return the mask after one pruning step: a share of the way to the goal, never past it."""
    if config.step_size is None:
        limit = goal.at(step, config.steps)
        return prune_to(scores, kept, allowed, cost_of=goal.cost_of, limit=limit)
    fewest = goal.channels_of(kept) - config.step_size
    last = prune_to(scores, kept, allowed, cost_of=goal.cost_of, limit=goal.limit)
    if goal.channels_of(last) >= fewest:
        return last
    return prune_to(scores, kept, allowed, cost_of=goal.channels_of, limit=fewest)


def _nothing_to_prune(graph: ChannelGraph, frozen: bool) -> str:
    if graph.unknown and not graph.prunable:
        return f"nothing to prune: unknown operations touch every group: {', '.join(graph.unknown)}"
    if not graph.prunable:
        reasons = dict.fromkeys(str(g.frozen) for g in graph.frozen if g.frozen not in ORDINARY)
        return f"nothing to prune: every group must stay dense: {', '.join(reasons) or 'no layer'}"
    if frozen:
        return "nothing to prune: every layer that reads prunable channels is frozen"
    return "nothing to prune: no group is above its floor (min_channels, min_share, keep_dense)"
