"""Find the channel groups of a network from its captured graph.

Every dimension of every value, parameters and buffers included, carries one atom per index or never
shrinks. Rules (compress.networks.rules) say how atoms pass through each operator; the connected
components of their ties are the units of compress.networks.groups. No layer names and no module
classes are used. An operator without a rule keeps dense what it touches and is named in the result.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.errors import ModelError
from compress.networks.branch_units import branch_units
from compress.networks.branches import Found, branches_of
from compress.networks.capture import Captured, Example, capture, source_of
from compress.networks.cuts import tensor_of
from compress.networks.groups import (
    Addition,
    Axis,
    Branch,
    ChannelGraph,
    ReadSite,
    Term,
    Units,
    gone_from,
)
from compress.networks.layers import LayerCall
from compress.networks.partition import NETWORK_INPUT, components, groups_of
from compress.networks.rules import RULES
from compress.networks.rules.pointwise import pointwise
from compress.networks.walk import (
    Atoms,
    Call,
    Value,
    Walk,
    operator_name,
    plain,
    tensors_in,
    values_in,
)


def analyse(
    model: nn.Module,
    inputs: Example | Sequence[int],
    *,
    whole_groups: bool = False,
    outer: frozenset[str] = frozenset(),
) -> ChannelGraph:
    """Find the dimensions, units and groups of a network.

    Args:
        model: the network; nothing in it is changed and no weight is read.
        inputs: what it is captured with, or the size (C, H, W) of one image.
        whole_groups: remove whole groups of every grouped convolution, as format version 1 does,
            where fewer channels of each group would be finer.
        outer: names of ``ChannelGraph.splits`` that split channels into parts whose number shrinks,
            where the length of each part does otherwise.

    Raises:
        ModelError: the network cannot be captured, or does not accept such inputs.
    """
    example = inputs if isinstance(inputs, Example) else Example.images(inputs)
    captured = capture(model, example)
    walk = Walk(captured.batch, dict(model.named_modules()), whole_groups, outer)
    analysis = _Analysis(model, walk)
    analysis.add(captured)
    if analysis.unseen:  # heads that training alone runs read channels as well
        with suppress(ModelError):
            trained = capture(model, example, training=True)
            walk.training = True
            analysis.add(trained)
    return analysis.result()


class _Analysis:
    """One walk over each graph: atoms for every value, then units, groups and costs."""

    def __init__(self, model: nn.Module, walk: Walk) -> None:
        self.model, self.walk = model, walk
        self.values: dict[fx.Node, Any] = {}
        self.named: dict[str, Value] = {}
        self.input_atoms: list[Atoms] = []
        self.found: list[Found] = []
        self.unknown: list[str] = []
        self.random: list[str] = []

    @property
    def unseen(self) -> bool:
        """Whether the graphs so far leave parameters unused."""
        used = {id(tensor_of(self.model, name)) for name in self.named}
        return any(id(parameter) not in used for parameter in self.model.parameters())

    def add(self, captured: Captured) -> None:
        """Walk over a graph; parameters that were met before have the same atoms."""
        self.captured = captured
        if not self.walk.training:
            self.evaluated = captured
        for node in captured.inputs:
            self.values[node] = self._input(node)
        for node in captured.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._visit(node)
        for node in captured.outputs:
            for value in values_in(self._value(node)):
                for dim in value.dims:
                    self.walk.freeze(dim, "network output")
        if not self.walk.training:
            work: dict[fx.Node, float] = defaultdict(float)
            for at, number, dims in self.walk.macs:
                if at is not None:
                    work[at] += number * math.prod(map(len, dims))
            ends = (at for at, dim in self.walk.additions if dim is not None)
            self.found = branches_of(captured, ends, work)

    # Values

    def _input(self, node: fx.Node) -> Value | None:
        tensors = tensors_in(node.meta.get("val"))
        if not tensors:
            return None
        shape = tuple(tensors[0].shape)
        value = plain(shape)
        if len(shape) < 2:
            return value
        atoms = self.walk.fresh(shape[1])
        self.walk.freeze(atoms, NETWORK_INPUT)
        self.input_atoms.append(atoms)
        return value.with_dim(1, atoms, shape[1])

    def _value(self, node: fx.Node) -> Any:
        """Return what a node holds; a parameter or buffer gets its atoms when it is first used."""
        if node in self.values:
            return self.values[node]
        shape = tuple(int(n) for n in node.meta["val"].shape) if "val" in node.meta else ()
        if node in self.captured.named:
            value = self._named(self.captured.named[node], shape)
        else:
            value = plain(shape, fixed=True)
        self.values[node] = value
        return value

    def _named(self, name: str, shape: tuple[int, ...]) -> Value:
        if name not in self.named:
            self.named[name] = Value(
                shape,
                tuple(self.walk.fresh(size) if size > 1 else None for size in shape),
                tuple(frozenset({(name, dim)}) for dim in range(len(shape))),
                fixed=True,
                name=name,
            )
        return self.named[name]

    # Operators

    def _visit(self, node: fx.Node) -> Any:
        name = operator_name(node)
        if name == "getitem":
            source, index = self._value(node.args[0]), node.args[1]  # type: ignore[arg-type]
            several = isinstance(source, (list, tuple)) and isinstance(index, int)
            return source[index] if several else plain(_shape(node))
        self.walk.node = node
        call = Call(self.walk, node, self._arguments(node))
        if not self.walk.training and _is_random(call):
            self.random.append(f"{name} at {source_of(node)}")
        rule = RULES.get(name)
        if rule is None and _is_pointwise(node):
            rule = pointwise
        result = None if rule is None else rule(call)
        if result is None:
            result = self._give_up(call, "unknown operation" if rule is None else "this use of")
        return result

    def _give_up(self, call: Call, what: str) -> Any:
        """Freeze what an operator touches; what it returns never shrinks."""
        call.freeze_all(f"{what} {call.name}")
        touches = any(dim is not None for value in call.values for dim in value.dims)
        if touches and call.name not in self.unknown:
            self.unknown.append(call.name)
        fixed = bool(call.values) and all(value.fixed for value in call.values)
        results = [plain(shape, fixed=fixed) for shape in call.shapes]
        self.walk.count(_counted(call.node))
        single = isinstance(call.node.meta.get("val"), torch.Tensor)
        return results[0] if single and results else results

    def _arguments(self, node: fx.Node) -> dict[str, Any]:
        def resolved(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return self._value(item)
            if isinstance(item, (list, tuple)):
                return [resolved(part) for part in item]
            return item

        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {str(i): resolved(item) for i, item in enumerate(node.args)}
        found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        names = [argument.name for argument in schema.arguments]
        given = {n: resolved(item) for n, item in zip(names, node.args, strict=False)}
        ordered = {n: {**found, **given}.get(n) for n in names}
        return {**ordered, **{n: resolved(item) for n, item in node.kwargs.items()}}

    # The result

    def result(self) -> ChannelGraph:
        """Return units, groups and costs of all that was walked over."""
        walk, named = self.walk, self._axes_by_atoms()
        widths = list(self._widths())
        used = np.concatenate(
            [
                np.zeros(0, np.int64),
                *self.input_atoms,
                *(atoms for _, _, atoms in (*named, *widths)),
                *(atoms for _, _, dims in walk.macs for atoms in dims),
                *(atoms for _, _, atoms, _ in walk.sites),
                *(atoms for _, atoms in walk.additions if atoms is not None),
                *(d for _, _, _, *dims in walk.layers for d in dims if isinstance(d, np.ndarray)),
            ]
        )
        unit_of = components(walk.num_atoms, walk.ties, used)
        axes = tuple(
            Axis(
                tensor,
                dim,
                unit_of[atoms],
                writes=(tensor, dim) in walk.writes,
                reads=(tensor, dim) in walk.reads,
            )
            for tensor, dim, atoms in (*named, *widths)
        )
        frozen: dict[int, str] = {}
        for atoms, reason in walk.frozen:
            for unit in unit_of[atoms].tolist():
                frozen.setdefault(unit, reason)
        fewest: dict[int, int] = defaultdict(lambda: 1)
        for atoms, least in walk.least:
            for unit in unit_of[atoms].tolist():
                fewest[unit] = max(fewest[unit], least)
        channels = int(unit_of.max(initial=-1)) + 1
        needs = self._needs(channels)
        additions = tuple(
            Addition(number, np.zeros(0, np.int64) if dim is None else unit_of[dim], needs[node])
            for number, (node, dim) in enumerate(walk.additions)
        )
        residual = {unit for a in additions for unit in a.units.tolist()}
        groups = groups_of(axes[: len(named)], frozen=frozen, residual=residual, fewest=fewest)
        branches = branch_units(self.found, axes, groups, self.evaluated.named, first=channels)
        return ChannelGraph(
            axes=axes,
            groups=groups,
            num_units=channels + len(branches),
            macs=tuple(
                Term(
                    number,
                    (*(unit_of[a] for a in dims), *(np.array([n]) for n in needs.get(node, ()))),
                )
                for node, number, dims in walk.macs
            ),
            params=tuple(self._params(unit_of, branches)),
            read_sites=tuple(
                ReadSite(w, unit_of[a], dim, needs[node]) for node, w, a, dim in walk.sites
            ),
            additions=additions,
            layers=tuple(
                LayerCall(
                    name,
                    shape,
                    reads if isinstance(reads, int) else unit_of[reads],
                    writes if isinstance(writes, int) else unit_of[writes],
                    needs[node],
                )
                for node, name, shape, reads, writes in walk.layers
            ),
            branches=branches,
            unknown=tuple(self.unknown),
            random=tuple(self.random),
            splits=tuple((name, np.unique(unit_of[atoms])) for name, atoms in walk.splits),
        )

    def _axes_by_atoms(self) -> list[tuple[str, int, Atoms]]:
        """Return the dimensions of named tensors that hold channels."""
        return [
            (name, dim, atoms)
            for name, value in self.named.items()
            for dim, atoms in enumerate(value.dims)
            if atoms is not None and (name, dim) not in self.walk.still
        ]

    def _widths(self) -> Iterable[tuple[str, int, Atoms]]:
        """Yield the integers of modules that state a width."""
        modules = self.walk.modules
        found: dict[str, Atoms] = {}
        for owner, attribute, atoms in self.walk.widths:
            if "." in attribute or _states(modules.get(owner), attribute, len(atoms)):
                found.setdefault(f"{owner}.{attribute}" if owner else attribute, atoms)
        for hint in self.walk.hints:
            module = modules.get(hint.module)
            for attribute in [hint.attribute] if hint.attribute else _integers(module):
                prefix = f"{hint.module}." if hint.module else ""
                if _states(module, attribute, hint.size) and len(hint.atoms):
                    found.setdefault(f"{prefix}{attribute}", hint.atoms)
                elif hint.attribute:
                    self.walk.freeze(hint.atoms, "padding of a fixed width")
        return [(name, 0, atoms) for name, atoms in found.items()]

    def _needs(self, channels: int) -> dict[fx.Node | None, tuple[int, ...]]:
        """Return the units of the branches that each node lies in."""
        needs: dict[fx.Node | None, tuple[int, ...]] = defaultdict(tuple)
        for number, found in enumerate(self.found):
            for node in found.nodes:
                needs[node] += (channels + number,)
        return needs

    def _params(self, unit_of: Units, branches: Sequence[Branch]) -> Iterable[Term]:
        goes = [(b.unit, gone_from({b.module: b.program})) for b in branches]
        captured = {id(tensor_of(self.model, name)): value for name, value in self.named.items()}
        for name, parameter in self.model.named_parameters():
            value = captured.get(id(parameter))
            number, axes = 1.0, [np.array([unit]) for unit, gone in goes if gone(name)]
            for dim, size in enumerate(parameter.shape):
                atoms = None if value is None else value.dims[dim]
                if atoms is None or (value and (value.name, dim) in self.walk.still):
                    number *= size
                else:
                    axes.append(unit_of[atoms])
            yield Term(number, tuple(axes))


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensors = tensors_in(node.meta.get("val"))
    return tuple(int(n) for n in tensors[0].shape) if tensors else ()


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _counted(node: fx.Node) -> float:
    """Return the multiply-adds of a call as torch counts them; those of a region are not known."""
    from torch.utils.flop_counter import FlopCounterMode

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    try:
        with FlopCounterMode(display=False) as counter:
            node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # an operator of the user's own may raise anything
        return 0
    return counter.get_total_flops() / 2


def _is_random(call: Call) -> bool:
    """Whether a call draws random numbers; a dropout that is off does not."""
    seeded = torch.Tag.nondeterministic_seeded in getattr(call.node.target, "tags", ())
    return seeded and bool(call.get("train", True)) and bool(call.get("training", True))


def _states(module: nn.Module | None, attribute: str, length: int) -> bool:
    value = getattr(module, attribute, None)
    return type(value) is int and value == length


def _integers(module: nn.Module | None) -> list[str]:
    if module is None:
        return []
    return [k for k, v in vars(module).items() if type(v) is int and not k.startswith("_")]
