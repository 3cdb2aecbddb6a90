"""Find the channel groups of a network from its traced graph (torch.fx).

Every channel of every activation gets an atom. Operations copy, tie or freeze atoms; the connected
components of the ties are the units of compress.groups. No layer names and no module positions are
used, so any network that torch.fx can trace is analysed; an operation that is not known here
freezes the groups that touch it and is named in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import fx, nn

from compress.networks.architectures import ChannelPad, FitTo
from compress.networks.groups import ChannelGraph, GateSite, Layer, LayerKind, Units
from compress.networks.partition import components, groups_of
from compress.networks.tracing import (
    ADDITIONS,
    BINARY_NAMES,
    CHANNELWISE,
    CONVS,
    ELEMENTWISE_MODULES,
    ELEMENTWISE_NAMES,
    POOLING_MODULES,
    POOLING_NAMES,
    RESHAPES,
    SHAPE_QUERIES,
    Shapes,
    infer_shapes,
    opaque_modules,
    operation,
    trace,
)


def analyse(model: nn.Module, input_size: Sequence[int]) -> ChannelGraph:
    """Find the layers, units and groups of a network.

    Args:
        model: the network; nothing in it is changed and no weight is read.
        input_size: (C, H, W) of one image.

    Raises:
        ModelError: the network cannot be traced, or does not accept such images.
    """
    traced = trace(model)
    return _Analysis(model, traced.graph, infer_shapes(traced, input_size)).run()


@dataclass
class _Call:
    """What is known of one node while the graph is walked."""

    node: fx.Node
    name: str
    tensors: list[fx.Node]
    """Arguments that are tensors, in order."""


class _Analysis:
    """One walk over the graph: atoms for every node, then units, groups and layers."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: Shapes) -> None:
        self.model, self.graph, self.shapes = model, graph, shapes
        self.modules = dict(model.named_modules())
        self.opaque = opaque_modules(model)
        self.atoms: dict[fx.Node, Units] = {}
        self.num_atoms = 0
        self.ties: list[tuple[Units, Units]] = []
        self.frozen: list[tuple[Units, str]] = []
        self.additions: list[Units] = []
        self.read_sites: list[tuple[str, Units]] = []
        self.block_sites: list[tuple[str, Units]] = []
        self.layers: dict[str, Layer] = {}
        self.unknown: list[str] = []

    def run(self) -> ChannelGraph:
        for node in self.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    if source in self.atoms:
                        self._freeze(self.atoms[source], "network output")
            elif node not in self.shapes:  # a number, a size, or a tuple of tensors
                if operation(node) not in SHAPE_QUERIES:
                    self._freeze_sources(self._call(node))
            elif node.op == "placeholder":
                self.atoms[node] = self._fresh(self.shapes[node][1], frozen="network input")
            else:
                self._visit(node)
        return self._result()

    # Atoms

    def _fresh(self, count: int, *, frozen: str | None = None) -> Units:
        atoms = np.arange(self.num_atoms, self.num_atoms + count, dtype=np.int64)
        self.num_atoms += count
        if frozen:
            self._freeze(atoms, frozen)
        return atoms

    def _tie(self, first: Units, second: Units) -> None:
        self.ties.append((first, second))

    def _freeze(self, atoms: Units, reason: str) -> None:
        self.frozen.append((atoms, reason))

    # One node

    def _visit(self, node: fx.Node) -> None:
        call = self._call(node)
        atoms = None
        if node.op == "call_module":
            atoms = self._module(call, self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            atoms = self._function(call)
        if atoms is None:
            atoms = self._give_up(call)
        self.atoms[node] = atoms

    def _call(self, node: fx.Node) -> _Call:
        return _Call(node, operation(node), [n for n in node.all_input_nodes if n in self.shapes])

    def _give_up(self, call: _Call) -> Units:
        """Freeze what an operation touches, and start anew behind it."""
        reason = self._freeze_sources(call)
        shape = self.shapes[call.node]
        return self._fresh(shape[1] if len(shape) > 1 else 0, frozen=reason)

    def _freeze_sources(self, call: _Call) -> str:
        kind = "tensor" if call.node.op == "get_attr" else "unknown operation"
        reason = f"{kind} {call.name}"
        sources = [self.atoms[n] for n in call.tensors if len(self.atoms[n])]
        for source in sources:
            self._freeze(source, reason)
        if sources and call.name not in self.unknown:
            self.unknown.append(call.name)
        return reason

    def _module(self, call: _Call, module: nn.Module) -> Units | None:
        if len(call.tensors) != 1:
            return None
        source = call.tensors[0]
        if isinstance(module, (*ELEMENTWISE_MODULES, FitTo)):
            return self._same_channels(call.node, source)
        if isinstance(module, POOLING_MODULES):
            return self._pool(call.node, source, type(module).__name__)
        if isinstance(module, nn.Flatten):
            return self._reshape(call.node, source)
        if isinstance(module, ChannelPad):
            return self._pad(str(call.node.target), module, source)
        if module in self.opaque:
            return None
        if isinstance(module, CONVS):
            return self._conv(call, module)
        if isinstance(module, nn.Linear) and len(self.shapes[source]) == 2:
            return self._reader(call, "linear", module.out_features, 1, module)
        if isinstance(module, CHANNELWISE) or (
            isinstance(module, nn.PReLU) and module.num_parameters > 1
        ):
            return self._channelwise(call, module)
        return self._same_channels(call.node, source) if isinstance(module, nn.PReLU) else None

    def _function(self, call: _Call) -> Units | None:
        node, tensors = call.node, call.tensors
        if call.name in BINARY_NAMES:
            return self._binary(call)
        if call.name in ("cat", "concat", "concatenate"):
            return self._concat(node)
        if len(tensors) != 1:
            return None
        if call.name in ELEMENTWISE_NAMES:
            return self._same_channels(node, tensors[0])
        if call.name in POOLING_NAMES:
            return self._pool(node, tensors[0], call.name)
        if call.name in RESHAPES:
            return self._reshape(node, tensors[0])
        if call.name == "mean":
            return self._mean(node, tensors[0])
        if call.name == "getitem":
            return self._slice(node, tensors[0])
        if call.name == "pad":
            spatial = 2 * (len(self.shapes[node]) - 2)
            pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
            fits = isinstance(pads, Sequence) and len(pads) <= spatial
            return self._same_channels(node, tensors[0]) if fits else None
        return None

    # Operations that keep channels

    def _same_channels(self, node: fx.Node, source: fx.Node) -> Units | None:
        before, after = self.shapes[source], self.shapes[node]
        keeps = len(after) > 1 and len(before) > 1 and before[:2] == after[:2]
        return self.atoms[source] if keeps else None

    def _pool(self, node: fx.Node, source: fx.Node, name: str) -> Units | None:
        # One dimension fewer, and torch takes the channels for a dimension of space.
        spatial = f"{len(self.shapes[source]) - 2}d"
        fits = name.endswith(spatial) or name in ("Upsample", "interpolate")
        return self._same_channels(node, source) if fits else None

    def _reshape(self, node: fx.Node, source: fx.Node) -> Units | None:
        before, after = self.shapes[source], self.shapes[node]
        if len(after) < 2 or len(before) < 2 or before[0] != after[0]:
            return None
        if _asks_for_width(node):
            return None
        if before[1] == after[1]:
            return self.atoms[source]
        if len(after) == 2 and after[1] == math.prod(before[1:]):
            return np.repeat(self.atoms[source], math.prod(before[2:]))
        return None

    def _mean(self, node: fx.Node, source: fx.Node) -> Units | None:
        rank = len(self.shapes[source])
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, Sequence) or any(d % rank < 2 for d in dims):  # type: ignore[operator]
            return None
        return self.atoms[source]

    def _slice(self, node: fx.Node, source: fx.Node) -> Units | None:
        index = node.args[1]
        index = index if isinstance(index, tuple) else (index,)
        everything = slice(None)
        spatial_only = (
            len(index) >= 2
            and index[:2] == (everything, everything)
            and all(isinstance(part, slice) for part in index)
        )
        return self.atoms[source] if spatial_only else None

    def _pad(self, name: str, module: ChannelPad, source: fx.Node) -> Units:
        previous = self.layers.get(name)
        front = previous.inputs if previous else self._fresh(module.front)
        back = previous.outputs if previous else self._fresh(module.back)
        self.layers[name] = Layer(name, "pad", inputs=front, outputs=back)
        return np.concatenate([front, self.atoms[source], back])

    # Operations that join tensors

    def _binary(self, call: _Call) -> Units | None:
        node, tensors = call.node, call.tensors
        if len(tensors) < len(node.all_input_nodes):
            return None  # a number computed from a size, which may change
        wide = [n for n in tensors if len(self.shapes[n]) == len(self.shapes[node])]
        scalars = [n for n in tensors if math.prod(self.shapes[n]) == 1]
        if len(wide) == 1 and len(wide) + len(scalars) == len(tensors):
            return self._same_channels(node, wide[0])
        if len(wide) != 2 or any(len(self.shapes[n]) < 2 for n in wide):
            return None
        first, second = sorted(wide, key=lambda n: -self.shapes[n][1])
        if self.shapes[first][1] != self.shapes[second][1]:  # one channel, broadcast over all
            self._freeze(self.atoms[second], "broadcast over channels")
            return self.atoms[first]
        if self._is_constant(first) or self._is_constant(second):
            return None
        self._tie(self.atoms[first], self.atoms[second])
        if call.name in ADDITIONS and first is not second:
            self.additions.append(self.atoms[first])
            self.block_sites.append((self._after_activation(node).name, self.atoms[first]))
        return self.atoms[first]

    def _concat(self, node: fx.Node) -> Units | None:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(tensors, Sequence) or not isinstance(dim, int):
            return None
        parts = [self.atoms[n] for n in tensors if isinstance(n, fx.Node)]
        if dim % len(self.shapes[node]) == 1:
            return np.concatenate(parts)
        for part in parts[1:]:
            self._tie(parts[0], part)
        return parts[0]

    def _is_constant(self, node: fx.Node) -> bool:
        return node.op == "get_attr"

    def _after_activation(self, node: fx.Node) -> fx.Node:
        users = list(node.users)
        alone = len(users) == 1 and _is_activation(users[0], self.modules)
        return users[0] if alone else node

    # Layers

    def _conv(self, call: _Call, module: Any) -> Units | None:
        kernel = math.prod(module.kernel_size)
        source = self.atoms[call.tensors[0]]
        if len(self.shapes[call.node]) != 2 + len(module.kernel_size):
            return None  # an image without a batch dimension
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            return self._channelwise(call, module, kind="depthwise", kernel=kernel)
        outputs = self._reader(call, "conv", module.out_channels, kernel, module)
        if module.groups > 1:
            for part in (source, outputs):
                # All channels of one group of a grouped convolution live and die together.
                blocks = part.reshape(module.groups, -1)
                self._tie(blocks[:, 0].repeat(blocks.shape[1]), part)
            self._tie(
                source.reshape(module.groups, -1)[:, 0], outputs.reshape(module.groups, -1)[:, 0]
            )
        return outputs

    def _reader(
        self, call: _Call, kind: LayerKind, width: int, kernel: int, module: nn.Module
    ) -> Units:
        name, source = str(call.node.target), self.atoms[call.tensors[0]]
        positions = math.prod(self.shapes[call.node][2:])
        self.read_sites.append((call.node.name, source))
        previous = self.layers.get(name)
        if previous:  # the same module called again reads and writes the same channels
            self._tie(previous.inputs, source)
            outputs, positions = previous.outputs, positions + previous.positions
        else:
            outputs = self._fresh(width)
        self.layers[name] = Layer(
            name,
            kind,
            outputs=outputs,
            inputs=source,
            kernel=kernel,
            positions=positions,
            conv_groups=getattr(module, "groups", 1),
            params_per_output=int(getattr(module, "bias", None) is not None),
        )
        return outputs

    def _channelwise(
        self, call: _Call, module: nn.Module, *, kind: LayerKind = "channelwise", kernel: int = 1
    ) -> Units | None:
        name, source = str(call.node.target), self.atoms[call.tensors[0]]
        positions = math.prod(self.shapes[call.node][2:])
        previous = self.layers.get(name)
        if previous:
            self._tie(previous.outputs, source)
            positions += previous.positions
        per_output = sum(p.numel() for p in module.parameters(recurse=False)) // len(source)
        self.layers[name] = Layer(
            name,
            kind,
            outputs=source,
            kernel=kernel,
            positions=positions,
            conv_groups=getattr(module, "groups", 1),
            params_per_output=per_output - (kernel if kind == "depthwise" else 0),
        )
        return source

    # The result

    def _result(self) -> ChannelGraph:
        unit_of = components(self.num_atoms, self.ties)
        num_units = int(unit_of.max()) + 1 if self.num_atoms else 0
        layers = tuple(
            replace(layer, inputs=unit_of[layer.inputs], outputs=unit_of[layer.outputs])
            for layer in self.layers.values()
        )
        frozen: dict[int, str] = {}
        for atoms, reason in self.frozen:
            frozen.update(dict.fromkeys(unit_of[atoms].tolist(), reason))
        residual = _all_units(unit_of, self.additions)
        return ChannelGraph(
            layers=layers,
            groups=groups_of(layers, frozen, residual),
            num_units=num_units,
            read_sites=tuple(GateSite(name, unit_of[a]) for name, a in self.read_sites),
            block_sites=tuple(GateSite(name, unit_of[a]) for name, a in self.block_sites),
            other_params=self._parameters_outside_layers(),
            unknown=tuple(self.unknown),
        )

    def _parameters_outside_layers(self) -> int:
        layers = {id(p) for name in self.layers for p in self.modules[name].parameters()}
        return sum(p.numel() for p in self.model.parameters() if id(p) not in layers)


def _is_activation(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node applies an elementwise function of one tensor."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], ELEMENTWISE_MODULES)
    return node.op in ("call_function", "call_method") and operation(node) in ELEMENTWISE_NAMES


def _asks_for_width(node: fx.Node) -> bool:
    """Whether ``view`` or ``reshape`` names the number of channels, as in ``x.view(-1, 512)``."""
    if operation(node) not in ("view", "reshape"):
        return False
    sizes = node.args[1:] or tuple(node.kwargs.values())
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        sizes = tuple(sizes[0])
    return len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] != -1


def _all_units(unit_of: Units, parts: Sequence[Units]) -> set[int]:
    return {unit for part in parts for unit in unit_of[part].tolist()}
