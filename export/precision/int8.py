"""Explicit 8-bit quantisation: QuantizeLinear/DequantizeLinear pairs (Q/DQ) in a float graph.

A number x becomes round(x / scale), half to even, within -128 and 127 (ONNX, QuantizeLinear): one
scale for an activation, one for each output channel of a weight. Biases stay float. How it is
written depends on who reads it: see ``placement``.

With the rest in half precision, a layer whose result is rounded to 8 bits at once (behind Relu or
Clip at most) keeps float32 scales and bias: 8 bits go in and 8 bits come out, so nothing of it is
ever stored. ONNX Runtime rounds the bias of such a layer to a multiple of the product of both
scales, and that product leaves the range of half precision.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from compress.errors import ModelError
from compress.quantization.plan import LEVELS
from export.onnx.check import standard_opset
from export.onnx.names import Names
from export.precision.fp16 import Fp16Facts, to_fp16
from export.precision.placement import (
    TENSORRT,
    Form,
    channel_axis,
    never_negative,
    quantised_layers,
    quantised_places,
    rounded_at_once,
)

if TYPE_CHECKING:
    import onnx
    import torch

OLDEST_OPSET = 13
"""The first one whose Q/DQ has a scale for each channel."""
HALF_OPSET = 19
"""The first one whose Q/DQ reads and writes float16."""
Rest = Literal["fp32", "fp16"]


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


def rest_for(form: Form, opset: int) -> Rest:
    """Return what everything else computes in.

    A strongly typed engine computes the rest as the file says, and float32 there would cost time.
    """
    halves = form == TENSORRT and opset >= HALF_OPSET and rounds_half_precision()
    return "fp16" if halves else "fp32"


def quantised_tensors(model: onnx.ModelProto, form: Form = TENSORRT) -> tuple[str, ...]:
    """Return the activations that ``to_int8`` quantises, in the order in which they are read."""
    places = quantised_places(model, form)
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
        self._places = quantised_places(model, form)
        self._layers = quantised_layers(model.graph, form)
        self._positive = never_negative(model.graph) if form.unsigned else frozenset[str]()
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._ranges = ranges
        self._rest = rest
        self._names = Names(model.graph)
        self._rounded: dict[_Key, _Rounded] = {}
        self._least: dict[tuple[str, int], np.ndarray] = {}  # scales of a weight along an axis
        self._restored: dict[tuple[str, bool], str] = {}  # by the 8-bit tensor and whether wide
        self._nodes: list[onnx.NodeProto] = []
        self.wide: set[str] = set()
        """Results whose nodes stay in float32, whatever the rest is."""

    def run(self) -> tuple[int, tuple[str, ...], int, int]:
        graph = self._graph
        places = self._places
        if self._rest == "fp16":
            self.wide.update(rounded_at_once(graph, places, self._layers))
        self._leave_room_for_biases()
        layers, floats = 0, []
        for index, node in enumerate(graph.node):
            wide, axis = node.output[0] in self.wide, self._layers.get(index)
            for place in places[index]:
                node.input[place] = self._restore(self._activation(node.input[place]), wide)
            if axis is not None:
                node.input[1] = self._restore(self._weight(node.input[1], axis, wide), wide)
                layers += 1
            elif channel_axis(node) is not None:
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
        import torch

        from compress.quantization.scales import room_for

        for index, axis in self._layers.items():
            node = self._graph.node[index]
            key = node.input[1], axis
            least = self._least.setdefault(key, np.zeros(1))
            bias = self._weights.get(node.input[2]) if len(node.input) > 2 else None
            if bias is not None and len(bias.dims) == 1:
                scale = torch.from_numpy(self._activation_scale(node.input[0]))
                fits = room_for(_as_torch(bias), scale).numpy()
                self._least[key] = np.maximum(least, fits)

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
            scales = _channel_scales(self._weights[name], axis, self._form.weight_levels)
            scales = np.maximum(scales, self._least[name, axis])
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


def _channel_scales(tensor: onnx.TensorProto, axis: int, levels: int) -> np.ndarray:
    """Return the scale of every channel of a weight, float64 of shape (channels,).

    Raises:
        ModelError: a weight is NaN or infinite.
    """
    from compress.quantization.scales import weight_scales

    values = _as_torch(tensor)
    if not values.isfinite().all():
        raise ModelError(f"weight {tensor.name!r} holds NaN or infinity")
    return weight_scales(values, axis, levels).numpy()


def _half_scales(scales: np.ndarray) -> np.ndarray:
    """Round scales up to half precision; what is too large for it is refused by its name later."""
    import torch

    from compress.quantization.scales import half_up

    return half_up(torch.from_numpy(scales)).numpy()


def _as_torch(tensor: onnx.TensorProto) -> torch.Tensor:
    import torch
    from onnx import numpy_helper

    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


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
