"""Pruning in a loop of Hugging Face Accelerate, in one process or several.

    python examples/accelerate_loop.py [--steps 40]
    ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/accelerate_loop.py

Every process takes the same decisions; it is an error if they do not.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compress

ACCUMULATE = 2  # minibatches for one update


def build() -> nn.Module:
    """Return a plain network for images of 16 x 16 in ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 10))


def dataset(count: int) -> TensorDataset:
    """Return noisy copies of ten patterns with their numbers."""
    patterns, labels = torch.randn(10, 3, 16, 16), torch.randint(10, (count,))
    return TensorDataset(patterns[labels] + 2 * torch.randn(count, 3, 16, 16), labels)


def main(steps: int = 40, mixed_precision: str = "no") -> nn.Module:
    """Train and prune for so many updates; return the pruned network."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE, mixed_precision=mixed_precision
    )
    count = 32 * ACCUMULATE * steps * accelerator.num_processes
    loader = DataLoader(dataset(count), batch_size=32, shuffle=True)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = compress.Pruner(
        model, torch.randn(1, 3, 16, 16), optimizer=optimizer, steps=6, interval=max(1, steps // 12)
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                pruner.score(accelerator.scaler)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            pruner.step()
            if pruner.reshaped and accelerator.num_processes > 1:
                # DistributedDataParallel holds the parameters that it was made with.
                network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                accelerator.free_memory()
                model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(pruner.summary())
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    sums = accelerator.gather(sum(p.detach().double().sum() for p in network.parameters())[None])
    accelerator.print(f"{len(sums)} processes, the same weights: {bool((sums == sums[0]).all())}")
    accelerator.end_training()
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    options = parser.parse_args()
    main(options.steps, options.mixed_precision)
