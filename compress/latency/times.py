"""What a latency table answers, and the milliseconds of a whole network from it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compress.networks.groups import ChannelGraph, LayerShape, Mask

Milliseconds = NDArray[np.float64]


class Times(Protocol):
    """Milliseconds of layers by their widths, for one runtime, device, precision and batch.

    Attributes:
        fixed: milliseconds of a network that no width changes: input and output, launching.
    """

    fixed: float

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


def network_milliseconds(graph: ChannelGraph, times: Times, kept: Mask) -> float:
    """Return the milliseconds of a network when only the ``kept`` units remain.

    Raises:
        TableError: the table does not cover one of its layers.
    """
    total = times.fixed
    for layer in graph.layers:
        read, written = layer.widths(kept)
        if read and written:
            total += float(times.milliseconds(layer.shape, np.array(read), np.array(written)))
    return total
