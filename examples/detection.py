"""The backbone of a detector, pruned where it stands while the detector is trained.

    python examples/detection.py [--steps 24] [--output pruned.safetensors]

torchvision's SSDlite decides by values and cannot be captured; its backbone can. The feature maps
that the heads read are outputs of the backbone and keep their widths, so the heads fit as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import ssdlite320_mobilenet_v3_large

import compress


def build() -> SSD:
    """Return a detector of one class, beside the background."""
    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)


def scenes(
    count: int, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return images (3, 320, 320) of a bright rectangle in noise, and its box."""
    images, targets = [], []
    for _ in range(count):
        x, y, width, height = torch.randint(40, 160, (4,), generator=generator).tolist()
        image = 0.1 * torch.rand(3, 320, 320, generator=generator)
        image[:, y : y + height, x : x + width] += 0.8
        box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.long)})
    return images, targets


def main(steps: int = 24, count: int = 4, output: Path | None = None) -> list[float]:
    """Train and prune; return the loss of every minibatch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build().train()
    backbone = model.get_submodule("backbone")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = compress.Pruner(
        backbone,
        torch.stack(scenes(1, generator)[0]),
        optimizer=optimizer,  # of the whole detector
        budget="macs=0.6",
        steps=4,
        interval=max(1, steps // 8),  # the first half prunes
    )
    losses = []
    for _ in range(steps):
        images, targets = scenes(count, generator)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        pruner.score()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
    print(pruner.summary())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, the budget holds: {pruner.done}")
    if output is not None:
        compress.save(backbone, output, recipe=pruner.recipe)
        loaded = compress.load(output, build=lambda: build().get_submodule("backbone"))
        image = torch.stack(scenes(1, generator)[0])
        with torch.no_grad():
            pairs = zip(loaded(image).values(), backbone.eval()(image).values(), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
        print(f"the file holds the same backbone: {same}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    main(options.steps, output=options.output)
