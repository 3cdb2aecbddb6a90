"""MACs and parameters of a network under a mask, in closed form.

One multiply-add counts as one MAC. Convolutions and linear layers are counted, at batch size 1;
BatchNorm is folded away at inference and costs nothing.
"""

from __future__ import annotations

import numpy as np

from compress.groups import ChannelGraph, Layer, Mask


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
