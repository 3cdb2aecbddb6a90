"""Loops of people's own that several processes run together, importable by every rank."""

from __future__ import annotations

import functools
from typing import Any

import torch
from loops import Block, Loop
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compress.distributed.world import current

SGD = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)


def pruned(criterion: str = "taylor-gate", gate: str = "read") -> dict[str, Any]:
    """Prune with every rank's share of each minibatch, wrapped anew after every shrink."""
    world = current()
    loop = Loop(
        SGD,
        network=functools.partial(Block, norm=False),
        dtype=torch.float64,
        share=(world.rank, world.size),
        wrap=(lambda model: model) if world.alone else wrapped,
        steps=5,
        interval=2,
        shrink_at=0.05,
        criterion=criterion,
        residual_gate=gate,
        hessian_samples=0,
    )
    loop.until_done()
    return {"recipe": loop.pruner.recipe, "weights": loop.model.state_dict()}


def wrapped(model: nn.Module) -> nn.Module:
    """Join the gradients of all ranks."""
    return DistributedDataParallel(model)


def never_wrapped() -> None:
    """Every rank trains for itself."""
    Loop(SGD, share=(current().rank, current().size), interval=2).until_done()


def wrapped_once() -> None:
    """The wrapper of the dense network joins parameters that are gone."""
    loop = Loop(SGD, share=(current().rank, current().size), shrink_at=0.01, wrap=wrapped, steps=6)
    loop.wrap = lambda model: model
    loop.until_done()


def all_of(tasks: list[tuple[Any, ...]]) -> list[Any]:
    """Do several tasks in a row; an error of one is its result."""
    results: list[Any] = []
    for work, *arguments in tasks:
        try:
            results.append(work(*arguments))
        except Exception as error:
            results.append(error)
    return results
