"""Criteria that look at weights alone, and chance (docs/criteria.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.criteria.scoring import Context, Scale, Scoring, UnservedError, mean_per_unit
from compress.networks.cuts import tensor_of
from compress.networks.groups import Units


@dataclass(frozen=True)
class Filters:
    """The weight of a writer, and the unit of each index along the dimension that writes."""

    units: Units
    weight: nn.Parameter
    dim: int

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor of the weight's shape over each filter, (filters,)."""
        return values.movedim(self.dim, 0).flatten(1).sum(1)


def filters_of(context: Context) -> list[Filters]:
    """Return the weights of all writers."""
    found = []
    for axis in context.graph.writers:
        weight = tensor_of(context.model, axis.tensor)
        if isinstance(weight, nn.Parameter):
            found.append(Filters(axis.units, weight, axis.dim))
    return found


def batchnorms_of(context: Context) -> list[tuple[Units, Any]]:
    """Return all BatchNorms with a scale, with the unit of each channel.

    Raises:
        UnservedError: a unit that may be pruned passes through none.
    """
    modules = dict(context.model.named_modules())
    found = [
        (axis.units, modules[axis.layer])
        for axis in context.graph.axes
        if axis.tensor.endswith("weight")
        and isinstance(modules.get(axis.layer), nn.modules.batchnorm._BatchNorm)
    ]
    covered = np.concatenate([np.zeros(0, np.int64), *(units for units, _ in found)])
    for group in context.graph.prunable:
        if not np.isin(group.units, covered).all():
            raise UnservedError(f"the channels of {group.name} pass through no BatchNorm")
    return found


def weight_norm(context: Context) -> Scoring:
    """2: the squared L2 norm of a filter, averaged over the writers of the unit."""
    return _of_filters(context, torch.square)


def weight_abs(context: Context) -> Scoring:
    """3: the L1 norm of a filter, averaged over the writers of the unit."""
    return _of_filters(context, torch.abs)


def _of_filters(context: Context, measure: Callable[[torch.Tensor], torch.Tensor]) -> Scoring:
    filters = filters_of(context)

    @torch.no_grad()
    def score(scale: Scale) -> torch.Tensor:
        parts = [(f.units, f.sums(measure(f.weight.float()))) for f in filters]
        return mean_per_unit(context, parts)

    return Scoring(score, per_minibatch=False)


def bn_scale(context: Context) -> Scoring:
    """30: |gamma| of the BatchNorm, averaged over the BatchNorms of the unit."""
    norms = batchnorms_of(context)

    @torch.no_grad()
    def score(scale: Scale) -> torch.Tensor:
        return mean_per_unit(context, [(units, norm.weight.abs()) for units, norm in norms])

    return Scoring(score, per_minibatch=False)


def random(context: Context) -> Scoring:
    """1: one uniform number per unit, the same at every step: the order is drawn once."""
    generator = torch.Generator().manual_seed(context.seed)
    fixed = torch.rand(context.graph.num_units, generator=generator)
    return Scoring(lambda scale: fixed, per_minibatch=False)
