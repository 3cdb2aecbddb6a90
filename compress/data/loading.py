"""How one batch of images is read: decoded, augmented, normalised, with broken images left out.

An image set answers a ``Draw``: which images, and one random seed for each when they are to be
augmented. A batch is a function of its request alone, so it does not matter which process builds it
or what was built before. Pixels travel as the bytes that they are, a quarter of what the network
sees, and are normalised where they arrive: by ``Batch.to``, or by ``Batch.normalised``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from compress.data.decoding import (
    DECODE_ERRORS,
    Decoded,
    Decoder,
    decode_rgb,
    read_rgb,
    reason_of,
)
from compress.data.imagefolder import FileList
from compress.data.order import Int64s, Share, shuffled
from compress.data.views import Scale, View, seeded
from compress.errors import DataError

logger = logging.getLogger("compress")


@dataclass(frozen=True)
class Batch:
    """Images and their labels."""

    images: torch.Tensor
    """(N, C, H, W): float32 and normalised; with a ``scale`` uint8, or float32 in [0, 1]."""
    labels: torch.Tensor
    """(N,), int64."""
    skipped: int
    """Unreadable images left out of this batch; N is smaller by as many, down to 0."""
    scale: Scale | None = None
    """How the images are still to be normalised."""

    def to(
        self,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised images and labels on a device; copies to a GPU do not wait."""
        images = self.images.to(device, non_blocking=True, memory_format=memory_format)
        labels = self.labels.to(device, non_blocking=True)
        return images if self.scale is None else self.scale.normalise(images), labels

    def normalised(self) -> Batch:
        """Return the batch with normalised images."""
        if self.scale is None:
            return self
        return Batch(self.scale.normalise(self.images), self.labels, self.skipped)

    def parts(self, count: int) -> Iterator[Batch]:
        """Yield the batch in parts of sizes as even as can be."""
        for images, labels in zip(
            self.images.tensor_split(count), self.labels.tensor_split(count), strict=True
        ):
            yield Batch(images, labels, 0, self.scale)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; a thread of torch's loader calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Draw(NamedTuple):
    """What is asked of an image set."""

    indices: Int64s
    """(N,) positions in the set."""
    seeds: Int64s | None
    """(N,) seeds of the augmentation of each image; None reads for evaluation."""
    ahead: tuple[int, ...] = ()
    """Numbers of the shards to fetch meanwhile, for requests to come."""


class Reply(NamedTuple):
    """A batch, and what its reader has to say about it."""

    batch: Batch
    broken: str
    """The first unreadable image and why it is unreadable; empty when there is none."""


class ImageSet(Dataset[tuple[torch.Tensor, int]], ABC):
    """Labelled images that are read a batch at a time.

    ``images[i]`` is one image (C, H, W) as evaluation sees it, and its label.
    """

    _reported = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, request: Draw) -> Reply:
        """Read a batch, perhaps not normalised yet; torch's global generator is left as it was."""

    def epoch_order(self, share: Share, rng: np.random.Generator) -> Int64s:
        """Return the positions that one rank trains on in an epoch, a row for each of its steps.

        Every rank has as many rows, and together they read no image twice. Every rank draws the
        same from ``rng``, which is seeded by the run and the epoch.
        """
        return shuffled(len(self), share, rng)

    def ahead(self, order: Int64s) -> list[tuple[int, ...]]:
        """Return what to fetch ahead during each step of an order; see ``Draw.ahead``."""
        return [()] * len(order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        batch, broken = self.fetch(Draw(np.array([range(len(self))[index]]), None))
        if broken:
            raise DataError(f"image {index} cannot be read: {broken}; mend or remove the file")
        return batch.normalised().images[0], int(batch.labels[0])

    def report(self, broken: str) -> None:
        """Name an unreadable image in the log, once for this set."""
        if not self._reported:
            self._reported = True
            logger.warning("unreadable images are skipped and counted; the first: %s", broken)


class TensorImages(ImageSet):
    """Images held in memory: (N, C, H, W), uint8 or float32 in [0, 1], of any height and width."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, view: View) -> None:
        self.images = images
        self.labels = labels
        self.view = view

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, request: Draw) -> Reply:
        """Read a batch."""
        indices = torch.from_numpy(request.indices)
        images = self.images[indices]
        if request.seeds is None:
            images = self.view.resize(images)
        elif self.view.augment == "imagenet":
            images = torch.stack(list(map(self.view.random_resize, images, request.seeds.tolist())))
        else:
            images = self.view.shift(self.view.resize(images), request.seeds)
        return Reply(Batch(images, self.labels[indices], 0, self.view.scale), "")


class EncodedImages(ImageSet):
    """Images that are decoded when they are asked for; broken ones are left out.

    Args:
        labels: (N,) int64.
        view: How the images become what the network sees.
        decoder: What decodes them, see ``compress.data.decoding``.
    """

    def __init__(self, labels: torch.Tensor, view: View, decoder: Decoder = "pil") -> None:
        self.labels, self.view, self.decoder = labels, view, decoder

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Return what a message calls an image."""

    @abstractmethod
    def decoded(self, index: int) -> Decoded:
        """Read and decode one image.

        Raises:
            DECODE_ERRORS: it cannot be.
        """

    def fetch(self, request: Draw) -> Reply:
        """Read a batch, without the images that cannot be decoded."""
        seeds = [None] * len(request.indices) if request.seeds is None else request.seeds.tolist()
        results = [self._read(*pair) for pair in zip(request.indices, seeds, strict=True)]
        kept = np.array([isinstance(result, torch.Tensor) for result in results], dtype=bool)
        labels = self.labels[torch.from_numpy(request.indices[kept])]
        images = [result for result in results if isinstance(result, torch.Tensor)]
        pixels = self._stack(images, None if request.seeds is None else request.seeds[kept])
        broken = next((result for result in results if isinstance(result, str)), "")
        batch = Batch(pixels, labels, len(results) - len(images), self.view.scale)
        return Reply(batch, broken)

    def _read(self, index: int, seed: int | None) -> torch.Tensor | str:
        """Return the image (C, size, size) as uint8, or a phrase that says why there is none."""
        try:
            image = self.decoded(index)
        except DECODE_ERRORS as error:
            return f"{self.name_of(index)} ({reason_of(error)})"
        # Resized at once: a batch of decoded photographs can take gigabytes.
        resized = self.view.resize(image) if seed is None else self.view.random_resize(image, seed)
        if isinstance(resized, torch.Tensor):
            return resized
        return functional.pil_to_tensor(resized)

    def _stack(self, images: list[torch.Tensor], seeds: Int64s | None) -> torch.Tensor:
        if not images:
            shape = (0, len(self.view.mean), self.view.size, self.view.size)
            return torch.empty(shape, dtype=torch.uint8)
        stacked = torch.stack(images)
        return stacked if seeds is None else self.view.shift(stacked, seeds)


class FileImages(EncodedImages):
    """Images of one file each.

    Args:
        samples: Path and label of every image.
        view: How the images become what the network sees.
        decoder: What decodes them, see ``compress.data.decoding``.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], view: View, decoder: Decoder = "pil"
    ) -> None:
        # In one block: a list of a million strings is copied into every worker as it is touched.
        self.files = samples if isinstance(samples, FileList) else FileList.of(samples)
        super().__init__(torch.from_numpy(self.files.labels), view, decoder)

    def name_of(self, index: int) -> str:
        """Return the path of an image."""
        return self.files.path(index)

    def decoded(self, index: int) -> Decoded:
        """Read and decode one file."""
        path = self.name_of(index)
        if self.decoder == "pil":
            return read_rgb(path)
        return decode_rgb(Path(path).read_bytes(), self.decoder)


class PlainImages(ImageSet):
    """Any map-style data set of normalised images (C, H, W) and labels, with its own transforms.

    Transforms that draw from torch's CPU generator are seeded like the built-in augmentation; for
    evaluation they draw the same every time.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def fetch(self, request: Draw) -> Reply:
        """Read a batch."""
        samples = []
        for position, index in enumerate(request.indices):
            seed = 0 if request.seeds is None else int(request.seeds[position])
            with seeded(seed):
                samples.append(self.dataset[int(index)])
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([int(label) for _, label in samples], dtype=torch.int64)
        return Reply(Batch(images, labels, skipped=0), "")


def image_set(dataset: Dataset[Any]) -> ImageSet:
    """Return the data set as an image set; one that is none yet is wrapped."""
    return dataset if isinstance(dataset, ImageSet) else PlainImages(dataset)
