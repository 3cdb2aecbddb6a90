"""The batches of a data set, and the order in which training and evaluation read them.

The order of an epoch and the augmentation of every image follow from (seed, epoch, image) alone:
not from the number of worker processes, not from where an interrupted epoch is resumed, not from
torch's global generator. Evaluation reads in order and without chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from compress.data.loading import Batch, Draw, image_set
from compress.data.order import Int64s, Share
from compress.data.workers import PREFETCH, Reader, batches
from compress.errors import ConfigError, DataError


@dataclass(frozen=True)
class ImageData:
    """The two halves of a data set, and what the network must know about them."""

    train: Dataset[Any]
    """Map-style; ``TrainBatches`` augments it, ``eval_batches`` reads it as it reads ``val``."""
    val: Dataset[Any]
    """Map-style."""
    classes: tuple[str, ...]
    """Class names, by label."""
    input_size: tuple[int, int, int]
    """(C, H, W) in pixels."""
    mean: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]."""
    std: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]."""
    identity: str
    """sha256, hexadecimal, of the validation set: of labels and raw pixels when it is held in
    memory, of relative file names, sizes in bytes and labels when it is a folder or shards."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def val_images(self) -> int:
        """Images to validate on."""
        return len(image_set(self.val))


class TrainBatches:
    """The shuffled, augmented batches of ``data.train``.

    The last batch of an epoch is dropped when it is partial, unless it is the only one.

    Args:
        data: The data set.
        batch_size: Images per batch, over all ranks.
        seed: With the epoch and an image's position, decides its place and augmentation.
        workers: Processes that decode, the same for all epochs; 0 decodes in this process.
        prefetch: Batches that each of them reads ahead.
        for_gpu: Leave it to ``Batch.to`` to normalise images, see ``Reader``.
        rank: Which part of every batch is read here.
        ranks: Processes that train together, each with its part.
        limit: Batches of an epoch at most.

    Raises:
        ConfigError: a batch has fewer images than there are ranks.
        DataError: there are fewer training images than ranks.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        prefetch: int = PREFETCH,
        for_gpu: bool = False,
        rank: int = 0,
        ranks: int = 1,
        limit: int | None = None,
    ) -> None:
        self._images = image_set(data.train)
        self._limit = limit
        self._share = Share(batch_size, rank, ranks)
        self._seed = seed
        self._reader = Reader(self._images, workers=workers, prefetch=prefetch, for_gpu=for_gpu)
        self._check_share()

    def __len__(self) -> int:
        steps = self._share.steps(len(self._images))
        return steps if self._limit is None else min(steps, self._limit)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Batches of this epoch that were consumed before; they are not decoded again.

        Raises:
            DataError: a worker process died.
        """
        return self._reader.read(self._requests(epoch)[start : len(self)])

    def close(self) -> None:
        """End the workers; they end with this object too."""
        self._reader.close()

    def _requests(self, epoch: int) -> list[Draw]:
        rng = np.random.default_rng((self._seed, epoch))
        order = self._images.epoch_order(self._share, rng)
        seeds = rng.integers(2**63, size=len(self._images))[order]
        return list(map(Draw, order, seeds, self._images.ahead(order)))

    def _check_share(self) -> None:
        images, batch_size, ranks = len(self._images), self._share.batch_size, self._share.ranks
        if batch_size < ranks:
            raise ConfigError(
                f"data.batch_size = {batch_size} counts the images of all {ranks} ranks, and each "
                f"needs one: raise it to a multiple of {ranks}"
            )
        if 0 < images < ranks:
            raise DataError(
                f"the {images} training images cannot be shared by {ranks} ranks: start fewer"
            )


def eval_batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    workers: int = 0,
    for_gpu: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield the images of a data set in order, without augmentation; the last batch may be short.

    With several ranks each reads every ``ranks``-th batch, and together they read every image once.

    Args:
        dataset: Either half of an ``ImageData``, or any map-style data set of normalised images
            (C, H, W) and labels.
        batch_size: Images per batch.
        workers: Processes that decode; 0 decodes in this process.
        for_gpu: Leave it to ``Batch.to`` to normalise images, see ``Reader``.
        rank: Read the batches ``rank::ranks``.
        ranks: Processes that share the batches.

    Raises:
        DataError: a worker process died.
    """
    images = image_set(dataset)
    requests = _cut(np.arange(len(images)), batch_size)[rank::ranks]
    return batches(images, requests, workers=workers, for_gpu=for_gpu)


def spread_batches(
    dataset: Dataset[Any], count: int, *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """Yield at most ``count`` images that lie evenly over a data set, as ``eval_batches`` does.

    Data sets are often sorted by class, so the first images would show one class alone.
    """
    images = image_set(dataset)
    count = min(count, len(images))
    indices = (np.arange(count) * len(images)) // max(count, 1)
    yield from batches(images, _cut(indices, batch_size), workers=workers)


def first_images(data: ImageData, count: int) -> torch.Tensor:
    """Return the first readable validation images, at most ``count``: (N, C, H, W) float32.

    Raises:
        DataError: not one can be read.
    """
    found: list[torch.Tensor] = []
    skipped = 0
    for batch in eval_batches(data.val, batch_size=count):
        found.append(batch.images)
        skipped += batch.skipped
        if sum(map(len, found)) >= count:
            break
    images = torch.cat(found)[:count] if found else torch.empty(0)
    require_images(len(images), skipped, purpose="this command")
    return images


def require_images(read: int, skipped: int, *, purpose: str) -> None:
    """Raise a DataError that names the purpose unless at least one image was read."""
    if not read:
        raise DataError(
            f"{purpose} needs images, and none of {skipped} could be read: "
            "check that the files are whole and of a format that PIL decodes"
        )


def _cut(order: Int64s, batch_size: int) -> list[Draw]:
    """Cut an order of images into the requests of evaluation, the last one perhaps short."""
    return [
        Draw(order[first : first + batch_size], None) for first in range(0, len(order), batch_size)
    ]
