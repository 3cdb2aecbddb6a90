"""Latency tables that are simple functions of widths."""

from __future__ import annotations

import math

import numpy as np

from compress.networks.layers import LayerShape


class MultiplyAdds:
    """A table whose milliseconds are multiply-adds."""

    fixed = 0.0

    def milliseconds(self, shape: LayerShape, read: np.ndarray, written: np.ndarray) -> np.ndarray:
        each = math.prod(shape.kernel) * math.prod(shape.output_size)
        return each * written * read / np.asarray(shape.groups_at(read))  # type: ignore[arg-type]


class Written:
    """A table in which every channel that is written costs the same."""

    fixed = 0.0

    def milliseconds(self, shape: LayerShape, read: np.ndarray, written: np.ndarray) -> np.ndarray:
        return written + np.zeros(read.shape)
