"""Explicit gates and probes: layers put into the traced network where channels are read.

The folded gate (compress.criteria.taylor) needs no extra layer. Explicit gates are its reference,
the way to place gates where no parameter can stand for them (after add+ReLU of residual blocks),
and what second derivatives are taken of. Probes see what parameters average away: single examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import fx, nn

from compress.networks.groups import ChannelGraph, GateSite
from compress.networks.tracing import trace


class GateLayer(nn.Module):
    """Multiplies each channel by the gate of its unit.

    Args:
        gates: (units,) vector that all gate layers of a network share.
        units: (channels,) unit of each channel.
    """

    units: torch.Tensor

    def __init__(self, gates: nn.Parameter, units: torch.Tensor) -> None:
        super().__init__()
        self.gates = gates
        self.register_buffer("units", units, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, ...) -> the same shape."""
        return x * self.gates[self.units].view(1, -1, *(1,) * (x.dim() - 2))


class Probe(nn.Module):
    """Passes activations through and hands on their product with their gradient.

    Args:
        units: (channels,) unit of each channel.
        seen: called in the backward pass with ``units`` and the (N, channels, ...) product.
    """

    units: torch.Tensor

    def __init__(
        self, units: torch.Tensor, seen: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        super().__init__()
        self.seen = seen
        self.register_buffer("units", units, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, ...) -> the same tensor."""
        if not x.requires_grad:
            return x
        x = x.view_as(x)  # the gradient of this reader alone
        activation = x.detach()
        x.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self.seen(self.units, activation * gradient)
        )
        return x


class GatedNetwork(nn.Module):
    """A network with explicit gates; it shares every module and parameter with the original.

    Attributes:
        gates: (units,) the gate vector, ones.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sites: str) -> None:
        """Insert gates at the sites that ``insert`` names."""
        super().__init__()
        parameter = next(model.parameters())
        self.gates = nn.Parameter(
            torch.ones(graph.num_units, dtype=parameter.dtype, device=parameter.device)
        )
        self.network = trace(model)
        inserted = insert(self.network, graph, sites, lambda units: GateLayer(self.gates, units))
        self.gates.requires_grad_(inserted > 0)  # processes join only what has a gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> logits."""
        return self.network(x)


def probed(
    model: nn.Module,
    graph: ChannelGraph,
    sites: str,
    seen: Callable[[torch.Tensor, torch.Tensor], None],
) -> fx.GraphModule:
    """Return the network with probes at its sites; it shares every module and parameter."""
    network = trace(model)
    insert(network, graph, sites, lambda units: Probe(units, seen))
    return network


def insert(
    network: fx.GraphModule,
    graph: ChannelGraph,
    sites: str,
    layer: Callable[[torch.Tensor], nn.Module],
) -> int:
    """Put a layer into a traced network at every site, and return how many there are.

    Args:
        network: the traced network, changed in place.
        graph: its channel graph.
        sites: ``"read"``: the inputs of readers; ``"residual"``: behind add+ReLU of residual
            blocks; ``"block"``: there for residual streams, at the readers for all other units.
        layer: builds the layer from the (channels,) units of its channels.
    """
    device = next(network.parameters()).device
    nodes = {node.name: node for node in network.graph.nodes}
    residual = graph.residual_units
    inner = [s for s in graph.read_sites if sites == "read" or not np.isin(s.units, residual).any()]
    chosen: list[tuple[GateSite, bool]] = []
    if sites != "residual":
        chosen += [(site, True) for site in inner]
    if sites != "read":
        chosen += [(site, False) for site in graph.block_sites]
    for number, (site, before) in enumerate(chosen):
        name = f"gate_{number}"
        network.add_module(name, layer(torch.from_numpy(site.units).to(device)))
        _wire(network.graph, nodes[site.node], name, before=before)
    network.graph.lint()
    network.recompile()
    return len(chosen)


def _wire(graph: fx.Graph, node: fx.Node, name: str, *, before: bool) -> None:
    if before:
        source = node.all_input_nodes[0]
        with graph.inserting_before(node):
            gate = graph.call_module(name, (source,))
        node.replace_input_with(source, gate)
        return
    with graph.inserting_after(node):
        gate = graph.call_module(name, (node,))
    node.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
