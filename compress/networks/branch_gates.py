"""The gate of a branch: which weights scale what it adds.

Behind a layer, a factor of its weight and bias is a factor of its result; where everything up to
the addition lets a factor pass, it is one of the branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from compress.networks.capture import Captured
from compress.networks.programs import Gate
from compress.networks.walk import operator_name

HOMOGENEOUS = frozenset(
    {
        *("relu", "leaky_relu", "dropout", "feature_dropout", "contiguous", "clone", "to", "neg"),
        *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "expand"),
        *("mean", "sum", "avg_pool2d", "adaptive_avg_pool2d", "max_pool2d", "slice", "detach"),
        *("alias", "view_as", "reshape_as", "expand_as", "lift_fresh"),
        *("upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle", "channel_shuffle"),
    }
)
"""Operators of one tensor that a positive factor passes through."""
LAYERS = frozenset(
    f"{kind}{dims}d" for kind in ("conv", "conv_transpose") for dims in (1, 2, 3)
) | {"linear"}
SUMS = frozenset({"add", "sub", "cat"})
NORMS = frozenset({"batch_norm", "group_norm", "layer_norm", "instance_norm"})


class FoldedBranch:
    """The gate of a branch, from the weights in it."""

    def __init__(self, captured: Captured, fixed: set[fx.Node], branch: frozenset[fx.Node]) -> None:
        self.captured, self.fixed, self.branch = captured, fixed, branch

    def gate(self, node: fx.Node, user: fx.Node) -> Gate | None:
        """Return the weights that scale what one reader of a node's result reads.

        Whatever lies between them and it must let a factor pass through.
        """
        if node not in self.branch or node.op != "call_function":
            return None
        less = self._readers(other for other in node.users if other is not user)
        gate = self._own(node)
        if gate is None or less is None:
            return None
        return Gate(gate.weights, tuple(dict.fromkeys((*gate.less, *less))))

    def _own(self, node: fx.Node) -> Gate | None:
        """Return the weights that scale a node's result, whoever reads it."""
        name = operator_name(node)
        sources = [n for n in node.all_input_nodes if n not in self.fixed]
        if name in LAYERS or name in NORMS:
            return self._of_layer(node)
        if name == "mul" and len(sources) == 1:
            fixed = [n for n in node.all_input_nodes if n in self.fixed]
            scale = self._weight(fixed[0]) if fixed else None
            return Gate((scale,)) if scale else self.gate(sources[0], node)
        if name == "mul" and len(sources) == 2:  # values, and factors computed from them
            full = sorted(sources, key=lambda n: -n.meta["val"].numel())
            return self.gate(full[0], node) or self.gate(full[1], node)
        if name in SUMS and len(sources) == len(node.all_input_nodes):
            return joined(self.gate(source, node) for source in sources)
        if name in HOMOGENEOUS and len(sources) == 1:
            return self.gate(sources[0], node)
        return None

    def _of_layer(self, node: fx.Node) -> Gate | None:
        """Weight and bias of a layer, where nothing else uses them."""
        given = _arguments(node)
        weight, bias = (given.get(name) for name in ("weight", "bias"))
        names = [self._weight(n) for n in (weight, bias) if isinstance(n, fx.Node)]
        if not isinstance(weight, fx.Node) or None in names:
            return None
        return Gate(tuple(name for name in names if name))

    def _readers(self, nodes: Iterable[fx.Node]) -> tuple[str, ...] | None:
        """Return the weights with which layers read a value, through what a factor passes."""
        found: list[str] = []
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if operator_name(node) in LAYERS:
                weight = self._weight(_arguments(node).get("weight"))
                if weight is None:
                    return None
                found.append(weight)
            elif operator_name(node) in HOMOGENEOUS and node in self.branch:
                waiting += node.users
            else:
                return None
        return tuple(dict.fromkeys(found))

    def _weight(self, node: Any) -> str | None:
        """Return the weight, used once, whose factor a value that is computed from it has."""
        if not isinstance(node, fx.Node) or len(node.users) > 1:
            return None
        if node in self.captured.named:
            return self.captured.named[node]
        if node.op == "call_function" and operator_name(node) in NORMS:  # of a weight's rows
            return self._weight(_arguments(node).get("weight"))
        if node.op != "call_function" or operator_name(node) not in {*HOMOGENEOUS, "mul"}:
            return None
        shaped = operator_name(node).endswith("_as")  # like another tensor, which gives no values
        sources = node.all_input_nodes[:1] if shaped else node.all_input_nodes
        return self._weight(sources[0]) if len(sources) == 1 else None


def joined(gates: Iterable[Gate | None]) -> Gate | None:
    """Return the gate of a sum."""
    found = list(gates)
    if not found or any(gate is None for gate in found):
        return None
    weights = [w for gate in found if gate for w in gate.weights]
    less = [w for gate in found if gate for w in gate.less]
    return Gate(tuple(dict.fromkeys(weights)), tuple(dict.fromkeys(less)))


def _arguments(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
