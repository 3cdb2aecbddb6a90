"""A training loop of somebody's own, with ``compress.Pruner`` in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import lived_in
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import compress


class Block(nn.Module):
    """A residual block between a stem and a head, four classes of 3 x 8 x 8 images."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 32, 3, padding=1, bias=not norm)
        self.outer = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        for name, width in (("first", 16), ("norm", 32), ("last", 16)):
            self.add_module(name, nn.BatchNorm2d(width) if norm else nn.Identity())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) to (N, 4)."""
        x = torch.relu(self.first(self.stem(x)))
        x = torch.relu(x + self.last(self.outer(torch.relu(self.norm(self.inner(x))))))
        return self.head(x.mean((2, 3)))


def batch_of(
    count: int, number: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels that a network can learn."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return images.to(dtype), labels


class Loop:
    """A network, an optimizer and a pruner; ``train`` takes one step up to ``pruner.step()``."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        network: Callable[..., nn.Module] = Block,
        prepare: Callable[[Any], None] = lambda model: None,
        dtype: torch.dtype = torch.float32,
        averaged: bool = False,
        norm: bool = True,
        share: tuple[int, int] = (0, 1),
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        model = network() if norm else network(norm=False)
        self.model: Any = lived_in(model).to(dtype).train()
        prepare(self.model)
        self.dtype, self.taken, self.share, self.wrap = dtype, 0, share, wrap
        self.optimizer = optimizer(p for p in self.model.parameters() if p.requires_grad)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if averaged else None
        )
        usual = {"budget": "macs=0.5", "steps": 4, "interval": 1, "min_channels": 1}
        self.pruner = compress.Pruner(
            self.model,
            batch_of(2)[0],
            optimizer=self.optimizer,
            copies=[self.average] if self.average else [],
            **{**usual, **settings},
        )
        self.network = wrap(self.model)

    def parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer trains."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def train(
        self,
        *,
        data: tuple[torch.Tensor, torch.Tensor] | None = None,
        parts: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        unscale: bool = False,
    ) -> torch.Tensor:
        """Take a step of the optimizer, with the score before it; return the last loss."""
        images, labels = data or batch_of(16, self.taken, self.dtype)
        rank, ranks = self.share
        own = zip(
            images[rank::ranks].tensor_split(parts),
            labels[rank::ranks].tensor_split(parts),
            strict=True,
        )
        self.optimizer.zero_grad()
        loss = torch.zeros(())
        for inputs, targets in own:
            loss = F.cross_entropy(self.network(inputs), targets) / parts
            self.pruner.before_backward(loss)
            (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
        if scaler and unscale:
            scaler.unscale_(self.optimizer)
        self.pruner.score(scaler) if scaler else self.pruner.score()
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.taken += 1
        return loss

    def until_done(self) -> None:
        """Train until the pruner says that it is enough."""
        while not self.pruner.done:
            self.train()
            self.pruner.step()
            if self.pruner.reshaped:
                self.network = self.wrap(self.model)
