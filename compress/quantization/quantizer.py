"""Who turns a pruned network into one that rounds; whoever knows the exported file can."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from compress.quantization.network import QuantizedNetwork


class Quantizer(Protocol):
    """What makes a pruned network round to 8 bits where its exported file will."""

    def __call__(self, network: nn.Module, *, calibrated: bool = True) -> QuantizedNetwork:
        """Return the network with rounding around it; its ranges are a start to learn from.

        Args:
            network: anywhere; it is trained on.
            calibrated: measure the ranges; else they are 1, for somebody who knows them.

        Raises:
            ModelError: the file of such a network cannot be written, or rounds what it has not.
            DataError: there are too few images to measure ranges on.
        """

    def check(self, network: nn.Module) -> None:
        """Find out whether it can be done to a network, before hours are spent on it.

        Raises:
            ModelError, DataError: as above.
        """
