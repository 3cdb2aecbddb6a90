"""A training loop of one's own: mixed precision, accumulation, an EMA, and stopping half-way.

    python examples/plain_torch.py --output plain [--updates 60] [--resume]

The network learns which of ten patterns an image shows. Every ``--save-every`` updates the whole
state is written; ``--resume`` goes on from there and reaches the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import compress

ACCUMULATE = 2  # minibatches for one update


class Net(nn.Module):
    """Two residual blocks for images of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 32, 3, padding=1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 16, 3, padding=1, bias=False),
                nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 16, 16) to logits (N, 10)."""
        x = F.relu(self.stem(images))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def minibatch(number: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy copies of ten patterns, which the number alone decides."""
    patterns = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(10, (size,), generator=generator)
    return patterns[labels] + torch.randn(size, 3, 16, 16, generator=generator), labels


def main(
    output: Path, updates: int = 60, save_every: int = 20, resume: bool = False, interval: int = 5
) -> list[float]:
    """Train and prune; return the loss of every update."""
    output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Net().to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device)
    example = minibatch(0)[0][:1].to(device)
    pruner = compress.Pruner(
        model,
        example,
        optimizer=optimizer,
        copies=[ema],
        budget="macs=0.5",
        steps=8,
        interval=interval,
    )

    # The pruner first: it gives the network, the copy and the optimizer the shapes of their states.
    parts: dict[str, Any] = {"pruner": pruner, "model": model, "ema": ema}
    parts |= {"optimizer": optimizer, "scaler": scaler}
    start = restored(output / "checkpoint.pt", parts) if resume else 0
    losses = []
    for update in range(start, updates):
        optimizer.zero_grad()
        total = 0.0
        for part in range(ACCUMULATE):
            images, labels = minibatch(update * ACCUMULATE + part)
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                logits = model(images.to(device))
                loss = F.cross_entropy(logits, labels.to(device)) / ACCUMULATE
            scaler.scale(loss).backward()
            total += loss.item()
        pruner.score(scaler)  # once for each update, after the last backward
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(model)
        pruner.step()
        losses.append(total)
        if (update + 1) % save_every == 0:
            states = {name: held.state_dict() for name, held in parts.items()}
            torch.save({"update": update + 1, **states}, output / "checkpoint.pt")
    print(pruner.summary())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    compress.save(ema.module, output / "pruned.safetensors", recipe=pruner.recipe)
    loaded = compress.load(output / "pruned.safetensors", build=Net).to(device)
    with torch.no_grad():
        same = torch.equal(loaded(example), ema.module.eval()(example))
    print(f"the file holds the same network: {same}")
    return losses


def restored(checkpoint: Path, parts: dict[str, Any]) -> int:
    """Load the state of every part, in their order; return the updates that were done."""
    state = torch.load(checkpoint)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["update"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    main(options.output, options.updates, options.save_every, options.resume)
