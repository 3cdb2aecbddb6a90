"""Small data sets in idx files, written without the code that reads them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

NAMES = [
    f"{half}-{kind}-ubyte" for half in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(
    folder: Path,
    train: tuple[np.ndarray, np.ndarray] | None = None,
    test: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    packed: bool = False,
) -> None:
    """Write the four files of a data set: 12 and 5 images of noise unless others are given."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [
        *(train or (noise(12, 28, 28), np.arange(12, dtype=np.uint8) % 10)),
        *(test or (noise(5, 28, 28, seed=1), np.arange(5, dtype=np.uint8))),
    ]
    for name, array in zip(NAMES, arrays, strict=True):
        content = idx_bytes(np.ascontiguousarray(array))
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
