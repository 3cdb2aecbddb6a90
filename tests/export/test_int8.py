from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lived_in
from networks import NETWORKS
from onnx import TensorProto, helper
from onnx_models import (
    LEVELS,
    adds_8_bits_exactly,
    arrays,
    census,
    check,
    copied,
    cosine,
    engine_bytes,
    evaluate,
    exported,
    handmade,
    producers,
    rounds_half_precision,
    run,
)
from torch import nn
from torch.nn import functional as F
from torchvision import models

from compress.errors import ModelError
from compress.networks.models import build_model
from export.precision.calibration import calibrate
from export.precision.int8 import Int8Facts, quantised_tensors, to_int8
from export.precision.placement import ONNXRUNTIME, TENSORRT, Form

node = helper.make_node


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def ranges_of(model: onnx.ModelProto, x: np.ndarray, form: Form = TENSORRT) -> dict[str, float]:
    tensors = quantised_tensors(model, form)
    return calibrate(model.SerializeToString(), tensors, lambda: [x], method="max", threads=1)


def quantised(model: onnx.ModelProto, x: np.ndarray, **options: str) -> tuple[str, Int8Facts]:
    """Quantise in place with ranges from these images; return how many pairs there are."""
    facts = to_int8(model, ranges_of(model, x), **options)  # type: ignore[arg-type]
    check(model)
    kinds = census(model)
    return f"{kinds['QuantizeLinear']} Q {kinds['DequantizeLinear']} DQ", facts


def rounded(values: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Quantise and dequantise by hand."""
    return np.clip(np.rint(values / scale), -128, 127) * scale


def pairs(model: onnx.ModelProto) -> dict[str, str]:
    """Return, for every tensor that a DequantizeLinear makes, the tensor that was quantised."""
    made = producers(model)
    return {
        name: made[item.input[0]].input[0]
        for name, item in made.items()
        if item.op_type == "DequantizeLinear"
    }


class Residual(nn.Module):
    """A small residual network: an identity, a projection, both poolings."""

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.main = nn.Conv2d(8, 8, 3, padding=1)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.project = nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 4)
        self.swapped = swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.main(x) if self.swapped else self.main(x) + x)
        branches = self.project(x), self.deep(x)
        x = F.relu(branches[0] + branches[1] if self.swapped else branches[1] + branches[0])
        return self.head(F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1).flatten(1))


class Transition(nn.Module):
    """Concatenation, BatchNorm that nothing can take in, AveragePool: a DenseNet in small."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.norm, self.squeeze = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.last, self.head = nn.BatchNorm2d(5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(torch.cat([x, self.grow(F.relu(x))], 1)))
        x = F.avg_pool2d(self.squeeze(x), 2)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1))


class Twice(nn.Module):
    """One convolution used twice, and two convolutions that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.twice(F.relu(self.twice(x))))
        return (self.left(x) * self.right(x)).mean((2, 3))


def test_a_convolution_computes_on_numbers_rounded_by_hand() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():  # a channel far smaller than the others needs a scale of its own
        layer.weight *= torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None, None]
    model = exported(nn.Sequential(layer, nn.Flatten()), (3, 5, 5))
    to_int8(model, {"input": 1.5})  # which clips one number in seven
    check(model)
    x, weight = images(2, 3, 5, 5), layer.weight.detach().numpy()
    scales = np.abs(weight).max((1, 2, 3), keepdims=True) / np.float32(127)
    operands = rounded(x, np.float32(1.5 / 127)), rounded(weight, scales)
    expected = F.conv2d(
        *(torch.from_numpy(array.astype(np.float64)) for array in operands),
        layer.bias.detach().double(),
        padding=1,
    )
    actual = run(model, x, optimised=False).reshape(2, 4, 5, 5)
    for channel in range(4):
        wanted = expected[:, channel].numpy()
        np.testing.assert_allclose(actual[:, channel], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_linear_layer_has_a_scale_for_each_of_its_outputs(transposed: int) -> None:
    weight = images(5, 7) * np.array([[1], [100], [0.01], [1], [3]], np.float32)
    stored = weight if transposed else np.ascontiguousarray(weight.T)
    bias = np.arange(5, dtype=np.float32)
    nodes = [node("Gemm", ["input", "w", "b"], ["logits"], "fc", transB=transposed)]
    model = handmade(nodes, {"w": stored, "b": bias}, ("batch", 7))
    to_int8(model, {"input": 2.0})
    check(model)
    x = images(4, 7)
    scales = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    expected = rounded(x, np.float32(2 / 127)) @ rounded(weight, scales).T + bias
    actual = run(model, x, optimised=False)
    for output in range(5):
        np.testing.assert_allclose(actual[:, output], expected[:, output], rtol=1e-4, atol=1e-5)
    by_kind = {item.op_type: item for item in model.graph.node if item.input[0] == "w"}
    (axis,) = by_kind["QuantizeLinear"].attribute
    assert (axis.name, axis.i) == ("axis", 0 if transposed else 1)


def test_a_channel_of_zeros_stays_zero() -> None:
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1], layer.weight[2] = 0, 1e-42
    model = exported(nn.Sequential(layer, nn.Flatten()), (3, 3, 3))
    to_int8(model, {"input": 3.0})
    logits = run(model, images(2, 3, 3, 3))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, 1:3], np.tile(layer.bias.detach()[1:3], (2, 1)))
    assert all((array > 0).all() for name, array in arrays(model).items() if "scale" in name)


@pytest.mark.parametrize("opset", [17, 20])
def test_resnet18_has_the_43_pairs_that_tensorrt_fuses(opset: int) -> None:
    model = exported(models.resnet18(num_classes=10), (3, 64, 64), opset)
    x = images(2, 3, 64, 64)
    count, facts = quantised(model, x)
    # Weights: 20 Conv, 1 Gemm. Activations: the image, 8 block inputs that their identity or
    # projection shares, 8 between two convolutions, 3 projections, what is pooled and classified.
    assert count == "43 Q 43 DQ"
    assert facts == Int8Facts(layers=21, float_layers=(), activations=22, weights=21, rest=None)
    made, from_pair = producers(model), pairs(model)
    additions = [item for item in model.graph.node if item.op_type == "Add"]
    assert len(additions) == 8
    projections = 0
    for add in additions:
        (shortcut,) = (name for name in add.input if name in from_pair)
        (other,) = (name for name in add.input if name not in from_pair)
        assert made[other].op_type == "Conv"
        assert "downsample" not in made[other].name
        source = made[from_pair[shortcut]]
        assert source.op_type in ("Relu", "MaxPool") or "downsample" in source.name
        projections += source.op_type == "Conv"
    assert projections == 3


def test_every_pair_is_symmetric_and_says_so() -> None:
    model = exported(models.resnet18(num_classes=10), (3, 64, 64))
    quantised(model, images(1, 3, 64, 64))
    constants, kinds = arrays(model), Counter[str]()
    for item in model.graph.node:
        if item.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (constants[name] for name in item.input[1:3])
            assert len(item.input) == 3
            assert zero.dtype == np.int8
            assert zero.shape == scale.shape
            assert not zero.any()
            assert scale.dtype == np.float32
            kinds["weight" if item.attribute else "activation"] += 1
            assert (scale.ndim, len(item.attribute)) in ((0, 0), (1, 1))
    assert kinds == {"weight": 2 * 21, "activation": 2 * 22}


def test_a_convolution_reads_int8_on_both_sides_and_a_float_bias() -> None:
    model = exported(Residual(), (3, 8, 8))
    before = arrays(model)
    quantised(model, images(2, 3, 8, 8))
    from_pair, after = pairs(model), arrays(model)
    layers = [item for item in model.graph.node if item.op_type in ("Conv", "Gemm")]
    assert len(layers) == 6
    for layer in layers:
        data, weight, bias = layer.input
        assert data in from_pair
        np.testing.assert_array_equal(after[from_pair[weight]], before[from_pair[weight]])
        assert after[bias].dtype == np.float32
    pooled = [item for item in model.graph.node if item.op_type.endswith("AveragePool")]
    assert len(pooled) == 2
    assert all(item.input[0] in from_pair for item in pooled)
    assert not set(model.graph.node[-1].output) & set(from_pair)


@pytest.mark.parametrize("swapped", [False, True])
def test_of_an_add_the_shortcut_alone_is_quantised_on_either_side(swapped: bool) -> None:
    network = Residual(swapped=swapped)
    model = exported(network, (3, 8, 8))
    count, _ = quantised(model, images(2, 3, 8, 8))
    assert count == "14 Q 14 DQ"  # 6 weights; image, stem, add, deep, projection, 2 pools, Gemm
    made, from_pair = producers(model), pairs(model)
    sources = []
    for add in (item for item in model.graph.node if item.op_type == "Add"):
        (shortcut,) = (name for name in add.input if name in from_pair)
        sources.append(made[from_pair[shortcut]])
    assert [source.op_type for source in sources] == ["Relu", "Conv"]
    assert "project" in sources[1].name


def test_an_add_that_no_convolution_can_take_in_stays_float() -> None:
    weight = images(3, 3, 1, 1)
    nodes = [
        node("Conv", ["input", "w"], ["a"], "conv"),
        node("Relu", ["a"], ["b"], "relu"),
        node("Add", ["a", "b"], ["c"], "two readers of a"),
        node("Add", ["c", "c"], ["d"], "twice the same"),
        node("Add", ["d", "bias"], ["logits"], "a constant"),
    ]
    model = handmade(nodes, {"w": weight, "bias": np.ones(1, np.float32)}, ("batch", 3, 4, 4))
    assert quantised_tensors(model) == ("input",)
    assert quantised(model, images(2, 3, 4, 4))[0] == "2 Q 2 DQ"


def test_readers_of_one_tensor_share_its_pair() -> None:
    model = exported(Twice(), (3, 6, 6))
    count, facts = quantised(model, images(2, 3, 6, 6))
    assert census(model)["Conv"] == 4
    assert (facts.layers, facts.weights, facts.activations) == (4, 3, 3)
    assert count == "6 Q 6 DQ"
    left, right = [item for item in model.graph.node if item.op_type == "Conv"][2:]
    assert left.input[0] == right.input[0]


def test_a_weight_that_is_computed_leaves_its_layer_in_float() -> None:
    nodes = [
        node("Relu", ["w"], ["positive"], "relu"),
        node("Conv", ["input", "positive"], ["a"], "odd"),
        node("Conv", ["a", "w"], ["logits"], "plain"),
    ]
    model = handmade(nodes, {"w": images(3, 3, 1, 1)}, ("batch", 3, 4, 4))
    facts = to_int8(model, {"a": 5.0})
    assert (facts.layers, facts.float_layers) == (1, ("odd",))


def parity(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    if name in ("Residual", "Transition", "Twice"):
        return {"Residual": Residual, "Transition": Transition, "Twice": Twice}[name](), (3, 8, 8)
    if name == "resnet20":
        return build_model("resnet20", num_classes=10), (3, 16, 16)
    return NETWORKS[name](), (3, 12, 12)


NAMES = ("Residual", "Transition", "Twice", "Dense", "Grouped", "Separable", "Plain", "resnet20")


@pytest.mark.parametrize(("opset", "rest"), [(17, "fp32"), (20, "fp32"), (20, "fp16")])
@pytest.mark.parametrize("name", NAMES)
def test_networks_agree_with_torch(name: str, opset: int, rest: str) -> None:
    network, size = parity(name)
    lived_in(network).eval()
    model = exported(network, size, opset)
    layers = sum(census(model)[kind] for kind in ("Conv", "Gemm"))
    x = images(4, *size)
    _, facts = quantised(model, x, rest=rest)
    assert (facts.layers, facts.rest is None) == (layers, rest == "fp32")
    expected = network(torch.from_numpy(x)).detach().numpy()
    results = {level: run(model, x, level=level) for level in LEVELS}
    assert all(np.isfinite(result).all() for result in results.values())
    if rest == "fp16":
        results = results if rounds_half_precision() else {}
        results["specification"] = evaluate(model, x)
    for level, actual in results.items():
        assert actual.dtype == np.float32
        exact = level in ("specification", "ORT_DISABLE_ALL") or adds_8_bits_exactly()
        assert cosine(actual, expected) > (0.999 if exact else 0.98)
        assert np.abs(actual - expected).max() > 1e-6 * np.abs(expected).max()  # it did round


@pytest.mark.parametrize(("opset", "rest"), [(17, "fp32"), (20, "fp32"), (20, "fp16")])
@pytest.mark.parametrize("name", ["Residual", "Transition", "Grouped", "Separable", "resnet20"])
def test_tensorrt_builds_an_engine(name: str, opset: int, rest: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    network, size = parity(name)
    model = exported(network, size, opset)
    quantised(model, images(4, *size), rest=rest)
    assert engine_bytes(model, size) > 1000


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every tensor that is computed."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    return {value.name: value.type.tensor_type.elem_type for value in inferred}


def test_beside_int8_everything_is_half_precision_that_is_not_rounded_at_once() -> None:
    model = exported(Residual(), (3, 8, 8), 20)
    _, facts = quantised(model, images(2, 3, 8, 8), rest="fp16")
    assert census(model)["Cast"] == 2
    kinds = types(model)
    layers = {n.name: kinds.get(n.output[0]) for n in model.graph.node if n.op_type == "Conv"}
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    # Of those that an Add reads, one takes it in and stays half; all others become 8 bits at once.
    assert layers == {
        "/stem/Conv": single,
        "/main/Conv": half,
        "/deep/deep.0/Conv": single,
        "/deep/deep.2/Conv": half,
        "/project/Conv": single,
    }
    assert facts.rest is not None
    assert facts.rest.weights > 1000
    names = {name for node in model.graph.node for name in (*node.input, *node.output) if name}
    wide = {name for name in names if kinds.get(name) == single}
    for node in model.graph.node:  # nothing in float32 is stored: it goes from 8 bits to 8 bits
        if not wide.isdisjoint(node.input) and node.op_type not in ("Conv", "Relu"):
            assert node.op_type == "QuantizeLinear"


def biased(network: nn.Module, *, dead: float | None = None) -> nn.Module:
    """Give layers small weights and large biases, and some channels weights that are smaller."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.normal_(layer.weight, std=0.03)
            nn.init.normal_(layer.bias)
            if dead is not None:
                with torch.no_grad():
                    layer.weight[::2] = dead * torch.randn_like(layer.weight[::2])
    return network.eval()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
@pytest.mark.parametrize("dead", [None, 1e-6, 1e-12, 1e-37])
def test_large_biases_survive_every_optimisation(level: str, rest: str, dead: float | None) -> None:
    """Kernels round a bias to 32 bits of the product of both scales, where it must fit."""
    network = biased(nn.Sequential(*plain_layers()), dead=dead)
    model = exported(network, (3, 8, 8), 20)
    x = images(8, 3, 8, 8)
    quantised(model, x, rest=rest)
    expected = network(torch.from_numpy(x)).detach().numpy()
    error = np.abs(run(model, x, level=level) - expected).max() / np.abs(expected).max()
    assert error < 0.02


def plain_layers() -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def test_half_precision_scales_cover_their_range_and_are_never_zero() -> None:
    weight = np.array([[1.3], [1e-6], [1e-9], [0], [77.7]], np.float32)
    model = handmade(
        [node("Gemm", ["input", "w"], ["logits"], "fc", transB=1)],
        {"w": weight},
        ("batch", 1),
        opset=20,
    )
    to_int8(model, {"input": 0.1}, rest="fp16")
    constants = arrays(model)
    assert constants["input_scale"].dtype == constants["w_scale"].dtype == np.float16
    assert constants["input_scale"] >= 0.1 / 127
    assert constants["input_scale"] == pytest.approx(0.1 / 127, rel=2**-10)
    exact = np.abs(weight[:, 0]).astype(np.float64) / 127
    found = constants["w_scale"].astype(np.float64)
    assert (found >= exact).all()
    np.testing.assert_allclose(found[[0, 4]], exact[[0, 4]], rtol=2**-10)
    np.testing.assert_allclose(found[1:3], 2**-24)  # the least half there is


@pytest.mark.parametrize(
    ("opset", "rest", "needed"), [(12, "fp32", 13), (17, "fp16", 19), (18, "fp16", 19)]
)
def test_an_opset_without_such_pairs_is_refused(opset: int, rest: str, needed: int) -> None:
    nodes = [node("Gemm", ["input", "w"], ["logits"])]
    model = handmade(nodes, {"w": images(3, 3)}, ("batch", 3), opset=opset)
    words = f"the rest in {rest} needs opset {needed} and the model has opset {opset}"
    with pytest.raises(ModelError, match=words):
        to_int8(model, {"input": 1.0}, rest=rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({}, "activation 'input' has no range"),
        ({"input": 0.0}, "'input' has range 0.0, which is not positive"),
        ({"input": float("nan")}, "'input' has range nan"),
        ({"input": float("inf")}, "'input' has range inf"),
    ],
)
def test_a_range_that_is_none_is_refused(ranges: dict[str, float], words: str) -> None:
    model = handmade([node("Gemm", ["input", "w"], ["logits"])], {"w": images(3, 3)}, ("batch", 3))
    with pytest.raises(ModelError, match=words):
        to_int8(model, ranges)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    weight = np.array([[1, np.nan]], np.float32)
    model = handmade([node("Gemm", ["input", "w"], ["logits"])], {"w": weight}, ("batch", 1))
    with pytest.raises(ModelError, match="weight 'w' holds NaN or infinity"):
        to_int8(model, {"input": 1.0})


@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_the_same_network_gives_the_same_bytes(rest: str) -> None:
    model = exported(Residual(), (3, 8, 8), 20)
    again = copied(model)
    for proto in (model, again):
        quantised(proto, images(2, 3, 8, 8), rest=rest)
    assert model.SerializeToString() == again.SerializeToString()


def for_processors(name: str) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """Return a network in the form that ONNX Runtime wants, images, and what torch computes."""
    network, size = parity(name)
    lived_in(network).eval()
    model, x = exported(network, size), images(4, *size)
    to_int8(model, ranges_of(model, x, ONNXRUNTIME), form=ONNXRUNTIME)
    check(model)
    return model, x, network(torch.from_numpy(x)).detach().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_the_form_for_processors_computes_the_same_on_all_of_them(name: str) -> None:
    model, x, expected = for_processors(name)
    plain = run(model, x, optimised=False)
    assert cosine(plain, expected) > 0.997
    for level in LEVELS:  # two products of 63 and 255 fit into 16 bits, so nothing is clipped
        assert cosine(run(model, x, level=level), plain) > 0.9995


@pytest.mark.parametrize("name", NAMES)
def test_on_processors_every_layer_computes_in_8_bits(name: str, tmp_path: Path) -> None:
    model, _, _ = for_processors(name)
    before = census(model)
    options = onnxruntime.SessionOptions()
    # The last level lays channels out for this processor, under names of its own.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = census(onnx.load(tmp_path / "optimised.onnx"))
    assert kinds["Conv"] == kinds["FusedConv"] == kinds["Add"] == 0
    assert kinds["QLinearConv"] == before["Conv"]
    assert kinds["Gemm"] == min(1, before["Gemm"])  # the classifier, whose result nothing rounds
    assert kinds["QGemm"] == before["Gemm"] - kinds["Gemm"]


def test_on_processors_activations_are_unsigned_and_use_all_steps() -> None:
    model, x, _ = for_processors("Residual")
    constants, made = arrays(model), producers(model)
    found = {}
    for item in model.graph.node:
        if item.op_type == "QuantizeLinear" and not item.attribute:
            scale, zero = (constants[name] for name in item.input[1:])
            kind = made[item.input[0]].op_type if item.input[0] in made else "input"
            found.setdefault((kind, str(zero.dtype)), set()).add(int(zero))
            assert scale.dtype == np.float32
        elif item.op_type == "QuantizeLinear":
            scale, zero = (constants[name] for name in item.input[1:])
            weight = constants[item.input[0]]
            assert zero.dtype == np.int8
            assert not zero.any()
            assert np.abs(weight).max() / scale.max() == pytest.approx(63)
    signed = {("input", "uint8"): {128}, ("Conv", "uint8"): {128}}
    positive = {(kind, "uint8"): {0} for kind in ("Relu", "AveragePool", "GlobalAveragePool")}
    assert found == {**signed, **positive}
    assert constants["input_scale"] == pytest.approx(np.abs(x).max() / 127)


class Bounded(nn.Module):
    """A bound from above alone, and lengths that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.clamp(self.first(x), max=6.0))
        twice = torch.cat([y, y.flip(3)]).reshape(x.size(0) + x.size(0), 4, -1)
        return twice.reshape(x.size(0), -1, 8).mean(1)


def test_a_bound_from_above_lets_numbers_be_negative() -> None:
    network = Bounded().eval()
    model, x = exported(network, (3, 8, 8)), images(2, 3, 8, 8)
    to_int8(model, ranges_of(model, x, ONNXRUNTIME), form=ONNXRUNTIME)
    expected = network(torch.from_numpy(x)).detach().numpy()
    assert cosine(run(model, x), expected) > 0.99


def test_a_weight_that_is_read_along_both_axes_has_scales_of_each() -> None:
    weight, bias = images(4, 6), np.ones(6, np.float32)
    nodes = [
        node("Gemm", ["input", "w", "four"], ["a"], "down", transB=1),
        node("Gemm", ["a", "w", "six"], ["logits"], "up"),
    ]
    model = handmade(nodes, {"w": weight, "four": bias[:4], "six": bias}, ("batch", 6))
    x, plain = images(3, 6), copied(model)
    facts = to_int8(model, {"input": 4.0, "a": 12.0})
    assert facts.weights == 2
    assert cosine(run(model, x, optimised=False), run(plain, x)) > 0.99
