from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from host_gpu import HostGpu, fresh_host_gpu
from onnx import TensorProto, helper
from onnx_models import export_classifier
from torch import nn
from torchvision import models

from compress.config.targets import load_target
from compress.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentUnfitError,
    ModelError,
)
from export.runners import OnnxRunner, stages_of

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
NO_GPU = not torch.cuda.is_available()


def odd_net() -> nn.Module:
    """Widths as pruning leaves them."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1, bias=False),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.Conv2d(7, 13, 3, stride=2, bias=False),
        nn.BatchNorm2d(13),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(13, 11),
    )


def with_lived_in_norms(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that a wrong fold would betray."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def images(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32)


def exported(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.onnx"
    export_classifier(model, path, target=load_target("cpu"), input_size=(3, 64, 64), metadata={})
    return path


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(odd_net(), tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize(
    "make",
    [
        odd_net,
        lambda: models.resnet18(num_classes=10),
        pytest.param(lambda: models.resnext50_32x4d(num_classes=10), marks=pytest.mark.slow),
    ],
    ids=["odd", "resnet18", "resnext50"],
)
def test_onnx_runtime_gives_the_logits_of_plain_torch(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = with_lived_in_norms(make()).eval()
    with OnnxRunner(exported(model, tmp_path), threads=1) as runner:
        for count in (1, 3, 8):
            batch = images(count)
            with torch.no_grad():
                expected = model(torch.from_numpy(batch)).numpy()
            actual = runner.infer(batch)
            assert actual.dtype == np.float32
            # float32 sums of a few thousand terms, in another order
            scale = np.abs(expected).max()
            np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("provider", "name"),
    [
        (CPU, "ONNX Runtime (CPU)"),
        (CUDA, "ONNX Runtime (CUDA)"),
        (TENSORRT, "ONNX Runtime (TensorRT provider)"),
        ("OpenVINOExecutionProvider", "ONNX Runtime (OpenVINO)"),
    ],
)
def test_names_are_for_people(provider: str, name: str) -> None:
    assert OnnxRunner(Path("model.onnx"), provider=provider).name == name


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (images(1).astype(np.float64), "float64"),
        (images(1)[0], r"\(3, 64, 64\)"),
        (images(1, size=32), r"shape \(batch, 3, 64, 64\), not \(1, 3, 32, 32\)"),
    ],
)
def test_images_of_another_shape(odd_file: Path, batch: np.ndarray, words: str) -> None:
    with OnnxRunner(odd_file) as runner, pytest.raises(DataError, match=words):
        runner.infer(batch)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_batch_that_was_baked_in_does_not_run(tmp_path: Path) -> None:
    class Baked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(images.mean((2, 3)).reshape(int(images.shape[0]), 3))

    with (
        OnnxRunner(exported(Baked(), tmp_path)) as runner,
        pytest.raises(ModelError, match=r"ONNX Runtime \(CPU\) cannot compute"),
    ):
        runner.infer(images(3))


def test_files_that_are_not_there_or_not_whole(tmp_path: Path, odd_file: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no ONNX file"), OnnxRunner(tmp_path / "a"):
        pass
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(odd_file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cannot load .*damaged\.onnx"), OnnxRunner(damaged):
        pass


def test_an_unknown_provider(odd_file: Path) -> None:
    with (
        pytest.raises(EnvironmentUnfitError, match=r"it has .*CPUExecutionProvider"),
        OnnxRunner(odd_file, provider="FooExecutionProvider"),
    ):
        pass


@pytest.mark.skipif(
    not NO_GPU or CUDA not in onnxruntime.get_available_providers(),
    reason="needs the GPU build of ONNX Runtime on a machine without a GPU",
)
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_provider_without_a_gpu_is_one_sentence(
    odd_file: Path, capfd: pytest.CaptureFixture[str], provider: str
) -> None:
    with (
        pytest.raises(EnvironmentUnfitError, match=f"asked for {provider} on cuda and finds no"),
        OnnxRunner(odd_file, provider=provider),
    ):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_cannot_start(odd_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*_: Any, **__: Any) -> None:
        raise RuntimeError("the driver is too old\nand a page of details")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with (
        pytest.raises(EnvironmentUnfitError, match=r"cannot start CPU.*: the driver is too old$"),
        OnnxRunner(odd_file),
    ):
        pass


def test_without_onnx_runtime_the_pip_line_is_given(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentUnfitError, match="pip install"), OnnxRunner(odd_file):
        pass


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.usefixtures("gpu")
def test_the_graph_is_optimised_unless_it_is_asked_as_it_is(
    odd_file: Path, sessions: Sessions, optimised: bool
) -> None:
    with OnnxRunner(odd_file, provider=CUDA, optimised=optimised):
        levels = onnxruntime.GraphOptimizationLevel
        assert sessions.level == (levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL)


def test_threads_reach_the_session(odd_file: Path) -> None:
    with OnnxRunner(odd_file, threads=3) as runner:
        options = runner._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)


@pytest.mark.parametrize("provider", [CPU, TENSORRT])
def test_only_the_cuda_provider_captures_graphs(odd_file: Path, provider: str) -> None:
    with pytest.raises(ConfigError, match=f"cuda_graph needs {CUDA} and .*{provider}"):
        OnnxRunner(odd_file, provider=provider, cuda_graph=True)


class Sessions:
    """Sessions that claim to be on the provider that was asked for and compute on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.providers: list[Any] = []
        self.runs: list[tuple[str, str]] = []
        self.used: Sequence[str] | None = None
        self.level: Any = None
        outer = self

        class OnHost(onnxruntime.InferenceSession):
            def __init__(self, path: str, options: Any, providers: Any, **_: Any) -> None:
                outer.providers = providers
                outer.level = options.graph_optimization_level
                super().__init__(path, options, providers=[CPU])

            def get_providers(self) -> list[str]:
                return list(outer.used or [name for name, _ in outer.providers])

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                keys = ("disable_synchronize_execution_providers", "gpu_graph_id")
                outer.runs.append(tuple(options.get_run_config_entry(key) for key in keys))
                super().run_with_iobinding(binding, options)

        monkeypatch.setattr(onnxruntime, "InferenceSession", OnHost)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(
            onnxruntime, "preload_dlls", lambda: print("no libfoo.so"), raising=False
        )


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Sessions:
    return Sessions(monkeypatch)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, sessions: Sessions) -> type[HostGpu]:
    stand_in = fresh_host_gpu()
    monkeypatch.setattr("export.runners.onnx_runner.Cuda", stand_in)
    monkeypatch.setattr("export.runners.onnx_runner._load_tensorrt", lambda: None)
    return stand_in


@pytest.mark.parametrize(("provider", "used"), [(CUDA, CPU), (TENSORRT, CUDA)])
@pytest.mark.usefixtures("gpu")
def test_a_session_on_another_provider_is_refused(
    odd_file: Path, sessions: Sessions, provider: str, used: str
) -> None:
    sessions.used = [used, CPU]
    runner = OnnxRunner(odd_file, provider=provider)
    with pytest.raises(
        EnvironmentUnfitError, match=f"asked for {provider} and fell back to {used}"
    ):
        runner.__enter__()
    with pytest.raises(RuntimeError, match="with block"):
        runner.infer(images(1))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_ends_are_bound_by_name_to_memory_of_the_device(
    odd_file: Path,
    sessions: Sessions,
    gpu: type[HostGpu],
    capfd: pytest.CaptureFixture[str],
    cuda_graph: bool,
) -> None:
    batches = [images(count, seed=seed) for seed, count in enumerate((1, 4, 1, 2, 4))]
    with OnnxRunner(odd_file, provider=CUDA, cuda_graph=cuda_graph, device="cuda:1") as runner:
        actual = [runner.infer(batch) for batch in batches]
        (asked,) = sessions.providers
        with pytest.raises(DataError, match=r"shape \(batch, 3, 64, 64\)"):
            runner.infer(images(1, size=32))
    sessions.used = [CPU]
    sessions.providers = []
    with OnnxRunner(odd_file) as reference:
        for batch, logits in zip(batches, actual, strict=True):
            np.testing.assert_allclose(logits, reference.infer(batch), atol=1e-6)
    (opened,) = gpu.opened
    assert opened.asked[0] == "cuda:1"
    assert asked == (
        CUDA,
        {
            "device_id": "0",
            "user_compute_stream": str(HostGpu.stream),
            "enable_cuda_graph": str(int(cuda_graph)),
        },
    )
    assert {(1, 11), (2, 11), (4, 11)} < set(opened.device_shapes)
    assert len(opened.device_shapes) == 6  # images and logits of three sizes
    assert set(opened.uploads) <= opened.pinned
    # one run per batch, and one more per size where it is captured
    assert len(sessions.runs) == 5 + 3 * cuda_graph
    assert len({number for _, number in sessions.runs}) == 3
    assert {unsynchronized for unsynchronized, _ in sessions.runs} == {"1"}
    assert opened.closed
    assert capfd.readouterr().out == ""


def several_ends(path: Path) -> Path:
    """Write a network of two inputs and two outputs, of three types."""
    float_, whole, byte = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
    tensor = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["bytes"], ["pixels"], to=float_),
        helper.make_node("Add", ["pixels", "shift"], ["moved"]),
        helper.make_node("Cast", ["moved"], ["rounded"], to=whole),
    ]
    ends = (
        [tensor("bytes", byte, ["n", 3]), tensor("shift", float_, [3])],
        [tensor("moved", float_, ["n", 3]), tensor("rounded", whole, ["n", 3])],
    )
    graph = helper.make_graph(nodes, "ends", *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("provider", [CPU, CUDA])
@pytest.mark.usefixtures("gpu")
def test_several_inputs_and_outputs_of_any_type(
    provider: str, sessions: Sessions, tmp_path: Path
) -> None:
    sessions.used = [provider]
    shift = np.array([0.25, 0.5, 300.75], np.float32)
    with OnnxRunner(several_ends(tmp_path / "model.onnx"), provider=provider) as runner:
        specs = ["bytes uint8 (n, 3)", "shift float32 (3,)"]
        assert [str(spec) for spec in runner.inputs or ()] == specs
        for count in (2, 5, 2):
            values = np.random.default_rng(count).integers(0, 256, (count, 3)).astype(np.uint8)
            found = runner.run({"bytes": values, "shift": shift})
            assert list(found) == ["moved", "rounded"]
            np.testing.assert_array_equal(found["moved"], values + shift)
            assert found["rounded"].dtype == np.int64
            np.testing.assert_array_equal(found["rounded"], np.trunc(values + shift))
        with pytest.raises(DataError, match=r"reads bytes uint8 \(n, 3\), .* float32 of shape"):
            runner.run({"bytes": values.astype(np.float32), "shift": shift})


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_sizes_of_outputs_must_be_known(sessions: Sessions, tmp_path: Path) -> None:
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["places"])],
        "open",
        [tensor("x", TensorProto.FLOAT, ["n", 3])],
        [tensor("places", TensorProto.INT64, [2, "found"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "open.onnx").write_bytes(model.SerializeToString())
    with (
        pytest.raises(CheckpointError, match=r"gives places of shape \[2, 'found'\]"),
        OnnxRunner(tmp_path / "open.onnx", provider=CUDA),
    ):
        pass
    sessions.used = [CPU]
    with OnnxRunner(tmp_path / "open.onnx", provider=CPU) as runner:
        found = runner.run({"x": np.eye(3, dtype=np.float32)})
        assert found["places"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_what_is_no_array_of_numbers(tmp_path: Path) -> None:
    words = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
    same = helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "words", [words], [same]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "words.onnx").write_bytes(model.SerializeToString())
    with (
        pytest.raises(CheckpointError, match=r"tensor\(string\) at its x"),
        OnnxRunner(tmp_path / "words.onnx"),
    ):
        pass


@pytest.mark.usefixtures("gpu")
def test_engines_of_the_tensorrt_provider_live_as_long_as_its_block(
    odd_file: Path, sessions: Sessions, tmp_path: Path
) -> None:
    with OnnxRunner(odd_file, provider=TENSORRT) as runner:
        assert stages_of(runner) is not None
        assert runner.infer(images(2)).shape == (2, 11)
        (first, options), (second, rest) = sessions.providers
        cache = Path(options["trt_engine_cache_path"])
        assert cache.is_dir()
    assert not cache.exists()
    assert (first, second) == (TENSORRT, CUDA)
    assert sessions.level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options["trt_timing_cache_path"] == str(cache)
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "True"
    assert options["user_compute_stream"] == rest["user_compute_stream"] == str(HostGpu.stream)
    keeping = OnnxRunner(odd_file, provider=TENSORRT)
    keeping.keep_builds(tmp_path / "builds", "odd")
    with keeping:
        kept = sessions.providers[0][1]
        assert kept["trt_engine_cache_path"] == str(tmp_path / "builds" / "odd")
        assert kept["trt_timing_cache_path"] == str(tmp_path / "builds")
    assert (tmp_path / "builds" / "odd").is_dir()


@pytest.mark.usefixtures("gpu")
def test_a_temporary_cache_does_not_outlive_a_failure(odd_file: Path, sessions: Sessions) -> None:
    sessions.used = [CPU]
    with (
        pytest.raises(EnvironmentUnfitError, match="fell back"),
        OnnxRunner(odd_file, provider=TENSORRT),
    ):
        pass
    assert not Path(sessions.providers[0][1]["trt_engine_cache_path"]).exists()


@pytest.mark.skipif(
    not NO_GPU or TENSORRT not in onnxruntime.get_available_providers(),
    reason="needs an ONNX Runtime that was built with TensorRT on a machine without a GPU",
)
def test_a_provider_without_its_libraries_says_so(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.runners.onnx_runner.Cuda", fresh_host_gpu())
    monkeypatch.setattr("export.runners.onnx_runner._load_tensorrt", lambda: None)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with (
        pytest.raises(
            EnvironmentUnfitError,
            match=f"^ONNX Runtime cannot start {TENSORRT}: Please install|fell back to CPU",
        ),
        OnnxRunner(odd_file, provider=TENSORRT),
    ):
        pass


@pytest.mark.usefixtures("gpu", "sessions")
def test_what_onnx_runtime_cannot_compute_on_a_gpu(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    def fail(*_: Any) -> None:
        raise Fail("out of memory\nand a page of details")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", fail)
    with (
        OnnxRunner(odd_file, provider=CUDA) as runner,
        pytest.raises(ModelError, match=r"\(CUDA\) cannot compute .*: out of memory$"),
    ):
        runner.infer(images(1))


@pytest.mark.gpu
@pytest.mark.skipif(
    NO_GPU or CUDA not in onnxruntime.get_available_providers(),
    reason="needs a GPU and the GPU build of ONNX Runtime",
)
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_gives_the_logits_of_the_cpu(odd_file: Path, cuda_graph: bool) -> None:
    with (
        OnnxRunner(odd_file) as reference,
        OnnxRunner(odd_file, provider=CUDA, cuda_graph=cuda_graph) as candidate,
    ):
        for seed, count in enumerate((1, 8, 3, 8, 1)):
            batch = images(count, seed=seed)
            expected, actual = reference.infer(batch), candidate.infer(batch)
            scale = np.abs(expected).max()
            # eleven significant bits where convolutions are computed in TF32
            np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=5e-3)
