"""Importance of channels: the formulas, by name, and their average over minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compress.errors import ConfigError, nearest
from compress.gates import GatedNetwork
from compress.groups import ChannelGraph, Layer
from compress.masking import Scores


class FoldedGate:
    """dL/dz of every gate from weights and gradients alone: no hooks, no stored activations.

    Scaling what a reader reads by z scales the reader's weights, so the gradient of z = 1 is
    sum over readers of sum_{o,k} W[o,c,k] dL/dW[o,c,k]. It equals gamma dL/dgamma + beta dL/dbeta
    of the BatchNorm before, the gate of Molchanov et al. 2019, for a group with one writer.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        modules = dict(model.named_modules())
        self.num_units = graph.num_units
        self.readers = [
            _Reader(layer, modules[layer.name].weight) for layer in graph.layers if layer.reads
        ]

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return (units,) gate gradients; units that nothing reads get zero."""
        first = self.readers[0].weight
        gradient = torch.zeros(self.num_units, dtype=first.dtype, device=first.device)
        for reader in self.readers:
            reader.add_to(gradient)
        return gradient


class _Reader:
    """A reader's weight and the unit of each channel that it reads."""

    def __init__(self, layer: Layer, weight: torch.Tensor) -> None:
        self.weight = weight
        self.conv_groups = layer.conv_groups
        self.units = torch.from_numpy(layer.inputs).to(weight.device)

    def add_to(self, gradient: torch.Tensor) -> None:
        if self.weight.grad is None:
            return
        product = self.weight * self.weight.grad
        pairs = product.sum(tuple(range(2, product.dim()))) if product.dim() > 2 else product
        blocks = pairs.reshape(self.conv_groups, -1, pairs.shape[1])
        gradient.index_add_(0, self.units, blocks.sum(1).flatten())


class BlockGate:
    """The gate of Molchanov et al. 2019 for residual streams: one, after add+ReLU of each block.

    Its gradient counts the identity path of every block anew, so the square is divided by the
    number of blocks. Channels outside residual streams keep the folded gate.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.folded = FoldedGate(model, graph)
        self.network = GatedNetwork(model, graph, "block")
        blocks = np.zeros(graph.num_units)
        for site in graph.block_sites:
            blocks[np.unique(site.units)] += 1
        self.blocks = torch.from_numpy(blocks).to(self.network.gates)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Return (units,) squared gate gradients, and forget the gradient of the gates."""
        gates = self.network.gates
        shared = torch.zeros_like(gates) if gates.grad is None else gates.grad
        gates.grad = None
        return torch.where(
            self.blocks > 0, shared.square() / self.blocks.clamp(min=1), self.folded().square()
        )


@dataclass(frozen=True)
class Scoring:
    """A criterion bound to a network."""

    score: Callable[[], torch.Tensor]
    """Returns (units,) scores; with ``per_minibatch`` from the gradients of the last minibatch."""
    per_minibatch: bool
    network: nn.Module | None = None
    """What must be run forward instead of the network, for gates that no parameter stands for."""


def _taylor_gate(context: Context) -> Scoring:
    if context.residual_gate == "block":
        block = BlockGate(context.model, context.graph)
        return Scoring(block, per_minibatch=True, network=block.network)
    folded = FoldedGate(context.model, context.graph)
    return Scoring(lambda: folded().square(), per_minibatch=True)


def _weight_norm(context: Context) -> Scoring:
    """Squared L2 norm of the filter, averaged over the writers of the unit."""
    modules = dict(context.model.named_modules())
    writers = [layer for layer in context.graph.layers if layer.reads]

    @torch.no_grad()
    def score() -> torch.Tensor:
        device = modules[writers[0].name].weight.device
        total = torch.zeros(context.graph.num_units, device=device)
        count = torch.zeros(context.graph.num_units, device=device)
        for layer in writers:
            norms = modules[layer.name].weight.float().square().flatten(1).sum(1)
            units = torch.from_numpy(layer.outputs).to(device)
            total.index_add_(0, units, norms)
            count.index_add_(0, units, torch.ones_like(norms))
        return total / count.clamp(min=1)

    return Scoring(score, per_minibatch=False)


def _random(context: Context) -> Scoring:
    """One uniform number per unit, the same at every step: the order is drawn once."""
    generator = torch.Generator().manual_seed(context.seed)
    fixed = torch.rand(context.graph.num_units, generator=generator)
    return Scoring(lambda: fixed, per_minibatch=False)


@dataclass(frozen=True)
class Context:
    """What a criterion is bound to."""

    model: nn.Module
    graph: ChannelGraph
    residual_gate: str = "read"
    seed: int = 0


CRITERIA: dict[str, Callable[[Context], Scoring]] = {
    "taylor-gate": _taylor_gate,
    "weight-norm": _weight_norm,
    "random": _random,
}


def bind(name: str, context: Context) -> Scoring:
    """Bind a criterion to a network.

    Raises:
        ConfigError: no criterion has this name, or it has no use for the setting of residual_gate.
    """
    if name not in CRITERIA:
        raise ConfigError(f"no criterion is named {name!r}: {nearest(name, CRITERIA)}")
    if context.residual_gate == "block" and name != "taylor-gate":
        raise ConfigError(f"residual_gate = 'block' belongs to taylor-gate, not to {name}")
    return CRITERIA[name](context)


class Importance:
    """Averages scores over the minibatches of an interval, and exponentially over intervals.

    Args:
        num_units: length of a score vector.
        momentum: weight of the past intervals; 0 uses the last interval alone.
    """

    def __init__(self, num_units: int, *, momentum: float) -> None:
        self.momentum = momentum
        self.total = torch.zeros(num_units)
        self.minibatches = 0
        self.average: Scores | None = None

    def add(self, scores: torch.Tensor) -> None:
        """Count the scores of one minibatch; they stay on their device."""
        # Scaled fp16 gradients may overflow once in a while; such a minibatch says nothing.
        finite = torch.nan_to_num(scores.detach().float(), nan=0.0, posinf=0.0)
        self.total = self.total.to(finite.device) + finite
        self.minibatches += 1

    def close_interval(self) -> Scores:
        """End the interval and return the averaged importance of every unit, (units,)."""
        mean = (self.total / max(1, self.minibatches)).cpu().double().numpy()
        self.total = torch.zeros_like(self.total)
        self.minibatches = 0
        if self.average is None or self.momentum == 0:
            self.average = mean
        else:
            self.average = self.momentum * self.average + (1 - self.momentum) * mean
        return self.average
