"""How much of a data set must be readable, so that figures of the rest are about all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from compress.data.loading import image_set
from compress.data.order import Int64s
from compress.data.walking import listed
from compress.errors import DataError


@dataclass(frozen=True)
class Readable:
    """What must be readable of a set of images."""

    images: int
    """In all."""
    counts: Int64s
    """(classes,) images of each class; empty where they have none, or tell none unread."""
    classes: tuple[str, ...]
    """Class names, by label."""
    max_skipped: float
    """Largest share of the images that may be unreadable."""

    @classmethod
    def of(cls, dataset: Dataset[Any], classes: tuple[str, ...], max_skipped: float) -> Readable:
        """Return what is asked of a data set; one of the user's own never skips an image."""
        images = image_set(dataset)
        labels = getattr(images, "labels", None)
        known = np.empty(0, dtype=np.int64) if labels is None else np.asarray(labels)
        counts = counted(known[known >= 0], len(classes))
        return cls(len(images), counts, classes, max_skipped)

    def require(self, skipped: int, read: Int64s) -> None:
        """Refuse to measure on too few of the images, or without one of a class.

        Args:
            skipped: Images that could not be read.
            read: (classes,) images of each class that could be; empty where they have no classes.

        Raises:
            DataError: too many images were skipped, or all of a class.
        """
        if not skipped:
            return
        short = min(len(self.counts), len(read))
        lost = np.flatnonzero((self.counts[:short] > 0) & (read[:short] == 0)).tolist()
        if lost:
            names = listed([self.classes[label] for label in lost])
            raise DataError(
                f"not one image of class {names} could be read ({skipped} of {self.images} in all "
                "could not), so nothing is measured: mend the files, or remove the class"
            )
        if skipped > self.max_skipped * self.images:
            raise DataError(
                f"{skipped} of {self.images} images could not be read, and data.max_skipped = "
                f"{self.max_skipped:g} of them may be: mend or remove the files"
            )


def counted(labels: Int64s, classes: int) -> Int64s:
    """Return (classes,) how often each label comes; labels beyond are left to whoever uses them."""
    return np.bincount(labels, minlength=classes)[:classes].astype(np.int64)
