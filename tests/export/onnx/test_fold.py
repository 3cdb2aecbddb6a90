from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import export_classifier
from torch import nn
from torch.nn import functional

from compress.config.targets import load_target
from export.onnx.fold import fold_constants


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": images})[0]


def computed_pads() -> onnx.ModelProto:
    """Pads [0, 0, 1, 2, 0, 0, 3, 4], put together from pieces."""
    number = numpy_helper.from_array(np.array([0, 0, 1, 2], np.int64))
    nodes = [
        helper.make_node("Constant", [], ["front"], value=number),
        helper.make_node("Concat", ["front", "back"], ["pads32"], axis=0),
        helper.make_node("Cast", ["pads32"], ["pads"], to=TensorProto.INT64),
        helper.make_node("Pad", ["input", "pads"], ["padded"]),
        helper.make_node("Identity", ["bias"], ["same_bias"]),
        helper.make_node("Conv", ["padded", "kernel", "same_bias"], ["features"]),
        helper.make_node("Slice", ["features", "from", "to"], ["logits"]),
    ]
    weights = {
        "back": np.array([0, 0, 3, 4], np.int64),
        "kernel": np.arange(12, dtype=np.float32).reshape(2, 3, 1, 2),
        "bias": np.array([1, -1], np.float32),
        "from": np.array([0, 0], np.int64),
        "to": np.array([9, 1], np.int64),
        "unread": np.zeros(1000, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 8, 9])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_reads_constants_alone_becomes_one() -> None:
    model = computed_pads()
    images = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    expected = run(model, images)
    fold_constants(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Pad", "Conv", "Slice"]
    weights = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    assert sorted(weights) == ["from", "kernel", "pads", "same_bias", "to"]
    np.testing.assert_array_equal(weights["pads"], [0, 0, 1, 2, 0, 0, 3, 4])
    np.testing.assert_array_equal(run(model, images), expected)


class PaddedShortcut(nn.Module):
    """Option A of the CIFAR ResNets: every second pixel, and zeros for the new channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=2, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        shortcut = functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return (self.conv(images) + shortcut).mean((2, 3))


def test_a_padded_shortcut_has_constant_pads(tmp_path: Path) -> None:
    model = PaddedShortcut()
    path = tmp_path / "model.onnx"
    export_classifier(model, path, target=load_target("v100"), input_size=(3, 8, 8), metadata={})
    proto = onnx.load(path)
    census = Counter(node.op_type for node in proto.graph.node)
    assert census == {"Slice": 2, "Pad": 1, "Conv": 1, "Add": 1, "ReduceMean": 1}
    weights = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    (pad,) = (node for node in proto.graph.node if node.op_type == "Pad")
    np.testing.assert_array_equal(weights[pad.input[1]], [0, 2, 0, 0, 0, 2, 0, 0])
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(run(proto, images.numpy()), expected, atol=1e-5)


class Shuffled(nn.Module):
    """Channels in two groups, interleaved as ShuffleNet does, over a grid of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            n, c, h, w = images.shape
            images = conv(images).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            images = images + torch.arange(h * w).view(h, w) * 0.1
        return images.mean((2, 3))


def test_lengths_that_are_the_same_for_every_batch_are_constants(tmp_path: Path) -> None:
    model, path = Shuffled(), tmp_path / "model.onnx"
    export_classifier(model, path, target=load_target("v100"), input_size=(6, 4, 5), metadata={})
    proto = onnx.load(path)
    census = Counter(node.op_type for node in proto.graph.node)
    assert not census.keys() & {"Shape", "Gather", "Div", "Mul", "Cast", "Range"}
    images = torch.randn(3, 6, 4, 5)
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(run(proto, images.numpy()), expected, atol=1e-5)


def test_a_constant_is_not_blown_up() -> None:
    nodes = [
        helper.make_node("Expand", ["one", "many"], ["ones"]),
        helper.make_node("Expand", ["one", "few"], ["some"]),
        helper.make_node("Mul", ["input", "ones"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "some"], ["logits"]),
    ]
    weights = {
        "one": np.ones(1, np.float32),
        "many": np.array([1, 2**17], np.int64),
        "few": np.array([1, 2**17 // 2**10, 1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 2**17])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 128, 2**17])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    fold_constants(model)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Expand", "Mul", "Mul"]
