"""Explicit gates: one scalar z = 1 per unit, multiplied into the activations.

The folded gate (compress.criteria) needs no extra layer. These gates are its reference, and the way
to place gates where no parameter can stand for them: after add+ReLU of residual blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from compress.groups import ChannelGraph, GateSite
from compress.tracing import trace


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


class GatedNetwork(nn.Module):
    """A network with explicit gates; it shares every module and parameter with the original.

    Attributes:
        gates: (units,) the gate vector, ones.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sites: str) -> None:
        """Insert gates at ``"read"`` (inputs of readers) or ``"block"`` (after add+ReLU) sites."""
        super().__init__()
        parameter = next(model.parameters())
        self.gates = nn.Parameter(
            torch.ones(graph.num_units, dtype=parameter.dtype, device=parameter.device)
        )
        self.network = trace(model)
        chosen = graph.read_sites if sites == "read" else graph.block_sites
        self._insert(chosen, before=sites == "read")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> logits."""
        return self.network(x)

    def _insert(self, sites: Sequence[GateSite], *, before: bool) -> None:
        graph = self.network.graph
        nodes = {node.name: node for node in graph.nodes}
        for number, site in enumerate(sites):
            node = nodes[site.node]
            name = f"gate_{number}"
            units = torch.from_numpy(site.units).to(self.gates.device)
            self.network.add_module(name, GateLayer(self.gates, units))
            if before:
                source = node.all_input_nodes[0]
                with graph.inserting_before(node):
                    gate = graph.call_module(name, (source,))
                node.replace_input_with(source, gate)
            else:
                self._insert_after(graph, node, name)
        graph.lint()
        self.network.recompile()

    @staticmethod
    def _insert_after(graph: fx.Graph, node: fx.Node, name: str) -> None:
        with graph.inserting_after(node):
            gate = graph.call_module(name, (node,))
        node.replace_all_uses_with(gate, delete_user_cb=lambda user: user is not gate)
