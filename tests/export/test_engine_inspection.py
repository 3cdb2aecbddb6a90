"""The samples follow NVIDIA's developer guide; none was recorded from a device."""

from __future__ import annotations

import json
from typing import Any

import pytest

from export.engines.inspection import summarise_inspection

LINEAR = "Row major linear FP32"
HWC8 = "Channel major FP16 format where channel % 8 == 0"


def tensor(name: str, form: str) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [1, 8, 4, 4], "Format/Datatype": form}


TEN = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to /conv1/Conv + /relu/Relu",
            "LayerType": "Reformat",
            "Inputs": [tensor("input", LINEAR)],
            "Outputs": [tensor("Reformatted input", HWC8)],
            "TacticName": "",
        },
        {
            "Name": "/conv1/Conv + /relu/Relu",
            "LayerType": "CaskConvolution",
            "Outputs": [tensor("/relu/Relu_output_0", HWC8)],
            "Metadata": "[ONNX Layer: /conv1/Conv]\u001e[ONNX Layer: /relu/Relu]",
        },
        {
            "Name": "/layer1/conv2/Conv + /layer1/Add + /layer1/relu_1/Relu",
            "LayerType": "CaskConvolution",
            "Outputs": [tensor("/layer1/relu_1/Relu_output_0", HWC8)],
        },
        {
            "Name": "/fc/Gemm",
            "LayerType": "gemm",
            "Outputs": [tensor("logits", LINEAR)],
            "Metadata": "[ONNX Layer: /fc/Gemm]",
        },
    ],
    "Bindings": ["input", "logits"],
}


def test_a_detailed_answer_up_to_10() -> None:
    assert summarise_inspection(json.dumps(TEN)) == {
        "layers": 4,
        "types": {"CaskConvolution": 2, "Reformat": 1, "gemm": 1},
        "fused": {"1": 1, "2": 2, "3": 1},
        "outputs": {HWC8: 3, LINEAR: 1},
        "io": ["input", "logits"],
    }


def test_formats_and_types_apart_since_11() -> None:
    layer = {
        "Name": "conv",
        "LayerType": "Convolution",
        "Outputs": [{"Name": "a", "Format": "HWC8", "Datatype": "Half"}, {"Name": "b"}],
    }
    eleven = {
        "Layers": [layer],
        "I/O Tensors": [{"Name": "input", "Datatype": "Float"}, {"Name": "logits"}],
    }
    assert summarise_inspection(json.dumps(eleven)) == {
        "layers": 1,
        "types": {"Convolution": 1},
        "fused": {"1": 1},
        "outputs": {"HWC8 Half": 1, "unknown": 1},
        "io": ["input", "logits"],
    }


def test_names_alone_where_the_engine_has_no_details() -> None:
    text = json.dumps({"Layers": ["a + b", "c"], "Bindings": ["input", "logits"]})
    assert summarise_inspection(text) == {
        "layers": 2,
        "types": {"unknown": 2},
        "fused": {"1": 1, "2": 1},
        "outputs": {},
        "io": ["input", "logits"],
    }


def test_as_many_fused_as_layers() -> None:
    summary = summarise_inspection(json.dumps(TEN))
    assert summary is not None
    assert sum(summary["fused"].values()) == sum(summary["types"].values()) == summary["layers"]


def test_an_engine_without_layers() -> None:
    summary = summarise_inspection('{"Layers": []}')
    assert summary == {"layers": 0, "types": {}, "fused": {}, "outputs": {}, "io": []}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null", "{}", '{"Layers": {}}'])
def test_what_is_not_understood_is_none(text: str) -> None:
    assert summarise_inspection(text) is None


@pytest.mark.parametrize("layer", [None, 1, {}, {"Outputs": ["x"]}])
def test_odd_layers_do_no_harm(layer: Any) -> None:
    summary = summarise_inspection(json.dumps({"Layers": [layer]}))
    assert summary is not None
    assert summary["layers"] == 1
