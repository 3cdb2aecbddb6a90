"""What becomes of images that are not eight bits of red, green and blue."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.config import DataConfig
from compress.data.batches import TrainBatches, eval_batches
from compress.data.datasets import load_data
from compress.data.decoding import DECODE_ERRORS, Decoder, decode_rgb, read_rgb, reason_of

GREY = np.arange(256, dtype=np.uint8).reshape(8, 32)
GREY16 = GREY.astype(np.uint16) * 257  # 0 to 65535: what the eight bits are of sixteen
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
DECODERS: tuple[Decoder, ...] = ("pil", "tensor")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(samples: np.ndarray, colour_type: int) -> bytes:
    """Write a PNG of sixteen bits, without PIL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    data: bytes, bits: int, *, order: str = "<", zero: int = 1, kind: int = 1, bands: int = 1
) -> bytes:
    """Write a TIFF of 32 x 8 pixels without PIL; ``kind`` 1 unsigned, 2 signed, 3 floats."""
    tags = [
        *((256, 4, 32), (257, 4, 8), (258, 3, bits), (259, 3, 1), (262, 3, zero), (273, 4, 0)),
        *((277, 3, bands), (278, 4, 8), (279, 4, len(data)), (339, 3, kind)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    ifd = struct.pack(f"{order}H", len(tags))
    for tag, size, value in tags:
        value = start if tag == 273 else value
        if bands > 1 and tag in (258, 339):
            where = start + len(data)
            data += struct.pack(f"{order}{bands}H", *[value] * bands)
            ifd += struct.pack(f"{order}HHII", tag, size, bands, where)
        else:
            ifd += struct.pack(f"{order}HHI", tag, size, 1)
            ifd += struct.pack(f"{order}{'HH' if size == 3 else 'I'}", *(value, 0)[: 3 - size // 2])
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + ifd + bytes(4) + data


def twelve_bits(pixels: np.ndarray) -> bytes:
    """Pack pairs of twelve bits into three bytes."""
    first, second = pixels.reshape(-1, 2).T.astype(np.int64)
    packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(packed, axis=1).astype(np.uint8).tobytes()


GREYS = {
    "png 16": png(GREY16, 0),
    "tiff 16, little-endian": tiff(GREY16.astype("<u2").tobytes(), 16),
    "tiff 16, big-endian": tiff(GREY16.astype(">u2").tobytes(), 16, order=">"),
    "tiff 16, zero is white": tiff((65535 - GREY16).astype("<u2").tobytes(), 16, zero=0),
    "tiff 12": tiff(twelve_bits(GREY16 >> 4), 12),
    "tiff 8": tiff(GREY.tobytes(), 8),
    "tiff 8, zero is white": tiff((255 - GREY).tobytes(), 8, zero=0),
    "pgm 16": b"P5 32 8 65535\n" + GREY16.astype(">u2").tobytes(),
    "pgm 12": b"P5 32 8 4095\n" + (GREY16 >> 4).astype(">u2").tobytes(),
    "png 16 of PIL": saved(Image.fromarray(GREY16), "PNG"),
    "tiff 16 of PIL": saved(Image.fromarray(GREY16), "TIFF"),
}
COLOURS16 = COLOURS.astype(np.uint16) * 257
COLOURED = {
    "png 16": png(COLOURS16, 2),
    "tiff 16": tiff(COLOURS16.astype("<u2").tobytes(), 16, zero=2, bands=3),
    "ppm 16": b"P6 32 8 65535\n" + COLOURS16.astype(">u2").tobytes(),
    "png 16, transparent": png(np.dstack([COLOURS16, COLOURS16[..., :1]]), 6),
}
UNSCALED = {
    "tiff of 32 bits": tiff(GREY16.astype("<u4").tobytes(), 32),
    "tiff of 32 bits, signed": tiff(GREY16.astype("<i4").tobytes(), 32, kind=2),
    "tiff of 16 bits, signed": tiff(GREY.astype("<i2").tobytes(), 16, kind=2),
    "tiff of floats": tiff((GREY / 255).astype("<f4").tobytes(), 32, kind=3),
    "tiff I of PIL": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "pfm": b"Pf 32 8 -1.0\n" + (GREY / 255).astype("<f4").tobytes(),
}


def pixels_of(data: bytes, decoder: Decoder) -> np.ndarray:
    found = decode_rgb(data, decoder)
    return found.permute(1, 2, 0).numpy() if isinstance(found, torch.Tensor) else np.asarray(found)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", GREYS)
def test_grey_of_more_bits_is_scaled_by_what_the_file_says(name: str, decoder: Decoder) -> None:
    assert np.array_equal(pixels_of(GREYS[name], decoder), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", COLOURED)
def test_colours_of_more_bits_are_scaled(name: str, decoder: Decoder) -> None:
    assert np.array_equal(pixels_of(COLOURED[name], decoder), COLOURS)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", UNSCALED)
def test_numbers_that_name_no_white_are_refused(name: str, decoder: Decoder) -> None:
    with pytest.raises(DECODE_ERRORS) as caught:
        decode_rgb(UNSCALED[name], decoder)
    kind = "floats" if name in ("tiff of floats", "pfm") else "32-bit or signed integers"
    assert reason_of(caught.value).startswith(
        f"it holds {kind}, of which nothing says what is white"
    )


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_set_of_sixteen_bits_is_its_twin_of_eight(
    suffix: str, decoder: Decoder, tmp_path: Path
) -> None:
    found = []
    for name, factor in (("eight", 1), ("sixteen", 257)):
        rng = np.random.default_rng(0)
        for half in ("train", "val"):
            for label in ("cat", "dog"):
                folder = tmp_path / name / half / label
                folder.mkdir(parents=True)
                for number in range(4):
                    pixels = rng.integers(0, 256, (20, 24), dtype=np.uint8)
                    scaled = pixels.astype(np.uint16) * factor if factor > 1 else pixels
                    Image.fromarray(scaled).save(folder / f"{number}.{suffix}")
        config = DataConfig(
            dataset="imagefolder", root=tmp_path / name, image_size=16, decoder=decoder
        )
        data = load_data(config)
        read = [
            *TrainBatches(data, batch_size=8, seed=0).epoch(0),
            *eval_batches(data.val, batch_size=8),
        ]
        assert not any(batch.skipped for batch in read)
        found.append(torch.cat([batch.images for batch in read]))
    assert torch.equal(*found)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_not_applied(orientation: int, decoder: Decoder) -> None:
    image = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = saved(image, "JPEG"), saved(image, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == orientation
    assert np.array_equal(pixels_of(turned, decoder), pixels_of(plain, decoder))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_transparent_shows_its_stored_colour(decoder: Decoder, tmp_path: Path) -> None:
    alpha = np.arange(256, dtype=np.uint8).reshape(8, 32, 1)
    rgba = saved(Image.fromarray(np.dstack([COLOURS, alpha])), "PNG")
    assert np.array_equal(pixels_of(rgba, decoder), COLOURS)

    palette = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY).convert("P")
    image.putpalette(palette.tobytes())
    for transparency in (3, bytes(range(256))):
        for kind in ("PNG", "GIF"):
            if kind == "GIF" and isinstance(transparency, bytes):
                continue
            data = saved(image, kind, transparency=transparency)
            assert np.array_equal(pixels_of(data, decoder), palette[GREY]), (kind, transparency)
            (tmp_path / "image").write_bytes(data)
            assert np.array_equal(np.asarray(read_rgb(str(tmp_path / "image"))), palette[GREY])
    grey = saved(Image.fromarray(GREY), "PNG", transparency=7)
    assert np.array_equal(pixels_of(grey, decoder), np.stack([GREY] * 3, axis=-1))


@pytest.mark.parametrize("decoder", DECODERS)
def test_cmyk_is_converted_without_a_profile(decoder: Decoder) -> None:
    inks = np.array(
        [[[0, 0, 0, 0], [0, 255, 255, 0], [255, 255, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128]]],
        dtype=np.uint8,
    )
    data = saved(Image.frombytes("CMYK", (5, 1), inks.tobytes()), "TIFF")
    expected = [[255] * 3, [255, 0, 0], [0, 0, 255], [0] * 3, [127] * 3]
    assert pixels_of(data, decoder)[0].tolist() == expected
    # Adobe writes the inks of a JPEG inverted, and PIL turns them back.
    blocks = np.repeat(np.repeat(inks, 16, axis=0), 16, axis=1)
    jpeg = saved(Image.frombytes("CMYK", (80, 16), blocks.tobytes()), "JPEG", quality=100)
    found = pixels_of(jpeg, decoder)[8, 8::16].astype(int)
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_the_first_of_several_images_is_read(kind: str, decoder: Decoder) -> None:
    first, second = (Image.new("L", (32, 8), level) for level in (40, 200))
    data = saved(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (pixels_of(data, decoder) == 40).all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_contents_count_and_not_names(decoder: Decoder, tmp_path: Path) -> None:
    for half in ("train", "val"):
        (tmp_path / half / "cat").mkdir(parents=True)
        (tmp_path / half / "cat" / "0.jpg").write_bytes(saved(Image.fromarray(COLOURS), "PNG"))
    how = {"image_size": 8, "augment": "none", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    data = load_data(DataConfig(dataset="imagefolder", root=tmp_path, decoder=decoder, **how))
    (batch,) = eval_batches(data.val, batch_size=1)
    assert (len(batch.images), batch.skipped) == (1, 0)
