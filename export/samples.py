"""The real images that an export needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from compress.config import RunConfig
    from compress.data.batches import ImageData
    from compress.data.loading import Batch


@dataclass(frozen=True)
class Samples:
    """Real images, normalised as the network expects them."""

    validation: np.ndarray
    """(N, C, H, W) float32, for parity."""
    training: Callable[[], Iterable[Batch]]
    """Returns the batches anew from which the ranges of INT8 are measured; not augmented."""


def samples_of(data: ImageData, config: RunConfig) -> Samples:
    """Take images that lie evenly over a data set, so that every class has its part.

    Raises:
        DataError: not one validation image can be read.
    """
    import torch

    from compress.data.batches import require_images, spread_batches

    size, workers = config.data.eval_batch_size, config.data.workers
    found = list(spread_batches(data.val, config.export.parity_images, batch_size=size))
    images = torch.cat([batch.images for batch in found])
    require_images(len(images), sum(batch.skipped for batch in found), purpose="parity")

    def training() -> Iterable[Batch]:
        count = config.export.calibration_images
        return spread_batches(data.train, count, batch_size=min(size, 32), workers=workers)

    return Samples(images.numpy(), training)
