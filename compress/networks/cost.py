"""MACs and parameters of a network under a mask, in closed form.

One multiply-add counts as one MAC. Convolutions and linear layers are counted, at batch size 1;
BatchNorm is folded away at inference and costs nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.networks.groups import ChannelGraph, Layer, Mask


def macs(graph: ChannelGraph, kept: Mask) -> int:
    """Return the multiply-adds of one image when only the ``kept`` units remain."""
    return sum(_weights(layer, kept) * layer.positions for layer in graph.layers)


def params(graph: ChannelGraph, kept: Mask) -> int:
    """Return the parameters when only the ``kept`` units remain."""
    return graph.other_params + sum(
        _weights(layer, kept) + layer.params_per_output * _count(layer.outputs, kept)
        for layer in graph.layers
        if layer.kind != "pad"
    )


def channels(graph: ChannelGraph, kept: Mask) -> int:
    """Return the number of channels kept in all groups that may be pruned."""
    return sum(_count(group.units, kept) * group.width for group in graph.prunable)


def macs_saved(graph: ChannelGraph, kept: Mask) -> NDArray[np.float64]:
    """Return (units,) the multiply-adds that each removal would save, all other units as they are.

    Units that are not kept save nothing.
    """
    saved = np.zeros(graph.num_units)
    for layer in graph.layers:
        outputs = np.bincount(layer.outputs, minlength=graph.num_units)
        if layer.kind == "depthwise":
            saved += outputs * layer.kernel * layer.positions
        elif layer.conv_groups > 1 and layer.kind == "conv":
            inputs_per_group = len(layer.inputs) // layer.conv_groups
            saved += outputs * inputs_per_group * layer.kernel * layer.positions
        elif layer.reads:
            inputs = np.bincount(layer.inputs, minlength=graph.num_units)
            read, written = _count(layer.inputs, kept), _count(layer.outputs, kept)
            pairs = outputs * read + inputs * written - outputs * inputs
            saved += pairs * layer.kernel * layer.positions
    return np.where(kept, saved, 0.0)


def totals(graph: ChannelGraph, kept: Mask) -> dict[str, int]:
    """Return all three costs by name, for a JSON document."""
    return {
        "macs": macs(graph, kept),
        "params": params(graph, kept),
        "channels": channels(graph, kept),
    }


def _weights(layer: Layer, kept: Mask) -> int:
    outputs = _count(layer.outputs, kept)
    if layer.kind == "depthwise":
        return outputs * layer.kernel
    if layer.kind not in ("conv", "linear"):
        return 0
    if layer.conv_groups > 1:
        # Whole groups of a grouped convolution go together, so each keeps its inputs.
        return outputs * (len(layer.inputs) // layer.conv_groups) * layer.kernel
    return outputs * _count(layer.inputs, kept) * layer.kernel


def _count(units: np.ndarray, kept: Mask) -> int:
    return int(np.count_nonzero(kept[units]))
