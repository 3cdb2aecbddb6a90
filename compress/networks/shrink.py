"""Build the physically smaller network, and prove that it computes what the masked one does."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.networks.capture import Example, tensors_of
from compress.networks.groups import ChannelGraph, Mask, Units

PROOF_TOLERANCE = 1e-9
"""Largest difference of masked and shrunk outputs in float64, relative to the largest output."""
FLOAT32_TOLERANCE = 1e-4
"""The same for a network that runs in float32 alone."""


@dataclass(frozen=True)
class Place:
    """What a name stands for in a network: a parameter, a buffer, or an integer of a module.

    Attributes:
        module: which holds it.
        attribute: its name there.
        index: of the integer in a list or tuple, as in ``mixed.splits.0``.
        value: None where the network has nothing of that name.
    """

    module: nn.Module
    attribute: str
    index: int | None
    value: torch.Tensor | int | None

    @staticmethod
    def of(modules: Mapping[str, nn.Module], name: str) -> Place:
        """Find a place by its qualified name, in a network's modules by theirs."""
        owner, _, attribute = name.rpartition(".")
        if owner in modules:
            module = modules[owner]
            own = {**vars(module), **module._parameters, **module._buffers}
            return Place(module, attribute, None, _cuttable(own.get(attribute), attribute))
        outer, _, listed = owner.rpartition(".")
        module = modules.get(outer, modules[""])
        numbers = vars(module).get(listed) if outer in modules else None
        if isinstance(numbers, (list, tuple)) and attribute in map(str, range(len(numbers))):
            index = int(attribute)
            return Place(module, listed, index, _cuttable(numbers[index], listed))
        return Place(module, attribute, None, None)

    def set_width(self, width: int) -> None:
        """Put another integer in place of one."""
        if self.index is None:
            setattr(self.module, self.attribute, width)
            return
        numbers = list(getattr(self.module, self.attribute))
        numbers[self.index] = width
        kind = type(getattr(self.module, self.attribute))
        setattr(self.module, self.attribute, kind(numbers))


@dataclass(frozen=True)
class Cut:
    """Kept indices along one dimension of one named tensor.

    The tensor may also be an integer of a module that states a width, as ``conv.out_channels``; it
    becomes the number of indices.
    """

    tensor: str
    dim: int
    size: int
    """Length of the dimension before."""
    kept: Units
    """Ascending."""


def cuts_of(graph: ChannelGraph, kept: Mask) -> tuple[Cut, ...]:
    """Return the cuts that remove the units that are not kept from the network of a graph."""
    return tuple(
        Cut(axis.tensor, axis.dim, len(axis.units), np.flatnonzero(kept[axis.units]))
        for axis in graph.axes
        if not kept[axis.units].all()
    )


def apply_cuts_(
    model: nn.Module, cuts: Iterable[Cut], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Cut tensors of a network in place.

    Args:
        model: the network; tensors that it holds under several names are cut once.
        cuts: at most one for each dimension of a tensor.
        optimizer: its state (momentum) is cut along with the parameters.
    """
    by_tensor: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts:
        by_tensor[cut.tensor].append(cut)
    modules = dict(model.named_modules())
    for name, own in by_tensor.items():
        place = Place.of(modules, name)
        if isinstance(place.value, torch.Tensor):
            _cut_tensor(place.value, own, optimizer.state if optimizer else {})
        else:
            place.set_width(len(own[0].kept))


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
    apply_cuts_(model, cuts_of(graph, kept), optimizer)
    return graph.removed(kept)


@torch.no_grad()
def mask_(model: nn.Module, graph: ChannelGraph, kept: Mask) -> None:
    """Zero the weights with which readers read removed units: z = 0 for their gates, in place."""
    for axis in graph.readers:
        if not kept[axis.units].all():
            weight = tensor_of(model, axis.tensor)
            weight.index_fill_(axis.dim, _index(~kept[axis.units], weight.device), 0)


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
    masked = copy.deepcopy(model).cpu().to(dtype).eval()
    inputs = example.to(torch.device("cpu"), dtype)
    mask_(masked, graph, kept)
    expected = outputs_of(masked, inputs)
    shrink_(masked, graph, kept)
    return largest_difference(expected, outputs_of(masked, inputs))


@torch.no_grad()
def precision_for(model: nn.Module, example: Example) -> torch.dtype:
    """Return float64, or float32 for a network that does not run in float64."""
    copied, inputs = copy.deepcopy(model).cpu().eval(), example.to(torch.device("cpu"))
    try:
        outputs_of(copied.double(), inputs.to(torch.device("cpu"), torch.float64))
    except RuntimeError:  # a constant of forward, or a cast, is of another precision
        outputs_of(copied.float(), inputs)
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


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _cuttable(value: Any, attribute: str) -> torch.Tensor | int | None:
    width = type(value) is int and not attribute.startswith("_")
    return value if width or isinstance(value, torch.Tensor) else None


def _cut_tensor(
    tensor: torch.Tensor, cuts: Sequence[Cut], state: Mapping[Any, dict[str, Any]]
) -> None:
    shape = tensor.shape
    for key, value in state.get(tensor, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == shape:
            state[tensor][key] = _selected(value, cuts)
    tensor.data = _selected(tensor.data, cuts)
    tensor.grad = None


def _selected(tensor: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    for cut in cuts:
        index = torch.from_numpy(cut.kept).to(tensor.device)
        tensor = tensor.index_select(cut.dim, index)
    return tensor


def _index(selected: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(selected)).to(device)
