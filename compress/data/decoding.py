"""How the bytes of one image file become RGB pixels.

There are two ways. ``pil`` yields a PIL image, which PIL then crops and resizes. ``tensor`` yields
a tensor, which torch crops and resizes with its vector code: faster, with the same pixels after
decoding and with differences of rounding after resizing. JPEG is decoded into it by torchvision's
operator where there is one; everything else is decoded by PIL, to the same pixels.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional

Decoder = Literal["pil", "tensor"]
Decoded = Image.Image | torch.Tensor
"""A PIL image in mode RGB, or a tensor (3, H, W) of uint8."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called; of others PIL starts a program for one, EPS."""

RGB = 3
"""torchvision's number of the colour space."""

# What the decoders raise on damaged files; a file that is gone is an OSError as well.
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
    Image.DecompressionBombWarning,  # where warnings are errors
)


def read_rgb(path: str) -> Image.Image:
    """Decode a whole image file to RGB, pixel for pixel as stored: EXIF rotation is not applied."""
    with Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
        return image.convert("RGB")


def decode_rgb(data: bytes, decoder: Decoder = "pil") -> Decoded:
    """Decode the bytes of an image file to RGB; the pixels do not depend on the decoder.

    Raises:
        DECODE_ERRORS: the bytes are damaged, or no image.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # PIL has read the header alone so far, and has refused sizes that are an attack.
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if decoder == "tensor" and plain and has_jpeg_operator():
            return _decode_jpeg(data)
        rgb = image.convert("RGB")
        return rgb if decoder == "pil" else functional.pil_to_tensor(rgb)


@cache
def has_jpeg_operator() -> bool:
    """Return whether this torchvision decodes JPEG; its makers have announced the removal."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    try:
        return _decode_jpeg(buffer.getvalue()).shape == (3, 8, 8)
    except (AttributeError, ValueError):
        return False


def reason_of(error: Exception) -> str:
    """Return why a file could not be decoded, as a phrase of one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _decode_jpeg(data: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator itself: torchvision's function for it warns at every call that it will go.
        return torch.ops.image.decode_jpeg(encoded, RGB, False)
    except RuntimeError as error:
        # The message begins with the place in torchvision's source.
        raise ValueError(str(error).splitlines()[0].rpartition(", ")[2]) from error
