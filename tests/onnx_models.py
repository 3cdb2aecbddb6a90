"""ONNX models in memory for tests: exported, written by hand, run, and built by TensorRT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from compress.config.targets import Target, load_target
from export.onnx.check import OnnxFacts
from export.onnx.trace import onnx_from_network, staged_onnx

TARGETS = {17: "cpu", 20: "rtx"}
"""A target for each opset."""


def exported(model: nn.Module, size: tuple[int, int, int], opset: int = 17) -> onnx.ModelProto:
    """Return a network as ``compress export`` writes it in float32."""
    proto = onnx_from_network(model.eval(), target=load_target(TARGETS[opset]), input_size=size)
    (entry,) = proto.opset_import
    assert entry.version == opset
    return proto


def export_classifier(
    model: nn.Module,
    path: Path,
    *,
    target: Target,
    input_size: tuple[int, int, int],
    metadata: Mapping[str, str],
) -> OnnxFacts:
    """Write a classifier as ``compress export`` writes it in float32, without its sidecar."""
    proto = onnx_from_network(model, target=target, input_size=input_size)
    with staged_onnx(proto, path, target=target, metadata=metadata) as facts:
        return replace(facts, path=path)


def handmade(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    shape: tuple[int | str, ...],
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    """Return a model of these nodes from ``input`` to ``logits``, float32 and of one rank."""
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that can be rewritten."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the weights by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def census(model: onnx.ModelProto) -> Counter[str]:
    """Count the operators."""
    return Counter(node.op_type for node in model.graph.node)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the node that makes each tensor."""
    return {name: node for node in model.graph.node for name in node.output}


def check(model: onnx.ModelProto) -> None:
    """Fail unless the checker and strict type inference accept a model."""
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


LEVELS = tuple(name for name in dir(onnxruntime.GraphOptimizationLevel) if name.startswith("ORT_"))
"""Of optimisation, none to all."""


def run(
    model: onnx.ModelProto, images: np.ndarray, *, optimised: bool = True, level: str | None = None
) -> np.ndarray:
    """Return what ONNX Runtime computes on the CPU.

    Where it lacks a float16 operator it computes in float32, and rounds only the weights.
    """
    wanted = level or ("ORT_ENABLE_ALL" if optimised else "ORT_DISABLE_ALL")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, wanted)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": images})
    return np.asarray(logits)


def rounds_half_precision() -> bool:
    """Whether this ONNX Runtime rounds float16 to int8; up to 1.29 it cuts the fraction off."""
    one = {"scale": np.array(1, np.float16), "zero": np.array(0, np.int8)}
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["half", "scale", "zero"], ["small"]),
        helper.make_node("Cast", ["small"], ["logits"], to=TensorProto.FLOAT),
    ]
    model = handmade(nodes, one, ("batch",), opset=20)
    return bool(run(model, np.array([0.75], np.float32))[0] == 1)


def adds_8_bits_exactly() -> bool:
    """Whether ONNX Runtime's 8-bit convolutions add without clipping.

    On processors without VNNI two products are added in 16 bits, which 255 times 127 leave.
    """
    tensors = {
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.int8),
        "many": np.array(1000, np.float32),
        "small": np.full((4, 16, 1, 1), 127, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["small", "one", "zero"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "many", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["rounded", "many", "zero"], ["logits"]),
    ]
    model = handmade(nodes, tensors, ("batch", 16, 4, 4))
    largest = np.full((1, 16, 4, 4), 127, np.float32)
    return bool((run(model, largest) == run(model, largest, optimised=False)).all())


def evaluate(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Return what the reference evaluator computes, every tensor in its own type."""
    (logits,) = ReferenceEvaluator(model).run(None, {"input": images})
    return np.asarray(logits)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine similarity of all numbers."""
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def engine_bytes(model: onnx.ModelProto, size: tuple[int, int, int]) -> int:
    """Parse a model and build an engine, which TensorRT-RTX does without a GPU; return its size."""
    import tensorrt_rtx as trt  # an extra; the tests that come here ask for it

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("input", (1, *size), (2, *size), (4, *size))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return engine.nbytes
