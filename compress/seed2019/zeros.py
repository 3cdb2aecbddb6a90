"""Channels that are closed without a gate: by a zeroed filter, or a zeroed scale of BatchNorm.

The research code of Molchanov et al. 2019 zeroes what it scores. Criteria on weights leave filters
of zeros, those on BatchNorm scales of zero, and both leave the shift. Such a channel hands on the
same for every image. Where that is zero wherever it is read, the channel can go, exactly; elsewhere
it is a constant, which stays: a reader with padding reads less of it at the borders, so that it
cannot be folded into a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compress.networks.cuts import tensor_of
from compress.networks.gates import UnplacedError, WatchedNetwork
from compress.networks.groups import Axis, ChannelGraph, Mask, Units


@dataclass(frozen=True)
class Zeroed:
    """Units with zeroed filters or scales, by what can be done with them."""

    gone: Units
    """Read as zero by everything, for every image."""
    constant: Units
    """Read as a constant that is not zero."""
    written: Units
    """Of residual streams, and other layers write them too."""

    def within(self, kept: Mask) -> Zeroed:
        """Return those of them that are left."""
        return Zeroed(*(units[kept[units]] for units in (self.gone, self.constant, self.written)))

    def words(self) -> str:
        """Say how many stay and why; nothing if none does."""
        reasons = (
            (self.constant, "hand on a constant that is not zero, which BatchNorm's shift left"),
            (self.written, "belong to residual streams that other layers write too"),
        )
        return ", ".join(f"{len(units)} {why}" for units, why in reasons if len(units))


def find_zeroed(model: nn.Module, graph: ChannelGraph, images: torch.Tensor) -> Zeroed:
    """Find the units of groups that may shrink whose filters or scales were zeroed.

    Args:
        model: the network, without gates; it is run in evaluation mode.
        graph: its channel graph.
        images: (N, C, H, W) of the network's precision. Any do, because a unit is looked at only if
            it is the same for all.
    """
    touched, still = _zero_units(model, graph)
    may = np.zeros(graph.num_units, dtype=bool)
    residual = may.copy()
    for group in graph.prunable:
        may[group.units] = True
    residual[graph.residual_units] = True
    still &= may
    silent = still & _read_as_zero(model, graph, images) if still.any() else still
    written = touched & residual & may & ~still
    return Zeroed(*map(np.flatnonzero, (silent, still & ~silent, written)))


def _zero_units(model: nn.Module, graph: ChannelGraph) -> tuple[Mask, Mask]:
    """Return the units with any zeroed filter or scale, and those with nothing else.

    A unit is the same for every image if all of its filters are zero, or the scales of as many
    BatchNorms as there are filters.
    """
    filters = _counted(model, graph, graph.writers)
    modules = dict(model.named_modules())
    norms = tuple(
        axis
        for axis in graph.axes
        if isinstance(modules.get(axis.layer), nn.modules.batchnorm._BatchNorm)
        and axis.tensor.endswith(".weight")
    )
    scales = _counted(model, graph, norms)
    all_filters = (filters.held > 0) & (filters.zero == filters.held)
    all_scales = (scales.held >= np.maximum(filters.held, 1)) & (scales.zero == scales.held)
    return (filters.zero > 0) | (scales.zero > 0), all_filters | all_scales


@dataclass(frozen=True)
class _Counts:
    """(units,) tensors that hold each unit along an axis, and how many have only zeros there."""

    held: Units
    zero: Units


def _counted(model: nn.Module, graph: ChannelGraph, axes: tuple[Axis, ...]) -> _Counts:
    held, zero = (np.zeros(graph.num_units, np.int64) for _ in range(2))
    for axis in axes:
        tensor = tensor_of(model, axis.tensor)
        if not isinstance(tensor, nn.Parameter):
            continue
        rows = tensor.detach().movedim(axis.dim, 0).flatten(1) if tensor.dim() > 1 else tensor
        alive = (rows != 0).cpu().numpy().reshape(len(axis.units), -1).any(1)
        units = np.unique(axis.units)
        held[units] += 1
        zero[np.setdiff1d(units, axis.units[alive])] += 1
    return _Counts(held, zero)


class _Reads(WatchedNetwork):
    """Notes which units are ever read as something else than zero."""

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        super().__init__(model, graph, "read")
        self.seen = torch.zeros(graph.num_units, dtype=torch.bool)
        self.silent = torch.ones(graph.num_units, dtype=torch.bool)

    def insert(self, x: torch.Tensor, units: torch.Tensor, dim: int) -> torch.Tensor:
        """Look at an activation, which stays as it is."""
        alive = (x != 0).movedim(dim, 0).flatten(1).any(1).cpu()
        self.seen[units.cpu()] = True
        self.silent[units.cpu()[alive]] = False
        return x


@torch.no_grad()
def _read_as_zero(model: nn.Module, graph: ChannelGraph, images: torch.Tensor) -> Mask:
    """Return the units of which every reader reads zeros."""
    try:
        reads = _Reads(model, graph)
    except UnplacedError:  # something reads in a way that cannot be watched
        return np.zeros(graph.num_units, dtype=bool)
    training = model.training
    model.eval()
    reads(images)
    model.train(training)
    return (reads.seen & reads.silent).numpy()
