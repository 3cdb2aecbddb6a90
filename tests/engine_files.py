"""A small ONNX network in every precision, and engines that the stand-in for TensorRT builds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tensorrt_contract import fake_tensorrt

from compress.config import ExportConfig
from compress.config.targets import Target, load_target
from compress.files.atomic import sha256_of
from export.engines import build
from export.engines.build import build_engine
from export.nvml import Gpu

V100 = Gpu("Tesla V100-SXM2-16GB", "7.0", "550.90.07")
T4 = Gpu("Tesla T4", "7.5", "550.90.07")
ADA = Gpu("NVIDIA L4", "8.9", "570.86.15")
NETWORK: dict[str, Any] = {
    "architecture": "tiny",
    "num_classes": 4,
    "classes": ["a", "b", "c", "d"],
    "input_size": [3, 8, 8],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "weights_sha256": "ab" * 32,
    "macs": 3888,
    "params": 112,
    "parity": "not of the network",
}
"""As the sidecar of an ONNX file describes it, with one key that engines do not take over."""


def write_onnx(path: Path, precision: str = "fp32", opset: int = 17) -> Path:
    """Write a convolution, ReLU and global average of 3 x 8 x 8 images; four logits."""
    rng = np.random.default_rng(0)
    dtype = np.float16 if precision == "fp16" else np.float32
    weights = {
        "weight": rng.standard_normal((4, 3, 3, 3)).astype(dtype),
        "bias": rng.standard_normal(4).astype(dtype),
        "scale": np.float32(0.05),
        "zero": np.int8(0),
    }
    ends = {"read": "input", "written": "logits"}
    nodes = []
    if precision == "fp16":
        ends = {"read": "half", "written": "half_logits"}
        nodes = [helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16)]
    if precision == "int8":
        ends["read"] = "rounded"
        nodes = [
            helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["levels"]),
            helper.make_node("DequantizeLinear", ["levels", "scale", "zero"], ["rounded"]),
        ]
    nodes += [
        helper.make_node("Conv", [ends["read"], "weight", "bias"], ["sums"], name="conv"),
        helper.make_node("Relu", ["sums"], ["positive"], name="relu"),
        helper.make_node("GlobalAveragePool", ["positive"], ["means"], name="pool"),
        helper.make_node("Flatten", ["means"], [ends["written"]], name="flatten"),
    ]
    if precision == "fp16":
        nodes.append(helper.make_node("Cast", ["half_logits"], ["logits"], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in weights.items()
            if name in used
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def any_gpu_target(version: str, **changes: Any) -> Target:
    """Return a target that a recorded release builds for, with every precision."""
    provider = provider_of(version)
    return Target.model_validate(
        {
            **load_target("rtx" if provider == "tensorrt_rtx" else "v100").model_dump(),
            "name": "test",
            "tensorrt": ">=1.0",
            **changes,
        }
    )


def provider_of(version: str) -> str:
    """Return the module that a recorded release is."""
    return "tensorrt_rtx" if version.startswith("rtx") else "tensorrt"


def install(
    monkeypatch: pytest.MonkeyPatch, version: str, gpu: Gpu | None = V100, **behaviour: Any
) -> Any:
    """Put the stand-in for a recorded release, and a GPU, where the package looks for them."""
    module = fake_tensorrt(version, **behaviour)
    monkeypatch.setitem(sys.modules, provider_of(version), module)
    monkeypatch.setattr(build, "find_gpu", lambda: gpu)
    return module


def build_with(version: str, onnx_path: Path, path: Path, **options: Any) -> dict[str, Any]:
    """Build an engine with whatever is installed under the name of a release."""
    target = options.pop("target", None) or any_gpu_target(version)
    progress = options.pop("progress", None)
    return build_engine(
        onnx_path,
        path,
        target=target,
        config=ExportConfig(target=target.name, **options),
        onnx_sha256=sha256_of(onnx_path),
        network=NETWORK,
        progress=progress,
    )
