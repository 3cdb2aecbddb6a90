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

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2 import functional

Decoder = Literal["pil", "tensor"]
Decoded = Image.Image | torch.Tensor
"""A PIL image in mode RGB, or a tensor (3, H, W) of uint8."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called; of others PIL starts a program for one, EPS."""

SIXTEEN_AS_32 = ("PNG", "PPM")
"""Formats whose 16 bits PIL may give as 32: older releases do for PNG, all for PPM, scaled."""

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF 6.0, and a value of the second."""

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
    """Decode a whole image file to RGB, pixel for pixel as stored: EXIF rotation is not applied.

    Raises:
        DECODE_ERRORS: it is damaged, no image, or of numbers that name no black and white.
    """
    with Path(path).open("rb") as file, Image.open(file, formats=FORMATS) as image:
        return as_rgb(image)


def decode_rgb(data: bytes, decoder: Decoder = "pil") -> Decoded:
    """Decode the bytes of an image file to RGB; the pixels do not depend on the decoder.

    Raises:
        DECODE_ERRORS: the bytes are damaged, no image, or numbers that name no black and white.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # PIL has read the header alone so far, and has refused sizes that are an attack.
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if decoder == "tensor" and plain and has_jpeg_operator():
            return _decode_jpeg(data)
        rgb = as_rgb(image)
        return rgb if decoder == "pil" else functional.pil_to_tensor(rgb)


def as_rgb(image: Image.Image) -> Image.Image:
    """Turn an open image of any mode into RGB.

    Of more than eight bits the upper eight are taken, as PIL itself does for colours; what is
    transparent shows the colour that is stored for it; CMYK is converted without a profile.

    Raises:
        ValueError: nothing says which numbers are black and white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_AS_32):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise ValueError(
            f"it holds {kind}, of which nothing says what is white: save it with 8 or 16 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _upper_bits(image).convert("RGB")
    # PIL would warn that a palette with transparency should not become RGB.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of up to 16 bits in its upper eight, mode L."""
    tags = getattr(image, "tag_v2", {})  # of TIFF; in other formats 16 bits are always used
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    # PIL inverts eight bits by itself, but not these.
    return Image.fromarray(255 - pixels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else pixels)


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
        return "not an image of a kind that is read"
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
