"""The pruner's pieces one by one: importance from gradients, a choice, a shrink."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoints.recipe import Recipe, recipe_of
from compress.config import PruneConfig
from compress.criteria import bind
from compress.errors import ConfigError, ModelError, UsageError
from compress.latency.times import Times
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import shrink_
from compress.networks.trial import tried_graph
from compress.pruning.decision import (
    end_of,
    report_far,
    report_multiple,
    report_untrained,
    require_removable,
    untrained,
    within_reach,
)
from compress.pruning.goal import times_for
from compress.pruning.masking import Candidate, Scores, candidates
from compress.pruning.pruner import Optimizers, context_of
from compress.pruning.settings import prune_settings, takes_settings
from compress.pruning.training import (
    inner_network,
    inner_optimizers,
    require_described,
    require_trained,
)


def analyse(model: nn.Module, example: Any) -> ChannelGraph:
    """Find the channel groups of a network, and try on a copy that removing them is exact.

    Args:
        model: the network; it is not changed.
        example: inputs of ``forward``: a tensor, a tuple of arguments, a dictionary of keywords, or
            an ``Example``.

    Returns:
        The channel graph. ``graph.groups`` holds every group with its name, its units and, in
        ``frozen``, why it stays dense; masks and importance have one entry per unit.

    Raises:
        ModelError: the network cannot be captured.
    """
    network = inner_network(model)
    return tried_graph(network, Example.of(example).pair().beside(network))


def importance(
    model: nn.Module, graph: ChannelGraph, criterion: str = "taylor-gate", *, seed: int = 0
) -> Scores:
    """Return the importance of every unit from the gradients that are in the parameters.

    Average it over minibatches: that of one is noise.

    Args:
        model: the network after ``loss.backward()``.
        graph: its channel graph.
        criterion: a formula of docs/criteria.md that weights and gradients alone tell.
        seed: of the criterion ``random``.

    Returns:
        (units,) float64; of groups whose readers are frozen, and have no gradient, infinity.

    Raises:
        ModelError: the network is not that of the graph.
        ConfigError: no such criterion, or one that has to watch the network run.
        UsageError: there are no gradients.
    """
    network, config = inner_network(model), PruneConfig(criterion=criterion)
    require_described(network, graph)
    scoring = bind(config.criterion, context_of(network, graph, config, seed))
    if scoring.network is not None:
        raise ConfigError(
            f"the criterion {config.criterion} watches the network run, which gradients that are "
            "there do not tell: use Pruner, or taylor-gate"
        )
    if scoring.per_minibatch and all(p.grad is None for p in network.parameters()):
        raise UsageError("importance() finds no gradient in the network: call loss.backward()")
    found = np.array(scoring.score(1.0).detach().double().cpu().numpy())
    if scoring.per_minibatch:
        frozen = untrained(network, (*graph.prunable, *graph.removable))
        report_untrained(frozen)
        for group in frozen:
            found[group.units] = np.inf
    return found


@takes_settings
def choose(
    graph: ChannelGraph,
    importance: Scores | torch.Tensor,
    *,
    kept: Mask | None = None,
    table: Times | str | Path | None = None,
    **settings: Any,
) -> Mask:
    """Choose what goes, the least important first, until the budget holds.

    Args:
        graph: the channel graph of the dense network.
        importance: (units,) of every unit; a group of infinite importance stays, NaN is refused.
        kept: (units,) the mask to go on from; by default everything is there.
        table: what layers take, for a budget of time; see ``Pruner``.
        settings: ``budget`` and other fields of ``[prune]`` that bear on one choice: ``normalize``,
            ``rank``, ``min_channels``, ``min_share``, ``channel_multiple``, ``relax_multiple``,
            ``keep_dense``, ``only``.

    Returns:
        (units,) True for what stays.

    Raises:
        BudgetError: the budget cannot be reached; the message names the closest.
        ConfigError: a setting that does not exist or does not fit.
        ModelError: nothing may be removed, or the importance is of another network.
    """
    config = prune_settings(settings, of="choose")
    scores = np.asarray(torch.as_tensor(importance).detach().cpu().numpy(), dtype=np.float64)
    if scores.shape != (graph.num_units,) or np.isnan(scores).any():
        raise ModelError(
            f"the importance is of shape {scores.shape} and this network has {graph.num_units} "
            "units: give one number for each, which is not NaN"
        )
    before = graph.everything() if kept is None else np.asarray(kept, dtype=bool)

    def allowed_by(settings: PruneConfig) -> tuple[Candidate, ...]:
        wanted = candidates(graph, settings)
        allowed = tuple(c for c in wanted if not np.isinf(scores[c.group.units]).all())
        require_removable(graph, allowed, some_frozen=len(allowed) < len(wanted))
        return allowed

    times = times_for(config, graph, table)
    wanted = config
    config, allowed, goal = within_reach(graph, wanted, allowed_by, times)
    report_multiple(wanted, config)
    order = goal.order(scores, before, allowed, graph, config)
    chosen = graph.closed(end_of(order, before, allowed, goal))
    report_far(goal, chosen, config)
    return chosen


def shrink(
    model: nn.Module,
    graph: ChannelGraph,
    kept: Mask,
    *,
    optimizer: Optimizers | None = None,
    copies: Sequence[nn.Module] = (),
) -> Recipe:
    """Remove from a network, in place, what is not kept; training may go on.

    Parameters are exchanged, not resized, and the optimizer's state follows.

    Args:
        model: the network that the graph describes.
        graph: its channel graph.
        kept: (units,) True for what stays.
        optimizer: one or several that train the network, if any.
        copies: networks of the same shapes that shrink along.

    Returns:
        The recipe, with which ``compress.save`` and ``compress.load`` rebuild the network.

    Raises:
        ModelError: the mask or the graph is of another network, as that of a dense one where the
            network has shrunk; or the mask removes all of a group or a frozen one.
        UsageError: the optimizer lacks a parameter, or a copy is of another network.
    """
    network, others = inner_network(model), tuple(map(inner_network, copies))
    optimizers, mask = inner_optimizers(optimizer), np.asarray(kept, dtype=bool)
    _require_mask(graph, mask)
    mask = graph.closed(mask)
    require_described(network, graph)
    require_trained(network, graph, optimizers, others)
    for each, trained_by in ((network, optimizers), *((copied, ()) for copied in others)):
        shrink_(each, graph, mask, trained_by)
    return recipe_of(graph, mask)


def _require_mask(graph: ChannelGraph, mask: Mask) -> None:
    if mask.shape != (graph.num_units,):
        raise ModelError(
            f"the mask is of shape {mask.shape} and this network has {graph.num_units} units"
        )
    gone = [branch for branch in graph.branches if not mask[branch.unit]]
    for branch in gone:
        if branch.frozen is not None:
            raise ModelError(f"{branch.name} stays ({branch.frozen}) and the mask removes it")
    inner = np.concatenate([np.zeros(0, np.int64), *(branch.inner for branch in gone)])
    for group in graph.groups:
        if np.isin(group.units, inner).all():  # gone as a whole
            continue
        left = int(mask[group.units].sum())
        if group.frozen is not None and left < group.size:
            raise ModelError(f"{group.name} stays dense ({group.frozen}) and the mask cuts it")
        if left < min(group.fewest, group.size):
            raise ModelError(f"the mask leaves {left} of {group.name}, which needs {group.fewest}")
