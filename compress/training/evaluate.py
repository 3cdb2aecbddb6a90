"""Accuracy of a torch network on a validation set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from compress.data.batches import require_images
from compress.data.loading import Batch
from compress.distributed.world import ALONE, World
from compress.networks.capture import in_mode
from compress.networks.outputs import require_finite, rows_not_finite


@dataclass(frozen=True)
class Accuracy:
    """Share of images classified right, in percent."""

    top1: float
    top5: float
    images: int
    skipped: int
    """Images that could not be read; they do not count."""

    def as_dict(self) -> dict[str, float]:
        """Return the figures for a JSON document."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, world: World = ALONE
) -> Accuracy:
    """Measure top-1 and top-5 accuracy; the network's modes are put back.

    Args:
        model: the network on ``device``.
        batches: this process's share of the images.
        device: where the network is.
        world: the processes that share the images; they count together.

    Raises:
        DataError: there is not one readable image.
        ModelError: it gives NaN or infinity on some: the largest of these is no class.
    """
    right = torch.zeros(2, dtype=torch.int64, device=device)  # read once: a GPU would wait
    strange = torch.zeros(2, dtype=torch.int64, device=device)
    images = skipped = 0
    with in_mode(model):
        for batch in batches:
            skipped += batch.skipped
            if not len(batch.labels):
                continue
            pixels, labels = batch.to(device)
            logits = model(pixels)
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            hits = top.eq(labels[:, None])
            right += torch.stack([hits[:, 0].sum(), hits.sum()])
            strange += rows_not_finite(logits)
            images += len(labels)
    counts = world.sum(torch.tensor([*right.tolist(), images, skipped, *strange.tolist()]))
    right1, right5, images, skipped, *strange_rows = counts.tolist()
    require_images(images, skipped, purpose="evaluation")
    require_finite(strange_rows, images)
    return Accuracy(100 * right1 / images, 100 * right5 / images, images, skipped)
