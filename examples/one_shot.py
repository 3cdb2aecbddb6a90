"""Prune in one step: analyse, importance, choose, shrink, with no loop around pruning.

    python examples/one_shot.py [--train 40] [--finetune 40] [--output FOLDER]

What a gradual ``Pruner`` does in many small steps, here in one, piece by piece. The pieces also
serve a schedule or a criterion of one's own: importance is a vector with one entry per unit.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import compress


def build() -> nn.Module:
    """Return a plain network for images of 16 x 16 in ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def minibatches(
    count: int, seed: int, size: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield noisy copies of ten patterns with their numbers."""
    patterns = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(10, (size,), generator=generator)
        yield patterns[labels] + 3 * torch.randn(size, 3, 16, 16, generator=generator), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> float:
    """Train for so many minibatches; return the last loss."""
    loss = torch.zeros(())
    for images, labels in minibatches(count, seed):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(trained: int = 40, finetuned: int = 40, output: Path | None = None) -> tuple[float, float]:
    """Train, prune, finetune; return the loss before and after."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = train(model, optimizer, trained, seed=1)
    dense = copy.deepcopy(model)  # to compare with in the end
    example = next(minibatches(1, seed=0))[0][:1]

    graph = compress.analyse(model, example)
    for group in graph.groups:
        print(f"{group.name}: {group.size} units, {group.frozen or 'can be pruned'}")

    scores = torch.zeros(graph.num_units, dtype=torch.float64)
    for images, labels in minibatches(8, seed=2):  # importance of one minibatch is noise: average
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        scores += torch.from_numpy(compress.importance(model, graph))

    kept = compress.choose(graph, scores, budget="macs=0.5", channel_multiple=4)
    recipe = compress.shrink(model, graph, kept, optimizer=optimizer)
    print(f"{int(kept.sum())} of {len(kept)} units stay:\n{model}")

    after = train(model, optimizer, finetuned, seed=3)  # the momentum of what is left went on
    print(f"loss {before:.3f} dense -> {after:.3f} pruned and finetuned")
    if output is not None:
        write(output, model, recipe, dense)
    return before, after


def write(output: Path, model: nn.Module, recipe: dict[str, Any], dense: nn.Module) -> None:
    """Save the network, and measure it against the dense one in ONNX Runtime."""
    output.mkdir(parents=True, exist_ok=True)
    images, labels = next(minibatches(1, seed=4, size=256))
    compress.save(model, output / "pruned.safetensors", recipe=recipe)
    loaded = compress.load(output / "pruned.safetensors", build=build)
    with torch.no_grad():
        same = torch.equal(loaded(images), model.eval()(images))
    print(f"the file holds the same network: {same}")
    for name, network in (("dense", dense), ("pruned", model)):
        compress.export_onnx(network, output / f"{name}.onnx", example=images[:1])
    report = compress.compare(
        output / "dense.onnx",
        output / "pruned.onnx",
        images,
        labels=labels,
        batch_sizes=[1],
        max_seconds=2,
    )
    print(report)
    for verdict in compress.judge(report, {"size": {"max_ratio": 0.6}}):
        print(verdict.status, verdict.sentence)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=40)
    parser.add_argument("--finetune", type=int, default=40)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    main(options.train, options.finetune, options.output)
