"""What a network said of every image, packed small enough to be kept in a report.

With it two reports on the same images are compared image by image, whenever they were made.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from bench.record import Record

_CLASSES = np.dtype("<u4")
_MOST_BYTES = 2**28  # of one unpacked field: 67 M images


class Outcomes(Record):
    """Per image, in the order of the validation set; each field is base64 of zlib of bytes."""

    images: int = Field(ge=1)
    top1: str
    """Most likely class: unsigned 32-bit little-endian integers."""
    correct: str
    """Whether that is the label: bits, the first image in the highest bit of the first byte."""
    top5_correct: str
    """Whether the label is among the five most likely: bits likewise."""

    @model_validator(mode="after")
    def _whole(self) -> Outcomes:
        for read in (self.read_top1, self.read_correct, self.read_top5_correct):
            read()
        return self

    def read_top1(self) -> npt.NDArray[np.int64]:
        """Return the most likely classes, (images,)."""
        packed = _unpack(self.top1, self.images * _CLASSES.itemsize)
        return np.frombuffer(packed, dtype=_CLASSES).astype(np.int64)

    def read_correct(self) -> npt.NDArray[np.bool_]:
        """Return which images are right, (images,)."""
        return self._bits(self.correct)

    def read_top5_correct(self) -> npt.NDArray[np.bool_]:
        """Return which images have their label among the five most likely classes, (images,)."""
        return self._bits(self.top5_correct)

    def _bits(self, text: str) -> npt.NDArray[np.bool_]:
        packed = np.frombuffer(_unpack(text, -(-self.images // 8)), dtype=np.uint8)
        return np.unpackbits(packed, count=self.images).astype(bool)


def pack_outcomes(
    top1: npt.NDArray[np.int64],
    correct: npt.NDArray[np.bool_],
    top5_correct: npt.NDArray[np.bool_],
) -> Outcomes:
    """Pack what a network said of (images,) each."""
    return Outcomes(
        images=len(top1),
        top1=_pack(top1.astype(_CLASSES)),
        correct=_pack(np.packbits(correct)),
        top5_correct=_pack(np.packbits(top5_correct)),
    )


def _pack(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")


def _unpack(text: str, size: int) -> bytes:
    """Return exactly so many bytes; ValueError for anything else, which pydantic reports."""
    if size > _MOST_BYTES:
        raise ValueError("there are more images than a report holds")
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError("the outcomes of the images cannot be unpacked") from error
    if len(unpacked) != size:
        raise ValueError(f"the outcomes hold {len(unpacked)} bytes and not {size}")
    return unpacked
