"""Layers as latency tables know them: by shape and widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class LayerShape:
    """What a layer's time depends on besides its widths; sizes are those of one image."""

    kind: str
    """The operator: ``conv2d``, ``conv_transpose2d``, ``linear``."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    input_size: tuple[int, ...] = ()
    """Height and width of what is read; of a linear layer, how many rows."""
    output_size: tuple[int, ...] = ()
    groups: int = 1
    group_width: int = 0
    """Channels that each group reads, where groups go whole; 1 of a depthwise convolution."""
    then: tuple[str, ...] = ()
    """Operators that alone read the result, one after the other, as far as a runtime may fuse
    them: ``add`` is a residual addition. BatchNorm is folded away."""

    def groups_at(self, read: int) -> int:
        """Return the number of groups when so many channels are read."""
        return read // self.group_width if self.group_width else self.groups

    def __str__(self) -> str:
        def by(numbers: tuple[int, ...]) -> str:
            return "x".join(map(str, numbers)) or "1"

        parts = [self.kind, by(self.kernel)] if self.kernel else [self.kind]
        if set(self.stride) - {1}:
            parts.append(f"stride {by(self.stride)}")
        if set(self.dilation) - {1}:
            parts.append(f"dilation {by(self.dilation)}")
        if self.group_width:
            parts.append("depthwise" if self.group_width == 1 else f"groups of {self.group_width}")
        elif self.groups > 1:
            parts.append(f"{self.groups} groups")
        return " ".join((*parts, "at", by(self.output_size), *(f"+ {name}" for name in self.then)))


@dataclass(frozen=True)
class LayerCall:
    """A call of a convolution or linear layer, as latency tables know it."""

    weight: str
    """Name of the weight; empty where it is computed."""
    shape: LayerShape
    reads: Units | int
    """The unit of each channel that it reads, or how many there are where none ever goes."""
    writes: Units | int
    """The unit of each channel that it writes, or how many there are where none ever goes."""
    needs: tuple[int, ...] = ()
    """Units of the branches without any of which it is not there."""

    def widths(self, kept: Mask) -> tuple[int, int]:
        """Return how many channels it reads and writes; nothing of a layer that is gone."""
        if not there(self.needs, kept):
            return 0, 0
        return _length_of(self.reads, kept), _length_of(self.writes, kept)

    def left(self, kept: Mask) -> LayerCall:
        """Return the call in the shrunk network; unit ids stay those of the dense one."""
        reads, writes = (_left_of(units, kept) for units in (self.reads, self.writes))
        return replace(self, reads=reads, writes=writes)


def there(needs: Sequence[int], kept: Mask) -> bool:
    """Whether nothing that needs these branches is gone."""
    return all(kept[unit] for unit in needs)


def _length_of(units: Units | int, kept: Mask) -> int:
    return units if isinstance(units, int) else int(np.count_nonzero(kept[units]))


def _left_of(units: Units | int, kept: Mask) -> Units | int:
    return units if isinstance(units, int) else units[kept[units]]
