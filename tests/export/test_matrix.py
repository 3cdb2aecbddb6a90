"""Every family of networks, dense and pruned, in every precision: checked, compared, built."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import random_mask
from torch import nn

from compress.analysis import analyse
from compress.config import ExportConfig, ParityLimits, PrecisionLimits
from compress.models import build_model
from compress.shrink import shrink
from compress.targets import load_target
from export.engines.build import build_engine
from export.engines.sidecar import NETWORK_FACTS
from export.onnx_check import OnnxFacts
from export.onnx_export import onnx_from_network, staged_onnx
from export.precision.calibration import calibrate
from export.precision.fp16 import to_fp16
from export.precision.int8 import quantised_tensors, to_int8
from export.runners import OnnxRunner, TorchRunner
from export.verify import check_parity

NETWORKS = {
    "resnet18": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "resnext50_32x4d": (3, 64, 64),
    "resnet20": (3, 32, 32),
    "vgg16_bn": (3, 48, 48),
    "densenet121": (3, 64, 64),
}
V100 = load_target("v100")
LIMITS = {
    "fp32": PrecisionLimits().fp32,
    "fp16": PrecisionLimits().fp16,
    # Random weights leave the classes nearly tied, so their order says nothing.
    "int8": ParityLimits(relative_error=0.5, cosine=0.97),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A dense network with the statistics of real activations."""
    name = request.param
    torch.manual_seed(0)
    size = NETWORKS[name]
    images = torch.randn(24, *size)
    model = build_model(name, num_classes=10)
    if name == "vgg16_bn":  # its classifier is 90 % of the weights and no other operator
        model.classifier = nn.Sequential(nn.Linear(25088, 64), nn.ReLU(), nn.Linear(64, 10))
    for label, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average over the batches that follow
            nn.init.uniform_(module.bias, -0.3, 0.3)
            # As after training, a block adds a little to its stream; random ones double the noise.
            nn.init.constant_(module.weight, 0.3 if label.endswith("bn3") else 1.0)
    with torch.no_grad():
        model.train()(images)
    return {"name": name, "model": model.eval(), "images": images}


@pytest.fixture(scope="module", params=["dense", "pruned"])
def subject(request: pytest.FixtureRequest, network: dict[str, Any]) -> dict[str, Any]:
    """A network, whole or pruned, exported once in float32."""
    model, size = network["model"], NETWORKS[network["name"]]
    if request.param == "pruned":
        graph = analyse(model, size)
        model = shrink(model, graph, random_mask(graph, seed=1))
    proto = onnx_from_network(model.eval(), target=V100, input_size=size)
    images = network["images"].numpy()
    return {"name": network["name"], "model": model, "proto": proto, "images": images}


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def written(
    request: pytest.FixtureRequest, subject: dict[str, Any], tmp_path_factory: Any
) -> Iterator[tuple[str, Path, OnnxFacts]]:
    """The network in one precision, on disk."""
    precision = request.param
    proto = copy.deepcopy(subject["proto"])
    if precision == "fp16":
        to_fp16(proto)
    elif precision == "int8":
        tensors = quantised_tensors(proto)
        batches = lambda: [subject["images"][:12]]  # noqa: E731
        to_int8(proto, calibrate(proto.SerializeToString(), tensors, batches, method="max"))
    path = tmp_path_factory.mktemp("matrix") / "model.onnx"
    with staged_onnx(proto, path, target=V100, metadata={}) as facts:
        pass
    yield precision, path, facts
    path.unlink()


def test_the_file_fits_the_oldest_parser(written: tuple[str, Path, OnnxFacts]) -> None:
    precision, path, facts = written
    assert (facts.opset, facts.ir_version) == (17, 8)
    model = onnx.load(path)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kernels = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    assert kernels
    if precision == "int8":
        assert facts.nodes["QuantizeLinear"] == facts.nodes["DequantizeLinear"] > 2 * len(kernels)
    else:
        wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[precision]
        assert {weights[name] for name in kernels} == {wanted}
    ends = (*model.graph.input, *model.graph.output)
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}


def test_onnx_runtime_agrees_with_torch(
    subject: dict[str, Any], written: tuple[str, Path, OnnxFacts]
) -> None:
    precision, path, _ = written
    with TorchRunner(subject["model"]) as reference, OnnxRunner(path) as candidate:
        check_parity(
            *(reference, candidate, subject["images"][:4]),
            batch_sizes=(1, 4),
            limits=LIMITS[precision],
        )


def test_tensorrt_rtx_builds_it(
    subject: dict[str, Any], written: tuple[str, Path, OnnxFacts], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    precision, path, facts = written
    # Every profile is built on its own, so the smallest network stands for more than one.
    batch = (1, 8) if subject["name"] == "resnet20" else (8,)
    document = build_engine(
        path,
        tmp_path / "model.engine",
        target=load_target("rtx"),
        config=ExportConfig(precision=precision, batch=batch),
        onnx_sha256=facts.sha256,
        network=dict.fromkeys(NETWORK_FACTS),
    )
    assert document["strongly_typed"]
    assert len(document["profiles"]) == len(batch)
    assert document["engine"]["bytes"] > 10_000
