"""What an image folder holds: ``train/`` and ``val/``, each with one folder of images per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from compress.data.order import Int64s
from compress.errors import DataError


class FileList(Sequence[tuple[str, int]]):
    """Paths and labels of files, in a few blocks of memory: a million strings take 100 MB more.

    Args:
        folder: What the names are relative to; may be empty.
        blocks: Names in the encoding of the file system, and the label of all of them.
    """

    def __init__(self, folder: str, blocks: Iterable[tuple[Sequence[bytes], int]]) -> None:
        names = []
        ends, labels = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for block, label in blocks:
            names.append(b"".join(block))
            ends.append(np.array([len(name) for name in block], dtype=np.int64))
            labels.append(np.full(len(block), label, dtype=np.int64))
        self.folder = folder
        self.labels: Int64s = np.concatenate(labels)
        """(N,)"""
        self._names = b"".join(names)
        self._ends = np.cumsum(np.concatenate(ends))

    @classmethod
    def of(cls, samples: Iterable[tuple[str, int]]) -> FileList:
        """Return the list of some paths and labels."""
        return cls("", (([os.fsencode(path)], label) for path, label in samples))

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, int] | list[tuple[str, int]]:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        at = range(len(self))[index]
        return self.path(at), int(self.labels[at])

    def path(self, index: int) -> str:
        """Return the path of a file."""
        name = os.fsdecode(self.name(index))
        return f"{self.folder}{os.sep}{name}" if self.folder else name

    def name(self, index: int) -> bytes:
        """Return the name of a file relative to the folder, in the file system's encoding."""
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]]


class Listing(NamedTuple):
    """The files of an image folder; none of them was opened."""

    classes: tuple[str, ...]
    """Names of the class folders, sorted; a label is a position here."""
    train: FileList
    """Path and label of every training image."""
    val: FileList
    """Path and label of every validation image."""
    identity: str
    """sha256, hexadecimal, over relative name, size in bytes and label of the validation images."""


def scan(root: Path) -> Listing:
    """List an image folder.

    Raises:
        DataError: a folder is missing, a class is empty, or the halves differ in their classes.
    """
    if not root.is_dir():
        raise DataError(f"data.root = {root} does not exist: name the folder of the images")
    missing = [f"{name}/" for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"data.root = {root} has no {' and no '.join(missing)}: "
            "an image folder needs train/ and val/, each with one folder per class"
        )
    try:
        classes, train = list_classes(root / "train")
        val_classes, val = list_classes(root / "val")
        identity = identity_of(val)
    except OSError as error:
        raise DataError(f"cannot list data.root = {root}: {error.strerror or error}") from error
    _check_same(root, set(classes), set(val_classes))
    return Listing(classes, train, val, identity)


def list_classes(folder: Path) -> tuple[tuple[str, ...], FileList]:
    """Return the class names of a folder of class folders, and path and label of every image file.

    Raises:
        DataError: there is no class folder, or one without an image.
    """
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders: put the images into one folder per class")
    classes, _ = find_classes(folder)
    blocks = ((_names_of_class(folder, name), label) for label, name in enumerate(classes))
    samples = FileList(os.fspath(folder), blocks)
    counts = np.bincount(samples.labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{folder} has no image for class {_names(empty)}: "
            f"add files ({' '.join(IMG_EXTENSIONS)}) or remove the folder"
        )
    return tuple(classes), samples


def list_files(folder: Path) -> FileList:
    """Return the image files that lie in a folder itself, without labels: each is -1."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    images = [os.fsencode(name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return FileList(os.fspath(folder), [(images, -1)])


def _names_of_class(folder: Path, name: str) -> list[bytes]:
    """List the images of one class, at any depth: folder by folder, each in the order of names."""
    found = []
    for path, _, files in sorted(os.walk(folder / name, followlinks=True)):
        inside = os.path.relpath(path, folder)
        found += [
            os.fsencode(f"{inside}{os.sep}{file}")
            for file in sorted(files)
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
    return found


def _check_same(root: Path, train: set[str], val: set[str]) -> None:
    differences = [
        f"only {half}/ has {_names(sorted(names))}"
        for half, names in (("train", train - val), ("val", val - train))
        if names
    ]
    if differences:
        raise DataError(
            f"the class folders under {root} differ: {' and '.join(differences)}; "
            "train/ and val/ must have the same"
        )


def _names(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def identity_of(samples: FileList) -> str:
    """Return the sha256, hexadecimal, over relative name, size in bytes and label of files."""
    digest = hashlib.sha256()
    for index, label in enumerate(samples.labels.tolist()):
        try:
            size = os.stat(samples.path(index)).st_size  # noqa: PTH116 - Path takes seconds more
        except OSError:
            # A dangling link is a broken image like any other, and is skipped when it is read.
            size = 0
        name = samples.name(index).replace(os.sep.encode(), b"/")
        digest.update(b"%s\0%d\0%d\n" % (name, size, label))
    return digest.hexdigest()
