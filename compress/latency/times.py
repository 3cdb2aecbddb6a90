"""What a latency table answers, and the milliseconds of a whole network from it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.networks.groups import ChannelGraph, Mask
from compress.networks.layers import LayerShape

Milliseconds = NDArray[np.float64]


class Times(Protocol):
    """Milliseconds of layers by their widths, for one runtime, device, precision and batch."""

    @property
    def fixed(self) -> float:
        """Milliseconds of a network that no width changes: input and output, launching."""

    def milliseconds(
        self, shape: LayerShape, read: NDArray[np.int64], written: NDArray[np.int64]
    ) -> Milliseconds:
        """Return the time of a layer with what is fused into it.

        Args:
            shape: all but its widths.
            read: numbers of channels read.
            written: numbers of channels written; the two are broadcast.

        Raises:
            TableError: the table does not cover such a layer, or such widths.
        """


@runtime_checkable
class LocalTimes(Times, Protocol):
    """Times that are a sum over layers for networks near a given one only."""

    def around(self, graph: ChannelGraph, kept: Mask) -> Times:
        """Return the times of layers in networks near that of a mask."""


def network_milliseconds(graph: ChannelGraph, times: Times, kept: Mask) -> float:
    """Return the milliseconds of a network when only the ``kept`` units remain.

    Raises:
        TableError: the table does not cover one of its layers.
    """
    if isinstance(times, LocalTimes):
        times = times.around(graph, kept)
    total = times.fixed
    for layer in graph.layers:
        read, written = layer.widths(kept)
        if read and written:
            total += float(times.milliseconds(layer.shape, np.array(read), np.array(written)))
    return total
