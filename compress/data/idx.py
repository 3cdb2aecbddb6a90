"""Images in idx files, as MNIST and the sets that were made like it come.

An idx file is four bytes, of which the third says the kind of number (8: unsigned bytes) and the
fourth how many dimensions there are, then the length of each dimension in four bytes, most
significant first, then the numbers (Yann LeCun, "The MNIST database of handwritten digits"). It may
be packed with gzip.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from compress.errors import DataError

UNSIGNED_BYTES = 8
GZIP = b"\x1f\x8b"
MOST_PACKED = 1040
"""Bytes that one byte of gzip can stand for, a little more than deflate reaches."""

ALL_FILES = 4
HALVES = "train", "t10k"
IMAGES, LABELS = "images-idx3", "labels-idx1"
SEPARATORS = "-", "."
"""Both are found before ``idx``: train-images-idx3-ubyte, train-images.idx3-ubyte."""


class GreyImages(NamedTuple):
    """One half of a data set."""

    images: torch.Tensor
    """(N, H, W) uint8."""
    labels: torch.Tensor
    """(N,) int64."""


def missing_files(folder: Path) -> int:
    """Return how many of the four files of a data set a folder lacks."""
    return sum(_found(folder, half, kind) is None for half in HALVES for kind in (IMAGES, LABELS))


def read_idx(folder: Path, num_classes: int) -> tuple[GreyImages, GreyImages]:
    """Read the training and the test images of a folder.

    Raises:
        DataError: a file is missing, damaged or cut short, or does not belong to the others; the
            message names it.
    """
    train, test = (_half(folder, half, num_classes) for half in HALVES)
    if train.images.shape[1:] != test.images.shape[1:]:
        one, other = (_size(half.images.shape[1:]) for half in (train, test))
        raise DataError(
            f"the training images in {folder} have {one} pixels and the test images {other}: they "
            "are not of one data set"
        )
    return train, test


def _half(folder: Path, half: str, num_classes: int) -> GreyImages:
    paths = [_existing(folder, half, kind) for kind in (IMAGES, LABELS)]
    images, labels = (_array(path, dims) for path, dims in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels):
        raise DataError(
            f"{paths[0]} has {len(images)} images and {paths[1].name} {len(labels)} labels: they "
            "are not of one data set"
        )
    wrong = np.flatnonzero(labels >= num_classes)
    if len(wrong):
        raise DataError(
            f"{paths[1]} says that image {wrong[0]} is of class {labels[wrong[0]]}, and there are "
            f"{num_classes} classes, from 0: name the folder of the data set that is asked for"
        )
    return GreyImages(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def _found(folder: Path, half: str, kind: str) -> Path | None:
    """Return the file of a kind, the unpacked one first; None if there is none."""
    for separator in SEPARATORS:
        name = f"{half}-{kind.replace('-', separator)}-ubyte"
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def _existing(folder: Path, half: str, kind: str) -> Path:
    path = _found(folder, half, kind)
    if path is None:
        raise DataError(
            f"{folder} has no {half}-{kind}-ubyte, packed as .gz or not: images and labels for "
            "training (train) and for testing (t10k) are four files"
        )
    return path


def _array(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read a whole file of unsigned bytes.

    Raises:
        DataError: it is none of so many dimensions, damaged, or of another length than it says.
    """
    try:
        with path.open("rb") as file:
            return _parsed(file, dimensions)
    except ValueError as error:
        raise DataError(f"{path} {error}: fetch or copy it again") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "it is cut short" if isinstance(error, EOFError) else str(error)
        raise DataError(f"{path} cannot be unpacked ({reason}): fetch or copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _parsed(file: BinaryIO, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read what a file says and holds.

    Raises:
        ValueError: a phrase about the file.
    """
    length = os.fstat(file.fileno()).st_size
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
    shape = _shape(stream, dimensions)
    header, numbers = 4 + 4 * dimensions, prod(shape)
    # Before memory is asked for: a damaged length may say more than there is in the world.
    most = length * MOST_PACKED if packed else length
    if header + numbers > most:
        raise ValueError(f"is cut short: it says that it holds {_size(shape)} numbers")
    array = np.empty(shape, dtype=np.uint8)
    if _filled(stream, array.reshape(-1).data) < numbers:
        raise ValueError(f"is cut short: it says that it holds {_size(shape)} numbers")
    if stream.read(1):  # the end of a packed file also has its check sum compared
        raise ValueError(f"goes on after the {_size(shape)} numbers that it says it holds")
    return array


def _shape(stream: BinaryIO, dimensions: int) -> tuple[int, ...]:
    expected = bytes((0, 0, UNSIGNED_BYTES, dimensions))
    header = stream.read(4 + 4 * dimensions)
    if header[:4] != expected:
        what = "images" if dimensions > 1 else "labels"
        raise ValueError(
            f"is no idx file of {what}: it begins with {header[:4].hex() or 'nothing'} and not "
            f"with {expected.hex()}"
        )
    if len(header) < 4 + 4 * dimensions:
        raise ValueError("is cut short in its first bytes")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in shape:
        raise ValueError(f"says that it holds {_size(shape)} numbers, which is nothing")
    return shape


def _filled(stream: BinaryIO, memory: memoryview) -> int:
    """Read until the memory is full or the stream ends; return the bytes that were read."""
    done = 0
    while done < len(memory):
        count = cast(gzip.GzipFile, stream).readinto(memory[done:])
        if not count:
            break
        done += count
    return done


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
