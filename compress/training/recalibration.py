"""Re-estimate BatchNorm statistics: the old averages belong to the network before the shrink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compress.distributed.world import ALONE, World
from compress.networks.capture import Example, in_mode


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Example], world: World = ALONE) -> int:
    """Replace running statistics by their plain average over minibatches.

    No weight changes; modes and momenta are put back whatever happens.

    Args:
        model: the network.
        batches: inputs of training minibatches, this process's share.
        world: the processes that share them; the result is the mean over processes.

    Returns:
        The number of minibatches seen; 0 leaves the statistics as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    seen = 0
    if not norms:
        return seen
    with _averaging(model, norms):
        for batch in batches:
            if min(world.each(batch.batch)) < 2:
                continue
            if not seen:
                for norm in norms:
                    norm.reset_running_stats()
            inputs = batch.beside(model)
            model(*inputs.args, **inputs.kwargs)
            seen += 1
    if seen:
        world.average_buffers(model)
    return seen


@contextmanager
def _averaging(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Put BatchNorm layers, and only them, into the mode that averages what they see."""
    momenta = [norm.momentum for norm in norms]
    with in_mode(model):
        for norm in norms:
            norm.train()
            norm.momentum = None  # PyTorch: a cumulative average
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
