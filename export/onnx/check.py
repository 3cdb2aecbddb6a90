"""What an ONNX file really holds, and whether a target can run it.

Exporters do not always write what they were asked for: the opset can be newer, weights can land in
a second file, BatchNorm can stay. So the written file is read back and judged by its content.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, ModelError, first_line
from export.onnx.signature import BATCH, Shape, Signature

if TYPE_CHECKING:
    import onnx

    from compress.config.targets import Target

INPUT = "input"
OUTPUT = "logits"
CLASSIFIER = Signature({INPUT: (BATCH, None, None, None)}, {OUTPUT: (BATCH, None)})
"""What ``compress export`` writes: images (N, C, H, W) to logits (N, classes)."""
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxFacts:
    """What one ONNX file holds."""

    path: Path
    """The file."""
    opset: int
    """Version of the standard operator set that it imports."""
    ir_version: int
    """Version of the file format."""
    nodes: dict[str, int]
    """How often every operator occurs, subgraphs included."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Digest of the file, in hexadecimal."""


def inspect_onnx(path: Path, *, target: Target, signature: Signature = CLASSIFIER) -> OnnxFacts:
    """Read an ONNX file, prove that it fits a target and return what it holds.

    The file must pass the full onnx checker, carry all its weights, have the inputs and outputs of
    a signature and no others, and use only what the target reads.

    Raises:
        CheckpointError: the file is missing or is not ONNX.
        ModelError: it breaks a rule; the message names the rule and the node.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise CheckpointError(f"{path} is damaged or is not an ONNX file") from error
    if not model.graph.node:  # an empty file decodes to an empty model
        raise CheckpointError(f"{path} holds no network")
    fault = find_fault(model, target=target, signature=signature)
    if fault:
        raise ModelError(f"this network cannot be expressed for target {target.name}: {fault}")
    return OnnxFacts(
        path=path,
        opset=standard_opset(model),
        ir_version=model.ir_version,
        nodes=dict(sorted(Counter(node.op_type for node in walk_nodes(model.graph)).items())),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def find_fault(
    model: onnx.ModelProto, *, target: Target, signature: Signature = CLASSIFIER
) -> str | None:
    """Return the first rule of ``inspect_onnx`` that a model breaks, as half a sentence."""
    checks = (
        _external_data(model),
        _invalid(model),
        _too_new(model, target),
        _unfit_node(model, target),
        _unfolded_norm(model.graph),
        _wrong_ends("input", model.graph.input, signature.inputs),
        _wrong_ends("output", model.graph.output, signature.outputs),
    )
    return next(filter(None, checks), None)


def standard_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that a model imports; 0 for none."""
    return max(
        (entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS),
        default=0,
    )


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return an ONNX file and the files of its weights, sorted.

    Exporters may keep weights apart. Only files beside it whose names begin with its own are read
    (``model.onnx.data``, ``model.onnx_data``): a file could have a runtime read any other.

    Raises:
        CheckpointError: it names another file, or one is missing, damaged or not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        apart = _kept_apart(onnx.load_model_from_string(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise CheckpointError(f"cannot load {path}: it is damaged or is not ONNX") from error
    for location, weight in apart.items():
        beside = path.parent / location
        own = Path(location).name == location and location.startswith(path.name)
        if not own or beside.is_symlink():
            raise CheckpointError(
                f"{path} keeps weight {weight!r} in {location!r}, and only files beside it whose "
                f"names begin with {path.name} are read: export it again, into one file"
            )
        if not beside.is_file():
            raise CheckpointError(f"there is no {beside}, in which {path.name} keeps its weights")
    return (path, *sorted(path.parent / location for location in apart))


def _external_data(model: onnx.ModelProto) -> str | None:
    for weight in _kept_apart(model).values():
        return f"weight {weight!r} is kept in a second file"
    return None


def _kept_apart(model: onnx.ModelProto) -> dict[str, str]:
    """Return the files that weights lie in, each with the name of one of them."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    nodes = (node for function in model.functions for node in function.node)
    tensors = (*_tensors(model.graph), *_held(nodes))
    apart = (tensor for tensor in tensors if uses_external_data(tensor))
    return {ExternalDataInfo(tensor).location: tensor.name for tensor in apart}


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Walk the tensors of a graph, wherever its format can hold one."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _held(graph.node)


def _held(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)


def _invalid(model: onnx.ModelProto) -> str | None:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"the onnx checker says {first_line(error)}"
    return None


def _too_new(model: onnx.ModelProto, target: Target) -> str | None:
    opset = standard_opset(model)
    if opset > target.opset:
        return f"it needs opset {opset} and the target reads up to {target.opset}"
    if model.ir_version > target.ir_version:
        return f"it has IR {model.ir_version} and the target reads up to {target.ir_version}"
    return None


def _unfit_node(model: onnx.ModelProto, target: Target) -> str | None:
    for node in walk_nodes(model.graph):
        if node.domain not in STANDARD_DOMAINS:
            return f"node {_title(node)} is not a standard operator but of {node.domain!r}"
        axes_as_input = node.op_type == "ReduceMean" and len(node.input) > 1 and node.input[1]
        if axes_as_input and not target.two_input_reduce_mean:
            return f"node {_title(node)} reads its axes from a second input, which is lost there"
    return None


def _unfolded_norm(graph: onnx.GraphProto) -> str | None:
    """Find a BatchNormalization that a convolution before it should have taken in."""
    readers = Counter(name for node in walk_nodes(graph) for name in node.input)
    convolutions = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    for node in graph.node:
        foldable = node.op_type == "BatchNormalization" and node.input[0] in convolutions
        if foldable and readers[node.input[0]] == 1:
            return f"node {_title(node)} was not folded into the convolution before it"
    return None


def _wrong_ends(
    role: str, values: Iterable[onnx.ValueInfoProto], shapes: Mapping[str, Shape]
) -> str | None:
    found = {value.name: value.type.tensor_type.shape.dim for value in values}
    if list(found) != list(shapes):
        named = f"{role}s {', '.join(map(repr, shapes))}"
        wanted = named if len(shapes) != 1 else f"one {role} {next(iter(shapes))!r}"
        return f"it must have the {wanted} and has {', '.join(found) or 'none'}"
    for name, shape in shapes.items():
        dimensions = found[name]
        if len(dimensions) != len(shape):
            return f"{role} {name!r} has {len(dimensions)} dimensions instead of {len(shape)}"
        for i, length in enumerate(shape):
            if isinstance(length, str) and not dimensions[i].dim_param:
                return f"the {length} dimension of {role} {name!r} is fixed"
            if isinstance(length, int) and dimensions[i].dim_value != length:
                return f"dimension {i} of {role} {name!r} is not of length {length}"
    return None


def count_readers(graph: onnx.GraphProto) -> Counter[str]:
    """Return how often each tensor is read, within branches and as an output too."""
    readers = Counter(name for node in walk_nodes(graph) for name in node.input)
    readers.update(value.name for value in graph.output)
    return readers


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Walk the nodes of a graph and of the branches and loop bodies inside it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from walk_nodes(inner)


def _title(node: onnx.NodeProto) -> str:
    return f"{node.name or node.output[0]} ({node.op_type})"
