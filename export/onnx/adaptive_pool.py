"""Adaptive average pooling that ONNX can say.

ONNX has no adaptive pooling, and torch's exporter knows it only where the output divides the map.
Elsewhere, as in a VGG that reads 256 pixels, every output is the mean of a window of its own. That
is linear in the rows and in the columns, so two constant matrices compute it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@contextmanager
def exportable_pools() -> Iterator[None]:
    """Trace ``adaptive_avg_pool2d`` as matrix products where torch's exporter would refuse it."""
    import torch
    from torch.nn import functional

    original = functional.adaptive_avg_pool2d

    def pool(images: torch.Tensor, output_size: Any) -> torch.Tensor:
        rows, columns = _static_size(images)
        height, width = _pair(output_size, (rows, columns))
        if rows % height == 0 and columns % width == 0:
            return original(images, output_size)
        # From numpy they are constants of the trace, and how they are made is no part of it.
        left, right = _means(rows, height), _means(columns, width).T.copy()
        return torch.from_numpy(left).to(images) @ images @ torch.from_numpy(right).to(images)

    functional.adaptive_avg_pool2d = pool  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.adaptive_avg_pool2d = original


def _static_size(images: torch.Tensor) -> tuple[int, int]:
    """Return height and width; the graph holds them as constants, which the tracer warns of."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return int(images.shape[-2]), int(images.shape[-1])


def _pair(output_size: Any, given: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the output; None keeps those that are given."""
    pair = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
    height, width = (
        size if size is not None else side for size, side in zip(pair, given, strict=True)
    )
    return height, width


def _means(size: int, outputs: int) -> np.ndarray:
    """Return the (outputs, size) matrix whose row i is the mean of output i's window.

    The window is that of torch: from floor(i * size / outputs) up to, and not including,
    ceil((i + 1) * size / outputs).
    """
    matrix = np.zeros((outputs, size), np.float32)
    for i in range(outputs):
        start, stop = i * size // outputs, -(-(i + 1) * size // outputs)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix
