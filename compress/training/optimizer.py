"""The optimizer and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from compress.config import TrainConfig


def learning_rate(
    config: TrainConfig, step: int, *, steps_per_epoch: int, hold: int | None, total: int | None
) -> float:
    """Return the learning rate of a step.

    Linear warm-up, then the peak until ``hold`` (the end of pruning), then the schedule of
    ``config`` over the steps that are left up to ``total``; both are None while nobody knows when
    pruning will end. ``zero_lr_epochs`` come first and move nothing of that.
    """
    if step < config.zero_lr_epochs * steps_per_epoch:
        return 0.0
    warmup = config.warmup_epochs * steps_per_epoch
    if total is not None:
        warmup = min(warmup, total)
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if hold is None or total is None:
        return config.lr
    start = max(hold, int(warmup))
    if step < start or config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        epoch = (step - hold) // steps_per_epoch + 1  # the decays count epochs from one
        return config.lr * config.step_gamma ** (epoch // config.step_epochs)
    return cosine(config.lr, (step - start) / max(1, total - start))


def cosine(peak: float, progress: float) -> float:
    """Return a learning rate that falls from its peak to zero while progress goes from 0 to 1."""
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def sgd(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with weight decay on weights; on norms and biases only where asked."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            weight = parameter.dim() > 1 or config.decay_norm_and_bias
            (decayed if weight else plain).append(parameter)
    return torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )


@torch.no_grad()
def add_lasso_gradient(model: nn.Module, coefficient: float) -> None:
    """Add the gradient of the sum of the L2 norms of all convolution filters (group lasso).

    It is not part of the loss, because no gate is part of it: a criterion must not see it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.grad is not None:
            norms = torch.linalg.vector_norm(module.weight, dim=(1, 2, 3), keepdim=True)
            tiny = torch.finfo(norms.dtype).tiny  # a filter of zeros is pulled nowhere
            module.weight.grad.add_(module.weight / norms.clamp(min=tiny), alpha=coefficient)
