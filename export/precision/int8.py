"""Explicit 8-bit quantisation: QuantizeLinear/DequantizeLinear pairs (Q/DQ) in a float graph.

A number x becomes round(x / scale), half to even, within -128 and 127 (ONNX, QuantizeLinear): one
scale for an activation, one for each output channel of a weight. Biases stay float. How it is
written depends on who reads it, and is a ``Form``.

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

With the rest in half precision, a layer whose result is rounded to 8 bits at once (behind Relu or
Clip at most) keeps float32 scales and bias: 8 bits go in and 8 bits come out, so nothing of it is
ever stored. ONNX Runtime rounds the bias of such a layer to a multiple of the product of both
scales, and that product leaves the range of half precision.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from compress.errors import ModelError
from export.onnx.check import standard_opset, walk_nodes
from export.precision.fp16 import Fp16Facts, Names, to_fp16

if TYPE_CHECKING:
    import onnx

LEVELS = 127
"""Largest 8-bit number that a range is mapped to."""
OLDEST_OPSET = 13
"""The first one whose Q/DQ has a scale for each channel."""
HALF_OPSET = 19
"""The first one whose Q/DQ reads and writes float16."""
POOLINGS = frozenset({"AveragePool", "GlobalAveragePool"})
"""The poolings that compute; a maximum commutes with Q/DQ and needs none."""

LARGEST_BIAS = 2**30
"""A rounded bias, which leaves as much of 32 bits to what is added to it."""
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

Rest = Literal["fp32", "fp16"]


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


@dataclass(frozen=True)
class Int8Facts:
    """What was quantised."""

    layers: int
    """Conv and Gemm nodes that compute in 8 bits."""
    float_layers: tuple[str, ...]
    """Names of those that do not, because their weights are not constants or their results are the
    network's."""
    activations: int
    """Activations with a Q/DQ pair."""
    weights: int
    """Weights with a Q/DQ pair."""
    rest: Fp16Facts | None
    """What half precision did to the rest; None where it is float32."""


def quantised_tensors(model: onnx.ModelProto, form: Form = TENSORRT) -> tuple[str, ...]:
    """Return the activations that ``to_int8`` quantises, in the order in which they are read."""
    places = _quantised_places(model.graph, form)
    nodes = enumerate(model.graph.node)
    return tuple(dict.fromkeys(node.input[p] for index, node in nodes for p in places[index]))


def to_int8(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    *,
    rest: Rest = "fp32",
    form: Form = TENSORRT,
) -> Int8Facts:
    """Insert Q/DQ pairs into a float32 model, in place.

    Args:
        model: opset 13 or newer; it stays as new as it is.
        ranges: for each of ``quantised_tensors``, the magnitude that the largest number stands for.
        rest: what everything else computes in. ``fp16`` needs opset 19, and gives a strongly typed
            model, whose layers that are rounded at once stay float32. ONNX Runtime up to 1.29 is
            no witness for it: on the CPU it cuts off the fraction of float16 numbers instead of
            rounding them.
        form: of the runtime that will read it.

    Raises:
        ModelError: the opset is too old, a range is missing or not positive, or a weight is not
            finite or, where the rest is ``fp16``, beyond 65504.
    """
    opset, needed = standard_opset(model), HALF_OPSET if rest == "fp16" else OLDEST_OPSET
    if opset < needed:
        raise ModelError(
            f"INT8 with the rest in {rest} needs opset {needed} and the model has opset {opset}"
        )
    quantising = _Quantising(model, ranges, rest, form)
    facts = quantising.run()
    if rest == "fp32":
        return Int8Facts(*facts, rest=None)
    return Int8Facts(*facts, rest=to_fp16(model, quantising.wide))


class _Key(NamedTuple):
    """What is rounded to 8 bits once."""

    name: str
    axis: int | None
    """Of a weight's scales."""
    wide: bool
    """Whether it is rounded from float32 where the rest is float16."""


class _Rounded(NamedTuple):
    """Names of an 8-bit tensor and of what its numbers mean."""

    key: _Key
    small: str
    scale: str
    zero: str


class _Quantising:
    """One insertion of pairs into one graph."""

    def __init__(
        self, model: onnx.ModelProto, ranges: Mapping[str, float], rest: Rest, form: Form
    ) -> None:
        self._graph, self._form = model.graph, form
        self._layers = _quantised_layers(model.graph, form)
        self._positive = _never_negative(model.graph) if form.unsigned else frozenset[str]()
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._ranges = ranges
        self._rest = rest
        self._names = Names(model.graph)
        self._rounded: dict[_Key, _Rounded] = {}
        self._least: dict[str, np.ndarray] = {}  # scales of each weight's channels
        self._restored: dict[tuple[str, bool], str] = {}  # by the 8-bit tensor and whether wide
        self._nodes: list[onnx.NodeProto] = []
        self.wide: set[str] = set()
        """Results whose nodes stay in float32, whatever the rest is."""

    def run(self) -> tuple[int, tuple[str, ...], int, int]:
        graph = self._graph
        places = _quantised_places(graph, self._form)
        if self._rest == "fp16":
            self.wide.update(_rounded_at_once(graph, places, self._layers))
        self._leave_room_for_biases()
        layers, floats = 0, []
        for index, node in enumerate(graph.node):
            wide, axis = node.output[0] in self.wide, self._layers.get(index)
            for place in places[index]:
                node.input[place] = self._restore(self._activation(node.input[place]), wide)
            if axis is not None:
                node.input[1] = self._restore(self._weight(node.input[1], axis, wide), wide)
                layers += 1
            elif _channel_axis(node) is not None:
                floats.append(node.name or node.output[0])
            self._nodes.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        weights = sum(key.axis is not None for key in self._rounded)
        return layers, tuple(floats), len(self._rounded) - weights, weights

    def _leave_room_for_biases(self) -> None:
        """Find the smallest scales of weights with which the bias fits into 32 bits.

        Integer kernels round it to a multiple of both scales' product, and saturate.
        """
        from onnx import numpy_helper

        for node in (self._graph.node[index] for index in self._layers):
            least = self._least.setdefault(node.input[1], np.zeros(1))
            bias = self._weights.get(node.input[2]) if len(node.input) > 2 else None
            if bias is not None and len(bias.dims) == 1:
                unit = self._activation_scale(node.input[0]) * LARGEST_BIAS
                fits = np.abs(numpy_helper.to_array(bias)) / unit
                self._least[node.input[1]] = np.maximum(least, fits)

    def _activation(self, name: str) -> _Rounded:
        key = _Key(name, None, name in self.wide)
        if key not in self._rounded:
            self._round(key, self._activation_scale(name))
        return self._rounded[key]

    def _activation_scale(self, name: str) -> np.ndarray:
        largest = self._ranges.get(name)
        if largest is None:
            raise ModelError(f"activation {name!r} has no range: calibrate this very model")
        if not (np.isfinite(largest) and largest > 0):
            raise ModelError(f"activation {name!r} has range {largest}, which is not positive")
        steps = 2 * LEVELS + 1 if name in self._positive else LEVELS
        scale = np.array(largest / steps)
        # Whoever reads it may be in half precision, and reads the same numbers.
        return _half_scales(scale) if self._rest == "fp16" else scale

    def _weight(self, name: str, axis: int, wide: bool) -> _Rounded:
        key = _Key(name, axis, wide)
        if key not in self._rounded:
            scales = weight_scales(self._weights[name], axis, self._form.weight_levels)
            scales = np.maximum(scales, self._least[name])
            halved = self._rest == "fp16" and not wide
            self._round(key, _half_scales(scales) if halved else scales)
        return self._rounded[key]

    def _round(self, key: _Key, scale: np.ndarray) -> None:
        """Add what rounds a tensor to 8 bits."""
        from onnx import numpy_helper

        stems = ("scale", "zero_point", "quantized")
        factor, zero, small = (self._names.new(f"{key.name}_{stem}") for stem in stems)
        self._graph.initializer.extend(
            (
                numpy_helper.from_array(scale.astype(np.float32), factor),
                numpy_helper.from_array(self._zero_point(key, scale.shape), zero),
            )
        )
        self._rounded[key] = _Rounded(key, small, factor, zero)
        self._add("QuantizeLinear", self._rounded[key], key.name, small, wide=key.wide)

    def _zero_point(self, key: _Key, shape: tuple[int, ...]) -> np.ndarray:
        if key.axis is not None or not self._form.unsigned:
            return np.zeros(shape, np.int8)
        return np.full(shape, 0 if key.name in self._positive else LEVELS + 1, np.uint8)

    def _restore(self, rounded: _Rounded, wide: bool) -> str:
        """Return the floating-point numbers that 8-bit ones stand for."""
        key = rounded.small, wide
        if key not in self._restored:
            result = self._names.new(f"{rounded.key.name}_dequantized")
            self._add("DequantizeLinear", rounded, rounded.small, result, wide=wide)
            self._restored[key] = result
        return self._restored[key]

    def _add(self, kind: str, rounded: _Rounded, source: str, result: str, *, wide: bool) -> None:
        from onnx import helper

        inputs = [source, rounded.scale, rounded.zero]
        title, axis = self._names.new(f"{rounded.key.name}_{kind}"), rounded.key.axis
        self._nodes.append(helper.make_node(kind, inputs, [result], title, axis=axis))
        if wide:
            self.wide.add(result)


def weight_scales(tensor: onnx.TensorProto, axis: int, levels: int = LEVELS) -> np.ndarray:
    """Return the scale of every channel of a weight, float64 of shape (channels,).

    Its largest magnitude becomes ``levels``.

    A channel of zeros, or of numbers so small that their scale would be zero, gets scale 1.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    if not np.isfinite(values).all():
        raise ModelError(f"weight {tensor.name!r} holds NaN or infinity")
    others = tuple(place for place in range(values.ndim) if place != axis)
    scales = np.abs(values).max(axis=others, initial=0).astype(np.float64) / levels
    scales[scales < np.finfo(np.float32).smallest_normal] = 1
    return scales


def _half_scales(scales: np.ndarray) -> np.ndarray:
    """Round scales up to half precision, so that no number falls out of its range and none is 0."""
    with np.errstate(over="ignore"):  # what is too large is refused by its name later
        rounded = scales.astype(np.float16)
        up = np.nextafter(rounded, np.float16(np.inf))
    return np.where(rounded < scales, up, rounded).astype(np.float32)


def _quantised_layers(graph: onnx.GraphProto, form: Form) -> dict[int, int]:
    """Return the axis of the weight's scales for each node that computes in 8 bits, by index."""
    constants = {tensor.name for tensor in graph.initializer}
    ends = {value.name for value in graph.output}
    return {
        index: axis
        for index, node in enumerate(graph.node)
        if (axis := _channel_axis(node)) is not None
        and node.input[1] in constants
        and node.input[0] not in constants
        # What is not rounded is computed in float32, from weights that had better be float32 too.
        and not (form.results and _bounded(node.output[0], graph) in ends)
    }


def _quantised_places(graph: onnx.GraphProto, form: Form) -> dict[int, tuple[int, ...]]:
    """Return, for every node, the places of its inputs that are rounded and are no weights."""
    constants = {tensor.name for tensor in graph.initializer}
    layers, nodes = _quantised_layers(graph, form), list(enumerate(graph.node))
    adds = [i for i, n in nodes if n.op_type == "Add" and not constants & set(n.input)]
    places: dict[int, tuple[int, ...]] = {
        index: (0,) for index, node in nodes if index in layers or node.op_type in POOLINGS
    }
    if not form.results:
        places.update((index, _shortcut(graph.node[index], graph)) for index in adds)
        return {index: places.get(index, ()) for index, _ in nodes}
    computed = [graph.node[index].output[0] for index in sorted({*places, *adds})]
    rounded = {graph.node[index].input[0] for index in places}
    rounded |= {name for index in adds for name in graph.node[index].input}
    rounded |= {_bounded(name, graph) for name in computed} - {v.name for v in graph.output}
    return {
        index: tuple(place for place, name in enumerate(node.input) if name in rounded)
        for index, node in nodes
    }


def _bounded(name: str, graph: onnx.GraphProto) -> str:
    """Return a result behind the Relu or Clip that alone reads it, else itself."""
    ends = {value.name for value in graph.output}
    while name not in ends:
        readers = [node for node in graph.node if name in node.input]
        if len(readers) != 1 or readers[0].op_type not in BOUNDS:
            break
        name = readers[0].output[0]
    return name


def _never_negative(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the tensors that hold no number below zero, whatever the images are."""
    from onnx import numpy_helper

    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name for name, array in known.items() if (array >= 0).all()}
    for node in graph.node:
        read = [name for name in node.input if name]
        bounded = node.op_type == "Clip" and len(read) > 1 and found >= {read[1]}
        one = node.op_type in OF_ONE and read[0] in found
        every = node.op_type in OF_ALL and found >= set(read)
        if node.op_type in POSITIVE or bounded or one or every:
            found.update(node.output)
    return frozenset(found)


def _rounded_at_once(
    graph: onnx.GraphProto, places: Mapping[int, Sequence[int]], layers: Mapping[int, int]
) -> set[str]:
    """Return results of layers that are only ever read rounded, and of Relu and Clip between.

    Args:
        graph: before anything is inserted.
        places: of each node's inputs that are quantised.
        layers: the nodes that compute in 8 bits.
    """
    readers: dict[str, list[tuple[int, bool]]] = {
        value.name: [(-1, False)] for value in graph.output
    }
    for index, node in enumerate(graph.node):
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((index, place in places[index]))
    found: set[str] = set()
    for index in layers:
        chain = [graph.node[index].output[0]]
        while len(read := readers.get(chain[-1], [])) == 1 and not read[0][1]:
            following = graph.node[read[0][0]] if read[0][0] >= 0 else None
            if following is None or following.op_type not in BOUNDS:
                break
            chain.append(following.output[0])
        if read and all(rounded for _, rounded in read):
            found.update(chain)
    return found


def _channel_axis(node: onnx.NodeProto) -> int | None:
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
    readers = Counter(name for node in walk_nodes(graph) for name in node.input)
    readers.update(value.name for value in graph.output)
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


@functools.cache
def rounds_half_precision() -> bool:
    """Return whether ONNX Runtime rounds float16 to int8 on the CPU.

    Up to 1.29 it cuts the fraction off: 0.75 becomes 0, and not 1 as the specification of
    QuantizeLinear says. Such a runtime cannot prove a network that quantises float16.

    Raises:
        EnvironmentUnfitError: it is not installed.
    """
    import onnx
    from onnx import helper, numpy_helper

    from export.runners.onnx_runner import import_onnxruntime

    half, small = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "rounding",
        [helper.make_tensor_value_info("x", half, [1])],
        [helper.make_tensor_value_info("y", small, [1])],
        [
            numpy_helper.from_array(np.array(1, np.float16), "scale"),
            numpy_helper.from_array(np.array(0, np.int8), "zero"),
        ],
    )
    opsets = [helper.make_opsetid("", 19)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
    (rounded,) = session.run(None, {"x": np.array([0.75], np.float16)})
    return bool(rounded[0] == 1)
