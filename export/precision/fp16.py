"""A float32 graph becomes a strongly typed half-precision one.

Every tensor is float16 but for the two ends, which stay float32 behind one Cast each, and for what
the ONNX specification defines in float32 alone (the scales of Resize, CumSum). Those inputs are
found in the operators' schemas, not in a list: a formal input that has no ``tensor(float16)`` among
its types is fed in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import ModelError
from export.onnx.check import STANDARD_DOMAINS, standard_opset, walk_nodes
from export.onnx.fold import fold_constants
from export.onnx.names import Names

if TYPE_CHECKING:
    import onnx

LARGEST = float(np.finfo(np.float16).max)
"""The largest finite half-precision number, 65504."""
TINIEST = 1e-7
"""What half precision tells from 0: its smallest number is 6e-8."""
BOUNDING = frozenset({"Clip", "Max", "Min"})
"""Operators whose constants are bounds."""
ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", *BOUNDING})
"""Operators whose constants are numbers of a formula, where 0 is another formula."""
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


@dataclass(frozen=True)
class Fp16Facts:
    """What half precision did to the weights of a network."""

    weights: int
    """How many numbers were rounded."""
    zeroed: float
    """Share of them, 0 to 1, that were not zero and became zero."""
    subnormal: float
    """Share of them, 0 to 1, that lost precision because they are below 6.1e-5."""


def to_fp16(model: onnx.ModelProto, wide: Collection[str] = ()) -> Fp16Facts:
    """Rewrite a float32 model in half precision, in place.

    The names of its input and output and of every weight stay.

    Args:
        model: strongly typed afterwards, as TensorRT wants it.
        wide: results whose nodes go on reading and writing float32.

    Raises:
        ModelError: a weight is not finite or beyond 65504, or the graph holds a branch, a loop or
            an operator that is not a standard one.
    """
    fold_constants(model)
    return _Halving(model, frozenset(wide)).run()


def activations(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the float32 results of all nodes of a model, in the order of the nodes."""
    floats = _float_tensors(model)
    return tuple(name for node in model.graph.node for name in node.output if name in floats)


def require_range(largest: Mapping[str, float]) -> float:
    """Refuse activations that half precision cannot hold, and return the largest magnitude.

    A runtime that computes in float32 and rounds late does not show them as infinite, a GPU does.

    Args:
        largest: the largest magnitude of each activation.

    Raises:
        ModelError: one is beyond 65504.
    """
    name = max(largest, key=lambda tensor: largest[tensor])
    if largest[name] > LARGEST:
        raise ModelError(
            f"activation {name!r} reaches {largest[name]:.6g} on real images, and the largest "
            f"number of fp16 is {LARGEST:.0f}: export in fp32"
        )
    return largest[name]


class _Halving:
    """One rewrite of one graph."""

    def __init__(self, model: onnx.ModelProto, stay_wide: frozenset[str]) -> None:
        self._graph, self._stay_wide = model.graph, stay_wide
        self._opset = standard_opset(model)
        self._floats = _float_tensors(model)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._names = Names(model.graph)
        self._half: dict[str, str] = {}  # the float16 tensor, where it has another name
        self._wide: dict[str, str] = {}  # the float32 tensor of the same numbers, if there is one
        self._nodes: list[onnx.NodeProto] = []
        self._halved = self._read_as_half()
        self._also_wide: list[onnx.TensorProto] = []

    def run(self) -> Fp16Facts:
        graph = self._graph
        for name in self._ends(graph.input):
            self._wide[name] = name
            self._half[name] = self._cast(name, self._names.new(f"{name}_fp16"), half=True)
        outputs = self._ends(graph.output)
        for name in outputs:
            self._half[name] = self._names.new(f"{name}_fp16")
        for node in graph.node:
            self._rewrite(node)
        for name in outputs:
            self._cast(self._half[name], name, half=False)
        facts = self._round_weights()
        del graph.node[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        return facts

    def _read_as_half(self) -> dict[str, list[onnx.NodeProto]]:
        """Return, for every float32 tensor that nodes can take in float16, these nodes."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            if self._stays_wide(node):
                continue
            for place, name in enumerate(node.input):
                if name in self._floats and _at(_halvable(node, self._opset)[0], place):
                    found.setdefault(name, []).append(node)
        return found

    def _ends(self, values: Iterable[onnx.ValueInfoProto]) -> list[str]:
        return [value.name for value in values if value.name in self._floats]

    def _stays_wide(self, node: onnx.NodeProto) -> bool:
        return not self._stay_wide.isdisjoint(node.output)

    def _rewrite(self, node: onnx.NodeProto) -> None:
        inputs, outputs = _halvable(node, self._opset)
        if self._stays_wide(node):
            inputs = outputs = [False]
        for place, name in enumerate(node.input):
            if name in self._floats:
                accepts = _at(inputs, place)
                node.input[place] = self._half.get(name, name) if accepts else self._widened(name)
        self._nodes.append(node)
        for place, name in enumerate(node.output):
            if name not in self._floats:
                continue
            half = self._half.get(name, name)
            if _at(outputs, place):
                node.output[place] = half
                _ask_for_half(node, self._opset)
            elif half == name and name not in self._halved:  # nobody wants it halved
                self._wide[name] = name
            else:
                node.output[place] = self._wide[name] = self._names.new(f"{name}_fp32")
                self._cast(self._wide[name], half, half=True)

    def _widened(self, name: str) -> str:
        """Return the float32 tensor of these numbers, made once."""
        if name in self._weights and name not in self._halved:
            return name
        if name not in self._wide:
            wide = self._wide[name] = self._names.new(f"{name}_fp32")
            if name in self._weights:
                self._also_wide.append(_renamed(self._weights[name], wide))
            else:
                self._cast(self._half.get(name, name), wide, half=False)
        return self._wide[name]

    def _cast(self, source: str, result: str, *, half: bool) -> str:
        from onnx import TensorProto, helper

        to = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._nodes.append(helper.make_node("Cast", [source], [result], f"{result}_Cast", to=to))
        return result

    def _round_weights(self) -> Fp16Facts:
        """Halve the weights that are read so, and count what that did."""
        count = zeroed = subnormal = 0
        for tensor in self._graph.initializer:
            if tensor.name in self._halved:
                wide, half = _rounded(tensor, self._halved[tensor.name])
                tensor.CopyFrom(_tensor(half, tensor.name))
                count += wide.size
                zeroed += int(np.count_nonzero(wide) - np.count_nonzero(half))
                tiny = (half != 0) & (np.abs(half) < _SMALLEST_NORMAL)
                subnormal += int(np.count_nonzero(tiny))
        self._graph.initializer.extend(self._also_wide)
        return Fp16Facts(count, zeroed / max(count, 1), subnormal / max(count, 1))


def _float_tensors(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of all float32 tensors."""
    import onnx

    for node in walk_nodes(model.graph):
        if node.domain not in STANDARD_DOMAINS:
            raise ModelError(
                f"node {node.name or node.output[0]!r} is not a standard operator but of "
                f"{node.domain!r}, so its types are unknown: export in fp32"
            )
    if len(list(walk_nodes(model.graph))) > len(model.graph.node):
        raise ModelError("the network holds a branch or a loop, which has no fp16: export in fp32")
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    return frozenset(name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT)


def _halvable(node: onnx.NodeProto, opset: int) -> tuple[list[bool], list[bool]]:
    """Return for each formal input and output of an operator whether it may be float16."""
    import onnx

    schema = onnx.defs.get_schema(node.op_type, opset, "")
    inputs, outputs = schema.inputs, schema.outputs
    return (
        ["tensor(float16)" in formal.types for formal in inputs],
        ["tensor(float16)" in formal.types for formal in outputs],
    )


def _at(formals: list[bool], place: int) -> bool:
    return formals[min(place, len(formals) - 1)]  # the last formal input or output may repeat


def _ask_for_half(node: onnx.NodeProto, opset: int) -> None:
    """Turn the attribute, if there is one, that decides the type of a node's result."""
    import onnx

    known = onnx.defs.get_schema(node.op_type, opset, "").attributes
    for name in ("to", "dtype"):
        if name in known:
            _set_attribute(node, name, onnx.TensorProto.FLOAT16)
    if node.op_type == "ConstantOfShape":
        old = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        fill = np.zeros(1) if old is None else onnx.numpy_helper.to_array(old)
        _set_attribute(node, "value", _tensor(fill.astype(np.float16), ""))


def _set_attribute(node: onnx.NodeProto, name: str, value: int | onnx.TensorProto) -> None:
    from onnx import helper

    others = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend((*others, helper.make_attribute(name, value)))


def _rounded(
    tensor: onnx.TensorProto, readers: Sequence[onnx.NodeProto]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight as it is and in half precision, if that can hold it."""
    from onnx import numpy_helper

    wide = numpy_helper.to_array(tensor)
    what = f"weight {tensor.name!r} of node {readers[0].name or readers[0].output[0]!r}"
    if all(reader.op_type in BOUNDING for reader in readers):  # nothing lies beyond such a bound
        wide = np.clip(wide, -LARGEST, LARGEST)
    if not np.isfinite(wide).all():
        raise ModelError(f"{what} holds NaN or infinity")
    largest = float(np.abs(wide).max(initial=0))
    if largest > LARGEST:
        raise ModelError(
            f"{what} holds {largest:.6g}, and the largest number of fp16 is {LARGEST:.0f}: "
            "export in fp32"
        )
    half = wide.astype(np.float16)
    if wide.any() and not half.any() and any(r.op_type in ELEMENTWISE for r in readers):
        raise ModelError(
            f"{what} is {float(np.abs(wide).max()):.3g}, which fp16 rounds to 0, and a "
            f"quotient to NaN: make it {TINIEST:.0e} or more in the network, or export in fp32"
        )
    return wide, half


def _tensor(array: np.ndarray, name: str) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(array, name)


def _renamed(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    import onnx

    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy
