"""Build the physically smaller network, and prove that it computes what the masked one does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.networks.groups import ChannelGraph, Layer, Mask

PROOF_TOLERANCE = 1e-9
"""Largest difference of masked and shrunk logits in float64, relative to the largest logit."""


def shrink(model: nn.Module, graph: ChannelGraph, kept: Mask) -> nn.Module:
    """Return a copy of the network without the units that are not kept."""
    smaller = copy.deepcopy(model)
    shrink_(smaller, graph, kept)
    return smaller


def shrink_(
    model: nn.Module,
    graph: ChannelGraph,
    kept: Mask,
    optimizer: torch.optim.Optimizer | None = None,
) -> ChannelGraph:
    """Remove units from a network in place.

    Args:
        model: the network that ``graph`` describes.
        graph: its channel graph, as it is before this call.
        kept: units to keep, by dense unit id.
        optimizer: its state (momentum) is cut along with the parameters.

    Returns:
        The channel graph of the network as it is now.
    """
    modules = dict(model.named_modules())
    state: Mapping[Any, dict[str, Any]] = optimizer.state if optimizer else {}
    for layer in graph.layers:
        if not (kept[layer.inputs].all() and kept[layer.outputs].all()):
            _shrink_layer(modules[layer.name], layer, kept, state)
    return graph.removed(kept)


def mask_(model: nn.Module, graph: ChannelGraph, kept: Mask) -> None:
    """Zero the weights with which readers read removed units: z = 0 for their gates, in place."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer in graph.layers:
            if layer.reads and not kept[layer.inputs].all():
                weight = modules[layer.name].weight
                # A group of a grouped convolution goes whole, so its rows are what it reads.
                dim, units = (0, layer.outputs) if layer.conv_groups > 1 else (1, layer.inputs)
                weight.index_fill_(dim, _index(~kept[units], weight.device), 0)


@torch.no_grad()
def proof(model: nn.Module, graph: ChannelGraph, kept: Mask, images: torch.Tensor) -> float:
    """Compare the masked with the shrunk network in float64 on real images.

    Args:
        model: the network before the shrink, masked or not; it is not changed.
        graph: its channel graph.
        kept: units to keep.
        images: (N, C, H, W) float32.

    Returns:
        max |masked - shrunk| / max |masked| over all logits.

    Raises:
        ModelError: the two differ by more than PROOF_TOLERANCE.
    """
    masked = copy.deepcopy(model).cpu().double().eval()
    images = images.cpu().double()
    mask_(masked, graph, kept)
    expected = masked(images)
    shrink_(masked, graph, kept)
    difference = (masked(images) - expected).abs().max() / expected.abs().max()
    if not difference <= PROOF_TOLERANCE:
        raise ModelError(
            f"the shrunk network differs from the masked one by {difference:.1e} relative, "
            f"over {PROOF_TOLERANCE:.0e}: this is a defect of the group analysis, please report it"
        )
    return float(difference)


def _shrink_layer(
    module: Any, layer: Layer, kept: Mask, state: Mapping[Any, dict[str, Any]]
) -> None:
    after = layer.removed(kept)
    if layer.kind == "pad":
        module.front, module.back = len(after.inputs), len(after.outputs)
        return
    cuts = {0: kept[layer.outputs]}
    if layer.reads and layer.conv_groups == 1:
        _cut(module, "weight", {**cuts, 1: kept[layer.inputs]}, state)
    elif layer.kind in ("conv", "depthwise"):
        _cut(module, "weight", cuts, state)
    names = [
        n
        for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    for name in names:
        if getattr(module, name).dim() == 1:
            _cut(module, name, cuts, state)
    _set_widths(module, layer, after)


def _set_widths(module: Any, before: Layer, after: Layer) -> None:
    """Keep the sizes that a module says of itself true."""
    widths = {
        "out_channels": len(after.outputs),
        "in_channels": len(after.outputs if before.kind == "depthwise" else after.inputs),
        "groups": after.conv_groups,
        "out_features": len(after.outputs),
        "in_features": len(after.inputs),
        "num_features": len(after.outputs),
        "num_parameters": len(after.outputs),
    }
    for name, width in widths.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, width)


def _cut(
    module: nn.Module,
    name: str,
    cuts: Mapping[int, np.ndarray],
    state: Mapping[Any, dict[str, Any]],
) -> None:
    tensor = getattr(module, name)
    shape = tensor.shape
    for key, value in state.get(tensor, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            state[tensor][key] = _select(value, cuts)
    tensor.data = _select(tensor.data, cuts)
    tensor.grad = None


def _select(tensor: torch.Tensor, cuts: Mapping[int, np.ndarray]) -> torch.Tensor:
    for dim, keep in cuts.items():
        if not keep.all():
            tensor = tensor.index_select(dim, _index(keep, tensor.device))
    return tensor


def _index(selected: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(selected)).to(device)
