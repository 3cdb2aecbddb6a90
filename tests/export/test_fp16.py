from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from conftest import lived_in
from networks import NETWORKS
from onnx import TensorProto, helper
from onnx_models import (
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
    run,
)
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.networks.models import build_model
from export.precision.fp16 import activations, require_range, to_fp16

node = helper.make_node


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def gemm(weight: np.ndarray, bias: np.ndarray | None = None) -> onnx.ModelProto:
    """Return ``logits = input @ weight.T + bias``."""
    weights = {"w": weight} | ({} if bias is None else {"b": bias})
    nodes = [node("Gemm", ["input", *weights], ["logits"], "fc", transB=1)]
    return handmade(nodes, weights, ("batch", weight.shape[1]))


class Constants(nn.Module):
    """Constants that torch writes as tensors: of Clip, of Pad, of Resize and of arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(self.conv(x), (1, 2, 0, 1), value=0.75).clamp(-0.5, 0.7) * 1.5
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return x.mean((2, 3)) + 0.25


def test_inputs_and_weights_are_rounded_to_eleven_bits() -> None:
    almost_one = np.float32(1 + 2**-12)
    model = gemm(np.full((1, 9), almost_one))
    ones = np.full((2, 9), almost_one)
    assert run(model, ones) == pytest.approx(9 * (1 + 2**-11), rel=1e-6)
    to_fp16(model)
    np.testing.assert_array_equal(evaluate(model, ones), np.full((2, 1), 9, np.float32))


def test_a_convolution_computes_with_rounded_weights() -> None:
    layer = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        for weight in (layer.weight, layer.bias):
            weight.copy_(torch.randint(1, 9, weight.shape) * (1 + 2**-13))
    model = exported(nn.Sequential(layer, nn.Flatten()), (3, 6, 6))
    x = np.random.default_rng(0).integers(-3, 4, (2, 3, 6, 6)).astype(np.float32)
    whole = (torch.from_numpy(x), layer.weight.detach().round(), layer.bias.detach().round())
    expected = F.conv2d(*whole).flatten(1).numpy()
    assert not np.array_equal(run(model, x), expected)
    to_fp16(model)
    np.testing.assert_array_equal(run(model, x), expected)


def test_only_the_two_ends_stay_float32() -> None:
    model = exported(Constants(), (3, 6, 6))
    reference = run(model, images(2, 3, 6, 6))
    to_fp16(model)
    check(model)
    ends = (*model.graph.input, *model.graph.output)
    assert [end.name for end in ends] == ["input", "logits"]
    assert {end.type.tensor_type.elem_type for end in ends} == {TensorProto.FLOAT}
    first, last = (item for item in model.graph.node if item.op_type == "Cast")
    assert (first.input[0], last.output[0]) == ("input", "logits")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16}
    types = {value.type.tensor_type.elem_type for value in inferred}
    assert types & floats == {TensorProto.FLOAT16}
    assert cosine(run(model, images(2, 3, 6, 6)), reference) > 0.99999


def test_the_scales_of_a_resize_stay_float32_and_the_bounds_of_a_clip_do_not() -> None:
    model = exported(Constants(), (3, 6, 6))
    to_fp16(model)
    weights = arrays(model)
    (resize,) = (item for item in model.graph.node if item.op_type == "Resize")
    (clip,) = (item for item in model.graph.node if item.op_type == "Clip")
    (pad,) = (item for item in model.graph.node if item.op_type == "Pad")
    assert weights[resize.input[2]].dtype == np.float32
    assert [weights[name].dtype for name in clip.input[1:]] == [np.float16] * 2
    assert weights[pad.input[2]] == np.float16(0.75)
    assert weights[pad.input[2]].dtype == np.float16
    assert weights[pad.input[1]].dtype == np.int64


def test_a_constant_that_both_types_read_is_kept_in_both() -> None:
    nodes = [
        node("Resize", ["input", "", "sizes"], ["large"], "resize", mode="nearest"),
        node("Mul", ["large", "sizes"], ["logits"], "mul"),
    ]
    model = handmade(nodes, {"sizes": np.array([1, 1, 2, 2], np.float32)}, ("batch", 1, 2, 2))
    x = images(2, 1, 2, 2)
    expected = x.astype(np.float16).repeat(2, 2).repeat(2, 3) * np.float16([1, 1, 2, 2])
    to_fp16(model)
    check(model)
    assert sorted(str(array.dtype) for array in arrays(model).values()) == ["float16", "float32"]
    np.testing.assert_array_equal(evaluate(model, x), expected)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-3)


def test_an_operator_that_is_float32_alone_is_wrapped_in_casts() -> None:
    scale = {"scale": np.array(0.5, np.float32), "zero": np.array(0, np.int8)}
    nodes = [
        node("Relu", ["input"], ["positive"], "relu"),
        node("QuantizeLinear", ["positive", "scale", "zero"], ["small"], "q"),
        node("DequantizeLinear", ["small", "scale", "zero"], ["back"], "dq"),
        node("Neg", ["back"], ["logits"], "neg"),
    ]
    model = handmade(nodes, scale, ("batch", 4), opset=17)  # whose Q/DQ reads no float16
    to_fp16(model)
    check(model)
    made = producers(model)
    assert [made[made[name].input[0]].op_type for name in ("logits",)] == ["Neg"]
    casts = {item.output[0]: item for item in model.graph.node if item.op_type == "Cast"}
    by_kind = {item.op_type: item for item in model.graph.node}
    assert by_kind["QuantizeLinear"].input[0] in casts
    assert by_kind["Neg"].input[0] in casts
    assert {name: array.dtype.name for name, array in arrays(model).items()} == {
        "scale": "float32",
        "zero": "int8",
    }
    x = np.array([[-1, 0.3, 0.8, 90]], np.float32)
    np.testing.assert_array_equal(run(model, x), [[0, -0.5, -1, -63.5]])


def test_results_whose_type_is_an_attribute_become_half() -> None:
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.5])
    nodes = [
        node("Shape", ["input"], ["shape"], "shape"),
        node("ConstantOfShape", ["shape"], ["filled"], "fill", value=one),
        node("Cast", ["shape"], ["sizes"], "sizes", to=TensorProto.FLOAT),
        node("Constant", [], ["half"], "half", value_float=0.5),
        node("Add", ["input", "filled"], ["sum"], "add"),
        node("Mul", ["sum", "half"], ["product"], "mul"),
        node("Add", ["product", "sizes"], ["logits"], "more"),
    ]
    model = handmade(nodes, {}, ("batch", 2))
    to_fp16(model)
    check(model)
    x = np.array([[0.5, 2.5], [1, 1], [0, 0]], np.float32)
    np.testing.assert_array_equal(run(model, x), (x + 1.5) * 0.5 + [3, 2])


def test_a_name_that_is_taken_is_not_given_again() -> None:
    model = gemm(np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    model.graph.node[0].input[2] = model.graph.initializer[1].name = "input_fp16"
    to_fp16(model)
    check(model)
    np.testing.assert_array_equal(run(model, np.ones((1, 3), np.float32)), [[3, 3]])


def test_types_of_inner_tensors_that_a_file_states_are_not_left_behind() -> None:
    model = exported(build_model("resnet20", num_classes=3), (3, 8, 8))
    model = onnx.shape_inference.infer_shapes(model)
    assert len(model.graph.value_info) > 40
    to_fp16(model)
    check(model)
    assert run(model, images(1, 3, 8, 8)).shape == (1, 3)


def test_what_is_lost_of_the_weights_is_counted() -> None:
    weights = np.array([[0, 1, -2, 1e-8, -1e-8], [1e-5, 6.2e-5, 3e-8, 5, 6]], np.float32)
    facts = to_fp16(gemm(weights))
    assert facts.weights == 10
    assert facts.zeroed == 0.2  # the two of 1e-8, half of the least subnormal being 3e-8
    assert facts.subnormal == 0.2  # 1e-5 and 3e-8
    assert type(facts.zeroed) is type(facts.subnormal) is float


@pytest.mark.parametrize("largest", [65504, -65504])
def test_the_largest_half_is_no_overflow(largest: float) -> None:
    model = gemm(np.array([[largest]], np.float32))
    to_fp16(model)
    assert run(model, np.ones((1, 1), np.float32)) == largest


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (65505, "holds 65505, and the largest number of fp16 is 65504"),
        (-7e4, "holds 70000"),
        (np.inf, "holds NaN or infinity"),
        (np.nan, "holds NaN or infinity"),
    ],
)
def test_a_weight_that_half_cannot_hold_is_refused_by_name(value: float, words: str) -> None:
    with pytest.raises(ModelError, match=f"weight 'w' of node 'fc' {words}"):
        to_fp16(gemm(np.array([[1, value]], np.float32)))


def test_a_branch_is_refused() -> None:
    value = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None)
    branch = helper.make_graph([node("Identity", ["input"], ["chosen"])], "branch", [], [value])
    nodes = [node("If", ["flag"], ["logits"], then_branch=branch, else_branch=branch)]
    model = handmade(nodes, {"flag": np.array(True)}, ("batch", 2))
    with pytest.raises(ModelError, match="a branch or a loop"):
        to_fp16(model)


def test_an_operator_of_another_domain_is_refused() -> None:
    model = handmade([node("Odd", ["input"], ["logits"], "odd", domain="me")], {}, ("batch", 2))
    model.opset_import.append(helper.make_opsetid("me", 1))
    with pytest.raises(ModelError, match="'odd' is not a standard operator but of 'me'"):
        to_fp16(model)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_agrees_with_torch(name: str, opset: int) -> None:
    size = (3, 12, 12)
    network = lived_in(NETWORKS[name]()).eval()
    model = exported(network, size, opset)
    kinds = census(model)
    to_fp16(model)
    check(model)
    assert census(model) == kinds + Counter(Cast=2)
    x = images(3, *size)
    expected = network(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run(model, x), expected, atol=5e-3 * np.abs(expected).max())


def test_a_resnet_follows_torch() -> None:
    network = lived_in(build_model("resnet20", num_classes=10)).eval()
    model = exported(network, (3, 16, 16))
    facts = to_fp16(model)
    check(model)
    x = images(4, 3, 16, 16)
    expected = network(torch.from_numpy(x)).detach().numpy()
    assert cosine(run(model, x), expected) > 0.99999
    assert facts.weights == sum(
        array.size for array in arrays(model).values() if array.dtype == "f2"
    )


@pytest.mark.parametrize("name", ["PreActivation", "Dense", "Separable", "Grouped", "Mixing"])
def test_tensorrt_builds_an_engine(name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = exported(NETWORKS[name](), (3, 12, 12))
    to_fp16(model)
    assert engine_bytes(model, (3, 12, 12)) > 1000


@pytest.mark.parametrize("opset", [17, 20])
def test_an_engine_in_half_precision_is_smaller(opset: int) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = exported(build_model("resnet20", num_classes=10), (3, 16, 16), opset)
    wide = engine_bytes(model, (3, 16, 16))
    to_fp16(model)
    assert engine_bytes(model, (3, 16, 16)) < 0.8 * wide


def test_the_same_network_gives_the_same_bytes() -> None:
    model = exported(Constants(), (3, 6, 6))
    again = copied(model)
    to_fp16(model)
    to_fp16(again)
    assert model.SerializeToString() == again.SerializeToString()


def test_activations_beyond_half_precision_are_refused() -> None:
    assert require_range({"a": 3.0, "b": 65504.0, "c": 1.0}) == 65504.0
    says = r"'b' reaches 65505 on real images.*65504: export in fp32"
    with pytest.raises(ModelError, match=says):
        require_range({"a": 3.0, "b": 65505.0})


def test_every_float_result_is_watched() -> None:
    model = exported(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), (3, 8, 8))
    watched = activations(model)
    assert len(watched) == len(model.graph.node) == 3
    assert watched[-1] == "logits"


@pytest.mark.parametrize("bound", [1e6, np.inf])
def test_a_bound_beyond_half_precision_saturates(bound: float) -> None:
    low, high = np.array(-bound, np.float32), np.array(bound, np.float32)
    model = handmade([node("Clip", ["input", "a", "b"], ["logits"])], {"a": low, "b": high}, ("n",))
    to_fp16(model)
    assert [float(array) for array in arrays(model).values()] == [-65504.0, 65504.0]
    x = np.array([-1e4, 0.5, 6e4], np.float32)
    np.testing.assert_allclose(evaluate(model, x), x, rtol=1e-3)


def test_a_bound_that_something_else_reads_is_refused() -> None:
    nodes = [node("Min", ["input", "a"], ["x"]), node("Add", ["x", "a"], ["logits"])]
    with pytest.raises(ModelError, match=r"holds 1e\+06"):
        to_fp16(handmade(nodes, {"a": np.array(1e6, np.float32)}, ("n",)))


@pytest.mark.parametrize(
    ("tiny", "words"),
    [(1e-12, "weight 'eps' of node 'keep' is 1e-12, which fp16 rounds to 0"), (1e-7, None)],
)
def test_a_constant_that_would_vanish_is_refused_by_name(tiny: float, words: str | None) -> None:
    nodes = [
        node("Abs", ["input"], ["x"]),
        node("Add", ["x", "eps"], ["y"], "keep"),
        node("Div", ["x", "y"], ["logits"]),
    ]
    model = handmade(nodes, {"eps": np.array(tiny, np.float32)}, ("n",))
    if words is not None:
        with pytest.raises(ModelError, match=words):
            to_fp16(model)
        return
    to_fp16(model)
    np.testing.assert_array_equal(evaluate(model, np.zeros(3, np.float32)), 0)
