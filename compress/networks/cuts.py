"""Cuts: kept indices along dimensions of named tensors, and how a network takes them.

A cut network goes on being trained. Parameters are exchanged, never resized: a graph that somebody
still holds, such as that of the last loss, stays valid. What belongs to a parameter goes with it:
its gradient, its hooks and attributes, the modules that share it, and what optimizers keep for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.networks.groups import ChannelGraph, Mask, Units, gone_from

_UNKNOWN_STATE = (
    ", and which part of it belongs to the channels that stay is not known: train with another "
    "optimizer, or shrink without one and make it anew"
)


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
    """Return the cuts that remove the units that are not kept from the network of a graph.

    What is gone with a branch is not cut.
    """
    gone = gone_from(graph.programs(kept))
    return tuple(
        Cut(axis.tensor, axis.dim, len(axis.units), np.flatnonzero(kept[axis.units]))
        for axis in graph.axes
        if not kept[axis.units].all() and not gone(axis.tensor)
    )


def apply_cuts_(
    model: nn.Module, cuts: Iterable[Cut], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Cut tensors of a network in place.

    Args:
        model: the network; tensors that it holds under several names are cut once.
        cuts: at most one for each dimension of a tensor.
        optimizers: what trains it; their parameters and state follow.

    Raises:
        ModelError: an optimizer keeps a state that no cut of its parameter says how to cut; nothing
            is changed.
    """
    by_name: dict[str, list[Cut]] = defaultdict(list)
    for cut in cuts:
        by_name[cut.tensor].append(cut)
    modules = dict(model.named_modules())
    places = [(Place.of(modules, name), own) for name, own in by_name.items()]
    cuts_by_tensor = {p.value: own for p, own in places if isinstance(p.value, torch.Tensor)}
    after = {tensor: _successor(tensor, own) for tensor, own in cuts_by_tensor.items()}
    states = [_states(optimizer, cuts_by_tensor, after) for optimizer in optimizers]
    # Nothing fails from here on.
    for place, own in places:
        if not isinstance(place.value, torch.Tensor):
            place.set_width(len(own[0].kept))
    for module in modules.values():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, value in table.items():
                if isinstance(value, torch.Tensor) and value in after:
                    table[name] = after[value]
    for optimizer, state in zip(optimizers, states, strict=True):
        for group in optimizer.param_groups:
            group["params"][:] = [after.get(p, p) for p in group["params"]]
        for old in after:
            optimizer.state.pop(old, None)
        optimizer.state.update(state)


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its qualified name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def _cuttable(value: Any, attribute: str) -> torch.Tensor | int | None:
    width = type(value) is int and not attribute.startswith("_")
    return value if width or isinstance(value, torch.Tensor) else None


def _successor(tensor: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    """Return what takes a tensor's place, with all that people hang on parameters."""
    data = _selected(tensor.detach(), cuts)
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, tensor.requires_grad)
    if type(tensor) is not nn.Parameter:
        new = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad)
    vars(new).update(vars(tensor))
    if tensor.grad is not None and not tensor.grad.is_sparse:  # which has no dimensions to cut
        new.grad = _selected(tensor.grad, cuts)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(tensor, hooks):  # the same table: the handles that users hold go on working
            setattr(new, hooks, getattr(tensor, hooks))
    return new


def _states(
    optimizer: torch.optim.Optimizer,
    cuts_by_tensor: Mapping[torch.Tensor, Sequence[Cut]],
    after: Mapping[torch.Tensor, torch.Tensor],
) -> dict[torch.Tensor, dict[str, Any]]:
    """Return what an optimizer keeps for the successors of its parameters."""
    return {
        after[tensor]: {
            key: _cut_state(value, tensor, cuts, f"{type(optimizer).__name__} keeps {key!r}")
            for key, value in optimizer.state[tensor].items()
        }
        for tensor, cuts in cuts_by_tensor.items()
        if tensor in optimizer.state
    }


def _cut_state(value: Any, tensor: torch.Tensor, cuts: Sequence[Cut], what: str) -> Any:
    """Cut a state along the dimensions that it shares with its parameter, as factored ones do."""
    if isinstance(value, (list, tuple, dict)) and value:
        raise ModelError(f"{what} as a {type(value).__name__}{_UNKNOWN_STATE}")
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return value
    shape, sizes = tuple(value.shape), tuple(tensor.shape)
    if len(shape) != len(sizes) or any(n not in (1, m) for n, m in zip(shape, sizes, strict=True)):
        raise ModelError(f"{what} of shape {shape} for {sizes} weights{_UNKNOWN_STATE}")
    return _selected(value, [cut for cut in cuts if shape[cut.dim] != 1])


def _selected(tensor: torch.Tensor, cuts: Sequence[Cut]) -> torch.Tensor:
    """Select the kept indices; dimensions lie in memory in the order in which they lay."""
    selected = tensor
    for cut in cuts:
        index = torch.from_numpy(cut.kept).to(tensor.device)
        selected = selected.index_select(cut.dim, index)
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(tensor.dim())]
    return selected.permute(order).contiguous().permute(back)
