"""A U-Net that segments discs: skip connections by concatenation, Dice and cross entropy.

    python examples/segmentation.py [--steps 120] [--output pruned.safetensors]

A level of the encoder is read by the next level and, beside upsampled channels, by the decoder.
They lose the same channels; nothing in the network says so.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import compress


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels; logits of background and disc for every pixel."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(double, (1, *widths[:-1]), widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, stride=2)
            for narrow, wide in itertools.pairwise(widths)
        )
        self.join = nn.ModuleList(double(2 * width, width) for width in widths[:-1])
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, H, W) to (N, 2, H, W); H and W are multiples of 4."""
        skips = [x := self.down[0](images)]
        for level in list(self.down)[1:]:
            skips.append(x := level(F.max_pool2d(x, 2)))
        for skip, up, join in reversed(list(zip(skips[:-1], self.up, self.join, strict=True))):
            x = join(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


def discs(count: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 1, size, size) of a bright disc in noise, and masks (N, size, size)."""
    x, y, radius = torch.rand(3, count, 1, 1, generator=generator) * size
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = (rows - y).square() + (columns - x).square() < (4 + radius / 3).square()
    images = masks[:, None] + 0.5 * torch.randn(count, 1, size, size, generator=generator)
    return images, masks.long()


def dice(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the soft Dice coefficient of the disc, 1 where it is found exactly."""
    disc = logits.softmax(1)[:, 1]
    return (2 * (disc * masks).sum() + 1) / (disc.sum() + masks.sum() + 1)


def main(steps: int = 120, output: Path | None = None, size: int = 32) -> list[float]:
    """Train and prune; return the Dice coefficient of every minibatch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    example = discs(1, size, generator)[0]
    interval = max(1, steps // 16)  # the first half prunes, the second recovers
    pruner = compress.Pruner(
        model, example, optimizer=optimizer, budget="macs=0.5", steps=8, interval=interval
    )
    found = []
    for _ in range(steps):
        images, masks = discs(8, size, generator)
        logits = model(images)
        overlap = dice(logits, masks)
        loss = F.cross_entropy(logits, masks) + 1 - overlap
        optimizer.zero_grad()
        loss.backward()
        pruner.score()
        optimizer.step()
        pruner.step()
        found.append(overlap.item())
    print(pruner.summary())
    print(f"Dice {found[0]:.3f} -> {found[-1]:.3f} at the smaller size")
    if output is not None:
        compress.save(model, output, recipe=pruner.recipe)
        loaded = compress.load(output, build=UNet)
        with torch.no_grad():
            same = torch.equal(loaded(example), model.eval()(example))
        print(f"the file holds the same network: {same}")
        exported = compress.export_onnx(loaded, output.with_suffix(".onnx"), example=example)
        print(f"{exported.path.name}: {exported.inputs} -> {exported.outputs}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    main(options.steps, options.output)
