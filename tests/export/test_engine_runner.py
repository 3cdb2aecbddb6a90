from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stand_in
import torch
from engine_files import NETWORK
from host_gpu import HostGpu, fresh_host_gpu
from onnx import TensorProto, helper
from onnx_models import exported
from tensorrt_contract import VERSIONS, calls_of, fake_tensorrt, state_of
from torch import nn

from compress.config import ExportConfig
from compress.config.targets import load_target
from compress.errors import CheckpointError, DataError, EnvironmentUnfitError, ModelError
from compress.files.atomic import sha256_of
from export.engines import build, sidecar
from export.nvml import Gpu
from export.runners import EngineRunner, Runner, open_runner, stages_of

SIZE = (3, 12, 12)
ONE_EACH = ((1, 1, 1), (4, 4, 4))
FIXED_AND_RANGE = ((4, 4, 4), (1, 2, 8))
RANGE = ((1, 8, 32),)
Ranges = tuple[tuple[int, int, int], ...]


class Net(nn.Module):
    """Widths as pruning leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, stride=2)
        self.fc = nn.Linear(7, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(images)).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def model(network: nn.Module) -> bytes:
    return exported(network, SIZE).SerializeToString()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[HostGpu]:
    stand_in = fresh_host_gpu()
    monkeypatch.setattr("export.runners.engine_runner.Cuda", stand_in)
    return stand_in


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return installed("10.4.0", monkeypatch)


def installed(version: str, monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> Any:
    module = fake_tensorrt(version, **behaviour)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def built(
    trt: Any,
    model: bytes,
    folder: Path,
    ranges: Ranges,
    fixed: dict[str, tuple[int, ...]] | None = None,
    fixed_memory: bool = True,
    **facts: Any,
) -> Path:
    """Build an engine with the stand-in and write it and its sidecar as a build does."""
    source, path = folder / "model.onnx", folder / "model.engine"
    source.write_bytes(model)
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    if fixed_memory and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    flags = trt.NetworkDefinitionCreationFlag
    explicit = getattr(flags, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    assert trt.OnnxParser(network, trt.Logger()).parse_from_file(str(source))
    for sizes in ranges:
        profile = builder.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, *((size, *SIZE) for size in sizes))
        for name, shape in (fixed or {}).items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    path.write_bytes(builder.build_serialized_network(network, config))
    document = {
        **dict.fromkeys(sidecar._REQUIRED),
        **NETWORK,
        "parity": None,
        "precision": "fp32",
        "onnx": {"sha256": sha256_of(source)},
        "schema_version": sidecar.SCHEMA_VERSION,
        "engine": {"file": path.name, "sha256": sha256_of(path)},
        "target": "h100",
        "provider": trt.__name__,
        "tensorrt": trt.__version__,
        "sm": HostGpu.sm,
        **facts,
    }
    sidecar.sidecar_path(path).write_text(json.dumps(document))
    return path


def images(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *SIZE)).astype(np.float32)


def check(runner: Runner, network: nn.Module, *counts: int) -> None:
    for seed, count in enumerate(counts):
        batch = images(count, seed)
        with torch.no_grad():
            expected = network(torch.from_numpy(batch)).numpy()
        actual = runner.infer(batch)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_gives_the_logits_of_torch(
    version: str,
    cuda_graph: bool,
    network: nn.Module,
    model: bytes,
    tmp_path: Path,
    gpu: type[HostGpu],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt = installed(version, monkeypatch)
    path = built(trt, model, tmp_path, FIXED_AND_RANGE)
    runner = EngineRunner(path, cuda_graph=cuda_graph)
    assert runner.name == "TensorRT (model.engine)"
    with runner:
        title = "TensorRT-RTX" if "rtx" in version else "TensorRT"
        assert runner.name == f"{title} {version.removeprefix('rtx-')} (Host GPU)"
        check(runner, network, 1, 4, 8, 1, 4, 4, 3)
    (opened,) = gpu.opened
    assert set(opened.uploads) <= opened.pinned
    assert opened.closed
    assert set(calls_of(trt, "IExecutionContext.execute_async_v3")) == {(HostGpu.stream,)}


@pytest.mark.usefixtures("gpu", "trt")
@pytest.mark.parametrize("batch", [(1, 4), "dynamic"])
def test_what_a_build_writes_a_runner_reads(
    network: nn.Module, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: Any
) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: Gpu(HostGpu.name, HostGpu.sm))
    source, path = tmp_path / "model.onnx", tmp_path / "model.engine"
    source.write_bytes(model)
    build.build_engine(
        source,
        path,
        target=load_target("h100"),
        config=ExportConfig(batch=batch),
        onnx_sha256=sha256_of(source),
        network={fact: NETWORK[fact] for fact in sidecar.NETWORK_FACTS},
    )
    with open_runner(path, "tensorrt") as runner:
        check(runner, network, 1, 4, 1)
        if batch != "dynamic":
            with pytest.raises(DataError, match="it takes 1 or 4"):
                runner.infer(images(2))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("ranges", "counts", "profiles"),
    [
        (ONE_EACH, (4, 1), [1, 0]),
        (FIXED_AND_RANGE, (4, 3), [0, 1]),
        (((1, 4, 32), (1, 4, 4)), (4, 5), [1, 0]),
        (((1, 8, 32), (1, 4, 32)), (5, 7, 6), [1, 0]),
        (RANGE, (1, 32, 8), [0]),
    ],
)
def test_a_batch_runs_in_the_profile_made_for_it(
    trt: Any,
    network: nn.Module,
    model: bytes,
    tmp_path: Path,
    ranges: Ranges,
    counts: tuple[int, ...],
    profiles: list[int],
) -> None:
    with EngineRunner(built(trt, model, tmp_path, ranges)) as runner:
        check(runner, network, *counts, *counts)
    asked = calls_of(trt, "IExecutionContext.set_optimization_profile_async")
    assert asked == [(profile, HostGpu.stream) for profile in profiles]
    assert len(calls_of(trt, "ICudaEngine.create_execution_context")) == len(profiles)


@pytest.mark.parametrize(
    ("ranges", "shapes", "captures"), [(ONE_EACH, 2, 2), (RANGE, 5, 5)], ids=["own", "shared"]
)
def test_a_graph_lives_as_long_as_the_shapes_of_its_context(
    trt: Any,
    network: nn.Module,
    model: bytes,
    tmp_path: Path,
    gpu: type[HostGpu],
    ranges: Ranges,
    shapes: int,
    captures: int,
) -> None:
    with EngineRunner(built(trt, model, tmp_path, ranges), cuda_graph=True) as runner:
        check(runner, network, 1, 4, 4, 1, 1, 4, 1)
    assert len(calls_of(trt, "IExecutionContext.set_input_shape")) == shapes
    assert (gpu.opened[0].captures, gpu.opened[0].replays) == (captures, 7)
    # each capture is one run, after one that warms up; the stand-in replays by running again
    assert len(calls_of(trt, "IExecutionContext.execute_async_v3")) == 2 * captures + 7


@pytest.mark.usefixtures("gpu")
def test_batches_for_which_there_is_no_profile(trt: Any, model: bytes, tmp_path: Path) -> None:
    path = built(trt, model, tmp_path, ((8, 8, 8), (1, 1, 1), (2, 3, 4)))
    with EngineRunner(path) as runner:
        with pytest.raises(DataError, match=r"for 5 images: it takes 1 or 2 to 4 or 8;.*batch"):
            runner.infer(images(5))
        assert runner.infer(images(4)).shape == (4, 5)
        with pytest.raises(DataError, match=r"shape \(any, 3, 12, 12\), not \(1, 3, 9, 9\)"):
            runner.infer(np.zeros((1, 3, 9, 9), np.float32))
        with pytest.raises(DataError, match="float64"):
            runner.infer(images(1).astype(np.float64))


@pytest.mark.usefixtures("gpu")
def test_outside_of_its_block_an_engine_is_a_bug(trt: Any, model: bytes, tmp_path: Path) -> None:
    runner = EngineRunner(built(trt, model, tmp_path, RANGE))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="with block"):
            runner.infer(images(1))
        with runner:
            assert stages_of(runner) is not None
            assert runner.infer(images(1)).shape == (1, 5)
    assert stages_of(runner) is None


@pytest.mark.usefixtures("gpu")
def test_the_steps_of_an_engine_can_be_taken_one_by_one(
    trt: Any, network: nn.Module, model: bytes, tmp_path: Path
) -> None:
    with EngineRunner(built(trt, model, tmp_path, RANGE)) as runner:
        stages = stages_of(runner)
        assert stages is not None
        stages.stage({"input": images(2)})
        before = len(calls_of(trt, "IExecutionContext.execute_async_v3"))
        for _ in range(3):
            stages.upload()
        for _ in range(4):
            stages.enqueue()
        stages.download()
        with torch.no_grad():
            expected = network(torch.from_numpy(images(2))).numpy()
        (fetched,) = stages.fetch().values()
        np.testing.assert_allclose(fetched, expected, atol=1e-5)
        assert len(calls_of(trt, "IExecutionContext.execute_async_v3")) == before + 4


@pytest.mark.usefixtures("gpu")
def test_an_engine_without_its_sidecar(trt: Any, model: bytes, tmp_path: Path) -> None:
    path = built(trt, model, tmp_path, RANGE)
    sidecar.sidecar_path(path).unlink()
    with pytest.raises(CheckpointError, match=r"model\.engine\.json.*sidecar"), EngineRunner(path):
        pass
    assert not calls_of(trt, "Runtime")


@pytest.mark.usefixtures("gpu")
def test_a_damaged_engine_never_reaches_tensorrt(trt: Any, model: bytes, tmp_path: Path) -> None:
    path = built(trt, model, tmp_path, RANGE)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not the file that"), EngineRunner(path):
        pass
    assert not calls_of(trt, "Runtime")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"sm": "7.0", "gpu": "Tesla V100"},
            r"SM 7\.0 \(Tesla V100\) and this Host GPU is SM 9\.0",
        ),
        ({"tensorrt": "8.6.1"}, r"built by tensorrt 8\.6\.1 and here is tensorrt 10\.4\.0"),
    ],
)
def test_an_engine_of_another_machine_never_reaches_tensorrt(
    trt: Any, model: bytes, tmp_path: Path, facts: dict[str, Any], words: str
) -> None:
    path = built(trt, model, tmp_path, RANGE, **facts)
    with pytest.raises(EnvironmentUnfitError, match=words), EngineRunner(path):
        pass
    assert not calls_of(trt, "Runtime")


@pytest.mark.usefixtures("gpu")
def test_the_library_that_built_it_runs_it(
    trt: Any, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = installed("rtx-1.7.1.116", monkeypatch)
    path = built(rtx, model, tmp_path, RANGE, sm=None)
    with EngineRunner(path) as runner:
        assert runner.name == "TensorRT-RTX 1.7.1.116 (Host GPU)"
    refused = pytest.raises(EnvironmentUnfitError, match=r"tensorrt_rtx 1\.7.*is tensorrt 10\.4")
    with refused, EngineRunner(path, provider="tensorrt"):
        pass


RTX = "rtx-1.7.1.116"


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_rtx_has_its_kernels_and_its_memory_before_anything_is_timed_or_captured(
    model: bytes,
    network: nn.Module,
    tmp_path: Path,
    gpu: type[HostGpu],
    monkeypatch: pytest.MonkeyPatch,
    cuda_graph: bool,
) -> None:
    rtx = installed(RTX, monkeypatch)
    with EngineRunner(built(rtx, model, tmp_path, ONE_EACH, sm=None), cuda_graph=cuda_graph) as on:
        check(on, network, 1, 4, 1)
    strategy = "dynamic_shapes_kernel_specialization_strategy"
    eager = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert calls_of(rtx, f"IRuntimeConfig.{strategy}=") == [(eager,)] * 2
    # a graph of its own within the one that is captured here would be another network's time
    disabled = rtx.CudaGraphStrategy.DISABLED
    assert calls_of(rtx, "IRuntimeConfig.cuda_graph_strategy=") == [(disabled,)] * 2
    memory = calls_of(rtx, "IExecutionContext.set_device_memory")
    size = 1 << 20
    assert [given for _, given in memory] == [size] * 2
    assert gpu.opened[0].device_shapes.count((size,)) == 2
    order = [call.name.partition(".")[2] for call in state_of(rtx).calls]
    asked = order.count("is_stream_capturable")
    assert asked == 2 * cuda_graph
    if cuda_graph:
        # a run that compiles, then the question, then the capture
        at = order.index("is_stream_capturable")
        assert order[at - 1] == order[at + 1] == "execute_async_v3"
        assert order[:at].count("execute_async_v3") == 1


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_says_that_no_graph_holds_it_is_refused_before_the_capture(
    model: bytes, tmp_path: Path, gpu: type[HostGpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = installed(RTX, monkeypatch)
    path = built(rtx, model, tmp_path, RANGE, fixed_memory=False, sm=None)
    with (
        EngineRunner(path, cuda_graph=True) as runner,
        pytest.raises(
            ModelError, match=r"says that the network cannot be captured.*without a graph"
        ),
    ):
        runner.infer(images(2))
    assert gpu.opened[0].captures == 0
    with EngineRunner(path) as runner:
        assert runner.infer(images(2)).shape == (2, 5)


@pytest.mark.usefixtures("gpu")
def test_a_sidecar_names_no_module_of_its_own_liking(
    trt: Any, model: bytes, tmp_path: Path
) -> None:
    path = built(trt, model, tmp_path, RANGE, provider="this")
    sys.modules.pop("this", None)
    with pytest.raises(CheckpointError, match="'this', which is none of"), EngineRunner(path):
        pass
    assert "this" not in sys.modules


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (
            {"deserialize_error": "Error Code 6: (Magic tag does not match)"},
            r"TensorRT 10\.4\.0 cannot load .*model\.engine: .*Magic tag.*; build it again",
        ),
        ({"driver": False}, "no usable GPU or driver.*error: 35"),
    ],
)
def test_the_reason_of_tensorrt_is_part_of_the_sentence(
    trt: Any,
    model: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: dict[str, Any],
    words: str,
) -> None:
    path = built(trt, model, tmp_path, RANGE)
    installed("10.4.0", monkeypatch, **behaviour)
    with pytest.raises(EnvironmentUnfitError, match=words), EngineRunner(path):
        pass


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("set_optimization_profile_async", "refuses its own optimization profile 0: .*the GPU"),
        ("set_input_shape", r"refuses input of shape \(2, 3, 12, 12\): .*the GPU"),
        ("set_tensor_address", "refuses the memory of its tensor input: .*the GPU"),
        ("execute_async_v3", r"refuses to run on input \(2, 3, 12, 12\): .*the GPU"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_of_the_network(
    trt: Any,
    model: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    words: str,
) -> None:
    def refuse(context: Any, *_: Any) -> bool:
        return context._refuse("the GPU is on fire")

    with EngineRunner(built(trt, model, tmp_path, RANGE)) as runner:
        monkeypatch.setattr(tensorrt_stand_in.Context, method, refuse)
        with pytest.raises(ModelError, match=rf"^TensorRT 10\.4\.0 \(Host GPU\) {words}"):
            runner.infer(images(2))


@pytest.mark.usefixtures("gpu")
def test_a_context_that_does_not_fit_into_memory(
    trt: Any, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_stand_in.Engine, "create_execution_context", lambda *_: None)
    with (
        EngineRunner(built(trt, model, tmp_path, RANGE)) as runner,
        pytest.raises(EnvironmentUnfitError, match=r"execution context.*memory used up"),
    ):
        runner.infer(images(2))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_of_several_tensors_and_types(trt: Any, tmp_path: Path, cuda_graph: bool) -> None:
    half, whole = TensorProto.FLOAT16, TensorProto.INT64
    reads = [
        helper.make_tensor_value_info("input", half, ("batch", *SIZE)),
        helper.make_tensor_value_info("ids", whole, (3,)),
    ]
    writes = [
        helper.make_tensor_value_info("rectified", half, ("batch", *SIZE)),
        helper.make_tensor_value_info("twice", whole, (3,)),
    ]
    nodes = [
        helper.make_node("Relu", ["input"], ["rectified"]),
        helper.make_node("Add", ["ids", "ids"], ["twice"]),
    ]
    graph = helper.make_graph(nodes, "ends", reads, writes)
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = built(trt, data.SerializeToString(), tmp_path, RANGE, fixed={"ids": (3,)})
    with EngineRunner(path, cuda_graph=cuda_graph) as runner:
        assert [str(spec) for spec in runner.inputs or ()] == [
            f"input float16 (any, {', '.join(map(str, SIZE))})",
            "ids int64 (3,)",
        ]
        for seed in range(2):
            feeds = {"input": images(2, seed).astype(np.float16), "ids": np.arange(3) + seed}
            found = runner.run(feeds)
            assert list(found) == ["rectified", "twice"]
            np.testing.assert_array_equal(found["rectified"], np.maximum(feeds["input"], 0))
            np.testing.assert_array_equal(found["twice"], 2 * feeds["ids"])
        with pytest.raises(DataError, match="reads input, ids, and it was given input"):
            runner.run({"input": feeds["input"]})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence(trt: Any, model: bytes, tmp_path: Path) -> None:
    path = built(trt, model, tmp_path, RANGE)
    with (
        pytest.raises(
            EnvironmentUnfitError,
            match=r"^TensorRT 10\.4\.0 was asked to run model\.engine on cuda and finds no usable",
        ),
        EngineRunner(path),
    ):
        pass


def test_without_tensorrt_the_pip_line_is_given(
    trt: Any, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built(trt, model, tmp_path, RANGE)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentUnfitError, match="pip install"), EngineRunner(path):
        pass
