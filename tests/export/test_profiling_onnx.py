from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import lived_in, random_mask
from networks import NETWORKS
from onnx import helper
from onnx_models import copied, exported, handmade
from torch import nn

from compress.errors import CheckpointError, ConfigError, DataError, ModelError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from export.precision.fp16 import to_fp16
from export.precision.int8 import quantised_tensors, to_int8
from export.profiling import (
    WARMUPS,
    LayerTime,
    Profile,
    joined_profiles,
    onnx_profile,
    profile_network,
)
from export.profiling.onnx_layers import MULTIPLYING, layers_of, module_path, read_layers
from export.profiling.onnx_profile import covered_nodes, profile_from_events
from export.runners import OnnxRunner, Runtime

SIZE = (3, 12, 12)
PRECISIONS = ("fp32", "fp16", "int8")
CONV1, RELU1 = "/layer1/layer1.0/conv1/Conv", "/layer1/layer1.0/relu/Relu"
CONV2, ADD = "/layer1/layer1.0/conv2/Conv", "/layer1/layer1.0/Add"
RELU2, SHORTCUT = "/layer1/layer1.0/relu_1/Relu", "/layer1/layer1.0/downsample/downsample.0/Conv"


def in_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    model = copied(model)
    if precision == "fp16":
        to_fp16(model)
    if precision == "int8":
        to_int8(model, dict.fromkeys(quantised_tensors(model), 3.0))
    return model


def written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SIZE)).astype(np.float32)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(NETWORKS[request.param]()).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_macs_and_names_are_those_of_the_pruner(network: nn.Module, precision: str) -> None:
    graph = analyse(network, SIZE)
    layers = layers_of(in_precision(exported(network, SIZE), precision))
    assert sum(layer.macs for layer in layers) == cost.macs(graph, graph.everything())
    modules = {
        name
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert {layer.name for layer in layers} - {"twice_1"} == modules
    by_name = dict(network.named_modules())
    for layer in layers:
        module: Any = by_name[layer.name.removesuffix("_1")]
        convolution = isinstance(module, nn.Conv2d)
        inputs, outputs = (
            (module.in_channels, module.out_channels)
            if convolution
            else (module.in_features, module.out_features)
        )
        assert (layer.inputs, layer.outputs) == (inputs, outputs), layer.name
    assert [layer.reads_image for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert [layer.writes_logits for layer in layers] == [False] * (len(layers) - 1) + [True]


def test_macs_of_a_pruned_network_with_paths_as_long_as_torchs() -> None:
    model = lived_in(build_model("resnet20", num_classes=7)).eval()
    graph = analyse(model, (3, 16, 16))
    kept = random_mask(graph, seed=1)
    pruned = shrink(model, graph, kept)
    layers = layers_of(exported(pruned, (3, 16, 16)))
    assert sum(layer.macs for layer in layers) == cost.macs(graph, kept)
    paths = {name for name, of in pruned.named_modules() if isinstance(of, nn.Conv2d | nn.Linear)}
    assert {layer.name for layer in layers} == paths


def test_macs_in_closed_form() -> None:
    weights = {
        "conv": np.ones((8, 2, 3, 5), np.float32),
        "right": np.ones((6, 5), np.float32),
        "gemm": np.ones((4, 30), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "conv"], ["a"], name="a", group=3, strides=[2, 1]),
        helper.make_node("MatMul", ["a", "right"], ["b"], name="b"),
        helper.make_node("MatMul", ["b", "b"], ["c"], name="c"),
    ]
    model = handmade(nodes[:2], weights, ("batch", 6, 9, 10))
    conv, product = layers_of(model)
    # (9 - 3) / 2 + 1 = 4 rows and 10 - 5 + 1 = 6 columns
    assert (conv.macs, conv.inputs, conv.outputs) == (8 * 4 * 6 * 2 * 3 * 5, 6, 8)
    assert (product.macs, product.inputs, product.outputs) == (8 * 4 * 5 * 6, 6, 5)
    first = helper.make_node("MatMul", ["right", "input"], ["logits"], name="first")
    (layer,) = layers_of(handmade([first], weights, ("batch", 2, 5, 7)))
    assert (layer.macs, layer.inputs, layer.outputs) == (2 * 6 * 7 * 5, 5, 6)
    square = [helper.make_node("MatMul", ["input", "input"], ["logits"], name="square")]
    assert layers_of(handmade(square, {}, ("batch", 3, 4, 4))) == ()
    gemm = helper.make_node("Gemm", ["input", "gemm"], ["logits"], name="fc", transB=1)
    (layer,) = layers_of(handmade([gemm], weights, ("batch", 30)))
    assert (layer.macs, layer.inputs, layer.outputs) == (120, 30, 4)
    assert layer.reads_image
    assert layer.writes_logits


def test_a_pooling_that_enlarges_multiplies_and_has_no_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(7), nn.Flatten())
    proto = exported(model, (3, 5, 5))
    assert "MatMul" in {node.op_type for node in proto.graph.node}
    assert [layer.name for layer in layers_of(proto)] == ["0"]


@pytest.mark.parametrize(
    ("title", "path"),
    [
        ("/conv1/Conv", "conv1"),
        ("/layer1/layer1.0/downsample/downsample.0/Conv", "layer1.0.downsample.0"),
        (
            "/features/features.1/features.1.0/block/block.0/block.0.0/Conv",
            "features.1.0.block.0.0",
        ),
        ("/layer1/layer10/Conv", "layer1.layer10"),
        ("/Conv_1", "Conv_1"),
        ("conv", "conv"),
    ],
)
def test_paths_of_modules(title: str, path: str) -> None:
    assert module_path(title) == path


def test_two_layers_of_one_module_keep_the_names_of_their_nodes() -> None:
    weights = {"w": np.ones((3, 3, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="/block/Conv"),
        helper.make_node("Conv", ["a", "w"], ["logits"], name="/block/Conv_1"),
    ]
    layers = layers_of(handmade(nodes, weights, ("batch", 3, 4, 4)))
    assert [layer.name for layer in layers] == ["block/Conv", "block/Conv_1"]


def test_files_that_do_not_tell(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_layers(tmp_path / "missing.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(CheckpointError, match="not an ONNX file"):
        read_layers(path)
    conv = helper.make_node("Conv", ["input", "w"], ["logits"], name="conv")
    model = handmade([conv], {"w": np.ones((2, 3, 1, 1), np.float32)}, ("batch", 3, "h", "w"))
    with pytest.raises(ModelError, match=r"shape of its tensor logits.*export it again"):
        read_layers(written(model, tmp_path))


def event(name: str, kind: str, us: int, number: int = 0) -> dict[str, Any]:
    args = {"op_name": kind, "node_index": str(number)}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": args}


def call(*found: dict[str, Any]) -> list[dict[str, Any]]:
    fence = {"cat": "Node", "name": "a_fence_before", "dur": 900, "args": {"op_name": "Conv"}}
    ends = [
        {"cat": "Session", "name": "SequentialExecutor::Execute", "dur": 999, "args": {}},
        {"cat": "Session", "name": "model_run", "dur": 999, "args": {}},
    ]
    return [fence, *found, *ends]


def two_nodes() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["logits"], name="relu"),
    ]
    return handmade(nodes, {"w": np.ones((3, 3, 1, 1), np.float32)}, ("batch", 3, 4, 4))


def two_events(conv: int, relu: int) -> list[dict[str, Any]]:
    return call(event("conv", "Conv", conv), event("relu", "Relu", relu, 1))


def test_medians_of_the_calls_that_count() -> None:
    start = [{"cat": "Session", "name": "session_initialization", "dur": 5, "args": {}}]
    events = start + two_events(900, 900) + two_events(10, 3) + two_events(12, 3)
    events += two_events(30, 3) + two_events(900, 900)
    profile = profile_from_events(
        events, two_nodes(), counted=[False, True, True, True, False], plain_us=[1e6]
    )
    # Durations are cut to whole microseconds: 12 stands for anything from 12 to 13.
    assert profile == Profile(
        calls=3,
        total_ms=pytest.approx(0.016),
        layers=(
            LayerTime(name="conv", kind="Conv", nodes=("conv",), milliseconds=0.0125),
            LayerTime(name="relu", kind="Relu", nodes=("relu",), milliseconds=0.0035),
        ),
    )


def test_a_median_lies_within_its_microsecond() -> None:
    events = two_events(4, 9) + two_events(4, 9) + two_events(4, 9) + two_events(5, 9)
    profile = profile_from_events(events, two_nodes(), counted=[True] * 4, plain_us=[1e6])
    # Half of four calls are below: two thirds into the microsecond that three of them share.
    assert profile.layers[0].milliseconds == pytest.approx((4 + 2 / 3) / 1000)


@pytest.mark.parametrize(
    ("plain", "times", "total"),
    [
        ([8.0], (10.5 - 3, 3.5 - 3), 8.0),  # 6 of 14 us are the profiler's, in two nodes
        ([7.0, 8.0, 500.0], (10.5 - 3, 3.5 - 3), 8.0),
        ([1.0], (10.5 - 6.5, 0.0), 4.0),  # no node takes less than nothing
        ([20.0], (10.5, 3.5), 14.0),  # slower without it: the machine was busy
    ],
)
def test_the_cost_of_the_profiler_is_taken_off(
    plain: list[float], times: tuple[float, float], total: float
) -> None:
    profile = profile_from_events(two_events(10, 3), two_nodes(), counted=[True], plain_us=plain)
    assert [1000 * layer.milliseconds for layer in profile.layers] == pytest.approx(times)
    assert 1000 * profile.total_ms == pytest.approx(total)


def block() -> onnx.ModelProto:
    """A residual block whose shortcut is a convolution, between two identities of the exporter."""
    weights = {name: np.ones((4, 3, 3, 3), np.float32) for name in ("one", "skip")}
    weights["two"] = np.ones((4, 4, 3, 3), np.float32)
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["input", "one"], [f"{CONV1}_output_0"], name=CONV1, **pads),
        helper.make_node("Relu", [f"{CONV1}_output_0"], [f"{RELU1}_output_0"], name=RELU1),
        helper.make_node(
            *("Conv", [f"{RELU1}_output_0", "two"], [f"{CONV2}_output_0"]), name=CONV2, **pads
        ),
        helper.make_node(
            "Conv", ["input", "skip"], [f"{SHORTCUT}_output_0"], name=SHORTCUT, **pads
        ),
        helper.make_node(
            *("Add", [f"{CONV2}_output_0", f"{SHORTCUT}_output_0"], [f"{ADD}_output_0"]), name=ADD
        ),
        helper.make_node("Relu", [f"{ADD}_output_0"], ["logits"], name=RELU2),
    ]
    return handmade(nodes, weights, ("batch", 3, 6, 6))


@pytest.mark.parametrize(
    ("executed", "covered"),
    [
        (
            [
                (f"{RELU1}_output_0_nchwc", "Conv"),
                (f"{CONV2}_output_0_nchwc", "Conv"),
                (f"{SHORTCUT}_output_0_nchwc", "Conv"),
                ("ReorderOutput_token_3", "ReorderOutput"),
            ],
            [(CONV1, RELU1), (CONV2,), (SHORTCUT, ADD, RELU2), ()],
        ),
        (
            [
                (f"{SHORTCUT}_output_0_nchwc", "Conv"),
                ("ReorderOutput", "ReorderOutput"),
                (f"{RELU1}_output_0_nchwc", "Conv"),
                (f"{CONV2}_output_0_nchwc", "Conv"),
                (ADD, "Add"),
                (RELU2, "Relu"),
            ],
            [(SHORTCUT,), (), (CONV1, RELU1), (CONV2,), (ADD,), (RELU2,)],
        ),
        (
            [(CONV1, "FusedConv"), (SHORTCUT, "Conv"), (f"fused {CONV2}", "FusedConv")],
            [(CONV1, RELU1), (SHORTCUT,), (CONV2, ADD, RELU2)],
        ),
        (
            [
                (f"InsertedPrecisionFreeCast_{RELU1}_output_0_nchwc", "Conv"),
                (f"InsertedPrecisionFreeCast_{RELU1}_output_0", "Cast"),
                (f"{CONV2}_output_0_nchwc", "Conv"),
                (SHORTCUT, "QLinearConv"),
                (ADD, "QLinearAdd"),
            ],
            [(CONV1, RELU1), (), (CONV2,), (SHORTCUT,), (ADD, RELU2)],
        ),
        (
            [(CONV1, "FusedConv"), (f"{RELU1}_output_0_nchwc", "Conv")],
            [(CONV1, RELU1, CONV2, ADD, RELU2), ()],
        ),
    ],
    ids=["blocked", "addition apart", "fused", "casts", "a convolution more"],
)
def test_names_that_onnx_runtime_makes_trace_back(
    executed: list[tuple[str, str]], covered: list[tuple[str, ...]]
) -> None:
    assert covered_nodes(block(), executed) == covered


def test_nodes_without_a_name_and_products() -> None:
    nodes = [
        helper.make_node("Relu", ["input"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="product"),
        helper.make_node("Add", ["b", "c"], ["logits"], name="sum"),
    ]
    weights = {"w": np.ones((4, 4), np.float32), "c": np.ones(4, np.float32)}
    model = handmade(nodes, weights, ("batch", 4))
    executed = [("Relu_0", "Relu"), ("product/MatMulAddFusion", "Gemm")]
    assert covered_nodes(model, executed) == [("a",), ("product", "sum")]


def test_a_norm_that_runs_as_a_convolution_stays_a_norm() -> None:
    norm = helper.make_node("BatchNormalization", ["input", *"abcd"], ["logits"], name="norm")
    weights = {name: np.ones(3, np.float32) for name in "abcd"}
    model = handmade([norm], weights, ("batch", 3, 4, 4))
    events = call(event("logits_bn_nchwc", "Conv", 7))
    (layer,) = profile_from_events(events, model, counted=[True], plain_us=[1e6]).layers
    assert (layer.kind, layer.nodes) == ("BatchNormalization", ("norm",))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_is_found_in_what_onnx_runtime_ran(
    network: nn.Module, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_precision(exported(network, SIZE), precision)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    path = written(model, tmp_path)
    with monkeypatch.context() as inside:
        inside.chdir(folder)  # where ONNX Runtime writes by default
        profile = profile_network(path, "onnxruntime-cpu", images(2), calls=2, threads=1)
    assert list(folder.iterdir()) == []
    assert profile is not None
    assert profile.calls == 2
    assert profile.total_ms >= 0
    covered = [node for layer in profile.layers for node in layer.nodes]
    assert len(covered) == len(set(covered))
    assert {layer.node for layer in layers_of(model)} <= set(covered)
    assert all(layer.milliseconds >= 0 for layer in profile.layers)
    weighted = {layer.node for layer in layers_of(model)}
    for layer in profile.layers:
        if weighted.intersection(layer.nodes):
            assert any(kind in layer.kind for kind in MULTIPLYING), layer
            assert len(weighted.intersection(layer.nodes)) == 1


def test_calls_are_warmed_up_and_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(exported(NETWORKS["Plain"]().eval(), SIZE), tmp_path)
    ran: list[bool] = []
    infer = OnnxRunner.infer

    def counted(runner: OnnxRunner, batch: np.ndarray) -> np.ndarray:
        ran.append(runner._profile_to is not None)
        return infer(runner, batch)

    counts: list[bool] = []
    from_events = onnx_profile.profile_from_events

    def noted(*given: Any, counted: list[bool], plain_us: list[float]) -> Profile:
        counts.extend(counted)
        assert len(plain_us) == 14
        return from_events(*given, counted=counted, plain_us=plain_us)

    monkeypatch.setattr(OnnxRunner, "infer", counted)
    monkeypatch.setattr(onnx_profile, "profile_from_events", noted)
    profile = profile_network(path, "onnxruntime-cpu", images(1), calls=14, threads=1)
    assert profile is not None
    assert profile.calls == 14
    warm = [True] * WARMUPS + [False] * WARMUPS
    assert ran == warm + [True] * 11 + [False] * 11 + [True] * 5 + [False] * 5
    # The first call of each turn pays for the caches that the other session left cold.
    assert counts == [False] * WARMUPS + [False] + [True] * 10 + [False] + [True] * 4


def test_a_profile_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(exported(NETWORKS["Plain"]().eval(), SIZE), tmp_path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(DataError):
        profile_network(path, "onnxruntime-cpu", images(1)[..., :5], calls=1, threads=1)
    assert list(folder.iterdir()) == []


def test_a_profile_that_is_no_json_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(exported(NETWORKS["Plain"]().eval(), SIZE), tmp_path)
    broken = tmp_path / "broken.json"
    broken.write_text('[{"name": "a "quoted" node"}]')
    monkeypatch.setattr(OnnxRunner, "end_profile", lambda _: broken)
    assert profile_network(path, "onnxruntime-cpu", images(1), calls=1, threads=1) is None


@pytest.mark.parametrize("runtime", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnx_runtime_on_a_gpu_cannot_tell(runtime: Runtime) -> None:
    assert profile_network(Path("model.onnx"), runtime, images(1), calls=1) is None


def test_what_cannot_be_profiled() -> None:
    with pytest.raises(ConfigError, match=r"reads a file \*\.onnx, not model\.engine"):
        profile_network(Path("model.engine"), "onnxruntime-cpu", images(1), calls=1)
    with pytest.raises(ConfigError, match="profile of 0 calls"):
        profile_network(Path("model.onnx"), "onnxruntime-cpu", images(1), calls=0)
    with pytest.raises(CheckpointError, match="there is no ONNX file"):
        profile_network(Path("model.onnx"), "onnxruntime-cpu", images(1), calls=1)


def test_profiles_of_several_rounds_become_one() -> None:
    def of(first: float, second: float, total: float) -> Profile:
        layers = (
            LayerTime(name="a", kind="Conv", nodes=("x",), milliseconds=first),
            LayerTime(name="b", kind="Add", nodes=(), milliseconds=second),
        )
        return Profile(calls=2, total_ms=total, layers=layers)

    joined = joined_profiles([of(1.0, 9.0, 5.0), of(3.0, 2.0, 50.0), of(2.0, 4.0, 6.0)])
    assert joined == Profile(
        calls=6,
        total_ms=6.0,
        layers=(
            LayerTime(name="a", kind="Conv", nodes=("x",), milliseconds=2.0),
            LayerTime(name="b", kind="Add", nodes=(), milliseconds=4.0),
        ),
    )
