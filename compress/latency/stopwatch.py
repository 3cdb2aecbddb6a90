"""What measures whole networks, for runs: they know no runtime, whoever starts them does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

    from compress.latency.table import LatencyTable
    from compress.networks.groups import ChannelGraph

Size = tuple[int, int, int]
"""(C, H, W) of one image."""


@dataclass(frozen=True)
class Comparison:
    """Milliseconds of two networks, measured in turn in one process."""

    dense_ms: float
    pruned_ms: float
    ratio: float
    """Pruned over dense; no quotient of the two medians."""
    low: float
    """Bounds of the ratio's interval."""
    high: float


class Stopwatch(Protocol):
    """Measures what a budget of time is about, in the runtime that will serve."""

    def table(
        self, model: nn.Module, graph: ChannelGraph, size: Size, folder: Path
    ) -> LatencyTable:
        """Return the latency table of a dense network, measured unless it is in the folder.

        Raises:
            TableError: the machine is too noisy.
            EnvironmentUnfitError: the runtime or its device is not there.
        """

    def compare(self, dense: nn.Module, pruned: nn.Module, size: Size) -> Comparison:
        """Measure two networks against each other, as they will be served.

        Raises:
            EnvironmentUnfitError: the runtime or its device is not there.
        """
