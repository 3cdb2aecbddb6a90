"""Every family of networks, dense and pruned, in every precision: checked, compared, built."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from conftest import random_mask
from onnx_models import copied
from torch import nn

from compress.config import ExportConfig, ParityLimits, PrecisionLimits
from compress.config.targets import load_target
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from export.engines.build import build_engine
from export.engines.sidecar import NETWORK_FACTS
from export.onnx.check import OnnxFacts
from export.onnx.trace import onnx_from_network, staged_onnx
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
SMALLEST = "resnet20"
"""The others differ in operators that test_fp16.py and test_int8.py try on small networks."""
V100 = load_target("v100")
LIMITS = {
    "fp32": PrecisionLimits().fp32,
    "fp16": PrecisionLimits().fp16,
    # Random weights leave the classes nearly tied, so their order says nothing.
    "int8": ParityLimits(relative_error=0.5, cosine=0.97),
}


@lru_cache(maxsize=1)
def dense(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with the statistics of real activations, and the images that they are of."""
    torch.manual_seed(0)
    images = torch.randn(24, *NETWORKS[name])
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
    return model.eval(), images


@lru_cache(maxsize=1)
def exported(name: str, kind: str) -> tuple[nn.Module, np.ndarray, onnx.ModelProto]:
    """A network, whole or pruned, the images, and its export in float32."""
    model, images = dense(name)
    size = NETWORKS[name]
    if kind == "pruned":
        graph = analyse(model, size)
        model = shrink(model, graph, random_mask(graph, seed=1))
    proto = onnx_from_network(model.eval(), target=V100, input_size=size)
    return model, images.numpy(), proto


class Written(NamedTuple):
    """A network in one precision, on disk."""

    name: str
    precision: str
    path: Path
    facts: OnnxFacts
    model: nn.Module
    images: np.ndarray


CELLS = [
    pytest.param(cell, id="-".join(cell), marks=() if cell[0] == SMALLEST else pytest.mark.slow)
    for cell in product(NETWORKS, ("dense", "pruned"), LIMITS)
]


# One parameter, so that the tests of a network follow each other and it is exported once.
@pytest.fixture(scope="module", params=CELLS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Written]:
    name, kind, precision = request.param
    model, images, original = exported(name, kind)
    proto = copied(original)
    if precision == "fp16":
        to_fp16(proto)
    elif precision == "int8":
        tensors = quantised_tensors(proto)
        ranges = calibrate(
            proto.SerializeToString(), tensors, lambda: [images[:12]], method="max", threads=1
        )
        to_int8(proto, ranges)
    path = tmp_path_factory.mktemp("matrix") / "model.onnx"
    with staged_onnx(proto, path, target=V100, metadata={}) as facts:
        pass
    yield Written(name, precision, path, facts, model, images)
    path.unlink()


def test_the_file_fits_the_oldest_parser(written: Written) -> None:
    facts = written.facts
    assert (facts.opset, facts.ir_version) == (17, 8)
    model = onnx.load(written.path)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kernels = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    assert kernels
    if written.precision == "int8":
        assert facts.nodes["QuantizeLinear"] == facts.nodes["DequantizeLinear"] > 2 * len(kernels)
    else:
        kinds = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}
        assert {weights[name] for name in kernels} == {kinds[written.precision]}
    ends = (*model.graph.input, *model.graph.output)
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}


def test_onnx_runtime_agrees_with_torch(written: Written) -> None:
    with TorchRunner(written.model) as reference, OnnxRunner(written.path) as candidate:
        check_parity(
            *(reference, candidate, written.images[:4]),
            batch_sizes=(1, 4),
            limits=LIMITS[written.precision],
        )


def test_tensorrt_rtx_builds_it(written: Written, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    # Every profile is built on its own, so the smallest network stands for more than one.
    batch = (1, 8) if written.name == SMALLEST else (8,)
    document = build_engine(
        written.path,
        tmp_path / "model.engine",
        target=load_target("rtx"),
        config=ExportConfig(precision=written.precision, batch=batch),
        onnx_sha256=written.facts.sha256,
        network=dict.fromkeys(NETWORK_FACTS),
    )
    assert document["strongly_typed"]
    assert len(document["profiles"]) == len(batch)
    assert document["engine"]["bytes"] > 10_000
