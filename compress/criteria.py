"""Importance of channels: the formulas, by name, and their average over minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compress.errors import ConfigError, nearest
from compress.groups import ChannelGraph, Layer
from compress.masking import Scores


@dataclass(frozen=True)
class Criterion:
    """One formula of importance.

    Attributes:
        build: prepares the formula for a network; the result returns a (units,) tensor when called.
        per_minibatch: whether it uses the gradients of every minibatch, or the weights alone.
    """

    build: Callable[[nn.Module, ChannelGraph, torch.Generator], Callable[[], torch.Tensor]]
    per_minibatch: bool


class FoldedGate:
    """dL/dz of every gate from weights and gradients alone: no hooks, no stored activations.

    Scaling what a reader reads by z scales the reader's weights, so the gradient of z = 1 is
    sum over readers of sum_{o,k} W[o,c,k] dL/dW[o,c,k]. It equals gamma dL/dgamma + beta dL/dbeta
    of the BatchNorm before, the gate of Molchanov et al. 2019, for a group with one writer.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        modules = dict(model.named_modules())
        self.num_units = graph.num_units
        self.readers = [_Reader(layer, modules[layer.name].weight) for layer in graph.layers if layer.reads]

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
        outputs, inputs_per_group = product.shape[:2]
        blocks = product.reshape(self.conv_groups, outputs // self.conv_groups, inputs_per_group, -1)
        gradient.index_add_(0, self.units, blocks.sum((1, 3)).flatten())


def _taylor_gate(
    model: nn.Module, graph: ChannelGraph, generator: torch.Generator
) -> Callable[[], torch.Tensor]:
    folded = FoldedGate(model, graph)
    return lambda: folded().square()


def _weight_norm(
    model: nn.Module, graph: ChannelGraph, generator: torch.Generator
) -> Callable[[], torch.Tensor]:
    """Squared L2 norm of the filter, averaged over the writers of the unit."""
    modules = dict(model.named_modules())
    writers = [layer for layer in graph.layers if layer.reads]

    @torch.no_grad()
    def score() -> torch.Tensor:
        device = modules[writers[0].name].weight.device
        total = torch.zeros(graph.num_units, device=device)
        count = torch.zeros(graph.num_units, device=device)
        for layer in writers:
            weight = modules[layer.name].weight
            units = torch.from_numpy(layer.outputs).to(device)
            total.index_add_(0, units, weight.float().square().flatten(1).sum(1))
            count.index_add_(0, units, torch.ones_like(units, dtype=count.dtype))
        return total / count.clamp(min=1)

    return score


def _random(
    model: nn.Module, graph: ChannelGraph, generator: torch.Generator
) -> Callable[[], torch.Tensor]:
    return lambda: torch.rand(graph.num_units, generator=generator)


CRITERIA: dict[str, Criterion] = {
    "taylor-gate": Criterion(_taylor_gate, per_minibatch=True),
    "weight-norm": Criterion(_weight_norm, per_minibatch=False),
    "random": Criterion(_random, per_minibatch=False),
}


def criterion_named(name: str) -> Criterion:
    """Return a criterion.

    Raises:
        ConfigError: no criterion has this name.
    """
    if name not in CRITERIA:
        raise ConfigError(f"no criterion is named {name!r}: {nearest(name, CRITERIA)}")
    return CRITERIA[name]


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
        self.total = self.total.to(scores.device) + scores.detach()
        self.minibatches += 1

    def close_interval(self) -> Scores:
        """End the interval and return the averaged importance of every unit."""
        mean = (self.total / self.minibatches).cpu().double().numpy()
        self.total = torch.zeros_like(self.total)
        self.minibatches = 0
        if self.average is None or self.momentum == 0:
            self.average = mean
        else:
            self.average = self.momentum * self.average + (1 - self.momentum) * mean
        return np.asarray(self.average)
