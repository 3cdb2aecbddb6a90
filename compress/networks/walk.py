"""Atoms: what a walk over a captured graph knows of every dimension of every value.

A dimension that may shrink carries one atom per index. Rules (compress.networks.rules) say for each
operator how the dimensions of its result follow from those of its arguments; this is what they
speak with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.networks.capture import module_of
from compress.networks.groups import Units
from compress.networks.layers import LayerShape

Atoms = Units
Dim = Atoms | None
"""The atoms along one dimension; None where it never shrinks: batch, space, kernels."""
Origins = frozenset[tuple[str, int]]
"""Dimensions of named tensors that a dimension of a value is, index by index."""
NOWHERE: Origins = frozenset()
FOLDED = frozenset({"batch_norm", "dropout", "feature_dropout", "contiguous"})
"""Operators that are no more when a network is exported."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph."""

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    origins: tuple[Origins, ...] = ()
    fixed: bool = False
    """Whether it is computed from parameters, buffers and constants alone."""
    name: str | None = None
    """Of the parameter or buffer that it is, unchanged."""

    def __post_init__(self) -> None:
        if not self.origins:
            object.__setattr__(self, "origins", (NOWHERE,) * len(self.shape))

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def take(self, order: Sequence[int]) -> Value:
        """Return the dimensions in another order, or some of them."""
        return Value(
            tuple(self.shape[i] for i in order),
            tuple(self.dims[i] for i in order),
            tuple(self.origins[i] for i in order),
            self.fixed,
        )

    def same(self) -> Value:
        """Return a value with the same dimensions that is computed from this one."""
        return self.take(range(self.rank))

    def with_dim(self, dim: int, atoms: Dim, size: int) -> Value:
        """Return the value with another dimension in place of one."""
        shape, dims, origins = list(self.shape), list(self.dims), list(self.origins)
        shape[dim], dims[dim], origins[dim] = size, atoms, NOWHERE
        return Value(tuple(shape), tuple(dims), tuple(origins), self.fixed)


Result = Value | Sequence[Value]
Rule = Callable[["Call"], Result | None]
"""From a call to its result; None when this use of the operator is not understood."""


@dataclass
class Hint:
    """A number in the graph that may be the width of something, as one of a module's integers."""

    module: str
    size: int
    atoms: Atoms
    attribute: str | None = None
    """The name of the integer, where that alone will do."""


@dataclass
class Walk:
    """What has been found so far: atoms, ties, and what stays dense for which reason."""

    batch: int
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """Those of the network, by qualified name."""
    whole_groups: bool = False
    """Whether every group of a grouped convolution goes whole."""
    outer: frozenset[str] = frozenset()
    """Nodes that split channels into parts whose number shrinks, where else their length does."""
    training: bool = False
    """Whether the graph is that of training mode, whose costs do not count."""
    node: fx.Node | None = None
    """The one whose operator is looked at."""
    num_atoms: int = 0
    ties: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    frozen: list[tuple[Atoms, str]] = field(default_factory=list)
    reads: set[tuple[str, int]] = field(default_factory=set)
    writes: set[tuple[str, int]] = field(default_factory=set)
    still: set[tuple[str, int]] = field(default_factory=set)
    """Dimensions of tensors that hold no channels, as a kernel's."""
    macs: list[tuple[fx.Node | None, float, tuple[Atoms, ...]]] = field(default_factory=list)
    sites: list[tuple[fx.Node, str, Atoms, int]] = field(default_factory=list)
    additions: list[tuple[fx.Node, Dim]] = field(default_factory=list)
    layers: list[tuple[fx.Node, str, LayerShape, Dim | int, Dim | int]] = field(
        default_factory=list
    )
    """Weight, shape, and the dimensions read and written, of every layer."""
    widths: list[tuple[str, str, Atoms]] = field(default_factory=list)
    """A module, the name of an integer of it, and what that integer counts."""
    splits: list[tuple[str, Atoms]] = field(default_factory=list)
    """Nodes that split channels into parts, where either the number or the length may shrink."""
    hints: list[Hint] = field(default_factory=list)
    least: list[tuple[Atoms, int]] = field(default_factory=list)

    def fresh(self, count: int) -> Atoms:
        """Return new atoms."""
        atoms = np.arange(self.num_atoms, self.num_atoms + count, dtype=np.int64)
        self.num_atoms += count
        return atoms

    def freeze(self, dim: Dim, reason: str) -> None:
        """Keep a dimension dense."""
        if dim is not None:
            self.frozen.append((dim, reason))

    def tie(self, first: Dim, second: Dim, reason: str) -> Dim:
        """Let two dimensions of equal length lose the same indices; return either.

        Where one of them never shrinks the other stays dense, for the reason given.
        """
        if first is None or second is None:
            found = second if first is None else first
            self.freeze(found, reason)
            return found
        if first is not second:
            self.ties.append((first, second))
        return first

    def tie_rows(self, atoms: Atoms, rows: int) -> Atoms:
        """Let each of ``rows`` consecutive blocks of a dimension live and die whole.

        Returns:
            (rows,) the first atom of each block.
        """
        blocks = atoms.reshape(rows, -1)
        self.ties.append((np.repeat(blocks[:, 0], blocks.shape[1]), atoms.ravel()))
        return blocks[:, 0]

    def read(self, dim: Dim, weight: Value, at: int, reason: str) -> None:
        """A dimension of an activation is contracted with one of a weight."""
        if weight.dims[at] is None:
            self.freeze(dim, reason)
            return
        self.tie(dim, weight.dims[at], reason)
        self.reads |= weight.origins[at]

    def write(self, weight: Value, at: int) -> Dim:
        """Return the dimension that a weight gives to a result."""
        self.writes |= weight.origins[at]
        return weight.dims[at]

    def keep_still(self, value: Value, *dims: int) -> None:
        """Say of dimensions of a weight that they hold no channels."""
        for dim in dims:
            self.still |= value.origins[dim]
            if not value.origins[dim]:
                self.freeze(value.dims[dim], "computed from a dimension that holds no channels")

    def count(self, number: float, *dims: Dim | int) -> None:
        """Add multiply-adds of the whole batch: a number times the lengths of dimensions."""
        axes = []
        for dim in dims:
            if isinstance(dim, int):
                number *= dim
            elif dim is not None:
                axes.append(dim)
        if not self.training:
            self.macs.append((self.node, number / self.batch, tuple(axes)))


@dataclass
class Call:
    """One call of an operator: its arguments by the names of its schema."""

    walk: Walk
    node: fx.Node
    arguments: dict[str, Any]
    """Tensors are Values; what was left out has its default."""

    @property
    def name(self) -> str:
        """The operator, as a user would know it."""
        return operator_name(self.node)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        """Return an argument, or the default where the operator has none of that name."""
        found = self.arguments.get(argument)
        return default if found is None else found

    @property
    def values(self) -> list[Value]:
        """All tensors among the arguments, in order."""
        return list(values_in(list(self.arguments.values())))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, or of its first tensor."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all tensors of the result."""
        return [tuple(int(n) for n in v.shape) for v in tensors_in(self.node.meta.get("val"))]

    @property
    def module(self) -> str:
        """Qualified name of the innermost module whose forward makes the call."""
        return module_of(self.node)

    def freeze_others(self, value: Value, dims: set[int]) -> None:
        """Keep every dimension of a tensor dense but some."""
        for dim in range(value.rank):
            if dim not in dims:
                self.walk.freeze(value.dims[dim], f"{self.name} along it")

    def state(self, *held: Value, **widths: Dim) -> None:
        """Integers of the calling module, and of those that hold the tensors, state widths."""
        tensors = {name for value in held for origins in value.origins for name, _ in origins}
        for owner in (self.module, *(name.rpartition(".")[0] for name in sorted(tensors))):
            self.walk.widths += [(owner, n, dim) for n, dim in widths.items() if dim is not None]

    def freeze_all(self, reason: str) -> None:
        """Keep everything dense that the call touches."""
        for value in self.values:
            for dim in value.dims:
                self.walk.freeze(dim, reason)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a node's result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [v for v in value if isinstance(v, torch.Tensor)]
    return []


def operator_name(node: fx.Node) -> str:
    """Return the name of what a node calls: ``conv2d``, ``mylib.blur``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::").replace("::", ".")
        # relu_ has the rule of relu; the two underscores of __and__ are its own.
        return name[:-1] if name.endswith("_") and not name.startswith("__") else name
    return getattr(target, "__name__", str(target))


def followers(node: fx.Node) -> tuple[str, ...]:
    """Return the pointwise operators behind a node, each the only reader of the one before."""
    found: list[str] = []
    while len(node.users) == 1:
        (node,) = node.users
        name = operator_name(node) if node.op == "call_function" else ""
        if name not in FOLDED:
            if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
                break
            found.append(name)
    return tuple(found)


def values_in(arguments: Any) -> Iterator[Value]:
    """Yield the values of a tree of lists, in order."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for item in arguments:
            yield from values_in(item)


def plain(shape: Sequence[int], *, fixed: bool = False) -> Value:
    """Return a value no dimension of which shrinks."""
    return Value(tuple(shape), (None,) * len(shape), fixed=fixed)
