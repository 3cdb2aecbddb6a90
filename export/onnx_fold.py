"""Constants that an exporter leaves as little graphs are computed once, here.

Torch writes the widths of a padding as a chain of nodes, and equal weights as one weight behind
Identity nodes; a plain constant is what every parser understands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.onnx_check import walk_nodes

if TYPE_CHECKING:
    import onnx

FOLDED = frozenset(
    {"Cast", "Concat", "Constant", "ConstantOfShape", "Identity", "Reshape", "Slice", "Transpose"}
)
"""The operators that exporters compute constants with; all are deterministic and cheap."""


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace, in place, the ``FOLDED`` nodes that read constants alone by their results."""
    graph = model.graph
    ends = {value.name for value in graph.output}
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        constant = node.op_type in FOLDED and all(name in known for name in node.input if name)
        if constant and node.output[0] not in ends:
            inputs = [known[name] for name in node.input if name]
            known[node.output[0]] = _computed(node, inputs, model)
            graph.node.remove(node)
    read = {name for node in walk_nodes(graph) for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(tensor for name, tensor in known.items() if name in read)


def _computed(
    node: onnx.NodeProto, inputs: list[onnx.TensorProto], model: onnx.ModelProto
) -> onnx.TensorProto:
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    (name,) = node.output
    result = helper.make_empty_tensor_value_info(name)
    graph = helper.make_graph([node], "constant", [], [result], initializer=inputs)
    alone = helper.make_model(graph, opset_imports=model.opset_import)
    (array,) = ReferenceEvaluator(alone).run(None, {})
    return numpy_helper.from_array(np.asarray(array), name)
