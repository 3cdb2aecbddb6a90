"""Data sets by the name that a configuration gives them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision import datasets
from torchvision.transforms.v2 import functional

from compress.config import DataConfig
from compress.data.batches import ImageData
from compress.data.idx import ALL_FILES, missing_files, read_idx
from compress.data.imagefolder import FileList, scan
from compress.data.loading import FileImages, ImageSet, TensorImages
from compress.data.shards.dataset import open_shards
from compress.data.shards.images import ShardImages
from compress.data.views import Augment, View
from compress.errors import ConfigError, DataError

AUTO_AUGMENT: dict[str, Augment] = {
    "digits": "crop",
    "mnist": "crop",
    "fashion-mnist": "crop-flip",
    "cifar10": "crop-flip",
    "cifar100": "crop-flip",
    "imagefolder": "imagenet",
    "shards": "imagenet",
}
DIGITS_SPLIT_SEED = 2019
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_data(config: DataConfig) -> ImageData:
    """Open the data set that the configuration names; image files are listed, not decoded.

    Raises:
        ConfigError: settings that do not fit the images of this set.
        DataError: the data set is missing, damaged or not laid out as it must be.
    """
    if config.dataset == "digits":
        return _load_digits(config)
    if config.dataset in _GREY:
        return _load_grey(config, _GREY[config.dataset])
    if config.root is None:
        raise _without_root(config)
    if config.dataset == "shards":
        return _load_shards(config)
    root = Path(config.root).expanduser()
    if config.dataset == "imagefolder":
        return _load_image_folder(config, root)
    return _load_cifar(config, root)


def _without_root(config: DataConfig, package: str = "") -> DataError:
    other = f", or install Debian's package {package}" if package else ""
    return DataError(
        f"data.dataset = {config.dataset!r} is read from disk, and data.root is not set: "
        f"add --set data.root=FOLDER{other}"
    )


class _Grey(NamedTuple):
    """A data set in idx files."""

    reader: type[Any]
    """Torchvision's, which downloads it, and whose name is that of its folder."""
    mean: tuple[float]
    std: tuple[float]
    package: str = ""
    """Of Debian, where there is one."""
    installed: Path | None = None
    """Where that package puts the files."""


_GREY = {
    "mnist": _Grey(datasets.MNIST, (0.1307,), (0.3081,)),
    "fashion-mnist": _Grey(
        datasets.FashionMNIST,
        (0.2860,),
        (0.3530,),
        package="dataset-fashion-mnist",
        installed=Path("/usr/share/datasets/fashion-mnist"),
    ),
}


class _Coloured(NamedTuple):
    reader: type[Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_COLOURED = {
    "cifar10": _Coloured(datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Coloured(datasets.CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
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


def _load_grey(config: DataConfig, known: _Grey) -> ImageData:
    classes = tuple(known.reader.classes)
    folder = _grey_folder(config, known)
    halves = [
        _Half(half.images.unsqueeze(1), half.labels) for half in read_idx(folder, len(classes))
    ]
    return _in_memory(*halves, classes=classes, view=_view(config, known.mean, known.std))


def _grey_folder(config: DataConfig, known: _Grey) -> Path:
    """Return the folder of the four files, which may be downloaded first."""
    if config.root is None:
        if known.installed is None or not known.installed.is_dir():
            raise _without_root(config, known.package)
        return known.installed
    root = Path(config.root).expanduser()
    _require_folder(config, root)
    places = root, root / known.reader.__name__ / "raw"
    folder = min(places, key=missing_files)
    if missing_files(folder) and config.download:
        _read_by_torchvision(known.reader, config, root)
        folder = min(places, key=missing_files)
    if missing_files(folder) == ALL_FILES:
        raise DataError(
            f"no {config.dataset} in data.root = {root}: neither there nor in {places[1]} is a "
            "file such as train-images-idx3-ubyte, packed as .gz or not, and "
            "--set data.download=true fetches them"
        )
    return folder


def _load_cifar(config: DataConfig, root: Path) -> ImageData:
    _require_folder(config, root)
    known = _COLOURED[config.dataset]
    train, val = _read_by_torchvision(known.reader, config, root)
    view = _view(config, known.mean, known.std)
    return _in_memory(_half(train), _half(val), classes=tuple(train.classes), view=view)


def _require_folder(config: DataConfig, root: Path) -> None:
    if not root.is_dir() and not config.download:
        raise DataError(
            f"data.root = {root} does not exist: "
            "name an existing folder, or add --set data.download=true"
        )


def _read_by_torchvision(reader: type[Any], config: DataConfig, root: Path) -> tuple[Any, Any]:
    """Read both halves of a data set, downloaded first if that is allowed and needed."""
    try:
        # Unpickling CIFAR is safe: torchvision checks every file's md5 first, downloaded or not.
        train, val = (reader(root, train=half, download=config.download) for half in (True, False))
        for part in (train, val):
            if len(part.data) != len(part.targets):
                raise ValueError(f"{len(part.data)} images with {len(part.targets)} labels")
    except _READER_ERRORS as error:
        if config.download:
            advice = "it could not be downloaded or read, so check the network and the folder"
        else:
            advice = "it is missing or damaged, and --set data.download=true fetches it"
        raise DataError(f"no usable {config.dataset} in data.root = {root}: {advice}") from error
    return train, val


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
    """Take (N, 32, 32, 3) uint8 pixels and the labels from a CIFAR set of torchvision."""
    planes = torch.as_tensor(part.data).permute(0, 3, 1, 2)
    return _Half(planes.contiguous(), torch.as_tensor(part.targets))


def _load_image_folder(config: DataConfig, root: Path) -> ImageData:
    folder = scan(root)
    view = _view(config, IMAGENET_MEAN, IMAGENET_STD)
    train, val = (FileImages(part, view, config.decoder) for part in (folder.train, folder.val))
    return _image_data(train, val, folder.classes, view, folder.identity)


def evaluated(files: FileList, config: DataConfig) -> FileImages:
    """Return image files as ``load_data`` prepares those of an image folder for evaluation."""
    config = config.model_copy(update={"dataset": "imagefolder"})
    return FileImages(files, _view(config, IMAGENET_MEAN, IMAGENET_STD), config.decoder)


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
    size = config.image_size or (224 if config.photographs else 32)
    if config.channels not in (None, len(mean)):
        if len(mean) > 1:
            raise ConfigError(
                f"data.channels = {config.channels} and the images of {config.dataset} have "
                f"{len(mean)}: leave it out"
            )
        mean, std = mean * config.channels, std * config.channels
    for key in ("mean", "std"):
        given = getattr(config, key)
        if given is not None and len(given) != len(mean):
            raise ConfigError(
                f"data.{key} has {len(given)} numbers and the images of {config.dataset} have "
                f"{len(mean)} channels: give one for each"
            )
    mean, std = config.mean or mean, config.std or std
    return View(size, augment, mean, std, config.interpolation, config.crop)


def _in_memory(train: _Half, val: _Half, *, classes: tuple[str, ...], view: View) -> ImageData:
    # A channel that is repeated takes no memory; the identity is that of the images as they are.
    one, other = (
        TensorImages(half.images.expand(-1, len(view.mean), -1, -1), half.labels, view)
        for half in (train, val)
    )
    return _image_data(one, other, classes, view, _tensors_identity(val))


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
