"""What a pruner tells, in TensorBoard, MLflow or Weights & Biases.

    python examples/callbacks.py --output runs [--steps 60]

A callback takes the kind of an event and a dictionary of plain facts. ``prune_step`` has
``pruning_step``, ``loss``, ``macs``, ``params``, ``channels``, ``importance`` (least, median and
largest) and ``widths`` by group; ``shrink`` has ``difference`` and ``images``; ``prune_pause`` has
``loss`` and ``prune_end`` a ``reason``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import compress

Callback = Callable[[str, dict[str, Any]], None]


def numbers(facts: dict[str, Any], prefix: str = "prune") -> dict[str, float]:
    """Return all numbers of an event by name, those of its dictionaries included."""
    found: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)):
            found[f"{prefix}/{name}"] = value
    return found


def to_tensorboard(writer: SummaryWriter) -> Callback:
    """Draw every number of a pruning step, and say why pruning ended."""

    def callback(kind: str, facts: dict[str, Any]) -> None:
        if kind == "prune_step":
            for name, value in numbers(facts).items():
                writer.add_scalar(name, value, facts["pruning_step"])
        elif kind == "prune_end":
            writer.add_text("prune/end", facts["reason"])

    return callback


def to_mlflow(mlflow: Any) -> Callback:
    """Log to the active run of MLflow; pass the module ``mlflow``."""

    def callback(kind: str, facts: dict[str, Any]) -> None:
        if kind == "prune_step":
            mlflow.log_metrics(numbers(facts), step=facts["pruning_step"])

    return callback


def to_wandb(run: Any) -> Callback:
    """Log to a run of Weights & Biases; pass what ``wandb.init`` returned."""

    def callback(kind: str, facts: dict[str, Any]) -> None:
        if kind == "prune_step":
            run.log(numbers(facts))

    return callback


def to_all(*callbacks: Callback) -> Callback:
    """Return a callback that tells several."""

    def callback(kind: str, facts: dict[str, Any]) -> None:
        for each in callbacks:
            each(kind, facts)

    return callback


def main(callback: Callback, steps: int = 60) -> nn.Module:
    """Train a small network on noisy patterns and prune it; return it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    patterns = torch.randn(10, 3, 16, 16)
    pruner = compress.Pruner(
        model, patterns[:1], optimizer=optimizer, callback=callback, steps=6, interval=5
    )
    for _ in range(steps):
        labels = torch.randint(10, (32,))
        loss = F.cross_entropy(model(patterns[labels] + torch.randn(32, 3, 16, 16)), labels)
        optimizer.zero_grad()
        loss.backward()
        pruner.score()
        optimizer.step()
        if pruner.step(loss):  # the loss is told too
            break
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with SummaryWriter(str(options.output)) as writer:
        main(to_all(to_tensorboard(writer), lambda kind, facts: print(kind, facts)), options.steps)
    print(f"look at it with: tensorboard --logdir {options.output}")
