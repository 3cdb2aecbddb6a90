"""The same function, said with fewer nodes: checked by running both forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_models import arrays, census, check, copied, handmade, run
from torch import nn
from torch.nn import functional as F

from compress.config.targets import load_target
from export.onnx.simplify import simplify
from export.onnx.trace import onnx_from_network

node = helper.make_node
IMAGES = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
WEIGHTS = {
    "kernel": np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float32),
    "bias": np.array([1, -2, 3, 0.5], np.float32),
}


def simplified(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]
) -> tuple[Counter[str], onnx.ModelProto]:
    """Simplify a network of (batch, 4, 5, 6), and return it; fail if it computes anything else."""
    model = handmade(nodes, weights, ("batch", 4, 5, 6))
    after = copied(model)
    simplify(after)
    check(after)
    expected = run(model, IMAGES)
    np.testing.assert_allclose(run(after, IMAGES), expected, atol=1e-6 * np.abs(expected).max())
    return census(after), after


def _four_dimensions(name: str) -> list[onnx.NodeProto]:
    return [node("ReduceMean", [name], ["logits"], axes=[0], keepdims=0)]


FACTORS: dict[str, tuple[np.ndarray, bool]] = {
    "one number": (np.array(3, np.float32), True),
    "one of each": (np.array([[[[2]], [[1]], [[-1]], [[0.1]]]], np.float32), True),
    "three dimensions": (np.array([[[2]], [[1]], [[-1]], [[0.1]]], np.float32), True),
    "of columns": (np.array([2, 1, -1, 0.1], np.float32), False),
    "of one image": (np.full((3, 1, 1, 1), 2, np.float32), False),
    "of each place": (np.full((4, 5, 4), 2, np.float32), False),
    "five dimensions": (np.full((1, 1, 1, 1, 1), 2, np.float32), False),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_a_factor_of_channels_goes_into_the_convolution(
    name: str, first: bool, biased: bool
) -> None:
    factor, fits = FACTORS[name]
    operands = ["factor", "features"] if first else ["features", "factor"]
    parts = ["input", "kernel", *(["bias"] if biased else [])]
    nodes = [
        node("Conv", parts, ["features"], pads=[1, 1, 1, 0]),  # 5 columns become 4 channels' worth
        node("Slice", ["features", "from", "to", "axis"], ["narrow"]),
        node("Conv", ["narrow", *parts[1:]], ["again"], pads=[1, 1, 1, 1]),
        node("Mul", [operand.replace("features", "again") for operand in operands], ["scaled"]),
        *(
            _four_dimensions("scaled")
            if factor.ndim == 5
            else [node("Relu", ["scaled"], ["logits"])]
        ),
    ]
    cut = {"from": np.array([0]), "to": np.array([4]), "axis": np.array([3])}
    shared, _ = simplified(nodes, {**WEIGHTS, **cut, "factor": factor})
    assert shared["Mul"] == 1  # the weights serve two convolutions
    own = {f"{key}2": value for key, value in WEIGHTS.items()}
    nodes[2].input[1:] = [f"{part}2" for part in nodes[2].input[1:]]
    alone, model = simplified(nodes, {**WEIGHTS, **own, **cut, "factor": factor})
    assert alone["Mul"] == (0 if fits else 1)
    np.testing.assert_array_equal(arrays(model)["kernel"], WEIGHTS["kernel"])


def test_a_factor_behind_what_others_read_stays() -> None:
    nodes = [
        node("Conv", ["input", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        node("Mul", ["features", "factor"], ["scaled"]),
        node("Add", ["features", "scaled"], ["logits"]),
    ]
    found, _ = simplified(nodes, {**WEIGHTS, "factor": np.array(2, np.float32)})
    assert found == {"Conv": 1, "Mul": 1, "Add": 1}


PADS: dict[str, tuple[list[int], dict[str, object], bool]] = {
    "around": ([0, 0, 1, 2, 0, 0, 3, 4], {}, True),
    "with a zero": ([0, 0, 1, 2, 0, 0, 3, 4], {"value": np.array(0, np.float32)}, True),
    "with ones": ([0, 0, 1, 2, 0, 0, 3, 4], {"value": np.array(1, np.float32)}, False),
    "mirrored": ([0, 0, 1, 2, 0, 0, 3, 4], {"mode": "reflect"}, False),
    "cut": ([0, 0, -1, 2, 0, 0, 3, 4], {}, False),
    "of images": ([1, 0, 0, 0, 0, 0, 0, 0], {}, False),
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.parametrize("own", [{}, {"pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_a_convolution_pads_with_zeros_by_itself(name: str, own: dict[str, object]) -> None:
    widths, options, fits = PADS[name]
    weights = {**WEIGHTS, "widths": np.array(widths)}
    names = ["input", "widths"]
    if "value" in options:
        weights["value"] = options["value"]  # type: ignore[assignment]
        names.append("value")
    mode = {"mode": options["mode"]} if "mode" in options else {}
    nodes = [
        node("Pad", names, ["padded"], **mode),
        node("Conv", ["padded", "kernel"], ["logits"], strides=[2, 1], **own),
    ]
    found, _ = simplified(nodes, weights)
    assert found["Pad"] == (0 if fits and "auto_pad" not in own else 1)


def test_padding_that_others_read_stays() -> None:
    nodes = [
        node("Pad", ["input", "widths"], ["padded"]),
        node("Conv", ["padded", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        node("Add", ["features", "padded"], ["logits"]),
    ]
    widths = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    assert simplified(nodes, {**WEIGHTS, "widths": widths})[0]["Pad"] == 1


@pytest.mark.parametrize(
    ("kind", "operands", "constant", "left"),
    [
        ("Add", ["x", "c"], np.zeros(1), 1),
        ("Add", ["c", "x"], np.zeros((4, 1, 1)), 1),
        ("Mul", ["c", "x"], np.ones(6), 1),
        ("Sub", ["x", "c"], np.zeros(()), 1),
        ("Div", ["x", "c"], np.ones((1, 4, 1, 1)), 1),
        ("Sub", ["c", "x"], np.zeros(1), 2),
        ("Div", ["c", "x"], np.ones(1), 2),
        ("Add", ["x", "c"], np.array([0, 0, 0, 0, 0, 1.0]), 2),
        ("Add", ["x", "c"], np.zeros((2, 1, 1, 1, 1)), 2),  # it makes two of one
    ],
)
def test_what_changes_nothing_goes(
    kind: str, operands: list[str], constant: np.ndarray, left: int
) -> None:
    nodes = [
        node("Exp", ["input"], ["x"]),
        node(kind, operands, ["y"]),
        node("Concat", ["y"], ["z"], axis=1),
        *(_four_dimensions("z") if constant.ndim == 5 else [node("Sin", ["z"], ["logits"])]),
    ]
    found, _ = simplified(nodes, {"c": constant.astype(np.float32)})
    assert found.total() == left + 1


def test_an_output_keeps_its_name() -> None:
    nodes = [node("Exp", ["input"], ["x"]), node("Concat", ["x"], ["logits"], axis=1)]
    assert simplified(nodes, {})[0] == {"Exp": 1, "Concat": 1}


class Views(nn.Module):
    """What networks ask shapes for: shuffles, flattened maps, what a tensor beside them has."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.view(torch.exp(images)).mean(dim=-1)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffled": shuffled,
    "two of one": lambda x: x.view(x.size(0), 2, -1, x.size(3)),
    "images and channels": lambda x: x.reshape(-1, x.size(2), x.size(3)),
    "like another": lambda x: x.flatten(1).mul(2).view(x.shape),
    "like a part of another": lambda x: x.flatten(2).view(*x.shape[:2], -1),
    "heads": lambda x: x.flatten(2).view(x.size(0), 2, x.size(1) // 2, -1).softmax(2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_no_shape_is_asked_for_where_one_length_is_left(name: str) -> None:
    network = Views(VIEWS[name])
    model = onnx_from_network(network, target=load_target("cpu"), input_size=(4, 5, 6))
    assert not census(model).keys() & {"Shape", "Gather", "Concat", "Unsqueeze", "Slice"}
    for count in (1, 3):
        images = torch.from_numpy(IMAGES[:count])
        np.testing.assert_allclose(run(model, images.numpy()), network(images), rtol=1e-5)


def test_two_lengths_that_are_not_known_are_asked_for() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = torch.cat([x, x]).flatten(1)
            return both.view(2, x.size(0), -1).mean(0)

    model = onnx_from_network(Twice(), target=load_target("cpu"), input_size=(4, 5, 6))
    for count in (1, 3):
        images = torch.from_numpy(IMAGES[:count])
        np.testing.assert_allclose(run(model, images.numpy()), Twice()(images), rtol=1e-5)


def test_standardised_weights_are_plain_weights() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
            return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)

    network = nn.Sequential(Standardised(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = onnx_from_network(network, target=load_target("cpu"), input_size=(4, 5, 6))
    assert set(census(model)) == {"Conv", "Relu", "GlobalAveragePool", "Flatten"}
    expected = network(torch.from_numpy(IMAGES)).detach().numpy()
    np.testing.assert_allclose(run(model, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_what_a_branch_reads_is_renamed_there_too() -> None:
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(kind, ["y"], [f"{name}_out"])], name, [], [value(f"{name}_out", 1, None)]
        )
        for name, kind in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        node("Exp", ["input"], ["x"]),
        node("Add", ["x", "zero"], ["y"]),
        node("If", ["yes"], ["logits"], **branches),
    ]
    found, _ = simplified(nodes, {"zero": np.zeros(1, np.float32), "yes": np.array(True)})
    assert found["Add"] == 0


def test_a_name_that_is_taken_is_not_given_again() -> None:
    nodes = [
        node("Shape", ["input"], ["shape"]),
        node("Gather", ["shape", "first"], ["one"]),
        node("Unsqueeze", ["one", "axis"], ["count"]),
        node("Concat", ["count", "rest"], ["wanted"], axis=0),
        node("Reshape", ["input", "wanted"], ["flat"]),
        node("Add", ["flat", "flat_shape"], ["sum"]),
        node("Unsqueeze", ["sum", "ends"], ["logits"]),
    ]
    weights = {
        "first": np.array(0),
        "axis": np.array([0]),
        "rest": np.array([120]),
        "ends": np.array([2, 3]),
        "flat_shape": np.ones(1, np.float32),
    }
    assert simplified(nodes, weights)[0] == {"Reshape": 1, "Add": 1, "Unsqueeze": 1}
