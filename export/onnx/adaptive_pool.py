"""Adaptive pooling that ONNX can say.

ONNX has no adaptive pooling. Where the output divides the map it is pooling with a window, which
torch's exporter sees for itself unless a padding before it hides the map's size. Elsewhere, as in a
VGG that reads 256 pixels, every mean is of a window of its own. That is linear in the rows and in
the columns, so two constant matrices compute it.
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
    """Trace adaptive pooling as windows or matrix products where torch's exporter might refuse."""
    import torch
    from torch.nn import functional

    of_mean = functional.adaptive_avg_pool2d
    of_max: Any = functional.adaptive_max_pool2d

    def mean(images: torch.Tensor, output_size: Any) -> torch.Tensor:
        rows, columns = _static_size(images)
        height, width = _pair(output_size, (rows, columns))
        if (height, width) == (1, 1):
            return of_mean(images, output_size)
        if window := _window((rows, columns), (height, width)):
            return functional.avg_pool2d(images, window)
        # From numpy they are constants of the trace, and how they are made is no part of it.
        left, right = _means(rows, height), _means(columns, width).T.copy()
        return torch.from_numpy(left).to(images) @ images @ torch.from_numpy(right).to(images)

    def largest(images: torch.Tensor, output_size: Any, return_indices: bool = False) -> Any:
        size = _static_size(images)
        window = _window(size, _pair(output_size, size))
        if window and not return_indices:
            return functional.max_pool2d(images, window)
        return of_max(images, output_size, return_indices)

    functional.adaptive_avg_pool2d = mean  # type: ignore[assignment]
    functional.adaptive_max_pool2d = largest  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.adaptive_avg_pool2d = of_mean
        functional.adaptive_max_pool2d = of_max


def _window(size: tuple[int, int], output: tuple[int, int]) -> tuple[int, int] | None:
    """Return the height and width of the windows of a map that the output divides; else None."""
    if size[0] % output[0] or size[1] % output[1]:
        return None
    return size[0] // output[0], size[1] // output[1]


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
