"""How one batch of images is read: decoded, augmented, normalised, with broken images left out.

An image set answers a ``Request``: which images, and one random seed for each when they are to be
augmented. A batch is a function of its request alone, so it does not matter which process builds it
or what was built before.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from compress.errors import DataError

logger = logging.getLogger("compress")

Augment = Literal["none", "crop", "crop-flip", "imagenet"]
Int64s = npt.NDArray[np.int64]

# What PIL's decoders raise on damaged files; a file that is gone is an OSError as well.
DECODE_ERRORS = (
    OSError,
    EOFError,
    LookupError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class Batch(NamedTuple):
    """Images ready for the network, and their labels."""

    images: torch.Tensor
    """(N, C, H, W), float32, normalised."""
    labels: torch.Tensor
    """(N,), int64."""
    skipped: int
    """Unreadable images left out of this batch; N is smaller by as many, down to 0."""


class Request(NamedTuple):
    """What is asked of an image set."""

    indices: Int64s
    """(N,) positions in the set."""
    seeds: Int64s | None
    """(N,) seeds of the augmentation of each image; None reads for evaluation."""


class Reply(NamedTuple):
    """A batch, and what its reader has to say about it."""

    batch: Batch
    broken: str
    """The first unreadable image and why it is unreadable; empty when there is none."""


@dataclass(frozen=True)
class View:
    """How stored images become what the network sees."""

    size: int
    """Height and width in pixels."""
    augment: Augment
    mean: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]."""
    std: tuple[float, ...]

    @property
    def padding(self) -> int:
        """Pixels added on each side before a random crop."""
        return self.size // 8

    def resize(self, image: Any) -> Any:
        """Bring a PIL image or a tensor (..., C, H, W) to the network's size, without chance."""
        if self.augment != "imagenet":
            return functional.resize(image, [self.size, self.size])
        # 256 to 224 is the customary margin of ImageNet evaluation.
        return functional.center_crop(
            functional.resize(image, [round(self.size * 256 / 224)]), [self.size, self.size]
        )

    def random_resize(self, image: Any, seed: int) -> Any:
        """Bring one PIL image or tensor (C, H, W) to the network's size as ``seed`` says."""
        if self.augment != "imagenet":
            return self.resize(image)
        with _seeded(seed):
            return self._random_resized_crop(image)

    @cached_property
    def _random_resized_crop(self) -> v2.Compose:
        return v2.Compose([v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()])

    def shift(self, images: torch.Tensor, seeds: Int64s) -> torch.Tensor:
        """Pad with black, crop and perhaps flip each of (N, C, size, size) as its seed says."""
        if self.augment not in ("crop", "crop-flip"):
            return images
        # The digits of a seed in this mixed base are independent uniform draws.
        span = 2 * self.padding + 1
        rest, tops = np.divmod(seeds, span)
        flips, lefts = np.divmod(rest, span)
        padded = functional.pad(images, [self.padding])
        cropped = [
            image[:, top : top + self.size, left : left + self.size]
            for image, top, left in zip(padded, tops.tolist(), lefts.tolist(), strict=True)
        ]
        result = torch.stack(cropped)
        if self.augment == "crop-flip":
            flipped = torch.from_numpy(flips % 2 == 1)
            result[flipped] = functional.horizontal_flip(result[flipped])
        return result

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8, or float in [0, 1], into normalised float32; shape (N, C, H, W) is kept."""
        scaled = functional.to_dtype(images, torch.float32, scale=True)
        return functional.normalize(scaled, list(self.mean), list(self.std))


class ImageSet(Dataset[tuple[torch.Tensor, int]], ABC):
    """Labelled images that are read a batch at a time.

    ``images[i]`` is one image (C, H, W) as evaluation sees it, and its label.
    """

    _reported = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, request: Request) -> Reply:
        """Read a batch; torch's global generator is left as it was."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        batch, broken = self.fetch(Request(np.array([range(len(self))[index]]), None))
        if broken:
            raise DataError(f"image {index} cannot be read: {broken}; mend or remove the file")
        return batch.images[0], int(batch.labels[0])

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

    def fetch(self, request: Request) -> Reply:
        """Read a batch."""
        indices = torch.from_numpy(request.indices)
        images = self.images[indices]
        if request.seeds is None:
            images = self.view.resize(images)
        elif self.view.augment == "imagenet":
            images = torch.stack(list(map(self.view.random_resize, images, request.seeds.tolist())))
        else:
            images = self.view.shift(self.view.resize(images), request.seeds)
        return Reply(Batch(self.view.normalise(images), self.labels[indices], skipped=0), "")


class FileImages(ImageSet):
    """Images decoded from files when they are asked for; broken ones are left out."""

    def __init__(self, samples: Sequence[tuple[str, int]], view: View) -> None:
        # One array: a list of a million strings is copied into every worker as it is touched.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        self.view = view

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, request: Request) -> Reply:
        """Read a batch, without the images that cannot be decoded."""
        seeds = [None] * len(request.indices) if request.seeds is None else request.seeds.tolist()
        results = [self._read(*pair) for pair in zip(request.indices, seeds, strict=True)]
        kept = np.array([isinstance(result, torch.Tensor) for result in results])
        labels = self.labels[torch.from_numpy(request.indices[kept])]
        images = [result for result in results if isinstance(result, torch.Tensor)]
        pixels = self._stack(images, None if request.seeds is None else request.seeds[kept])
        broken = next((result for result in results if isinstance(result, str)), "")
        return Reply(Batch(pixels, labels, skipped=len(results) - len(images)), broken)

    def _read(self, index: int, seed: int | None) -> torch.Tensor | str:
        """Return the image (C, size, size) as uint8, or a phrase that says why there is none."""
        path = os.fsdecode(self.paths[index])
        try:
            image = read_rgb(path)
        except DECODE_ERRORS as error:
            return f"{path} ({_reason(error)})"
        # Resized at once: a batch of decoded photographs can take gigabytes.
        resized = self.view.resize(image) if seed is None else self.view.random_resize(image, seed)
        return functional.pil_to_tensor(resized)

    def _stack(self, images: list[torch.Tensor], seeds: Int64s | None) -> torch.Tensor:
        if not images:
            return torch.empty(0, len(self.view.mean), self.view.size, self.view.size)
        stacked = torch.stack(images)
        return self.view.normalise(stacked if seeds is None else self.view.shift(stacked, seeds))


class PlainImages(ImageSet):
    """Any map-style data set of normalised images (C, H, W) and labels, with its own transforms.

    Transforms that draw from torch's CPU generator are seeded like the built-in augmentation; for
    evaluation they draw the same every time.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def fetch(self, request: Request) -> Reply:
        """Read a batch."""
        samples = []
        for position, index in enumerate(request.indices):
            seed = 0 if request.seeds is None else int(request.seeds[position])
            with _seeded(seed):
                samples.append(self.dataset[int(index)])
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([int(label) for _, label in samples], dtype=torch.int64)
        return Reply(Batch(images, labels, skipped=0), "")


def image_set(dataset: Dataset[Any]) -> ImageSet:
    """Return the data set as an image set; one that is none yet is wrapped."""
    return dataset if isinstance(dataset, ImageSet) else PlainImages(dataset)


def batches(
    images: ImageSet, requests: Iterable[Request], *, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the batch of every request, in order, read by ``workers`` processes (0: by this one).

    Raises:
        DataError: a worker process died.
    """
    loader: DataLoader[Reply] = DataLoader(
        _Replies(images),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # A generator of its own: the loader would draw from the global one.
        generator=torch.Generator(),
    )
    replies = iter(loader)
    while True:
        try:
            batch, broken = next(replies)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise DataError(
                f"one of the {workers} processes that decode images died, most often for want of "
                "memory or of space in /dev/shm: lower data.workers, or set it to 0"
            ) from error
        if broken:
            images.report(broken)
        yield batch


class _Replies(Dataset[Reply]):
    """The view that a DataLoader has of an image set: requests in, replies out."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, request: Request) -> Reply:
        return self.images.fetch(request)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the body, and put its state back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which reseeds every GPU as well.
        torch.default_generator.manual_seed(seed)
        yield


def read_rgb(path: str) -> Image.Image:
    """Decode a whole image file to RGB, pixel for pixel as stored: EXIF rotation is not applied."""
    with Path(path).open("rb") as file, Image.open(file) as image:
        return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__
