"""Data sets, and the order in which training and evaluation read them.

The order of an epoch and the augmentation of every image follow from (seed, epoch, image) alone:
not from the number of worker processes, not from where an interrupted epoch is resumed, not from
torch's global generator. Evaluation reads in order and without chance.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms.v2 import functional

from compress.config import DataConfig
from compress.errors import ConfigError, DataError
from compress.imagefolder import scan
from compress.loading import (
    Augment,
    Batch,
    FileImages,
    ImageSet,
    Request,
    TensorImages,
    View,
    image_set,
)
from compress.order import Int64s, Share
from compress.shards.dataset import open_shards
from compress.shards.images import ShardImages
from compress.workers import PREFETCH, Reader, batches

__all__ = [
    "Batch",
    "ImageData",
    "TrainBatches",
    "eval_batches",
    "first_images",
    "load_data",
    "require_images",
    "spread_batches",
]

AUTO_AUGMENT: dict[str, Augment] = {
    "digits": "crop",
    "mnist": "crop",
    "cifar10": "crop-flip",
    "cifar100": "crop-flip",
    "imagefolder": "imagenet",
    "shards": "imagenet",
}
PHOTOGRAPHS = ("imagefolder", "shards")
DIGITS_SPLIT_SEED = 2019
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        pin_memory: Return page-locked tensors, for copies to a GPU.
        rank: Which part of every batch is read here.
        ranks: Processes that train together, each with its part.

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
        pin_memory: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._images = image_set(data.train)
        self._share = Share(batch_size, rank, ranks)
        self._seed = seed
        self._reader = Reader(
            self._images, workers=workers, prefetch=prefetch, pin_memory=pin_memory
        )
        self._check_share()

    def __len__(self) -> int:
        return self._share.steps(len(self._images))

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch.

        Args:
            epoch: Number of the epoch, from 0.
            start: Batches of this epoch that were consumed before; they are not decoded again.

        Raises:
            DataError: a worker process died.
        """
        return self._reader.read(self._requests(epoch)[start:])

    def close(self) -> None:
        """End the workers; they end with this object too."""
        self._reader.close()

    def _requests(self, epoch: int) -> list[Request]:
        rng = np.random.default_rng((self._seed, epoch))
        order = self._images.epoch_order(self._share, rng)
        seeds = rng.integers(2**63, size=len(self._images))[order]
        return list(map(Request, order, seeds))

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
    pin_memory: bool = False,
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
        pin_memory: Return page-locked tensors, for copies to a GPU.
        rank: Read the batches ``rank::ranks``.
        ranks: Processes that share the batches.

    Raises:
        DataError: a worker process died.
    """
    images = image_set(dataset)
    requests = _cut(np.arange(len(images)), batch_size)[rank::ranks]
    return batches(images, requests, workers=workers, pin_memory=pin_memory)


def spread_batches(
    dataset: Dataset[Any], count: int, *, batch_size: int, workers: int = 0
) -> Iterator[Batch]:
    """Yield at most ``count`` images that lie evenly over a data set, as ``eval_batches`` does.

    Data sets are often sorted by class, so the first images would show one class alone.
    """
    images = image_set(dataset)
    count = min(count, len(images))
    indices = (np.arange(count) * len(images)) // max(count, 1)
    yield from batches(images, _cut(indices, batch_size), workers=workers, pin_memory=False)


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


def load_data(config: DataConfig, *, seed: int = 0) -> ImageData:
    """Open the data set that the configuration names; image files are listed, not decoded.

    Args:
        config: Which images, and how they are read.
        seed: Of the run. No built-in set depends on it: their splits never change.

    Raises:
        DataError: the data set is missing, damaged or not laid out as it must be.
    """
    if config.dataset == "digits":
        return _load_digits(config)
    if config.root is None:
        raise DataError(
            f"data.dataset = {config.dataset!r} is read from disk, and data.root is not set: "
            "add --set data.root=FOLDER"
        )
    if config.dataset == "shards":
        return _load_shards(config)
    root = Path(config.root).expanduser()
    if config.dataset == "imagefolder":
        return _load_image_folder(config, root)
    return _load_torchvision(config, root)


class _Known(NamedTuple):
    reader: type[Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_KNOWN = {
    "mnist": _Known(datasets.MNIST, (0.1307,), (0.3081,)),
    "cifar10": _Known(datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Known(datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class _Half(NamedTuple):
    images: torch.Tensor  # (N, C, H, W), uint8 or float32 in [0, 1]
    labels: torch.Tensor  # (N,), int64


def _load_digits(config: DataConfig) -> ImageData:
    # Imported here because it takes a second, and only this set needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(
        np.arange(len(labels)),
        test_size=len(labels) // 3,
        stratify=digits.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    halves = _Half(images[train], labels[train]), _Half(images[val], labels[val])
    mean, std = _moments(halves[0].images, config.image_size or 32)
    classes = tuple(str(name) for name in digits.target_names)
    return _in_memory(*halves, classes=classes, view=_view(config, mean, std))


def _load_torchvision(config: DataConfig, root: Path) -> ImageData:
    if not root.is_dir() and not config.download:
        raise DataError(
            f"data.root = {root} does not exist: "
            "name an existing folder, or add --set data.download=true"
        )
    known = _KNOWN[config.dataset]
    try:
        # Unpickling CIFAR is safe: torchvision checks every file's md5 first, downloaded or not.
        train, val = (
            known.reader(root, train=train, download=config.download) for train in (True, False)
        )
        halves = _half(train), _half(val)
    except _READER_ERRORS as error:
        if config.download:
            advice = "it could not be downloaded or read, so check the network and the folder"
        else:
            advice = "it is missing or damaged, and --set data.download=true fetches it"
        raise DataError(f"no usable {config.dataset} in data.root = {root}: {advice}") from error
    view = _view(config, known.mean, known.std)
    return _in_memory(*halves, classes=tuple(train.classes), view=view)


# What torchvision raises for absent, truncated or foreign files and for a failed download.
_READER_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    pickle.UnpicklingError,
)


def _half(part: Any) -> _Half:
    """Take (N, H, W) or (N, H, W, 3) uint8 pixels and the labels from a torchvision data set."""
    pixels = torch.as_tensor(part.data)
    labels = torch.as_tensor(part.targets)
    if len(pixels) != len(labels):
        raise ValueError(f"{len(pixels)} images with {len(labels)} labels")
    planes = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return _Half(planes.contiguous(), labels)


def _load_image_folder(config: DataConfig, root: Path) -> ImageData:
    folder = scan(root)
    view = _view(config, IMAGENET_MEAN, IMAGENET_STD)
    train, val = (FileImages(part, view, config.decoder) for part in (folder.train, folder.val))
    return _image_data(train, val, folder.classes, view, folder.identity)


def _load_shards(config: DataConfig) -> ImageData:
    shards = open_shards(config)
    view = _view(config, IMAGENET_MEAN, IMAGENET_STD)
    train, val = (
        ShardImages(shards.store, half, view, config.decoder, config.shuffle_shards)
        for half in (shards.train, shards.val)
    )
    return _image_data(train, val, shards.classes, view, shards.val.identity())


def _view(config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> View:
    augment = AUTO_AUGMENT[config.dataset] if config.augment == "auto" else config.augment
    size = config.image_size or (224 if config.dataset in PHOTOGRAPHS else 32)
    return View(size, augment, mean, std)


def _in_memory(train: _Half, val: _Half, *, classes: tuple[str, ...], view: View) -> ImageData:
    halves = TensorImages(*train, view), TensorImages(*val, view)
    return _image_data(*halves, classes, view, _tensors_identity(val))


def _image_data(
    train: ImageSet, val: ImageSet, classes: tuple[str, ...], view: View, identity: str
) -> ImageData:
    input_size = (len(view.mean), view.size, view.size)
    return ImageData(train, val, classes, input_size, view.mean, view.std, identity)


def _moments(images: torch.Tensor, size: int) -> tuple[tuple[float], tuple[float]]:
    """Return mean and standard deviation of one-channel images after resizing."""
    total = squares = 0.0
    for part in torch.split(images, 64):
        pixels = functional.resize(part, [size, size]).double()
        total += pixels.sum().item()
        squares += pixels.square().sum().item()
    pixels_in_all = len(images) * size * size
    mean = total / pixels_in_all
    # Rounded, so that the order of summation on another machine cannot show.
    return (round(mean, 4),), (round((squares / pixels_in_all - mean**2) ** 0.5, 4),)


def _tensors_identity(half: _Half) -> str:
    digest = hashlib.sha256(f"{tuple(half.images.shape)} {half.images.dtype}".encode())
    digest.update(half.images.numpy().tobytes())
    digest.update(half.labels.numpy().tobytes())
    return digest.hexdigest()


def _cut(order: Int64s, batch_size: int) -> list[Request]:
    """Cut an order of images into the requests of evaluation, the last one perhaps short."""
    return [
        Request(order[first : first + batch_size], None)
        for first in range(0, len(order), batch_size)
    ]
