"""What the research code of Molchanov et al. 2019 scores instead of a layer: the gate itself.

Criteria on filters and on BatchNorm look for their layer right before a gate, in the order in which
modules were registered. Before a gate of a residual stream there is none, and before the first gate
of a BasicBlock lies a ReLU. The gate is then scored as if it were a filter of one weight, a 1.
"""

from __future__ import annotations

import torch

from compress.criteria.scoring import Context, Scoring
from compress.criteria.taylor import BlockGate, FoldedGate

ONES = frozenset({"weight-norm", "weight-abs", "bn-scale"})
"""Criteria whose score of a gate of 1 is 1."""
GRADIENTS = frozenset({"taylor-weight", "bn-taylor"})
"""Criteria whose score of a gate of 1 is its squared gradient."""


def with_published_gates(name: str, context: Context, scoring: Scoring) -> Scoring:
    """Return a criterion that scores gates where the research code does.

    Args:
        name: of the criterion; those that need no layer stay as they are.
        context: gates of residual streams are there with ``residual_gate = "block"``.
        scoring: the criterion, bound.
    """
    if name not in ONES | GRADIENTS:
        return scoring
    units = _scored_by_gate(context)
    if name in ONES:
        return Scoring(
            lambda scale: scoring.score(scale).masked_fill(units, 1.0), scoring.per_minibatch
        )
    if context.residual_gate == "read":
        folded = FoldedGate(context.model, context.graph)
        return Scoring(
            lambda scale: torch.where(units, folded().square(), scoring.score(scale)),
            per_minibatch=True,
        )
    block = BlockGate(context)
    return Scoring(
        lambda scale: torch.where(units, block.gradients(scale).square(), scoring.score(scale)),
        per_minibatch=True,
        network=block.network,
    )


def _scored_by_gate(context: Context) -> torch.Tensor:
    """Return (units,) which units the research code knows by their gate alone."""
    from torchvision.models.resnet import BasicBlock  # takes longer than all else here

    found = torch.zeros(context.graph.num_units, dtype=torch.bool, device=context.device)
    if context.residual_gate == "block":
        found[context.units(context.graph.residual_units)] = True
    modules = dict(context.model.named_modules())
    for axis in context.graph.writers:
        owner, _, layer = axis.layer.rpartition(".")
        if layer == "conv1" and isinstance(modules.get(owner), BasicBlock):
            found[context.units(axis.units)] = True
    return found
