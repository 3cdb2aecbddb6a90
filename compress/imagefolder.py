"""What an image folder holds: ``train/`` and ``val/``, each with one folder of images per class."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from compress.errors import DataError


class Listing(NamedTuple):
    """The files of an image folder; none of them was opened."""

    classes: tuple[str, ...]
    """Names of the class folders, sorted; a label is a position here."""
    train: list[tuple[str, int]]
    """Path and label of every training image."""
    val: list[tuple[str, int]]
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
        classes, train = _list_images(root / "train")
        val_classes, val = _list_images(root / "val")
        identity = _identity(root / "val", val)
    except OSError as error:
        raise DataError(f"cannot list data.root = {root}: {error.strerror or error}") from error
    _check_same(root, set(classes), set(val_classes))
    return Listing(classes, train, val, identity)


def _list_images(folder: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Return the class names, and the path and label of every image file."""
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise DataError(f"{folder} has no class folders: put the images into one folder per class")
    classes, labels = find_classes(folder)
    samples = make_dataset(folder, labels, IMG_EXTENSIONS, allow_empty=True)
    counts = Counter(label for _, label in samples)
    empty = [name for name in classes if not counts[labels[name]]]
    if empty:
        raise DataError(
            f"{folder} has no image for class {_names(empty)}: "
            f"add files ({' '.join(IMG_EXTENSIONS)}) or remove the folder"
        )
    return tuple(classes), samples


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


def _identity(folder: Path, samples: Sequence[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for name, label in samples:
        path = Path(name)
        # A dangling link is a broken image like any other, and is skipped when it is read.
        size = path.stat().st_size if path.exists() else 0
        line = f"{path.relative_to(folder).as_posix()}\0{size}\0{label}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
