"""Build the physically smaller network, and prove that it computes what the masked one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.networks.capture import Example, tensors_of
from compress.networks.copies import copied
from compress.networks.cuts import apply_cuts_, cuts_of, tensor_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shortened import shorten_

PROOF_TOLERANCE = 1e-9
"""Largest difference of masked and shrunk outputs in float64, relative to the largest output."""
FLOAT32_TOLERANCE = 1e-4
"""The same for a network that runs in float32 alone."""


def shrink(model: nn.Module, graph: ChannelGraph, kept: Mask) -> nn.Module:
    """Return a copy of the network without the units that are not kept."""
    smaller = copied(model)
    shrink_(smaller, graph, kept)
    return smaller


def shrink_(
    model: nn.Module,
    graph: ChannelGraph,
    kept: Mask,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> ChannelGraph:
    """Remove units from a network in place.

    Args:
        model: the network that ``graph`` describes.
        graph: its channel graph, as it is before this call.
        kept: units to keep, by dense unit id.
        optimizers: what trains it; see ``apply_cuts_``.

    Returns:
        The channel graph of the network as it is now.
    """
    apply_cuts_(model, cuts_of(graph, kept), optimizers)
    shorten_(model, graph.programs(kept), optimizers)
    return graph.removed(kept)


def mask_(model: nn.Module, graph: ChannelGraph, kept: Mask) -> None:
    """Zero what readers read removed units with, and the last weights of removed branches.

    That is z = 0 for their gates, in place.
    """
    holder(model, graph, kept)()


def holder(model: nn.Module, graph: ChannelGraph, kept: Mask) -> Callable[[], None]:
    """Return what ``mask_`` does, to be done again and again: indices go to the device once."""
    places = []
    for axis in graph.readers:
        if not kept[axis.units].all():
            weight = tensor_of(model, axis.tensor)
            removed = torch.from_numpy(np.flatnonzero(~kept[axis.units])).to(weight.device)
            places.append((weight, axis.dim, removed))
    branches = [b for b in graph.branches if not (kept[b.unit] or b.gone)]
    last = [tensor_of(model, name) for branch in branches for name in branch.gate.weights]

    @torch.no_grad()
    def hold() -> None:
        for weight, dim, removed in places:
            weight.index_fill_(dim, removed, 0)
        for weight in last:
            weight.zero_()

    return hold


def proof(model: nn.Module, graph: ChannelGraph, kept: Mask, example: Example) -> float:
    """Compare the masked with the shrunk network in float64 on real inputs.

    Args:
        model: the network before the shrink, masked or not; it is not changed.
        graph: its channel graph.
        kept: units to keep.
        example: inputs, of any precision and on any device.

    Returns:
        max |masked - shrunk| / max |masked| over all outputs.

    Raises:
        ModelError: the two differ by more than PROOF_TOLERANCE.
    """
    dtype = torch.float64
    try:
        difference = difference_of(model, graph, kept, example)
    except RuntimeError:  # as precision_for, without a pass of its own
        dtype = torch.float32
        difference = difference_of(model, graph, kept, example, dtype)
    tolerance = tolerance_of(dtype)
    if np.isnan(difference):
        raise ModelError(
            "the network gives outputs that are not finite for the images of the proof: its "
            "training has diverged"
        )
    if not difference <= tolerance:
        raise ModelError(
            f"the shrunk network differs from the masked one by {difference:.1e} relative, "
            f"over {tolerance:.0e}: this is a defect of the group analysis, please report it"
        )
    return difference


@torch.no_grad()
def difference_of(
    model: nn.Module,
    graph: ChannelGraph,
    kept: Mask,
    example: Example,
    dtype: torch.dtype = torch.float64,
) -> float:
    """Return max |masked - shrunk| / max |masked| over all outputs, computed on the CPU."""
    masked = copied(model, "cpu").to(dtype).eval()
    inputs = example.to(torch.device("cpu"), dtype)
    mask_(masked, graph, kept)
    expected = outputs_of(masked, inputs)
    shrink_(masked, graph, kept)
    return largest_difference(expected, outputs_of(masked, inputs))


@torch.no_grad()
def precision_for(model: nn.Module, example: Example) -> torch.dtype:
    """Return float64, or float32 for a network that does not run in float64."""
    own, inputs = copied(model, "cpu").eval(), example.to(torch.device("cpu"))
    try:
        outputs_of(own.double(), inputs.to(torch.device("cpu"), torch.float64))
    except RuntimeError:  # a constant of forward, or a cast, is of another precision
        outputs_of(own.float(), inputs)
        return torch.float32
    return torch.float64


def tolerance_of(dtype: torch.dtype) -> float:
    """Return how far masked and shrunk may differ in a precision."""
    return PROOF_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE


def outputs_of(model: nn.Module, example: Example, *, detached: bool = True) -> list[torch.Tensor]:
    """Run a network and return all tensors of its outputs, copied; the inputs stay as they are."""
    fresh = example.to(next((t.device for t in example.tensors), torch.device("cpu")))
    leaves = tensors_of(model(*fresh.args, **fresh.kwargs))
    return [leaf.detach().clone() for leaf in leaves] if detached else leaves


def largest_difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Return max |found - expected| / max |expected| over tensors; infinite if shapes differ."""
    shapes = [tensor.shape for tensor in expected] == [tensor.shape for tensor in found]
    if not shapes:
        return float("inf")
    floating = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    scale = max((float(a.abs().max()) for a, _ in floating), default=0.0)
    difference = max((float((a - b).abs().max()) for a, b in floating), default=0.0)
    return difference / scale if scale else difference
