"""One layer as a network of its own, so that its time can be told from that of a call.

``copies`` layers of the same widths read one tensor, and each adds what the one before has
written, as a residual addition does, which runtimes fuse into the layer. What is left of the
network is the same without the layers: a pointwise convolution that brings the image to the width,
and a mean; its time is taken off. Channels are computed, not read from the image, because runtimes
rearrange activations and a first layer would pay for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from compress.errors import TableError
from compress.latency.table import weight_bytes
from compress.networks.layers import LayerShape
from export.latency.widths import HOT_BYTES

IMAGE_CHANNELS = 8
"""Of the input of such a network, unless the layer itself reads fewer."""
MOST_COPIES = 4

Size = tuple[int, int, int]


class Alone(nn.Module):
    """A layer several times in parallel, summed; without any, what surrounds it."""

    def __init__(self, shape: LayerShape, read: int, written: int, copies: int) -> None:
        """Build it with fresh weights; ``input_size`` is that of its image.

        Raises:
            TableError: no such layer can be built from what a shape tells.
        """
        super().__init__()
        build = _BUILDERS.get(shape.kind)
        if build is None or len(shape.kernel) not in (0, 2):
            raise TableError(f"{shape} cannot be measured: its kind of layer is not known here")
        size, self.layers = build(shape, read, written, copies)
        image = min(read, IMAGE_CHANNELS)
        self.input_size: Size = (image, *size)
        self.first = nn.Identity() if image == read else nn.Conv2d(image, read, 1)
        self.rows = 0 if shape.kernel else shape.input_size[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, channels)."""
        x = torch.relu(self.first(x))
        if self.rows:
            x = torch.flatten(x, 2).transpose(1, 2) if self.rows > 1 else torch.flatten(x, 1)
        y: torch.Tensor | None = None
        for layer in self.layers:
            y = torch.relu(layer(x)) if y is None else torch.relu(layer(x) + y)
        y = x if y is None else y
        if self.rows:
            return y.mean(1) if self.rows > 1 else y
        return y.mean((2, 3))


def copies_of(shape: LayerShape, read: int, written: int) -> int:
    """Return how many copies are measured: as many as a cache keeps."""
    each = float(weight_bytes(shape, np.array(read), np.array(written)))
    return int(np.clip(HOT_BYTES // each, 1, MOST_COPIES))


def _linear(
    shape: LayerShape, read: int, written: int, copies: int
) -> tuple[tuple[int, int], nn.ModuleList]:
    layers = nn.ModuleList(nn.Linear(read, written) for _ in range(copies))
    return (shape.input_size[0], 1), layers


def _convolution(
    shape: LayerShape, read: int, written: int, copies: int
) -> tuple[tuple[int, int], nn.ModuleList]:
    """Return convolutions, and the size of what they read to write what the shape says."""
    sizes, padding = [], []
    for i, kernel in enumerate(shape.kernel):
        reach = shape.dilation[i] * (kernel - 1)
        needed = (shape.output_size[i] - 1) * shape.stride[i] + reach + 1
        pad = max(0, (needed - shape.input_size[i] + 1) // 2)
        written_size = (shape.input_size[i] + 2 * pad - reach - 1) // shape.stride[i] + 1
        fits = written_size == shape.output_size[i]
        sizes.append(shape.input_size[i] if fits else needed - 2 * pad)
        padding.append(pad)
    groups = shape.groups_at(read)
    layers = nn.ModuleList(
        nn.Conv2d(
            read,
            written,
            _pair(shape.kernel),
            _pair(shape.stride),
            _pair(padding),
            _pair(shape.dilation),
            groups,
        )
        for _ in range(copies)
    )
    return _pair(sizes), layers


def _transposed(
    shape: LayerShape, read: int, written: int, copies: int
) -> tuple[tuple[int, int], nn.ModuleList]:
    padding, added = [], []
    for i, kernel in enumerate(shape.kernel):
        whole = (shape.input_size[i] - 1) * shape.stride[i] + shape.dilation[i] * (kernel - 1) + 1
        pad = max(0, -(-(whole - shape.output_size[i]) // 2))
        padding.append(pad)
        added.append(shape.output_size[i] - whole + 2 * pad)
    groups = shape.groups_at(read)
    layers = nn.ModuleList(
        nn.ConvTranspose2d(
            read,
            written,
            _pair(shape.kernel),
            _pair(shape.stride),
            _pair(padding),
            _pair(added),
            groups,
            dilation=_pair(shape.dilation),
        )
        for _ in range(copies)
    )
    return _pair(shape.input_size), layers


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    height, width = numbers
    return height, width


_BUILDERS = {"conv2d": _convolution, "conv_transpose2d": _transposed, "linear": _linear}
