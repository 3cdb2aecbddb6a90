"""A train script in the style of timm's: its models, optimizers, schedulers and EMA.

    python examples/timm_train.py [--model resnet10t] [--epochs 3] [--output pruned.safetensors]

Pruning takes the first epochs, at the peak of the learning rate; the cosine then finetunes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compress

CLASSES = 10


def images_of(count: int, size: int) -> TensorDataset:
    """Return noisy copies of ten patterns with their numbers."""
    patterns, labels = torch.randn(CLASSES, 3, size, size), torch.randint(CLASSES, (count,))
    return TensorDataset(patterns[labels] + torch.randn(count, 3, size, size), labels)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    """Return the share of images that are classified correctly."""
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in loader]).float().mean().item()


def main(
    name: str = "resnet10t",
    epochs: int = 3,
    minibatches: int = 20,
    size: int = 32,
    output: Path | None = None,
) -> float:
    """Train and prune; return the accuracy of the averaged network."""
    torch.manual_seed(0)
    data = images_of(16 * (minibatches + 4), size)
    train, valid = torch.utils.data.random_split(data, [16 * minibatches, 64])
    loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)

    model = timm.create_model(name, num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs, warmup_epochs=0, updates_per_epoch=len(loader)
    )
    ema = ModelEmaV3(model, decay=0.9)
    pruner = compress.Pruner(
        model,
        data[0][0][None],
        optimizer=optimizer,
        copies=[ema.module],
        budget="macs=0.5",
        steps=8,
        interval=max(1, epochs * minibatches // 16),  # half of the updates
    )
    for epoch in range(epochs):
        model.train()
        for update, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            pruner.score()
            optimizer.step()
            pruner.step()
            ema.update(model, step=update)
            scheduler.step_update(update + 1)
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {loss.item():.3f}, the budget holds: {pruner.done}")
    print(pruner.summary())
    share = accuracy(ema.module, DataLoader(valid, batch_size=16))
    print(f"accuracy of the averaged network: {share:.3f}")
    if output is not None:
        compress.save(ema.module, output, recipe=pruner.recipe)
        loaded = compress.load(output, build=lambda: timm.create_model(name, num_classes=CLASSES))
        print(f"accuracy of the file: {accuracy(loaded, DataLoader(valid, batch_size=16)):.3f}")
    return share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    main(options.model, options.epochs, output=options.output)
