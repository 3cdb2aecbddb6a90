"""What an image folder holds: ``train/`` and ``val/``, each with one folder of images per class."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from compress.data.order import Int64s
from compress.data.walking import APART, Found, Walk, class_folders, listed
from compress.errors import DataError

logger = logging.getLogger("compress")


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
        DataError: a folder is missing, a class is empty, the halves differ in their classes, or
            names of classes cannot be told apart.
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
        halves = ClassFolders(root / "train"), ClassFolders(root / "val")
        # Neither half is entered by way of the other: that would mix them.
        for half, other in zip(halves, reversed(halves), strict=True):
            half.walk.shut(other.walk)
        train, val = (half.files() for half in halves)
        identity = identity_of(val)
    except OSError as error:
        raise DataError(f"cannot list data.root = {root}: {error.strerror or error}") from error
    classes = halves[0].classes
    _check_same(root, set(classes), set(halves[1].classes))
    _warn_if_shared(root, classes)
    return Listing(classes, train, val, identity)


def list_classes(folder: Path) -> tuple[tuple[str, ...], FileList]:
    """Return the class names of a folder of class folders, and path and label of every image file.

    Raises:
        DataError: as ``ClassFolders``, or a class without an image.
        OSError: a folder cannot be listed.
    """
    found = ClassFolders(folder)
    return found.classes, found.files()


class ClassFolders:
    """The class folders in a folder, listed in two passes: real folders, then where links lead.

    So a folder belongs where it really lies, whatever links to it come before it.

    Args:
        folder: The folder.

    Raises:
        DataError: there is no class folder, one that is another or one above, or names that cannot
            be told apart.
        OSError: a folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.fspath(folder)
        self.classes = tuple(class_folders(folder))
        """Their names, sorted."""
        if not self.classes:
            raise DataError(
                f"{folder} has no class folders: put the images into one folder per class"
            )
        self.walk = Walk()
        for above in (folder, folder.parent):
            self.walk.enter(os.fspath(above))
        for name in self.classes:
            before = self.walk.enter(self._path(name))
            if before is not None:
                raise DataError(
                    f"the class folder {name!a} in {folder} is a link to {before}, and no folder "
                    "is listed twice: remove it"
                )
        self._real = [self.walk.images(self._path(name)) for name in self.classes]

    def files(self) -> FileList:
        """Return path and label of every image; what is left out is named in the log.

        Raises:
            DataError: a class has no image.
            OSError: a folder cannot be listed.
        """
        blocks = ((self._names(real), label) for label, real in enumerate(self._real))
        files = FileList(self.folder, blocks)
        self.walk.report()
        counts = np.bincount(files.labels, minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{self.folder} has no image for class {listed(empty)}: "
                f"add files ({' '.join(IMG_EXTENSIONS)}) or remove the folder"
            )
        return files

    def _path(self, name: str) -> str:
        return f"{self.folder}{os.sep}{name}"

    def _names(self, real: Found) -> list[bytes]:
        """Name the images of one class: folder by folder, each in the order of names."""
        folders, links = list(real.folders), list(real.links)
        while links:
            more = self.walk.follow(links.pop(0))
            folders += more.folders
            links += more.links
        named = []
        for path, names in sorted(folders):
            inside = os.fsencode(os.path.relpath(path, self.folder) + os.sep)
            named += [inside + name for name in names.split(APART) if name]
        return named


def list_files(folder: Path) -> FileList:
    """Return the image files that lie in a folder itself, without labels: each is -1."""
    walk = Walk()
    ((_, names),) = walk.images(os.fspath(folder), deep=False).folders
    walk.report()
    return FileList(os.fspath(folder), [(list(filter(None, names.split(APART))), -1)])


def _check_same(root: Path, train: set[str], val: set[str]) -> None:
    differences = [
        f"only {half}/ has {listed(sorted(names))}"
        for half, names in (("train", train - val), ("val", val - train))
        if names
    ]
    if differences:
        raise DataError(
            f"the class folders under {root} differ: {' and '.join(differences)}; "
            "train/ and val/ must have the same"
        )


def _warn_if_shared(root: Path, classes: Iterable[str]) -> None:
    """Say so where links make the training images of a class its validation images."""
    shared = [name for name in classes if (root / "train" / name).samefile(root / "val" / name)]
    if shared:
        logger.warning(
            "the validation images are the training images, for links join the folders of class %s",
            listed(shared),
        )


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
