"""The layers of an ONNX file that multiply: their names, channels and multiply-adds.

One multiply-add counts as one MAC, at batch size 1. Counted are the nodes that apply weights: Conv,
Gemm and MatMul, also where Q/DQ pairs or casts stand before their weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import onnx

MULTIPLYING = ("Conv", "Gemm", "MatMul")
"""The operators that are counted."""


@dataclass(frozen=True, kw_only=True)
class OnnxLayer:
    """One layer that multiplies."""

    name: str
    """Path of the torch module that it was exported from, such as ``layer1.0.conv1``."""
    node: str
    """Name of its node."""
    kind: str
    """Its operator."""
    macs: int
    """Multiply-adds for one image."""
    inputs: int
    """Channels that it reads, over all groups of a convolution."""
    outputs: int
    """Channels that it writes."""
    reads_image: bool
    """Whether no other such layer lies between the image and it."""
    writes_logits: bool
    """Whether no other such layer lies between it and the logits."""


def read_layers(path: Path) -> tuple[OnnxLayer, ...]:
    """Return the layers of an ONNX file, in the order of its nodes.

    Raises:
        CheckpointError: the file is missing or is not ONNX.
        ModelError: the file leaves the shape of a layer open.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise CheckpointError(f"{path} is damaged or is not an ONNX file") from error
    try:
        return layers_of(model)
    except LookupError as error:
        raise ModelError(
            f"{path} does not tell the shape of its tensor {error.args[0]}, so its MACs cannot be "
            "counted; export it again"
        ) from error


def layers_of(model: onnx.ModelProto) -> tuple[OnnxLayer, ...]:
    """Return the layers of a network in memory, which stays as it is.

    Raises:
        LookupError: of the name of a tensor whose shape is unknown.
    """
    shapes, constants = _shapes(model), _constants(model.graph)
    # Of each tensor, the layers that it comes from with no other layer between, or the image.
    origins = {value.name: {value.name} for value in model.graph.input}
    found = []
    for node in model.graph.node:
        title = node_title(node)
        sources = set().union(*(origins.get(name, set()) for name in node.input))
        weights = [name for name in node.input[:2] if name in constants]
        if node.op_type in MULTIPLYING and len(weights) == 1 and not _is_computed(weights[0]):
            first = weights[0] == node.input[0]
            macs, inputs, outputs = _count(node, shapes, weights_first=first)
            reads_image = bool(sources.intersection(value.name for value in model.graph.input))
            found.append((title, node.op_type, macs, inputs, outputs, reads_image))
            sources = {title}
        origins.update((name, sources) for name in node.output)
    last = set().union(*(origins.get(value.name, set()) for value in model.graph.output))
    layers = [
        OnnxLayer(
            name=module_path(title),
            node=title,
            kind=kind,
            macs=macs,
            inputs=inputs,
            outputs=outputs,
            reads_image=reads_image,
            writes_logits=title in last,
        )
        for title, kind, macs, inputs, outputs, reads_image in found
    ]
    uses = Counter(layer.name for layer in layers)
    return tuple(
        layer if uses[layer.name] == 1 else replace(layer, name=layer.node.lstrip("/"))
        for layer in layers
    )


def node_title(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of its first output if it has none."""
    return node.name or node.output[0]


def module_path(title: str) -> str:
    """Return the path of the module that torch's exporter names a node after.

    It names each scope, and children of a ``Sequential`` by their path from it:
    ``/layer1/layer1.0/conv1/Conv`` is ``layer1.0.conv1``.
    """
    *scopes, operator = title.strip("/").split("/")
    path: list[str] = []
    for scope in scopes:
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    return ".".join(path) or operator


def _is_computed(constant: str) -> bool:
    """Whether torch's exporter names a constant after a scope; parameters it does not.

    A pooling that enlarges is written as products with such matrices, and has no weights.
    """
    return constant.startswith("/")


def _count(
    node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], *, weights_first: bool
) -> tuple[int, int, int]:
    """Return multiply-adds, channels read and channels written."""
    written = math.prod(shapes[node.output[0]])
    first, second = shapes[node.input[0]], shapes[node.input[1]]
    options = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        outputs, per_group, *kernel = second
        macs = written * per_group * math.prod(kernel)
        return macs, per_group * options.get("group", 1), outputs
    if options.get("transA"):
        first = first[::-1]
    if options.get("transB"):
        second = second[::-1]
    inputs = first[-1]
    return written * inputs, inputs, first[-2] if weights_first else second[-1]


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that are known at batch size 1."""
    import onnx

    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    del alone.graph.value_info[:]
    weights = {tensor.name for tensor in model.graph.initializer}  # old files list them as inputs
    for value in (value for value in alone.graph.input if value.name not in weights):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(alone, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name in weights:
            continue
        sizes = value.type.tensor_type.shape.dim
        if all(size.HasField("dim_value") for size in sizes):
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    return shapes


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Return the names of the weights and of all that is computed from weights alone."""
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
    return constants
