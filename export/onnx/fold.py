"""Constants that an exporter leaves as little graphs are computed once, here.

Torch writes the widths of a padding as a chain of nodes, equal weights as one weight behind
Identity nodes, standardised weights as what standardises them, and where one dimension is symbolic
it asks for the lengths of all; a plain constant is what every parser understands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from export.onnx.check import walk_nodes

if TYPE_CHECKING:
    import onnx

MOST_BYTES = 2**31
"""Of a model whose shapes can be inferred in memory."""
MOST_NUMBERS = 2**16
"""In a constant that is larger than all that it is computed from."""
FOLDED = frozenset(
    {
        *("Add", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Constant"),
        *("ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather", "Identity", "Max", "Min"),
        *("Mul", "Neg", "Range", "ReduceMean", "Reshape", "Shape", "Slice", "Sqrt", "Squeeze"),
        *("Sub", "Transpose", "Unsqueeze", "Where"),
    }
)
"""The operators that exporters compute constants with; all are exact or round as any runtime."""


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace, in place, the ``FOLDED`` nodes that read constants alone by their results.

    The length of a dimension that is the same for every batch is a constant too; with one more
    known, the lengths behind it may be.
    """
    while _fold(model):
        pass
    drop_unread(model.graph)


def drop_unread(graph: onnx.GraphProto) -> None:
    """Remove, in place, the weights and the results of ``FOLDED`` nodes that nobody reads."""
    ends = {value.name for value in graph.output}
    read = _read(graph) | ends
    for node in reversed(list(graph.node)):  # so that what it alone read goes as well
        if node.op_type in FOLDED and read.isdisjoint(node.output):
            graph.node.remove(node)
            read = _read(graph) | ends
    constants = {tensor.name: tensor for tensor in graph.initializer}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in constants.items() if name in read)


def _fold(model: onnx.ModelProto) -> bool:
    """Go through the nodes once; return whether a length was found, which may make more known."""
    graph = model.graph
    ends = {value.name for value in graph.output}
    read = _read(graph) | ends
    known = {tensor.name: tensor for tensor in graph.initializer}
    lengths, found = _lengths(model), False
    for node in list(graph.node):
        if node.output[0] in ends or not read.isdisjoint(node.output[1:]):
            continue
        result = length = _length(node, lengths, known)
        if result is None and node.op_type in FOLDED and all(n in known for n in node.input if n):
            result = _computed(node, [known[name] for name in node.input if name], model)
        if result is not None:
            known[node.output[0]] = result
            graph.initializer.append(result)
            graph.node.remove(node)
        found = found or length is not None
    drop_unread(graph)
    return found


def _read(graph: onnx.GraphProto) -> set[str]:
    return {name for node in walk_nodes(graph) for name in node.input}


def _lengths(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Return the lengths of the tensors that ``Shape`` nodes read; None for one that may differ."""
    import onnx

    asked = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Shape" and not node.attribute  # which would cut the shape
    }
    if not asked or model.ByteSize() >= MOST_BYTES:
        return {}
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if (tensor := value.type.tensor_type).HasField("shape")
    }
    return {result: shapes[name] for result, name in asked.items() if name in shapes}


def _length(
    node: onnx.NodeProto,
    lengths: Mapping[str, list[int | None]],
    known: Mapping[str, onnx.TensorProto],
) -> onnx.TensorProto | None:
    """Return what a node picks out of a shape, if that is the same for every batch."""
    from onnx import numpy_helper

    if node.op_type != "Gather" or node.input[0] not in lengths or node.input[1] not in known:
        return None
    shape, index = lengths[node.input[0]], numpy_helper.to_array(known[node.input[1]])
    picked = [shape[i] for i in index.reshape(-1)]
    if None in picked:
        return None
    array = np.array(picked, np.int64).reshape(index.shape)
    return numpy_helper.from_array(array, node.output[0])


def _computed(
    node: onnx.NodeProto, inputs: list[onnx.TensorProto], model: onnx.ModelProto
) -> onnx.TensorProto | None:
    """Return what a node computes; None for much more than it reads."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    name = node.output[0]
    end = helper.make_empty_tensor_value_info(name)
    graph = helper.make_graph([node], "constant", [], [end], initializer=inputs)
    alone = helper.make_model(graph, opset_imports=model.opset_import)
    (result,) = ReferenceEvaluator(alone).run(None, {})
    array = np.asarray(result)
    if array.size > MOST_NUMBERS and array.nbytes > sum(tensor.ByteSize() for tensor in inputs):
        return None
    return numpy_helper.from_array(array, name)
