"""Nodes that need not be: the same function, said with fewer.

What an exporter leaves of a view, of a branch that is gone, or of a factor and a padding that the
convolution beside it can take in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from export.onnx.check import count_readers, walk_nodes
from export.onnx.fold import MOST_BYTES, drop_unread, fold_constants
from export.onnx.names import Names

if TYPE_CHECKING:
    import onnx

NOTHING = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
"""The number that changes nothing as the second operand; of Add and Mul as the first as well."""

Lengths = tuple[int | str | None, ...]
"""Of a tensor's dimensions: a number, a name where it is symbolic, or not known."""


def simplify(model: onnx.ModelProto) -> None:
    """Fold constants, and take out or in what need not be a node, in place."""
    fold_constants(model)
    graph = model.graph
    lengths = _lengths(model)
    _fix_lengths(graph, lengths)
    _take_out_nothing(graph, lengths)
    _take_in_factors(graph)
    _take_in_padding(graph)
    drop_unread(graph)


def _lengths(model: onnx.ModelProto) -> dict[str, Lengths]:
    import onnx

    if model.ByteSize() >= MOST_BYTES:
        return {}
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph

    def length(dimension: onnx.TensorShapeProto.Dimension) -> int | str | None:
        if dimension.HasField("dim_value"):
            return dimension.dim_value
        return dimension.dim_param or None

    return {
        value.name: tuple(length(dimension) for dimension in tensor.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if (tensor := value.type.tensor_type).HasField("shape")
    }


def _fix_lengths(graph: onnx.GraphProto, lengths: Mapping[str, Lengths]) -> None:
    """Give a Reshape constant lengths: 0 for one that stays, and -1 for the one that is left."""
    from onnx import numpy_helper

    made = {name: node for node in graph.node for name in node.output}
    known, names = _constants(graph), Names(graph)
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] in known or any(a.i for a in node.attribute):
            continue  # with allowzero, 0 means none
        wanted = _asked(node.input[1], made, known, lengths)
        given = lengths.get(node.input[0], ())
        shape = [
            length
            if isinstance(length, int)
            else (0 if length is not None and length in given[place : place + 1] else -1)
            for place, length in enumerate(wanted or ())
        ]
        if wanted and shape.count(-1) <= 1:
            name = names.new(f"{node.output[0]}_shape")
            graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
            node.input[1] = name


def _asked(
    name: str,
    made: Mapping[str, onnx.NodeProto],
    known: Mapping[str, np.ndarray],
    lengths: Mapping[str, Lengths],
) -> Lengths | None:
    """Return the lengths that a tensor holds, put together from shapes; None if it is not that."""
    if name in known:
        return tuple(int(number) for number in known[name].reshape(-1))
    node = made.get(name)
    if node is None or any(
        part not in known for part in node.input[1:] if node.op_type != "Concat"
    ):
        return None
    if node.op_type == "Shape":
        return None if node.attribute else lengths.get(node.input[0])
    parts = [_asked(part, made, known, lengths) for part in node.input]
    first, rest = parts[0], [known[part] for part in node.input[1:] if part in known]
    if first is None or None in parts:
        return None
    if node.op_type in ("Unsqueeze", "Cast"):
        return first
    if node.op_type == "Concat":
        return tuple(length for part in parts for length in part or ())
    if node.op_type == "Gather":
        return tuple(first[int(index)] for index in rest[0].reshape(-1))
    if node.op_type == "Slice":
        step = int(rest[3].item()) if len(rest) > 3 else 1
        return first[slice(int(rest[0].item()), int(rest[1].item()), step)]
    return None


def _take_out_nothing(graph: onnx.GraphProto, lengths: Mapping[str, Lengths]) -> None:
    """Take out what changes nothing: zero added, a factor of one, one tensor concatenated."""
    ends = {value.name for value in graph.output}
    known = _constants(graph)
    instead: dict[str, str] = {}

    def changes_nothing(node: onnx.NodeProto, name: str, other: str) -> bool:
        same = lengths.get(other), lengths.get(node.output[0])
        alike = same[0] is not None and same[0] == same[1] and None not in same[0]
        return alike and name in known and bool((known[name] == NOTHING[node.op_type]).all())

    for node in list(graph.node):
        node.input[:] = [instead.get(name, name) for name in node.input]
        left = None
        if node.op_type == "Concat" and len(node.input) == 1:
            left = node.input[0]
        elif node.op_type in NOTHING:
            first, second = node.input
            if changes_nothing(node, second, first):
                left = first
            elif node.op_type in ("Add", "Mul") and changes_nothing(node, first, second):
                left = second
        if left is not None and node.output[0] not in ends:
            instead[node.output[0]] = left
            graph.node.remove(node)
    for node in walk_nodes(graph):  # those within branches as well
        node.input[:] = [instead.get(name, name) for name in node.input]


def _take_in_factors(graph: onnx.GraphProto) -> None:
    """Multiply the weights of convolutions by factors of their channels that follow them."""
    from onnx import numpy_helper

    made = {node.output[0]: node for node in graph.node}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = count_readers(graph)
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        for factor, result in (tuple(node.input), tuple(reversed(node.input))):
            layer = made.get(result)
            if layer is None or layer.op_type != "Conv" or factor not in tensors:
                continue
            weights = [name for name in layer.input[1:] if name]
            alone = all(name in tensors and readers[name] == 1 for name in weights)
            channels, *others = tensors[weights[0]].dims if alone else (0,)
            factors = _per_channel(numpy_helper.to_array(tensors[factor]), channels, len(others))
            if factors is None or readers[result] != 1:
                continue
            for name in weights:
                array = numpy_helper.to_array(tensors[name])
                shape = (-1,) + (1,) * (array.ndim - 1)
                scaled = (array * factors.reshape(shape)).astype(array.dtype)
                tensors[name].CopyFrom(numpy_helper.from_array(scaled, name))
            layer.output[0] = node.output[0]
            made[node.output[0]] = layer
            graph.node.remove(node)
            break


def _per_channel(factor: np.ndarray, channels: int, behind: int) -> np.ndarray | None:
    """Return one factor for each channel, (channels,) or (1,); None where it is no such thing.

    Args:
        factor: what (batch, channels, ...) is multiplied by.
        channels: 0 if there are none to multiply.
        behind: dimensions behind the channels, and one more in front of them.
    """
    place = factor.ndim - behind
    if channels and factor.size == 1 and factor.ndim <= behind + 1:
        return factor.reshape(-1)
    if channels and factor.size == channels and place in (0, 1) and factor.shape[place] == channels:
        return factor.reshape(-1)
    return None


def _take_in_padding(graph: onnx.GraphProto) -> None:
    """Let convolutions pad by themselves with the zeros that a Pad puts before them."""
    from onnx import helper

    known, readers = _constants(graph), count_readers(graph)
    pads = {node.output[0]: node for node in graph.node if node.op_type == "Pad"}
    for layer in [node for node in graph.node if node.op_type == "Conv"]:
        pad = pads.get(layer.input[0])
        if pad is None or readers[layer.input[0]] != 1:
            continue
        widths, own = _zeros_around(pad, known), _attributes(layer)
        if widths is None or own.get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        total = widths + np.array(own.get("pads", [0] * len(widths)))
        others = [entry for entry in layer.attribute if entry.name != "pads"]
        del layer.attribute[:]
        layer.attribute.extend((*others, helper.make_attribute("pads", total.tolist())))
        layer.input[0] = pad.input[0]
        graph.node.remove(pad)


def _zeros_around(pad: onnx.NodeProto, known: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return how many zeros are put before and behind each side of a map; None for other pads."""
    names = [name for name in pad.input[1:] if name]
    plain = _attributes(pad).get("mode", b"constant") == b"constant" and len(pad.input) <= 3
    if not plain or not all(name in known for name in names):
        return None
    widths, *value = (known[name] for name in names)
    before, behind = np.split(widths, 2)
    if (value and value[0].any()) or before[:2].any() or behind[:2].any() or widths.min() < 0:
        return None
    return np.concatenate([before[2:], behind[2:]])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
