"""Where 8 bits lie in a network, for the runtime that will read it.

``TENSORRT``: the scale is range / 127 and the zero point is 0, written out, because that is all
that TensorRT reads. Placement follows what it fuses. A Conv or Gemm with Q/DQ on both operands
computes in 8 bits, a pooling in the type of what it reads. Of a residual Add only the shortcut is
quantised: a Conv that the Add alone reads takes the Add in and adds the shortcut, in 8 bits, to its
own wide sums. Quantising the Conv's result as well would keep the two apart and round once more for
nothing.

``ONNXRUNTIME``, for processors: activations are unsigned, which its kernels want. What is never
negative has the zero point 0 and all 255 steps, everything else 128. A layer computes in 8 bits
only if its result is rounded too, so all results of layers, additions and poolings are. Weights
have 63 steps to either side: without VNNI two products are added in 16 bits, which 2 x 255 x 63
does not leave, and so a file computes the same on every processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.quantization.plan import LEVELS
from export.onnx.check import count_readers

if TYPE_CHECKING:
    import onnx

POOLINGS = frozenset({"AveragePool", "GlobalAveragePool"})
"""The poolings that compute; a maximum commutes with Q/DQ and needs none."""
BOUNDS = frozenset({"Relu", "Clip"})
"""What a runtime takes into the rounding behind it."""

POSITIVE = frozenset({"Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax"})
"""Operators whose results are never negative."""
OF_ONE = frozenset(
    {
        *("AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Reshape"),
        *("Squeeze", "Transpose", "Unsqueeze"),
    }
)
"""Operators whose results are never negative where the first of what they read is not."""
OF_ALL = frozenset({"Add", "Concat", "Mul"})
"""The same, where none of what they read is."""


FORMULAS = frozenset(
    {
        *("Div", "Erf", "Exp", "HardSigmoid", "Log", "Mul", "Neg", "Pow", "Reciprocal", "Sigmoid"),
        *("Softplus", "Sqrt", "Sub", "Tanh"),
    }
)
"""Operators that activation functions are made of, whose results may have any scale."""


Read = tuple[int, int]
"""Who reads a tensor: a node's index, and the place among its inputs."""
OUTSIDE = -1
"""In place of a node: whoever runs the graph."""


@dataclass(frozen=True)
class Form:
    """How 8 bits are written for a runtime."""

    unsigned: bool
    """Activations from 0 to 255 instead of -128 to 127."""
    results: bool
    """Whether results of layers, additions and poolings are rounded, whoever reads them."""
    weight_levels: int
    """Largest number of a weight."""


TENSORRT = Form(unsigned=False, results=False, weight_levels=LEVELS)
ONNXRUNTIME = Form(unsigned=True, results=True, weight_levels=63)
FORMS: Mapping[str, Form] = {"tensorrt": TENSORRT, "onnxruntime": ONNXRUNTIME}
"""By the names that targets give them."""


def quantised_layers(graph: onnx.GraphProto, form: Form) -> dict[int, int]:
    """Return the axis of the weight's scales for each node that computes in 8 bits, by index."""
    constants = {tensor.name for tensor in graph.initializer}
    ends, reads = {value.name for value in graph.output}, _reads(graph)
    return {
        index: axis
        for index, node in enumerate(graph.node)
        if (axis := channel_axis(node)) is not None
        and node.input[1] in constants
        and node.input[0] not in constants
        # What is not rounded is computed in float32, from weights that had better be float32 too.
        and not (form.results and _taking_in(node.output[0], graph, reads)[-1] in ends)
    }


def quantised_places(model: onnx.ModelProto, form: Form) -> dict[int, tuple[int, ...]]:
    """Return, for every node, the places of its inputs that are rounded and are no weights."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    layers, nodes = quantised_layers(graph, form), list(enumerate(graph.node))
    adds = [i for i, n in nodes if n.op_type == "Add" and not constants & set(n.input)]
    adds = [i for i in adds if not _of_a_formula(graph.node[i], graph)]
    places: dict[int, tuple[int, ...]] = {
        index: (0,) for index, node in nodes if index in layers or node.op_type in POOLINGS
    }
    if not form.results:
        places.update((index, _shortcut(graph.node[index], graph)) for index in adds)
        return {index: places.get(index, ()) for index, _ in nodes}
    floats = _floats(model)
    adds = [index for index in adds if graph.node[index].output[0] in floats]
    computed = [graph.node[index].output[0] for index in sorted({*places, *adds})]
    rounded = {graph.node[index].input[0] for index in places}
    rounded |= {name for index in adds for name in graph.node[index].input}
    reads = _reads(graph)
    last = {_taking_in(name, graph, reads)[-1] for name in computed}
    rounded |= last - {value.name for value in graph.output}
    return {
        index: tuple(place for place, name in enumerate(node.input) if name in rounded)
        for index, node in nodes
    }


def _of_a_formula(add: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether one operand of an Add is computed of the other's numbers, with no layer between.

    As x + 0.0447 x^3 of GELU's tanh form: one scale for both would leave nothing of small x.
    """
    made = {name: node for node in graph.node for name in node.output}
    first, second = (_behind(name, made) for name in add.input)
    return bool(first & second - {tensor.name for tensor in graph.initializer})


def _behind(name: str, made: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Return a tensor and those that it is computed of by the operators of formulas alone."""
    found, left = set[str](), [name]
    while left:
        name = left.pop()
        found.add(name)
        if name in made and made[name].op_type in FORMULAS:
            left.extend(set(made[name].input) - found)
    return found - {""}


def _floats(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the float32 tensors whose types are known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    return frozenset(
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    )


def _reads(graph: onnx.GraphProto) -> dict[str, list[Read]]:
    """Return who reads each tensor."""
    found: dict[str, list[Read]] = {value.name: [(OUTSIDE, 0)] for value in graph.output}
    for index, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            found.setdefault(name, []).append((index, place))
    return found


def _taking_in(name: str, graph: onnx.GraphProto, reads: Mapping[str, Sequence[Read]]) -> list[str]:
    """Return a result, and behind it those of the Relus and Clips each of which alone reads it."""
    chain = [name]
    while len(read := reads.get(chain[-1], ())) == 1:
        ((index, _),) = read
        if index == OUTSIDE or graph.node[index].op_type not in BOUNDS:
            break
        chain.append(graph.node[index].output[0])
    return chain


def never_negative(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the tensors that hold no number below zero, whatever the images are."""
    from onnx import numpy_helper

    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name for name, array in known.items() if (array >= 0).all()}
    for node in graph.node:
        read = [name for name in node.input if name]
        bounded = node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in found
        one = node.op_type in OF_ONE and read[0] in found
        every = node.op_type in OF_ALL and found >= set(read)
        if node.op_type in POSITIVE or bounded or one or every:
            found.update(node.output)
    return frozenset(found)


def rounded_at_once(
    graph: onnx.GraphProto, places: Mapping[int, Sequence[int]], layers: Mapping[int, int]
) -> set[str]:
    """Return results of layers that are only ever read rounded, and of Relu and Clip between.

    Args:
        graph: before anything is inserted.
        places: of each node's inputs that are quantised.
        layers: the nodes that compute in 8 bits.
    """
    reads = _reads(graph)
    rounded = {
        name
        for name, each in reads.items()
        if all(index != OUTSIDE and place in places[index] for index, place in each)
    }
    found: set[str] = set()
    for index in layers:
        chain = _taking_in(graph.node[index].output[0], graph, reads)
        ends = [length for length, name in enumerate(chain, start=1) if name in rounded]
        found.update(chain[: min(ends, default=0)])
    return found


def channel_axis(node: onnx.NodeProto) -> int | None:
    """Return the axis of a layer's weight along which its output channels lie; None: no layer."""
    if node.op_type == "Conv":
        return 0  # (outputs, inputs / groups, height, width)
    if node.op_type == "Gemm":
        flags = {entry.name: entry.i for entry in node.attribute}
        return 0 if flags.get("transB") else 1  # (outputs, inputs), else (inputs, outputs)
    return None


def _shortcut(add: onnx.NodeProto, graph: onnx.GraphProto) -> tuple[int, ...]:
    """Return which input of an Add is the shortcut; none if no Conv can take the Add in.

    Where both inputs come from such a Conv, the shortcut is the one behind fewer nodes: a shortcut
    is there to be short. Of equal ones it is the second, as ``y += shortcut`` writes it.
    """
    producers = {name: node for node in graph.node for name in node.output}
    readers = count_readers(graph)
    fusable = [
        name in producers and producers[name].op_type == "Conv" and readers[name] == 1
        for name in add.input
    ]
    if fusable == [True, True]:
        depth = _depths(graph)
        return (0,) if depth[add.input[0]] < depth[add.input[1]] else (1,)
    return (fusable.index(False),) if any(fusable) else ()


def _depths(graph: onnx.GraphProto) -> dict[str, int]:
    """Return for every tensor the number of nodes on the longest path to it."""
    depths: dict[str, int] = {}
    for node in graph.node:
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths.update((name, depth) for name in node.output)
    return depths
