"""What people train a network with, as far as a pruner has to know it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from compress.errors import ModelError, UsageError
from compress.networks.cuts import tensor_of
from compress.networks.groups import ChannelGraph
from compress.networks.wrappers import unwrapped


def inner_network(model: nn.Module) -> nn.Module:
    """Return the network inside of what compiles, joins or averages it.

    Raises:
        UsageError: it is no network, or its parameters are spread over processes.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__} and no torch.nn.Module")
    sharding = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharding or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UsageError(
            f"the parameters of {type(model).__name__} are sharded over processes, so no process "
            "holds a whole channel: prune before they are, or with DistributedDataParallel"
        )
    return unwrapped(model)


def inner_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
) -> tuple[torch.optim.Optimizer, ...]:
    """Return the optimizers of torch inside of what Accelerate and Lightning wrap around them.

    Raises:
        UsageError: one keeps all parameters as one vector, which cannot shrink.
    """
    if optimizer is None:
        return ()
    found = []
    for each in optimizer if isinstance(optimizer, Sequence) else (optimizer,):
        inner = each
        while isinstance(wrapped := getattr(inner, "optimizer", None), torch.optim.Optimizer):
            inner = wrapped
        if not isinstance(inner, torch.optim.Optimizer):
            raise UsageError(f"optimizer is a {type(inner).__name__} and none of torch.optim")
        if isinstance(inner, torch.optim.LBFGS):
            raise UsageError(
                "LBFGS keeps all parameters as one vector, which cannot shrink: use another one"
            )
        found.append(inner)
    return tuple(found)


class Bound:
    """The parameters that a pruner works with, to be known again.

    Args:
        model: the network.
        graph: its channel graph; parameters that no channel runs through are left out.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        held = {axis.tensor: _held(model, axis.tensor) for axis in graph.axes}
        self.parameters = {n: p for n, p in held.items() if isinstance(p, nn.Parameter)}
        self.device = self._device

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def moved(self) -> bool:
        """Whether they lie on another device than they did."""
        return self._device != self.device

    @property
    def have_gradients(self) -> bool:
        """Whether any of them has one."""
        return any(parameter.grad is not None for parameter in self.parameters.values())

    def require_unchanged(self, model: nn.Module, graph: ChannelGraph) -> None:
        """Refuse a network in which somebody else exchanged or resized parameters.

        Raises:
            UsageError: naming the first.
        """
        for axis in graph.axes:
            bound = self.parameters.get(axis.tensor)
            if bound is None:
                continue
            same = _held(model, axis.tensor) is bound
            if not same or bound.shape[axis.dim] != len(axis.units):
                raise UsageError(
                    f"{axis.tensor} is not what the Pruner was made with: the network was changed "
                    "by somebody else (a module replaced, a parameter exchanged or resized); make "
                    "a new Pruner for the network as it is now"
                )


def require_trained(
    model: nn.Module,
    graph: ChannelGraph,
    optimizers: Sequence[torch.optim.Optimizer],
    copies: Sequence[nn.Module],
) -> None:
    """Refuse optimizers and copies that could not follow a shrink.

    Raises:
        UsageError: no optimizer holds a parameter that is trained and may shrink, or a copy lacks
            it or has it in another shape.
    """
    held = {id(p) for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    parameters = {id(p): name for name, p in model.named_parameters()}
    for axis in graph.axes:
        tensor = _held(model, axis.tensor)
        if not isinstance(tensor, torch.Tensor):  # an integer that states a width
            continue
        if optimizers and tensor.requires_grad and id(tensor) not in held:
            raise UsageError(
                f"the optimizer does not hold {parameters.get(id(tensor), axis.tensor)}, which is "
                "trained and may shrink: give the optimizer that does (or several), or freeze the "
                "parameter with requires_grad_(False)"
            )
        for copied in copies:
            if copied is model:
                raise UsageError("a copy is the network itself: give those that train beside it")
            if getattr(_held(copied, axis.tensor), "shape", None) != tensor.shape:
                raise UsageError(
                    f"a copy has no {axis.tensor} of shape {tuple(tensor.shape)}: copies are of "
                    "the same network"
                )


def require_described(model: nn.Module, graph: ChannelGraph) -> None:
    """Refuse a network that is not the one of a graph, for instance because it has shrunk since.

    Raises:
        ModelError: naming the first tensor that differs.
    """
    for axis in graph.axes:
        tensor = _held(model, axis.tensor)
        if isinstance(tensor, int):  # a width that the network's owner may have set
            continue
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
        if len(shape) <= axis.dim or shape[axis.dim] != len(axis.units):
            raise ModelError(
                f"{axis.tensor} is of shape {shape} and the channel graph says {len(axis.units)} "
                f"for dimension {axis.dim}: analyse the network as it is now"
            )


def unscale(scaler: torch.amp.GradScaler, optimizers: Sequence[torch.optim.Optimizer]) -> float:
    """Unscale the gradients of optimizers unless that is done; return the factor of the loss."""
    for optimizer in optimizers:
        try:
            scaler.unscale_(optimizer)
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
    return float(scaler.get_scale())


def _held(model: nn.Module, name: str) -> object:
    """Return what a network has under the name of an axis: a tensor, an integer, or nothing."""
    try:
        return tensor_of(model, name)
    except AttributeError:
        return None
