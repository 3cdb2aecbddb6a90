"""Channel groups: which indices of which tensors must be removed together.

The analysis (compress.networks.analysis) gives every index of a dimension that may shrink an
*atom*. Atoms that an operator ties (residual add, grouped convolution) form one *unit*, the
smallest thing that can be removed. A *group* is the set of units that run through the same
dimensions of the same tensors. Everything later (importance, cost, masks, shrinking) works on
vectors indexed by unit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from compress.errors import ModelError
from compress.networks.layers import LayerCall, there
from compress.networks.layers import Mask as Mask
from compress.networks.layers import Units as Units
from compress.networks.programs import Body, Gate, Program, program_without


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor of the network, and the unit of each index along it.

    A module's integer that states a width (``conv.out_channels``) is the axis of a tensor of that
    length: it is cut as one.
    """

    tensor: str
    """Qualified name of a parameter or buffer, or of a module's integer."""
    dim: int
    units: Units
    writes: bool = False
    """A convolution or linear layer produces these units along it."""
    reads: bool = False
    """A gate on what is read along it is part of the network's function."""

    @property
    def layer(self) -> str:
        """Qualified name of the module that holds the tensor."""
        return layer_of(self.tensor)


def layer_of(tensor: str) -> str:
    """Return the module that holds a weight; of a bare parameter, its own name."""
    owner, _, attribute = tensor.rpartition(".")
    return owner if owner and attribute == "weight" else tensor


@dataclass(frozen=True)
class Term:
    """Part of a cost: a number times the width of each of its axes."""

    coefficient: float
    axes: tuple[Units, ...] = ()


@dataclass(frozen=True)
class Group:
    """Units that run through the same dimensions, in the order of their first writer."""

    name: str
    units: Units
    writers: tuple[str, ...]
    """Layers that write the units."""
    readers: tuple[str, ...]
    """Tensors with which the units are read."""
    residual: bool = False
    frozen: str | None = None
    """Why no unit of this group may be removed, or None."""
    widths: tuple[int, ...] = (1,)
    """Channels per unit along each tensor dimension that the group runs through."""
    fewest: int = 1
    """Units that must be left."""

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.units)

    @property
    def width(self) -> int:
        """Channels that one unit stands for where it is written."""
        return self.widths[0]

    def units_per_multiple(self, multiple: int) -> int:
        """Fewest units whose removal keeps every width a multiple of ``multiple``."""
        return math.lcm(*(multiple // math.gcd(multiple, width) for width in self.widths))


@dataclass(frozen=True)
class ReadSite:
    """A call of a convolution or linear layer that reads units with a parameter as its weight."""

    weight: str
    units: Units
    """The unit of each channel that it reads."""
    dim: int
    """The dimension of its input that holds the channels."""
    needs: tuple[int, ...] = ()
    """Units of the branches without any of which it is not there."""


@dataclass(frozen=True)
class Addition:
    """A sum of two activations; additions are numbered in the order in which they run."""

    number: int
    units: Units
    """The unit of each channel; empty where channels are not carried."""
    needs: tuple[int, ...] = ()
    """Units of the branches without any of which it is not there."""


@dataclass(frozen=True)
class Branch:
    """What lies between a fork and a residual addition; it is removed as a whole.

    A branch has a unit of its own, as a channel has: in masks it says whether the branch is there,
    in scores what its gate is worth. It may stand wherever a group of one unit may.
    """

    name: str
    unit: int
    module: str
    """The module that is shortened."""
    body: Body | None
    """What that computes; None if it becomes zero."""
    addition: int
    """The number of the step of the body that adds the branch."""
    stays: int
    """The number of the value on the addition's other side."""
    gate: Gate
    """Weights that tell the gradient of the factor of the branch's output."""
    inner: Units = field(default_factory=lambda: np.zeros(0, np.int64))
    """Units that are nowhere else: those of channels, and of branches in this one."""
    frozen: str | None = None
    """Why it may not be removed, or None."""
    gone: bool = False

    size = width = 1
    fewest = 0
    widths = (1,)
    residual = False
    writers: tuple[str, ...] = ()

    @property
    def program(self) -> Program:
        """What is left of the module without this branch alone."""
        program = program_without(self.body, {self.addition: self.stays})
        assert program is not None, "a branch whose removal no program says was found"
        return program

    @property
    def units(self) -> Units:
        """Its unit, as those of a group."""
        return np.array([self.unit])

    @property
    def readers(self) -> tuple[str, ...]:
        """The weights that hold its gate."""
        return self.gate.weights

    def units_per_multiple(self, multiple: int) -> int:
        """A branch goes whole, whatever its widths are."""
        return 1


Removable = Group | Branch
"""What a choice is made of: groups lose units, a branch the one that it has."""


@dataclass(frozen=True)
class ChannelGraph:
    """All dimensions and groups of a network; the input of every decision about channels."""

    axes: tuple[Axis, ...]
    groups: tuple[Group, ...]
    num_units: int
    macs: tuple[Term, ...]
    """Multiply-adds of one image."""
    params: tuple[Term, ...]
    read_sites: tuple[ReadSite, ...] = ()
    additions: tuple[Addition, ...] = ()
    layers: tuple[LayerCall, ...] = ()
    """Convolutions and linear layers in the order in which they run."""
    branches: tuple[Branch, ...] = ()
    """Branches of residual additions, with units behind those of all channels."""
    unknown: tuple[str, ...] = ()
    """Operators without a rule; they froze the groups that touch them."""
    random: tuple[str, ...] = ()
    """Operators that draw random numbers in evaluation mode, with their place in the source."""
    splits: tuple[tuple[str, Units], ...] = ()
    """Nodes that split units into parts, where either the number or the length may shrink."""

    @property
    def prunable(self) -> tuple[Group, ...]:
        """Groups that may lose units."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def removable(self) -> tuple[Branch, ...]:
        """Branches that are there and may go."""
        return tuple(b for b in self.branches if b.frozen is None and not b.gone)

    @property
    def frozen(self) -> tuple[Group, ...]:
        """Groups that stay dense."""
        return tuple(group for group in self.groups if group.frozen is not None)

    @property
    def readers(self) -> tuple[Axis, ...]:
        """Dimensions along which units are read."""
        return tuple(axis for axis in self.axes if axis.reads)

    @property
    def writers(self) -> tuple[Axis, ...]:
        """Dimensions along which units are written."""
        return tuple(axis for axis in self.axes if axis.writes)

    @cached_property
    def by_tensor(self) -> dict[tuple[str, int], Axis]:
        """The axes by tensor and dimension."""
        return {(axis.tensor, axis.dim): axis for axis in self.axes}

    @property
    def block_sites(self) -> tuple[Addition, ...]:
        """Residual additions: those that tie channels."""
        return tuple(addition for addition in self.additions if len(addition.units))

    @property
    def residual_units(self) -> Units:
        """Units that residual additions tie."""
        found = [group.units for group in self.groups if group.residual]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def everything(self) -> Mask:
        """Return the mask that keeps every unit."""
        return np.ones(self.num_units, dtype=bool)

    def closed(self, kept: Mask) -> Mask:
        """Return a mask without what is only in branches that are gone."""
        gone = [branch.inner for branch in self.branches if not kept[branch.unit]]
        if gone and kept[np.concatenate(gone)].any():
            kept = kept.copy()
            kept[np.concatenate(gone)] = False
        return kept

    def programs(self, kept: Mask) -> dict[str, Program]:
        """Return, by module, what is left of those that lose branches."""
        found: dict[str, Program] = {}
        gone = [branch for branch in self.branches if not kept[branch.unit]]
        within = {unit for branch in gone for unit in branch.inner.tolist()}
        by_module: dict[str, list[Branch]] = defaultdict(list)
        for branch in gone:
            if branch.unit not in within:  # what it is in goes
                by_module[branch.module].append(branch)
        for module, branches in by_module.items():
            additions = {branch.addition: branch.stays for branch in branches}
            program = program_without(branches[0].body, additions)
            if program is None:
                raise ModelError(f"no program says what is left of {module} without its branches")
            found[module] = program
        return found

    def removed(self, kept: Mask) -> ChannelGraph:
        """Return the graph of the shrunk network; unit ids stay those of the dense one."""
        gone = gone_from(self.programs(kept))
        additions = (a for a in self.additions if there(a.needs, kept))
        return replace(
            self,
            axes=tuple(
                replace(axis, units=_left(axis.units, kept))
                for axis in self.axes
                if not gone(axis.tensor)
            ),
            groups=tuple(
                replace(group, units=left)
                for group in self.groups
                if len(left := _left(group.units, kept))
            ),
            macs=_terms_left(self.macs, kept),
            params=_terms_left(self.params, kept),
            read_sites=tuple(
                replace(s, units=_left(s.units, kept))
                for s in self.read_sites
                if there(s.needs, kept)
            ),
            additions=tuple(
                replace(a, number=number, units=_left(a.units, kept))
                for number, a in enumerate(additions)
            ),
            branches=tuple(replace(b, gone=not kept[b.unit]) for b in self.branches),
            layers=tuple(call.left(kept) for call in self.layers if there(call.needs, kept)),
        )

    def freezing(self, reasons: dict[str, str]) -> ChannelGraph:
        """Return the graph with groups or branches frozen, by name, each for its reason."""
        groups = (replace(g, frozen=reasons.get(g.name, g.frozen)) for g in self.groups)
        branches = (replace(b, frozen=reasons.get(b.name, b.frozen)) for b in self.branches)
        return replace(self, groups=tuple(groups), branches=tuple(branches))


def gone_from(programs: Mapping[str, Program]) -> Callable[[str], bool]:
    """Return what tells whether a tensor, by its name, is gone with modules that are shortened."""

    def gone(name: str) -> bool:
        for module, program in programs.items():
            if name.startswith(f"{module}."):
                inner = name[len(module) + 1 :]
                calls = (f"{call}." for call in program.calls)
                return not (inner in program.tensors or inner.startswith(tuple(calls)))
        return False

    return gone


def _left(units: Units, kept: Mask) -> Units:
    return units[kept[units]]


def _terms_left(terms: Sequence[Term], kept: Mask) -> tuple[Term, ...]:
    return tuple(Term(t.coefficient, tuple(_left(u, kept) for u in t.axes)) for t in terms)
