"""State dicts with gates, as the research code of Molchanov et al. 2019 writes them.

There, a gate is a layer of its own, one factor per channel of what another module returns; 0 is a
removed channel. Here gates are taken out again: folded into BatchNorm, removed with their units, or
left as zero weights of readers, so that the network computes what it computed with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from compress.errors import CheckpointError
from compress.networks.groups import Axis, ChannelGraph, Mask, Units

State = dict[str, torch.Tensor]

RESNET = r"resnet(18|34|50|101|152)"
FOLDED = (
    (RESNET, r"(layer\d\.\d+)\.gate([12])", r"\1.bn\2"),
    (r"densenet\d+", r"(.*\.denselayer\d+)\.gate2\): \(output_bn", r"\1.norm2"),
)
"""Architecture, gate, and the module whose outputs the gate multiplies; its factors are folded."""
STREAMS = ("gate_skip64", "gate_skip128", "gate_skip256", "gate_skip512")
"""The gates of a ResNet's residual streams, behind add+ReLU of every block of stages 1 to 4."""


@dataclass(frozen=True)
class GateAt:
    """One gate of a network, and the modules whose outputs it multiplies."""

    names: tuple[str, ...]
    """Modules under which a state dict holds the one tensor of this gate."""
    modules: tuple[str, ...]
    units: Units
    """(channels,) unit of each channel."""
    stream: bool = False
    """The modules are the blocks of a stage."""


class Gate(nn.Module):
    """Multiplies every channel of (N, channels, ...) by a factor of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, ...) -> the same shape."""
        return x * self.weight.view(1, -1, *(1,) * (x.dim() - 2))


def find_gates(
    architecture: str, graph: ChannelGraph, names: Iterable[str], where: object
) -> tuple[GateAt, ...]:
    """Place the gates of a state dict in a network.

    Args:
        architecture: built-in name of the network.
        graph: its channel graph.
        names: of the modules that hold gates.
        where: the file, for messages.

    Raises:
        CheckpointError: a gate has no place in this network.
    """
    streams = _streams(graph) if re.fullmatch(RESNET, architecture) else ()
    outputs = {axis.layer: axis.units for axis in graph.axes if axis.dim == 0}
    rules = [(gate, to) for model, gate, to in FOLDED if re.fullmatch(model, architecture)]
    names, found = set(names), []
    for stream in streams:
        held = tuple(name for name in stream.names if name in names)
        if held:
            found.append(GateAt(held, stream.modules, stream.units, stream=True))
            names -= set(held)
    for name in sorted(names):
        matches = [m.expand(to) for gate, to in rules if (m := re.fullmatch(gate, name))]
        if not matches or matches[0] not in outputs:
            raise CheckpointError(
                f"{where} has a gate {name!r}, which has no place in {architecture}: the gates of "
                "ResNet-18 to 152 and of DenseNets can be imported, so check --model"
            )
        found.append(GateAt((name,), (matches[0],), outputs[matches[0]]))
    return tuple(found)


def attach(model: nn.Module, gates: Iterable[GateAt]) -> None:
    """Put gates into a network in place, under the names that a state dict has for them."""
    modules = dict(model.named_modules())
    for gate in gates:
        layers = [Gate(len(gate.units)) for _ in gate.names]
        for name, layer in zip(gate.names, layers, strict=True):
            owner, _, attribute = name.rpartition(".")
            modules[owner].add_module(attribute, layer)
        for name in gate.modules:
            modules[name].register_forward_hook(lambda _, __, x, by=layers[0]: by(x))


def ungated(
    state: Mapping[str, torch.Tensor], gates: Sequence[GateAt], graph: ChannelGraph, where: object
) -> tuple[State, Mask]:
    """Take the gates out of a state dict.

    Args:
        state: weights and gates in float64, by name; not changed.
        gates: the gates.
        graph: the channel graph of the dense network.
        where: the file, for messages.

    Returns:
        Weights without gates, and the units that are left. A unit goes when everything that reads
        it reads zeros; a group keeps one such unit where all would go. The network with these
        weights and units computes what the gated one does.

    Raises:
        CheckpointError: a gate holds what cannot be taken out without changing the function.
    """
    held = {f"{name}.weight" for gate in gates for name in gate.names}
    clean = {name: tensor.clone() for name, tensor in state.items() if name not in held}
    closed: list[Units] = []
    for gate in gates:
        factors = _factors(state, gate, where)
        shut = gate.units[(factors == 0).numpy()]
        if gate.stream:
            closed.append(_close_stream(clean, gate, shut, graph))
        else:
            _fold(clean, gate.modules[0], factors)
            # A residual stream has other sources than this one.
            closed.append(np.setdiff1d(shut, graph.residual_units))
    return clean, left_without(graph, np.concatenate([np.zeros(0, np.int64), *closed]))


def left_without(graph: ChannelGraph, closed: Units) -> Mask:
    """Return the units that are left of a network when those that are read as zero go.

    Groups that would lose too many keep as many as they need, which are read as zero.
    """
    kept = graph.everything()
    for group in graph.prunable:
        kept[group.units] = ~np.isin(group.units, closed)
        needed = group.fewest - int(kept[group.units].sum())
        if needed > 0:
            kept[group.units[~kept[group.units]][:needed]] = True
    return kept


def _streams(graph: ChannelGraph) -> tuple[GateAt, ...]:
    """Return the residual streams of a ResNet that its file may hold a gate for."""
    blocks = [
        m[1] for axis in graph.writers if (m := re.fullmatch(r"(layer.*)\.conv1", axis.layer))
    ]
    units = {b: site.units for b, site in zip(blocks, graph.block_sites, strict=True)}
    found = []
    for number, name in enumerate(STREAMS, start=1):
        stage = tuple(block for block in blocks if block.startswith(f"layer{number}."))
        names = (name, *(f"{block}.gate" for block in stage))
        found.append(GateAt(names, stage, units[stage[0]], stream=True))
    return tuple(found)


def _factors(state: Mapping[str, torch.Tensor], gate: GateAt, where: object) -> torch.Tensor:
    first, *others = (state[f"{name}.weight"] for name in gate.names)
    name = gate.names[0]
    for other, tensor in zip(gate.names[1:], others, strict=True):
        if not torch.equal(first, tensor):
            raise CheckpointError(f"{where}: the gates {name!r} and {other!r} are one and disagree")
    if not first.isfinite().all():
        raise CheckpointError(f"{where}: the gate {name!r} holds values that are not finite")
    partial = first[(first != 0) & (first != 1)]
    if gate.stream and len(partial):
        raise CheckpointError(
            f"{where}: the gate {name!r} holds {float(partial[0]):g}, and behind an activation "
            "nothing but 0 and 1 can be imported: finish the pruning there first"
        )
    return first


def _fold(state: State, module: str, factors: torch.Tensor) -> None:
    """Scale what a module returns by scaling its parameters."""
    for name in (f"{module}.weight", f"{module}.bias"):
        if name in state:
            state[name] *= factors.view(-1, *(1,) * (state[name].dim() - 1))


def _close_stream(state: State, gate: GateAt, units: Units, graph: ChannelGraph) -> Units:
    """Zero what readers behind the gate read of closed units; return those that nothing else reads.

    The first block of a stage lies before the gate, and may read the same channels: the first
    stage of ResNet-18 and 34 has the stem's.
    """
    before = np.zeros(0, np.int64)
    for axis in graph.readers:
        if np.isin(axis.units, units).any():
            if axis.tensor.startswith(f"{gate.modules[0]}."):
                before = np.union1d(before, axis.units)
            else:
                _zero(state, axis, units)
    return np.setdiff1d(units, before)


def _zero(state: State, reader: Axis, units: Units) -> None:
    closed = torch.from_numpy(np.flatnonzero(np.isin(reader.units, units)))
    state[reader.tensor].index_fill_(reader.dim, closed, 0)
