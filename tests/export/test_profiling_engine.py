"""The names and the JSON follow NVIDIA's developer guide; none was recorded from a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stand_in
from engine_files import V100, build_with, install, write_onnx
from host_gpu import HostGpu, fresh_host_gpu
from tensorrt_contract import VERSIONS, calls_of

from compress.errors import DataError
from export.nvml import Gpu
from export.profiling import WARMUPS, profile_network
from export.profiling.engine_profile import layers_by_name

COPY = "Reformatting CopyNode for Input Tensor 0 to conv + relu"
DETAILED = {
    "Layers": [
        {"Name": COPY, "LayerType": "Reformat", "Metadata": "[ONNX Layer: conv]"},
        {
            "Name": "conv + relu",
            "LayerType": "CaskConvolution",
            "Metadata": "[ONNX Layer: conv]\u001e[ONNX Layer: relu]",
        },
        {"Name": "pool", "LayerType": "CaskPooling"},
    ]
}


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[HostGpu]:
    stand_in = fresh_host_gpu()
    stand_in.name, stand_in.sm = V100.name, V100.sm
    monkeypatch.setattr("export.runners.engine_runner.Cuda", stand_in)
    return stand_in


class Report:
    """What the profiler hears of each run: the first take a hundred times as long."""

    def __init__(self, *names: str) -> None:
        self.names, self.runs = names, 0

    def __call__(self) -> list[tuple[str, float]]:
        self.runs += 1
        factor = 100 if self.runs <= WARMUPS else self.runs - WARMUPS
        return [(name, 0.25 * factor * (1 + index)) for index, name in enumerate(self.names)]


def engine_of(
    version: str, folder: Path, monkeypatch: pytest.MonkeyPatch, report: Report, **behaviour: Any
) -> tuple[Path, Any]:
    monkeypatch.setattr(tensorrt_stand_in.Context, "layer_times", report)
    module = install(monkeypatch, version, Gpu(V100.name, V100.sm), **behaviour)
    path = folder / "tiny.engine"
    build_with(version, write_onnx(folder / "tiny.onnx"), path, batch=(1, 2))
    return path, module


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_tells_the_time_of_its_layers(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: type[HostGpu]
) -> None:
    report = Report(COPY, "conv + relu", "pool", "unheard of")
    inspection = json.dumps(DETAILED)
    path, module = engine_of(version, tmp_path, monkeypatch, report, inspection=inspection)
    profile = profile_network(path, "tensorrt", images(2), calls=3)
    assert profile is not None
    assert report.runs == WARMUPS + 3
    found = [(layer.name, layer.kind, layer.nodes) for layer in profile.layers]
    assert found == [
        (COPY, "Reformat", ()),
        ("conv + relu", "CaskConvolution", ("conv", "relu")),
        ("pool", "CaskPooling", ("pool",)),
        ("unheard of", "unknown", ("unheard of",)),
    ]
    # The runs that count take 1, 2 and 3 times as long; the median is the second.
    assert [layer.milliseconds for layer in profile.layers] == [0.5, 1.0, 1.5, 2.0]
    assert (profile.calls, profile.total_ms) == (3, 5.0)
    ((profiler,),) = calls_of(module, "IExecutionContext.profiler=")
    assert isinstance(profiler, module.IProfiler)
    assert profiler._initialised  # pybind11 refuses an object whose base was not
    assert gpu.opened[-1].closed


def test_layers_of_one_name_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("conv", "copy", "copy")
    path, _ = engine_of(VERSIONS[0], tmp_path, monkeypatch, report)
    profile = profile_network(path, "tensorrt", images(1), calls=1)
    assert profile is not None
    assert [layer.milliseconds for layer in profile.layers] == [0.25, 0.5, 0.75]


def test_an_engine_that_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine_of(VERSIONS[-1], tmp_path, monkeypatch, Report())
    assert profile_network(path, "tensorrt", images(1), calls=2) is None


def test_a_batch_without_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = engine_of(VERSIONS[0], tmp_path, monkeypatch, Report("conv"))
    with pytest.raises(DataError, match="it takes 1 or 2"):
        profile_network(path, "tensorrt", images(3), calls=1)


def test_metadata_names_the_nodes_and_names_do_where_there_is_none() -> None:
    joined = "weight + weight_QuantizeLinear + /conv1/Conv + /layer1/Add + PWN(/relu/Relu)"
    nested = "PWN(PWN(/act/Sigmoid), /act/Mul)"
    layers = [
        {"Name": joined, "LayerType": "CaskConvolution"},
        {"Name": nested, "LayerType": "PointWiseV2", "Metadata": ""},
        {"Name": "a", "LayerType": "kgen", "Metadata": "[ONNX Layer: /x][ONNX Layer: /x]"},
        {"Name": "Reformatting CopyNode for Output Tensor 0 to /conv1/Conv + /relu/Relu"},
    ]
    assert layers_by_name(json.dumps({"Layers": layers})) == {
        joined: (
            "CaskConvolution",
            ("weight", "weight_QuantizeLinear", "/conv1/Conv", "/layer1/Add", "/relu/Relu"),
        ),
        nested: ("PointWiseV2", ("/act/Sigmoid", "/act/Mul")),
        "a": ("kgen", ("/x",)),
        layers[3]["Name"]: ("unknown", ()),
    }


def test_an_engine_without_details_has_names_alone() -> None:
    assert layers_by_name('{"Layers": ["/a/Conv + /b/Relu", "c"], "Bindings": []}') == {
        "/a/Conv + /b/Relu": ("unknown", ("/a/Conv", "/b/Relu")),
        "c": ("unknown", ("c",)),
    }


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null", "{}", '{"Layers": {}}'])
def test_an_inspection_that_is_not_understood_holds_nothing(text: str) -> None:
    assert layers_by_name(text) == {}
