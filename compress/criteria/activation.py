"""Criteria of single examples: products of activations and their gradients (docs/criteria.md)."""

from __future__ import annotations

import numpy as np
import torch

from compress.criteria.scoring import NO_PASS, Context, Scale, Scoring, placing
from compress.errors import UsageError
from compress.networks.gates import ProbedNetwork


class _Accumulated:
    """(N, units) sums over all sites of one minibatch of the products, or their absolute means."""

    def __init__(self, context: Context, *, absolute_mean: bool) -> None:
        self.num_units, self.absolute_mean = context.graph.num_units, absolute_mean
        self.world = context.world
        self.parts: dict[int, torch.Tensor] = {}
        self.examples = 0  # of all processes, in the minibatch that was taken last
        with placing():
            self.network = ProbedNetwork(
                context.model, context.graph, context.residual_gate, self.add
            )

    @torch.no_grad()
    def add(self, units: torch.Tensor, product: torch.Tensor, part: int) -> None:
        """Add the (N, channels, ...) product of one site and part of the minibatch."""
        product = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.absolute_mean:
            product = product.abs()
        per_channel = product.flatten(2).sum(2) if product.dim() > 2 else product
        if self.absolute_mean:
            # Behind a flatten, the positions of a channel lie side by side.
            repeats = torch.bincount(units, minlength=self.num_units)[units]
            per_channel = per_channel / (repeats * (product[0, 0].numel()))
        if part not in self.parts:
            self.parts[part] = torch.zeros(len(product), self.num_units).to(product)
        self.parts[part].index_add_(1, units, per_channel)

    def take(self, scale: Scale) -> torch.Tensor:
        """Return the sums of every example's own loss, and begin anew."""
        if not self.parts:
            raise UsageError(NO_PASS)
        sums = torch.cat(list(self.parts.values()))
        self.parts = {}
        self.examples = self.world.total(len(sums))
        # The loss was averaged over the examples of all processes, whose gradients are averaged.
        return sums * (self.examples / (self.world.size * scale))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the examples of all processes: (N, units) -> (units,)."""
        return self.world.sum(values.sum(0)) / self.examples


def taylor_gate_fg(context: Context) -> Scoring:
    """23: the squared gate gradient of each example, averaged over examples ("Taylor FO-FG").

    The research code of 2019 adds up the squares of what each example gives to the gradient of the
    mean loss, which is the average by the number of examples.
    """
    accumulated = _Accumulated(context, absolute_mean=False)

    def score(scale: Scale) -> torch.Tensor:
        mean = accumulated.mean(accumulated.take(scale).square())
        return mean / accumulated.examples if context.as_published else mean

    return Scoring(score, per_minibatch=True, network=accumulated.network)


def taylor_output(context: Context) -> Scoring:
    """6: mean over space and batch of |activation x gradient|, L2-normalised within each group.

    Molchanov et al. 2017 (ICLR), section 2.2, as the research code of 2019 computes it.
    """
    accumulated = _Accumulated(context, absolute_mean=True)
    groups = [context.units(group.units) for group in context.graph.groups if len(group.units)]

    def score(scale: Scale) -> torch.Tensor:
        means = accumulated.mean(accumulated.take(scale)) / accumulated.examples
        for units in groups:
            norm = torch.linalg.vector_norm(means[units])
            means[units] /= norm.clamp(min=float(np.finfo(np.float32).tiny))
        return means

    return Scoring(score, per_minibatch=True, network=accumulated.network)
