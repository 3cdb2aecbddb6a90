"""The true importance of blocks: what the loss becomes without each branch, and who foresees it.

Channels and blocks compete for what is removed, so their importance must be of one currency: the
squared change of the loss (Molchanov et al. 2019, equation 2) that it stands for. Four estimates
are compared: the squared branch gate, the sum of the squared gates of the channels that the branch
adds, the square of the sum of their absolute gates (``taylor-parts``), and the sum of the
importance of the channels that are in no other place. What goes instead of a block is no single
channel but a good part of some groups, so the less important half of every group is removed as
well, and set against the sum of its importance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

from compress.criteria import bind
from compress.criteria.scoring import Context
from compress.criteria.taylor import BranchGate
from compress.networks import cost
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import mask_
from compress.oracle.correlation import FEWEST, Values
from compress.pruning.importance import Importance

ESTIMATES = {
    "gate": "squared branch gate",
    "summed": "squared gates of the channels that it adds, summed",
    "parts": "absolute gates of the channels that it adds, summed, squared",
    "inner": "importance of the channels inside, summed",
}


def block_changes(
    context: Context,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    after_block: Callable[[int], None] = lambda done: None,
) -> Values:
    """Return the change of the mean cross-entropy without each branch that may go, (branches,).

    Args: see ``loss_changes``; ``after_block`` is told how many are measured, and may raise.
    """
    masks = []
    for branch in context.graph.removable:
        kept = context.graph.everything()
        kept[branch.unit] = False
        masks.append(context.graph.closed(kept))
    return loss_changes(
        context, masks, images, labels, batch_size=batch_size, after_each=after_block
    )


def half_changes(
    context: Context,
    importance: Values,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
) -> tuple[Values, Values]:
    """Return what half of each group is worth: by the sum of its importance, and the true change.

    Args: see ``loss_changes``; ``importance`` is that of every unit, in whose order they go.
    """
    masks, sums = [], []
    for group in context.graph.prunable:
        least = group.units[np.argsort(importance[group.units])][: group.size // 2]
        kept = context.graph.everything()
        kept[least] = False
        masks.append(kept)
        sums.append(importance[least].sum())
    changes = loss_changes(context, masks, images, labels, batch_size=batch_size)
    return np.array(sums), changes


@torch.no_grad()
def loss_changes(
    context: Context,
    masks: Sequence[Mask],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    after_each: Callable[[int], None] = lambda done: None,
) -> Values:
    """Return the change of the mean cross-entropy under each mask, (masks,).

    Args:
        context: of the dense network.
        masks: the units that are kept.
        images: (N, C, H, W), normalised.
        labels: (N,).
        batch_size: images of a forward pass.
        after_each: told how many are measured; may raise.
    """
    model, graph = copy.deepcopy(context.model).eval(), context.graph

    def loss(network: torch.nn.Module) -> float:
        total = 0.0
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            logits = network(images[part].to(context.device))
            wanted = labels[part].to(context.device)
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        return total / len(images)

    dense, changes = loss(model), []
    for kept in masks:
        masked = copy.deepcopy(model)
        mask_(masked, graph, kept)
        changes.append(loss(masked) - dense)
        after_each(len(changes))
    return np.array(changes)


def block_estimates(
    context: Context, images: torch.Tensor, labels: torch.Tensor, *, batch_size: int
) -> dict[str, Values]:
    """Return what each of ``ESTIMATES`` says of the branches that may go, (branches,) each.

    Args:
        context: of the dense network.
        images: (N, C, H, W), normalised.
        labels: (N,).
        batch_size: images of a minibatch, over which squares are averaged.
    """
    model = copy.deepcopy(context.model).eval().requires_grad_(True)
    graph, branches = context.graph, context.graph.removable
    inside = Context(model, graph, seed=context.seed)
    scoring, importance = bind("taylor-gate", inside), Importance(graph.num_units, momentum=0)
    gates = [BranchGate(model, branch) for branch in branches]
    gate, summed, absolute = np.zeros((3, len(branches)))
    for start in range(0, len(images) - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        model.zero_grad()
        logits = model(images[part].to(context.device))
        F.cross_entropy(logits, labels[part].to(context.device)).backward()  # type: ignore[no-untyped-call]
        importance.add(scoring.score(1.0))
        parts = [one.parts().double().cpu().numpy() for one in gates]
        gate += [part.sum() ** 2 for part in parts]
        summed += [np.square(part).sum() for part in parts]
        absolute += [np.abs(part).sum() for part in parts]
    minibatches = max(1, importance.minibatches)
    units = importance.close_interval()
    channels = graph.num_units - len(graph.branches)
    return {
        "gate": gate / minibatches,
        "summed": summed / minibatches,
        "parts": (absolute / minibatches) ** 2,
        "inner": np.array([units[b.inner[b.inner < channels]].sum() for b in branches]),
    }


def blocks_document(
    graph: ChannelGraph,
    changes: Values,
    estimates: dict[str, Values],
    scales: Mapping[str, float | None],
) -> dict[str, Any] | None:
    """Return what is told of the blocks; None of a network without any.

    Args:
        graph: the channel graph.
        changes: (branches,) change of the loss.
        estimates: (branches,) by name.
        scales: of channels alone, and of halves of groups: see ``scale_of``.
    """
    if not len(changes):
        return None
    saved = cost.macs_saved(graph, graph.everything())
    return {
        "blocks": [
            {
                "name": branch.name,
                "loss_change": float(change),
                "macs": int(saved[branch.unit]),
                **{name: float(values[place]) for name, values in estimates.items()},
            }
            for place, (branch, change) in enumerate(zip(graph.removable, changes, strict=True))
        ],
        "scales": dict(scales),
        "estimates": {
            name: {
                "spearman": _spearman(values, changes),
                "scale": scale_of(values, changes),
            }
            for name, values in estimates.items()
        },
    }


def scale_of(importance: Values, changes: Values) -> float | None:
    """Return the median of squared change over importance: 1 where it estimates the square."""
    known = importance > 0
    return float(np.median(changes[known] ** 2 / importance[known])) if known.any() else None


def _spearman(importance: Values, changes: Values) -> float | None:
    if len(changes) < FEWEST or np.ptp(importance) == 0 or np.ptp(changes) == 0:
        return None
    return float(stats.spearmanr(importance, changes**2).statistic)
