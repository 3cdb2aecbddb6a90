"""Channel groups: which indices of which tensors must be removed together.

The traced network (compress.tracing) gives every channel of every activation an *atom*. Atoms that
an operation ties (residual add, grouped convolution) form one *unit*, the smallest thing that can
be removed. A *group* is the set of units that run through the same layers. Everything later
(importance, cost, masks, shrinking) works on vectors indexed by unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Units = NDArray[np.int64]
Mask = NDArray[np.bool_]

LayerKind = Literal["conv", "linear", "channelwise", "depthwise", "pad"]


@dataclass(frozen=True)
class Layer:
    """One module with channel dimensions, and the unit of each index along them.

    A ``conv`` or ``linear`` layer reads ``inputs`` and writes ``outputs``; ``channelwise``
    (BatchNorm, PReLU) and ``depthwise`` layers hold one slice per entry of ``outputs``; a ``pad``
    layer adds constant channels ``inputs`` (front) and ``outputs`` (back).
    """

    name: str
    kind: LayerKind
    outputs: Units
    inputs: Units = field(default_factory=lambda: np.zeros(0, np.int64))
    kernel: int = 1
    """Weights per pair of input and output channel (per channel when depthwise)."""
    positions: int = 1
    """Output positions per image over all calls, so that MACs = weights x positions."""
    conv_groups: int = 1
    params_per_output: int = 0
    """Further parameters per output channel: bias, or those of a channelwise layer."""

    @property
    def reads(self) -> bool:
        """Whether a gate on the inputs of this layer is part of the network's function."""
        return self.kind in ("conv", "linear")

    def removed(self, kept: Mask) -> Layer:
        """Return the layer without the units that are not kept."""
        inputs, outputs = self.inputs[kept[self.inputs]], self.outputs[kept[self.outputs]]
        conv_groups = self.conv_groups
        if self.kind == "depthwise":
            conv_groups = len(outputs)
        elif conv_groups > 1:
            conv_groups = conv_groups * len(inputs) // len(self.inputs)
        return replace(self, inputs=inputs, outputs=outputs, conv_groups=conv_groups)


@dataclass(frozen=True)
class Group:
    """Units that run through the same layers, in the order of their first writer."""

    name: str
    units: Units
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    residual: bool = False
    frozen: str | None = None
    """Why no unit of this group may be removed, or None."""
    widths: tuple[int, ...] = (1,)
    """Channels per unit along each tensor dimension that the group runs through."""

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)

    @property
    def width(self) -> int:
        """Channels that one unit stands for where it is written."""
        return self.widths[0]

    def units_per_multiple(self, multiple: int) -> int:
        """Fewest units whose removal keeps every width a multiple of ``multiple``."""
        return math.lcm(*(multiple // math.gcd(multiple, width) for width in self.widths))


@dataclass(frozen=True)
class GateSite:
    """A place in the traced network where an explicit gate can be multiplied in."""

    node: str
    units: Units


@dataclass(frozen=True)
class ChannelGraph:
    """All layers and groups of a network; the input of every decision about channels."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    num_units: int
    read_sites: tuple[GateSite, ...]
    """The inputs of the readers, by the name of the reader's node."""
    block_sites: tuple[GateSite, ...]
    """The outputs of residual additions, after the activation that follows."""
    other_params: int = 0
    """Parameters that no layer holds; they are never removed."""
    unknown: tuple[str, ...] = ()
    """Operations that the analysis does not know; they froze the groups that touch them."""

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Groups that may lose units."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def residual_units(self) -> Units:
        """Units that residual additions tie."""
        found = [group.units for group in self.groups if group.residual]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def everything(self) -> Mask:
        """Return the mask that keeps every unit."""
        return np.ones(self.num_units, dtype=bool)

    def removed(self, kept: Mask) -> ChannelGraph:
        """Return the graph of the shrunk network; unit ids stay those of the dense one."""
        groups = (replace(g, units=g.units[kept[g.units]]) for g in self.groups)
        return replace(
            self,
            layers=tuple(layer.removed(kept) for layer in self.layers),
            groups=tuple(groups),
            read_sites=_sites_removed(self.read_sites, kept),
            block_sites=_sites_removed(self.block_sites, kept),
        )


def _sites_removed(sites: Sequence[GateSite], kept: Mask) -> tuple[GateSite, ...]:
    return tuple(replace(site, units=site.units[kept[site.units]]) for site in sites)
