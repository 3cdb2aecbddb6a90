"""What a criterion is bound to, and what comes out: the types that all criteria share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compress.distributed.world import ALONE, World
from compress.networks.gates import UnplacedError, WatchedNetwork
from compress.networks.groups import ChannelGraph, Units

NO_PASS = (
    "the criterion has seen no activation with its gradient: score after loss.backward() of "
    "a loss that was computed by calling the network itself"
)


Scale = float | torch.Tensor
"""A number, or a tensor of one element."""


class UnservedError(Exception):
    """A criterion has no use for this network; the text says why."""


@contextmanager
def placing() -> Iterator[None]:
    """Say of gates that cannot be placed that the criterion has no use for the network."""
    try:
        yield
    except UnplacedError as error:
        raise UnservedError(str(error)) from error


@dataclass(frozen=True)
class Context:
    """What a criterion is bound to."""

    model: nn.Module
    graph: ChannelGraph
    residual_gate: str = "read"
    """Where gates of residual streams sit: ``"read"`` or ``"block"``."""
    seed: int = 0
    as_published: bool = False
    """Repeat the slips of the original's criteria."""
    hessian_samples: int = 4
    """Random vectors per minibatch for a Hessian's diagonal; 0 computes it exactly."""
    world: World = ALONE
    """The processes that share every minibatch."""

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.model.parameters()).device

    def units(self, found: Units) -> torch.Tensor:
        """Return an index of units on the network's device."""
        return torch.from_numpy(found).to(self.device)


@dataclass(frozen=True)
class Scoring:
    """A criterion bound to a network.

    Example of one minibatch::

        loss = loss_of((scoring.network or model)(images))
        scoring.before_backward(loss)  # where it is not None
        (scale * loss).backward()
        scores = scoring.score(scale)

    A minibatch may come in parts, each with its forward and backward pass and its weight in the
    loss, and be shared by processes: gradients are then those of the joined minibatch, and each
    process's loss is weighted by its share of the images times the number of processes.
    """

    score: Callable[[Scale], torch.Tensor]
    """Takes the factor of the loss in the backward pass and returns (units,) scores; with
    ``per_minibatch`` those of the last minibatch, from parameter gradients without that factor.
    Where those were clipped by a factor, the one of the loss is divided by it."""
    per_minibatch: bool
    network: WatchedNetwork | None = None
    """What must be run forward instead of the network, or be attached to it, where parameters alone
    do not tell."""
    before_backward: Callable[[torch.Tensor], None] | None = None
    """Must be called with the loss of the minibatch, for what needs a second derivative."""


def mean_per_unit(
    context: Context, parts: list[tuple[Units, torch.Tensor]], *, total: bool = False
) -> torch.Tensor:
    """Return the mean (or the sum) of all values given for each unit, (units,), zero for none.

    Args:
        context: tells the number of units and the device.
        parts: the unit of each value, and the values.
        total: the sum instead.
    """
    dtype = parts[0][1].dtype if parts else torch.float32
    sums = torch.zeros(context.graph.num_units, dtype=dtype, device=context.device)
    counts = torch.zeros_like(sums)
    for units, values in parts:
        index = context.units(units)
        sums.index_add_(0, index, values.to(dtype))
        counts.index_add_(0, index, torch.ones_like(values, dtype=dtype))
    return sums if total else sums / counts.clamp(min=1)
