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

BLOCK_SCALE = 2.0
"""What the parts of a branch count for, beside those of channels. The more goes at once, the less
of it the first order says: without a branch the loss changes by up to twice as much for its parts
as without half of a group, and so pruned networks keep most accuracy (docs/results.md)."""


class FoldedGate:
    """dL/dz of every gate from weights and gradients alone: no hooks, no stored activations.

    Scaling what a reader reads by z scales the reader's weights, so the gradient of z = 1 is
    sum over readers of sum_{o,k} W[o,c,k] dL/dW[o,c,k]. It equals gamma dL/dgamma + beta dL/dbeta
    of the BatchNorm before, the gate of Molchanov et al. 2019, for a group with one writer.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.num_units = graph.num_units
        self.readers = readers_of(model, graph)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return (units,) gate gradients; units that nothing reads get zero."""
        first, _, _ = self.readers[0]
        gradient = torch.zeros(self.num_units, dtype=first.dtype, device=first.device)
        for weight, dim, units in self.readers:
            if weight.grad is not None:
                gradient.index_add_(0, units, sum_but(weight * weight.grad, dim))
        return gradient


class UnsignedParts:
    """The parts of gate gradients, without their signs: what adds up when much goes at once.

    The gate of a unit is a sum over its readers, that of a branch over the channels of its output,
    and what goes at once is a sum over gates. Such sums cancel at z = 1, most of all where a
    BatchNorm behind makes the loss blind to a common factor, and none of it is left when half of a
    stream or a branch is gone. To first order the loss changes by no more than the absolute parts
    together, |sum of z_i dL/dz_i| <= sum of |z_i dL/dz_i|; so channels of one reader, channels of a
    stream and branches are counted in one currency, and in it sums are sums (docs/results.md).
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.num_units = graph.num_units
        self.readers = readers_of(model, graph)
        self.branches = [BranchGate(model, branch) for branch in graph.removable]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return (units,) sums of absolute parts; units that nothing reads get zero."""
        first, _, _ = self.readers[0]
        total = torch.zeros(self.num_units, dtype=first.dtype, device=first.device)
        for weight, dim, units in self.readers:
            if weight.grad is not None:  # behind a flatten a unit is read at many places
                read = torch.zeros_like(total)
                total += read.index_add_(0, units, sum_but(weight * weight.grad, dim)).abs_()
        for branch in self.branches:
            total[branch.unit] = BLOCK_SCALE * branch.parts().abs().sum()
        return total


class BranchGate:
    """dL/dz of the factor of a branch's output, from the weights that end it.

    Scaling the last layer's weight and bias (of a BatchNorm, its scale and shift) scales the
    output, so the gradient at z = 1 is the sum of W dL/dW over them. What other layers of the
    branch read of it on the way, as those of squeeze and excitation do, is taken off.
    """

    def __init__(self, model: nn.Module, branch: Branch) -> None:
        self.unit = branch.unit
        self.more = [(name, tensor_of(model, name)) for name in branch.gate.weights]
        self.less = [(name, tensor_of(model, name)) for name in branch.gate.less]

    def __call__(self) -> torch.Tensor:
        """Return the gradient, a scalar."""
        return self.parts().sum()

    @torch.no_grad()
    def parts(self) -> torch.Tensor:
        """Return what each channel of the output has in the gradient, (channels,).

        What is read on the way is taken off at the layer that writes as many channels.
        """
        found: dict[str, torch.Tensor] = {}
        for name, weight in self.more:
            if weight.grad is not None:
                written = next((d for d, length in enumerate(weight.shape) if length > 1), 0)
                part = sum_but(weight * weight.grad, written)
                layer = name.rpartition(".")[0]  # whose weight and bias share their channels
                if layer in found and len(found[layer]) != len(part):
                    layer = name
                found[layer] = found[layer] + part if layer in found else part
        for name, weight in self.less:
            if weight.grad is not None:
                read = 1 if weight.dim() > 1 and weight.shape[1] > 1 else 0
                part = -sum_but(weight * weight.grad, read)
                layer = next((n for n, known in found.items() if len(known) == len(part)), name)
                found[layer] = found[layer] + part if layer in found else part
        return torch.cat(list(found.values())) if found else torch.zeros(1)


def readers_of(
    model: nn.Module, graph: ChannelGraph
) -> list[tuple[nn.Parameter, int, torch.Tensor]]:
    """Return the weights that read units, the dimension along which they do, and the units."""
    return [
        (weight, axis.dim, torch.from_numpy(axis.units).to(weight.device))
        for axis in graph.readers
        if isinstance(weight := tensor_of(model, axis.tensor), nn.Parameter)
    ]


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
        self.folded = FoldedGate(context.model, context.graph)
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
    folded = FoldedGate(context.model, context.graph)
    return Scoring(lambda scale: folded().square(), per_minibatch=True)


def taylor_parts(context: Context) -> Scoring:
    """The sum of the absolute parts of the gate gradient of a minibatch; of branches as well."""
    parts = UnsignedParts(context.model, context.graph)
    return Scoring(lambda scale: parts(), per_minibatch=True)


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
