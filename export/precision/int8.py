"""Explicit 8-bit quantisation: QuantizeLinear/DequantizeLinear pairs (Q/DQ) in a float graph.

A number x becomes round(x / scale), half to even, within -128 and 127 (ONNX, QuantizeLinear). The
scale is range / 127 and the zero point is 0, written out, because that is all that TensorRT reads:
one scale for an activation, one for each output channel of a weight. Biases stay float.

Placement follows what TensorRT fuses. A Conv or Gemm with Q/DQ on both operands computes in 8 bits,
a pooling in the type of what it reads. Of a residual Add only the shortcut is quantised: a Conv
that the Add alone reads takes the Add in and adds the shortcut, in 8 bits, to its own wide sums.
Quantising the Conv's result as well would keep the two apart and round once more for nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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

Rest = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Int8Facts:
    """What was quantised."""

    layers: int
    """Conv and Gemm nodes that compute in 8 bits."""
    float_layers: tuple[str, ...]
    """Names of those that do not, because their weights are not constants."""
    activations: int
    """Activations with a Q/DQ pair."""
    weights: int
    """Weights with a Q/DQ pair."""
    rest: Fp16Facts | None
    """What half precision did to the rest; None where it is float32."""


def quantised_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the activations that ``to_int8`` quantises, in the order in which they are read."""
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    found: dict[str, None] = {}
    for node in graph.node:
        for place in _activation_inputs(node, graph, constants):
            found.setdefault(node.input[place])
    return tuple(found)


def to_int8(
    model: onnx.ModelProto, ranges: Mapping[str, float], *, rest: Rest = "fp32"
) -> Int8Facts:
    """Insert Q/DQ pairs into a float32 model, in place.

    Args:
        model: opset 13 or newer; it stays as new as it is.
        ranges: for each of ``quantised_tensors``, the magnitude that 127 stands for.
        rest: what everything else computes in. ``fp16`` needs opset 19, and gives a strongly typed
            model whose scales are float16 too. ONNX Runtime up to 1.29 is no witness for it: on
            the CPU it cuts off the fraction of float16 numbers instead of rounding them.

    Raises:
        ModelError: the opset is too old, a range is missing or not positive, or a weight is not
            finite or, where the rest is ``fp16``, beyond 65504.
    """
    opset, needed = standard_opset(model), HALF_OPSET if rest == "fp16" else OLDEST_OPSET
    if opset < needed:
        raise ModelError(
            f"INT8 with the rest in {rest} needs opset {needed} and the model has opset {opset}"
        )
    facts = _Quantising(model, ranges, rest).run()
    if rest == "fp32":
        return Int8Facts(*facts, rest=None)
    return Int8Facts(*facts, rest=to_fp16(model))


class _Quantising:
    """One insertion of pairs into one graph."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, float], rest: Rest) -> None:
        self._graph = model.graph
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._ranges = ranges
        self._rest = rest
        self._names = Names(model.graph)
        self._pairs: dict[tuple[str, int | None], str] = {}  # by tensor and axis of its scales
        self._nodes: list[onnx.NodeProto] = []

    def run(self) -> tuple[int, tuple[str, ...], int, int]:
        graph, constants = self._graph, set(self._weights)
        places = {
            index: _activation_inputs(node, graph, constants)
            for index, node in enumerate(graph.node)
        }
        layers, floats = 0, []
        for index, node in enumerate(graph.node):
            for place in places[index]:
                node.input[place] = self._activation(node.input[place])
            axis = _channel_axis(node)
            if axis is not None and places[index]:
                node.input[1] = self._weight(node.input[1], axis)
                layers += 1
            elif axis is not None:
                floats.append(node.name or node.output[0])
            self._nodes.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        weights = sum(axis is not None for _, axis in self._pairs)
        return layers, tuple(floats), len(self._pairs) - weights, weights

    def _activation(self, name: str) -> str:
        if (name, None) not in self._pairs:
            largest = self._ranges.get(name)
            if largest is None:
                raise ModelError(f"activation {name!r} has no range: calibrate this very model")
            if not (np.isfinite(largest) and largest > 0):
                raise ModelError(f"activation {name!r} has range {largest}, which is not positive")
            self._pairs[name, None] = self._pair(name, np.array(largest / LEVELS), None)
        return self._pairs[name, None]

    def _weight(self, name: str, axis: int) -> str:
        if (name, axis) not in self._pairs:
            scales = weight_scales(self._weights[name], axis)
            self._pairs[name, axis] = self._pair(name, scales, axis)
        return self._pairs[name, axis]

    def _pair(self, name: str, scale: np.ndarray, axis: int | None) -> str:
        """Add a pair behind a tensor and return what comes out of it."""
        from onnx import helper, numpy_helper

        scale = _half_scales(scale) if self._rest == "fp16" else scale.astype(np.float32)
        stems = ("scale", "zero_point", "quantized", "dequantized")
        factor, zero, small, result = (self._names.new(f"{name}_{stem}") for stem in stems)
        self._graph.initializer.extend(
            (
                numpy_helper.from_array(scale, factor),
                numpy_helper.from_array(np.zeros(scale.shape, np.int8), zero),
            )
        )
        steps = (("QuantizeLinear", name, small), ("DequantizeLinear", small, result))
        for kind, source, target in steps:
            inputs, title = [source, factor, zero], f"{name}_{kind}"
            self._nodes.append(helper.make_node(kind, inputs, [target], title, axis=axis))
        return result


def weight_scales(tensor: onnx.TensorProto, axis: int) -> np.ndarray:
    """Return the scale of every channel of a weight, float64 of shape (channels,).

    A channel of zeros, or of numbers so small that their scale would be zero, gets scale 1.

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    if not np.isfinite(values).all():
        raise ModelError(f"weight {tensor.name!r} holds NaN or infinity")
    others = tuple(place for place in range(values.ndim) if place != axis)
    scales = np.abs(values).max(axis=others, initial=0).astype(np.float64) / LEVELS
    scales[scales < np.finfo(np.float32).smallest_normal] = 1
    return scales


def _half_scales(scales: np.ndarray) -> np.ndarray:
    """Round scales up to half precision, so that no number falls out of its range and none is 0."""
    with np.errstate(over="ignore"):  # what is too large is refused by its name later
        rounded = scales.astype(np.float16)
        up = np.nextafter(rounded, np.float16(np.inf))
    return np.where(rounded < scales, up, rounded).astype(np.float32)


def _activation_inputs(
    node: onnx.NodeProto, graph: onnx.GraphProto, constants: set[str]
) -> tuple[int, ...]:
    """Return the places of a node's inputs that are quantised and are not weights."""
    if node.op_type in POOLINGS:
        return (0,)
    if _channel_axis(node) is not None:
        return (0,) if node.input[1] in constants and node.input[0] not in constants else ()
    if node.op_type == "Add" and not constants & set(node.input):
        return _shortcut(node, graph)
    return ()


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
