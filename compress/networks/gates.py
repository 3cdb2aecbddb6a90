"""Explicit gates and probes: factors put where channels are read, while a network runs.

The folded gate (compress.criteria.taylor) needs no extra layer. Explicit gates are its reference,
the way to place gates where no parameter can stand for them (behind the additions of residual
blocks), and what second derivatives are taken of. Probes see what parameters average away: single
examples. Both watch the operators that the network calls, in training mode as well; nothing in the
network changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.errors import ModelError
from compress.networks.cuts import tensor_of
from compress.networks.groups import ChannelGraph

Insertion = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From an activation, the (channels,) units along a dimension of it, and that dimension, to what
takes its place."""

READERS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d, F.linear),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
ADDITIONS = frozenset(
    {
        *(torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__),
        *(torch.Tensor.__radd__, torch.Tensor.__iadd__),
    }
)


class UnplacedError(Exception):
    """A group is read where no explicit gate can be put; the text says where."""


class Insertions:
    """Where a channel graph has gates.

    Args:
        model: the network.
        graph: its channel graph.
        sites: ``"read"``: the inputs of readers; ``"residual"``: behind the additions of residual
            blocks; ``"block"``: there for residual streams, at the readers for all other units. An
            activation such as ReLU, that a positive factor passes through, may follow the gate.

    Raises:
        UnplacedError: a group that may be pruned is read by something else than a convolution or
            linear layer with a parameter as its weight, or a weight reads different channels.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sites: str) -> None:
        device = next(model.parameters()).device
        residual = graph.residual_units
        inner = [
            site
            for site in graph.read_sites
            if sites == "read" or not np.isin(site.units, residual).any()
        ]
        self.readers: dict[int, tuple[torch.Tensor, int]] = {}
        self.blocks: dict[int, torch.Tensor] = {}
        self.additions = len(graph.additions) if sites != "read" else 0
        if sites != "residual":
            for site in inner:
                units = torch.from_numpy(site.units).to(device)
                placed = self.readers.setdefault(
                    id(tensor_of(model, site.weight)), (units, site.dim)
                )
                if not torch.equal(placed[0], units):
                    raise UnplacedError(f"{site.weight} reads along several of its dimensions")
            _require_placed(graph, {site.weight for site in graph.read_sites})
        if sites != "read":
            for addition in graph.block_sites:
                units = torch.from_numpy(addition.units).to(device)
                self.blocks[addition.number] = units

    def __len__(self) -> int:
        return len(self.readers) + len(self.blocks)


class Inserting(TorchFunctionMode):
    """While it is entered, a network's activations pass through insertions."""

    def __init__(self, places: Insertions, insertion: Insertion) -> None:
        super().__init__()
        self.places, self.insertion = places, insertion
        self.seen = 0
        """Additions so far."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one function of torch, with what is inserted before or behind it."""
        kwargs = kwargs or {}
        if func in READERS:
            args, kwargs = self._reading(args, kwargs)
        result = func(*args, **kwargs)
        if self.places.blocks and func in ADDITIONS and _is_addition(args, kwargs):
            result = self._added(result)
        return result

    def _reading(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        place = self.places.readers.get(id(weight))
        if place is None:
            return args, kwargs
        if args:
            return (self.insertion(args[0], *place), *args[1:]), kwargs
        return args, {**kwargs, "input": self.insertion(kwargs["input"], *place)}

    def _added(self, total: torch.Tensor) -> torch.Tensor:
        units = self.places.blocks.get(self.seen)
        self.seen += 1
        if units is None:
            return total
        if total.dim() < 2 or total.shape[1] != len(units):
            raise ModelError(
                f"addition {self.seen} of the network has {total.shape[1:2]} channels in training "
                f"mode and {len(units)} in evaluation mode, so gates behind residual blocks cannot "
                "be placed: use residual_gate = 'read'"
            )
        return self.insertion(total, units, 1)

    def require_complete(self) -> None:
        """Refuse a pass that added less, or more, often than the graph does.

        Raises:
            ModelError: so it was, and gates are numbered by additions.
        """
        if self.places.blocks and self.seen != self.places.additions:
            raise ModelError(
                f"the network adds {self.seen} times in training mode and {self.places.additions} "
                "times in evaluation mode, so gates behind residual blocks cannot be placed: use "
                "residual_gate = 'read'"
            )


class WatchedNetwork(nn.Module):
    """A network that runs with insertions; it shares every module and parameter with the original.

    Args:
        model: the network.
        graph: its channel graph.
        sites: see ``Insertions``.

    Attributes:
        compiled: whether torch.compile ran the last pass of an attached network, which was then
            run without insertions.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sites: str) -> None:
        super().__init__()
        self.network = model
        self.places = Insertions(model, graph, sites)
        self.compiled = False

    def insert(self, x: torch.Tensor, units: torch.Tensor, dim: int) -> torch.Tensor:
        """Return what takes an activation's place; see ``Insertion``."""
        raise NotImplementedError

    def begin(self) -> None:
        """Be told that a forward pass begins."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs and outputs of the network."""
        self.begin()
        with Inserting(self.places, self.insert) as mode:
            output = self.network(*args, **kwargs)
        mode.require_complete()
        return output

    def attach(self) -> Callable[[], None]:
        """Let every call of the network itself that records gradients run with the insertions.

        Returns:
            What ends that.
        """
        entered: list[Inserting] = []

        def enter(module: nn.Module, args: Any) -> None:
            if module is not self.network or not torch.is_grad_enabled():  # a copy of it
                return
            self.compiled = torch.compiler.is_compiling()
            if not self.compiled:  # the compiler would trace something else than what happens
                self.begin()
                mode = Inserting(self.places, self.insert)
                mode.__enter__()  # type: ignore[no-untyped-call]
                entered.append(mode)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module is self.network and entered:
                mode = entered.pop()
                mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                if output is not None:  # None: forward raised an error of its own
                    mode.require_complete()

        handles = (
            self.network.register_forward_pre_hook(enter),
            self.network.register_forward_hook(leave, always_call=True),
        )

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach


class GatedNetwork(WatchedNetwork):
    """A network with explicit gates.

    Attributes:
        gates: (units,) the gate vector, ones.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sites: str) -> None:
        """Insert gates at the sites that ``Insertions`` names."""
        super().__init__(model, graph, sites)
        parameter = next(model.parameters())
        self.gates = nn.Parameter(
            torch.ones(graph.num_units, dtype=parameter.dtype, device=parameter.device)
        )

    def insert(self, x: torch.Tensor, units: torch.Tensor, dim: int) -> torch.Tensor:
        """Multiply by the gates of the units."""
        shape = [1] * x.dim()
        shape[dim] = -1
        return x * self.gates[units].view(shape)


class ProbedNetwork(WatchedNetwork):
    """A network with probes: they pass activations through and hand on their product with their
    gradient in the backward pass.

    Args:
        model: the network; it is shared.
        graph: its channel graph.
        sites: see ``Insertions``.
        seen: called with the (channels,) units and the (N, channels, ...) product of each site, and
            the number of the forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        sites: str,
        seen: Callable[[torch.Tensor, torch.Tensor, int], None],
    ) -> None:
        super().__init__(model, graph, sites)
        self.seen = seen
        self.passes = 0

    def begin(self) -> None:
        """Count the forward pass."""
        self.passes += 1

    def insert(self, x: torch.Tensor, units: torch.Tensor, dim: int) -> torch.Tensor:
        """Hand on the product of an activation and its gradient."""
        if not x.requires_grad:
            return x
        x = x.view_as(x)  # the gradient of this reader alone
        activation, number = x.detach(), self.passes
        x.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self.seen(units, (activation * gradient).movedim(dim, 1), number)
        )
        return x


def _is_addition(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether two activations of one shape are added; the rule of ``add`` says the same."""
    both = [*args[:2], *(kwargs[name] for name in ("input", "other") if name in kwargs)]
    return (
        len(both) == 2
        and all(isinstance(item, torch.Tensor) and item.dim() >= 2 for item in both)
        and both[0] is not both[1]
        and both[0].shape == both[1].shape
        and both[0].is_floating_point()
    )


def _require_placed(graph: ChannelGraph, placed: set[str]) -> None:
    for group in graph.prunable:
        for reader in group.readers:
            if reader not in placed:
                raise UnplacedError(f"{group.name} is read by {reader} in a computed form")
