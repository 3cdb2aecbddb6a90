"""Find the branches of residual additions in a captured graph: what may go as a whole.

A branch is what lies between a fork and an addition. Which of an addition's two sides it is, is
told by the work that only this side needs: a projection is less than what it goes around. The
module whose forward adds is shortened to what is left of it; where that cannot be said, a module
that is the whole branch becomes zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compress.networks.branch_gates import FoldedBranch
from compress.networks.capture import Captured, inner_name
from compress.networks.programs import Body, Gate, Operand, Step
from compress.networks.rules.pointwise import FURTHER
from compress.networks.walk import operator_name

RECTIFIERS = frozenset({"relu"})
KEEP_SIGN = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout", "contiguous"})
"""Operators whose result is never negative where what they read is not."""


@dataclass(frozen=True)
class Found:
    """A branch of a captured graph."""

    module: str
    """Whose forward is shortened."""
    body: Body | None
    """All of its steps; None of a module that becomes zero."""
    addition: int
    """The number of the step that adds; 0 without a body."""
    stays: int
    """The number of the value on the addition's other side."""
    nodes: frozenset[fx.Node]
    """What is no more without it, the addition included."""
    gate: Gate | None
    """None where no weights tell its gradient."""


def branches_of(
    captured: Captured, additions: Iterable[fx.Node], work: Mapping[fx.Node, float]
) -> list[Found]:
    """Return the branches of a network, in the order of their additions.

    Args:
        captured: the network in evaluation mode.
        additions: the nodes that add two activations.
        work: multiply-adds of the nodes that have any.
    """
    finder = _Finder(captured, work)
    found = [branch for node in additions if (branch := finder.at(node)) is not None]
    return [b for b in found if not any(_is_part(b, other) for other in found)]


def _is_part(branch: Found, other: Found) -> bool:
    """Whether a branch is one summand of another, whose gate is that of all summands."""
    nested = branch.module == other.module and branch.nodes < other.nodes
    if not nested or branch.gate is None or other.gate is None:
        return False
    return {*branch.gate.weights} <= {*other.gate.weights}


@dataclass
class _Called:
    """The nodes of one step of a module, and the module that it calls, if any."""

    nodes: list[fx.Node]
    path: str | None
    """Qualified name of the module that is called."""


@dataclass
class _Module:
    """One module whose forward adds: its body, and where its nodes are in it."""

    body: Body
    steps: list[_Called]
    step_of: dict[fx.Node, int] = field(default_factory=dict)


class _Finder:
    def __init__(self, captured: Captured, work: Mapping[fx.Node, float]) -> None:
        self.captured, self.work = captured, work
        self.calls: dict[str, set[str]] = defaultdict(set)
        self.inside: dict[str, list[fx.Node]] = defaultdict(list)
        for node in captured.graph.nodes:
            if node.op == "call_function":
                for key, path in stack_of(node):
                    self.calls[path].add(key)
                    self.inside[key].append(node)
        self.fixed = {*captured.named, *captured.constants}
        for node in captured.graph.nodes:
            if node.op == "call_function" and self.fixed.issuperset(node.all_input_nodes):
                self.fixed.add(node)
        self.modules: dict[str, _Module | None] = {}

    # One addition

    def at(self, node: fx.Node) -> Found | None:
        """Return the branch that ends in an addition, if there is one that can go."""
        sides = [side for side in node.args[:2] if isinstance(side, fx.Node)]
        stack = stack_of(node)
        if len(sides) != 2 or sides[0] is sides[1] or not stack:
            return None
        (key, path), both = stack[-1], (sides, sides[::-1])
        found = [self._of_module(node, side, other, key, path) for side, other in both]
        if not any(found):
            found = [self._whole_module(node, side, other) for side, other in both]
        branches = [branch for branch in found if branch is not None]
        return max(branches, key=lambda b: self._work(b.nodes), default=None)

    def _of_module(
        self, node: fx.Node, side: fx.Node, other: fx.Node, key: str, path: str
    ) -> Found | None:
        """The branch goes from the module whose forward adds."""
        module = self._module(key, path)
        if module is None:
            return None
        number = module.step_of[node]
        if module.steps[number - 1].path is not None:
            return None
        stays = module.step_of.get(other, 0 if other is self._input(key) else -1)
        whole, left = module.body.without({}), module.body.without({number: stays})
        if left is None:
            return None
        before = whole[1] if whole else frozenset(range(1, len(module.steps) + 1))
        gone = {n for i in before - left[1] for n in module.steps[i - 1].nodes}
        return self._found(path, module.body, number, stays, frozenset(gone), (side, other, node))

    def _whole_module(self, node: fx.Node, side: fx.Node, other: fx.Node) -> Found | None:
        """One side is the result of a module and of nothing else, which becomes zero."""
        for key, path in stack_of(side):
            nodes = self.inside[key]
            leaving = {n for n in nodes if any(user not in nodes for user in n.users)}
            once = len(self.calls[path]) == 1 and path
            if once and node not in nodes and leaving == {side} and set(side.users) == {node}:
                gone = frozenset({*nodes, node})
                inside = frozenset(nodes)
                if all(set(read.users) - inside for read in self._reads(inside)):  # a fork
                    return self._found(path, None, 0, 0, gone, (side, other, node))
        return None

    def _found(
        self,
        path: str,
        body: Body | None,
        addition: int,
        stays: int,
        gone: frozenset[fx.Node],
        sides: Sequence[fx.Node],
    ) -> Found | None:
        side, other, node = sides
        if side not in gone or other in gone or not self._work(gone):
            return None
        read = self._reads(gone) - {other}
        if not read <= self._ancestors(other) or (read and read <= {*self.captured.inputs}):
            return None  # two networks are added, and nothing forks but the image
        return Found(
            path,
            body,
            addition,
            stays,
            gone,
            FoldedBranch(self.captured, self.fixed, gone).gate(side, node),
        )

    def _work(self, nodes: Iterable[fx.Node]) -> float:
        return sum(self.work.get(node, 0) for node in nodes)

    def _reads(self, nodes: frozenset[fx.Node]) -> set[fx.Node]:
        """Return the activations that nodes read from outside."""
        read = {source for node in nodes for source in self._sources(node)}
        return read - nodes

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n not in self.fixed]

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            for source in self._sources(waiting.pop()):
                if source not in found:
                    found.add(source)
                    waiting.append(source)
        return found

    # Modules

    def _module(self, key: str, path: str) -> _Module | None:
        """Return a module's steps, where it is called once and returns one value."""
        if key not in self.modules:
            once = len(self.calls[path]) == 1 and path
            self.modules[key] = self._taken_apart(key, path) if once else None
        return self.modules[key]

    def _taken_apart(self, key: str, path: str) -> _Module | None:
        nodes = self.inside[key]
        leaving = [n for n in nodes if any(user not in nodes for user in n.users)]
        if len(leaving) != 1:
            return None
        called = list(self._called(key, nodes))
        step_of = {n: i for i, step in enumerate(called, 1) for n in step.nodes}
        first = self._input(key)
        steps, reads, rectifies = [], [], set()
        positive = {0} if first is not None and self._is_positive(first) else set()
        for number, each in enumerate(called, 1):
            read = self._read_by(each)
            reads.append(tuple(step_of.get(n, 0 if n is first else -1) for n in read))
            steps.append(self._step(path, each, read, reads[-1]))
            plain = len(each.nodes) == 1 and len(read) == 1
            if plain and operator_name(each.nodes[0]) in RECTIFIERS:
                rectifies.add(number)
            if self._is_positive(each.nodes[-1]):
                positive.add(number)
        body = Body(
            tuple(steps),
            tuple(reads),
            step_of[leaving[0]],
            frozenset(rectifies),
            frozenset(positive),
        )
        return _Module(body, called, step_of)

    def _called(self, key: str, nodes: Sequence[fx.Node]) -> Iterable[_Called]:
        """Group the nodes of a module by the modules that its forward calls."""
        step: _Called | None = None
        last: str | None = None
        for node in nodes:
            stack = stack_of(node)
            deeper = stack[[k for k, _ in stack].index(key) + 1 :]
            inner, path = deeper[0] if deeper else (None, None)
            if step is None or inner is None or inner != last:
                if step is not None:
                    yield step
                step = _Called([], path)
            step.nodes.append(node)
            last = inner
        if step is not None:
            yield step

    def _read_by(self, step: _Called) -> list[fx.Node]:
        """Return the activations that a step reads, each once, in order."""
        read = [source for node in step.nodes for source in self._sources(node)]
        return [n for n in dict.fromkeys(read) if n not in step.nodes]

    def _step(
        self, path: str, step: _Called, read: Sequence[fx.Node], numbers: Sequence[int]
    ) -> Step | None:
        """Return a step as programs say it, or None."""
        value = dict(zip(read, (f"${n}" for n in numbers), strict=True))
        if step.path is not None:
            leaving = [n for n in step.nodes if any(u not in step.nodes for u in n.users)]
            if not step.path.startswith(f"{path}.") or len(leaving) != 1 or len(read) != 1:
                return None
            return Step((value[read[0]],), call=step.path[len(path) + 1 :])
        (node,) = step.nodes
        operands = [self._operand(path, item, value) for item in node.args]
        op = _functional(node)
        if op is None or node.kwargs or ... in operands:
            return None
        return Step(tuple(operands), op=op)

    def _operand(self, path: str, item: Any, value: Mapping[fx.Node, str]) -> Operand | Any:
        """Return an operand, or ``...`` where programs have no word for it."""
        if isinstance(item, fx.Node):
            owner, _, name = self.captured.named.get(item, "").rpartition(".")
            return value.get(item, name if name and owner == path else ...)
        return item if isinstance(item, int | float | bool | None) else ...

    def _input(self, key: str) -> fx.Node | None:
        """Return the activation from outside that a module reads first."""
        nodes = self.inside[key]
        members = set(nodes)
        return next((s for n in nodes for s in self._sources(n) if s not in members), None)

    def _is_positive(self, node: fx.Node) -> bool:
        while node.op == "call_function" and operator_name(node) in KEEP_SIGN:
            node = self._sources(node)[0]
        return node.op == "call_function" and operator_name(node) in RECTIFIERS


def stack_of(node: fx.Node) -> list[tuple[str, str]]:
    """Return the modules whose forward calls a node, outermost first: the call, and its name."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, inner_name(path)) for key, (path, *_) in stack.items()]


def _functional(node: fx.Node) -> str | None:
    """Return the operator of a step that computes element by element and changes no operand."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    base, overload = operator_name(node), target._overloadname
    packet: Callable[..., Any] | None = getattr(torch.ops.aten, base, None)
    found = getattr(packet, overload, None)
    elementwise = torch.Tag.pointwise in getattr(found, "tags", ()) or base in FURTHER
    return f"{base}.{overload}" if found is not None and elementwise else None
