"""First-order Taylor criteria that parameters and their gradients tell (docs/criteria.md)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from compress.criteria.magnitude import batchnorms_of, filters_of
from compress.criteria.scoring import NO_PASS, Context, Scale, Scoring, mean_per_unit
from compress.errors import UsageError
from compress.networks.cuts import tensor_of
from compress.networks.gates import GatedNetwork
from compress.networks.groups import Branch, ChannelGraph

BLOCK_SCALE = 10.0
"""What the squared gate of a branch counts for, beside that of a channel. A branch is no small
change: the squared change of the loss without one is some 150 times what the first order says,
where without half of a group it is some 15 times (compress oracle, docs/results.md)."""


class FoldedGate:
    """dL/dz of every gate from weights and gradients alone: no hooks, no stored activations.

    Scaling what a reader reads by z scales the reader's weights, so the gradient of z = 1 is
    sum over readers of sum_{o,k} W[o,c,k] dL/dW[o,c,k]. It equals gamma dL/dgamma + beta dL/dbeta
    of the BatchNorm before, the gate of Molchanov et al. 2019, for a group with one writer.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, blocks: bool = False) -> None:
        self.num_units = graph.num_units
        self.branches = [BranchGate(model, branch) for branch in graph.removable if blocks]
        self.readers = [
            (weight, axis.dim, torch.from_numpy(axis.units).to(weight.device))
            for axis in graph.readers
            if isinstance(weight := tensor_of(model, axis.tensor), nn.Parameter)
        ]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return (units,) gate gradients; units that nothing reads get zero."""
        first, _, _ = self.readers[0]
        gradient = torch.zeros(self.num_units, dtype=first.dtype, device=first.device)
        for weight, dim, units in self.readers:
            if weight.grad is not None:
                gradient.index_add_(0, units, sum_but(weight * weight.grad, dim))
        for branch in self.branches:
            gradient[branch.unit] = branch()
        return gradient


class BranchGate:
    """dL/dz of the factor of a branch's output, from the weights that end it.

    Scaling the last layer's weight and bias (of a BatchNorm, its scale and shift) scales the
    output, so the gradient at z = 1 is the sum of W dL/dW over them. What other layers of the
    branch read of it on the way, as those of squeeze and excitation do, is taken off.
    """

    def __init__(self, model: nn.Module, branch: Branch) -> None:
        self.unit = branch.unit
        self.more = [tensor_of(model, name) for name in branch.gate.weights]
        self.less = [tensor_of(model, name) for name in branch.gate.less]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return the gradient, a scalar."""
        more, less = (
            sum(torch.vdot(w.flatten(), w.grad.flatten()) for w in weights if w.grad is not None)
            for weights in (self.more, self.less)
        )
        return torch.as_tensor(more - less)


def sum_but(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all dimensions but one, (length,): leading ones first, whose rows lie together."""
    if dim:
        values = values.flatten(0, dim - 1).sum(0)
    return values.flatten(1).sum(1) if values.dim() > 1 else values


class BlockGate:
    """The gate of Molchanov et al. 2019 for residual streams: one, after add+ReLU of each block.

    Its gradient counts the identity path of every block anew, so the square is divided by the
    number of blocks. Channels outside residual streams keep the folded gate.
    """

    def __init__(self, context: Context) -> None:
        self.folded = FoldedGate(context.model, context.graph, blocks=context.blocks)
        self.network, self.world = (
            GatedNetwork(context.model, context.graph, "residual"),
            context.world,
        )
        blocks = blocks_per_unit(context.graph)
        divisors = published_divisors(context.graph) if context.as_published else blocks
        self.residual = torch.from_numpy(blocks > 0).to(context.device)
        self.divisors = torch.from_numpy(np.maximum(divisors, 1)).to(self.network.gates)

    def __call__(self, scale: Scale) -> torch.Tensor:
        """Return (units,) squared gate gradients by their divisors; see ``gradients``."""
        return self.gradients(scale).square() / self.divisors

    @torch.no_grad()
    def gradients(self, scale: Scale) -> torch.Tensor:
        """Return (units,) gate gradients, and forget the gradient of the gates."""
        gates = self.network.gates
        if gates.grad is None and len(self.network.places):
            raise UsageError(NO_PASS)
        shared = torch.zeros_like(gates) if gates.grad is None else gates.grad / scale
        gates.grad = None
        shared = self.world.sum(shared) / self.world.size
        return torch.where(self.residual, shared, self.folded())


def blocks_per_unit(graph: ChannelGraph) -> np.ndarray:
    """Return (units,) how many residual additions each unit passes."""
    blocks = np.zeros(graph.num_units)
    for site in graph.block_sites:
        blocks[np.unique(site.units)] += 1
    return blocks


def published_divisors(graph: ChannelGraph) -> np.ndarray:
    """Return (units,) what the research code of Molchanov et al. 2019 divides squares by.

    It divides every layer by 3, the second residual stream by 4 and the third by its number of
    blocks, if that is 6 (ResNet-34 and 50) or 23 (ResNet-101).
    """
    blocks = blocks_per_unit(graph)
    divisors = np.full(graph.num_units, 3.0)
    streams: list[int] = []
    for site in graph.block_sites:
        if site.units[0] not in streams:
            streams.append(int(site.units[0]))
            count = blocks[site.units[0]]
            if len(streams) == 2:
                divisors[site.units] = 4
            elif len(streams) == 3 and count in (6, 23):
                divisors[site.units] = count
    return divisors


def taylor_gate(context: Context) -> Scoring:
    """22: the squared gate gradient of a minibatch ("Gate after BN", "Taylor FO")."""
    if context.residual_gate == "block":
        block = BlockGate(context)
        return Scoring(block, per_minibatch=True, network=block.network)
    folded = FoldedGate(context.model, context.graph, blocks=context.blocks)
    units = [gate.unit for gate in folded.branches]

    def score(scale: Scale) -> torch.Tensor:
        scores = folded().square()
        if units:
            scores[units] *= BLOCK_SCALE
        return scores

    return Scoring(score, per_minibatch=True)


def taylor_weight(context: Context) -> Scoring:
    """0: the sum over a filter of (w dL/dw)^2, averaged over the writers of the unit."""
    filters = filters_of(context)

    @torch.no_grad()
    def score(scale: Scale) -> torch.Tensor:
        parts = [
            (f.units, f.sums((f.weight * f.weight.grad).square()))
            for f in filters
            if f.weight.grad is not None
        ]
        return mean_per_unit(context, parts)

    return Scoring(score, per_minibatch=True)


def bn_taylor(context: Context) -> Scoring:
    """31: (gamma dL/dgamma + beta dL/dbeta)^2, summed over the unit's BatchNorms, then squared.

    The research code of Molchanov et al. 2019 meant this and drops beta.
    """
    norms = batchnorms_of(context)

    @torch.no_grad()
    def score(scale: Scale) -> torch.Tensor:
        parts = []
        for units, norm in norms:
            parameters = [norm.weight] if context.as_published else [norm.weight, norm.bias]
            parts += [(units, p * p.grad) for p in parameters if p.grad is not None]
        return mean_per_unit(context, parts, total=True).square()

    return Scoring(score, per_minibatch=True)
