from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from onnx_models import export_classifier
from torch import nn

from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.config.targets import load_target
from compress.errors import ConfigError
from compress.networks.models import build_model
from export.runners import (
    RUNTIMES,
    EngineRunner,
    OnnxRunner,
    Runner,
    Runtime,
    TorchRunner,
    artefact_suffix,
    open_runner,
    stages_of,
)

ROOT = Path(__file__).parents[2]
SIZE = (3, 16, 16)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)
    ).eval()


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    export_classifier(network, path, target=load_target("cpu"), input_size=SIZE, metadata={})
    return path


@pytest.fixture(params=["torch", "onnxruntime"])
def runner(request: pytest.FixtureRequest, network: nn.Module, file: Path) -> Runner:
    makers: dict[str, Callable[[], Runner]] = {
        "torch": lambda: TorchRunner(network),
        "onnxruntime": lambda: OnnxRunner(file),
    }
    return makers[request.param]()


def test_any_memory_layout_will_do(runner: Runner) -> None:
    batch = images(2)
    flipped = np.ascontiguousarray(batch[:, :, ::-1])[:, :, ::-1]
    flipped.flags.writeable = False
    with runner:
        np.testing.assert_array_equal(runner.infer(flipped), runner.infer(batch))


def test_outside_of_its_block_a_runner_is_a_bug(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="with block"):
        runner.infer(images(1))
    with runner:
        assert runner.infer(images(1)).shape == (1, 5)
        assert stages_of(runner) is None
    with pytest.raises(RuntimeError, match="with block"):
        runner.infer(images(1))


@pytest.mark.parametrize(
    "module",
    [f"export.runners.{path.stem}" for path in sorted((ROOT / "export/runners").glob("[a-z]*.py"))],
)
def test_importing_loads_no_framework(module: str) -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_runtime_has_its_file() -> None:
    assert get_args(Runtime) == RUNTIMES
    assert {runtime: artefact_suffix(runtime) for runtime in RUNTIMES} == {
        "torch-cpu": ".safetensors",
        "torch-cuda": ".safetensors",
        "onnxruntime-cpu": ".onnx",
        "onnxruntime-cuda": ".onnx",
        "onnxruntime-tensorrt": ".onnx",
        "tensorrt": ".engine",
    }


@pytest.mark.parametrize(
    ("runtime", "kind", "name"),
    [
        ("onnxruntime-cpu", OnnxRunner, "ONNX Runtime (CPU)"),
        ("onnxruntime-cuda", OnnxRunner, "ONNX Runtime (CUDA)"),
        ("onnxruntime-tensorrt", OnnxRunner, "ONNX Runtime (TensorRT provider)"),
        ("tensorrt", EngineRunner, "TensorRT (model.engine)"),
    ],
)
def test_a_runtime_opens_its_file(runtime: Runtime, kind: type[Any], name: str) -> None:
    runner = open_runner(Path(f"model{artefact_suffix(runtime)}"), runtime, device="cuda:1")
    assert isinstance(runner, kind)
    assert runner.name == name
    assert vars(runner)["_device"] == "cuda:1"


def test_torch_opens_a_checkpoint_from_disk_or_from_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, model = tmp_path / "dense.safetensors", build_model("resnet20", num_classes=4).eval()
    description = Description(
        architecture="resnet20",
        classes=tuple("abcd"),
        input_size=SIZE,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    save_checkpoint(path, model, description=description)
    with torch.no_grad():
        expected = model(torch.from_numpy(images(2))).numpy()
    for source in (path, load_checkpoint(path)):
        with open_runner(source, "torch-cpu", threads=1) as runner:
            assert runner.name == "torch (cpu)"
            np.testing.assert_allclose(runner.infer(images(2)), expected, atol=1e-6)
        on_gpu = open_runner(source, "torch-cuda", device="cuda:1", cuda_graph=True)
        assert on_gpu.name == "torch (cuda:1)"
    with pytest.raises(
        ConfigError, match=r"tensorrt reads a file \*\.engine, not a network in memory"
    ):
        open_runner(load_checkpoint(path), "tensorrt")


def test_threads_and_graphs_reach_the_runner(file: Path) -> None:
    with open_runner(file, "onnxruntime-cpu", threads=3) as runner:
        options = vars(runner)["_session"].get_session_options()
        assert options.intra_op_num_threads == 3
    for runtime in ("onnxruntime-cpu", "onnxruntime-tensorrt"):
        with pytest.raises(ConfigError, match="cuda_graph"):
            open_runner(file, runtime, cuda_graph=True)  # type: ignore[arg-type]
    for runtime, path in (("onnxruntime-cuda", file), ("tensorrt", Path("model.engine"))):
        captured = open_runner(path, runtime, cuda_graph=True)  # type: ignore[arg-type]
        assert vars(captured)["_cuda_graph"] is True


@pytest.mark.parametrize(
    ("file_name", "runtime", "words"),
    [
        ("model.onnx", "tensorrt", r"runtime tensorrt reads a file \*\.engine, not model\.onnx"),
        ("model.engine", "onnxruntime-cuda", r"\*\.onnx, not model\.engine"),
        ("model.onnx", "torch-cpu", r"\*\.safetensors, not model\.onnx"),
        ("model.onnx", "onnxruntime-gpu", "no runtime is named 'onnxruntime-gpu': did you mean"),
    ],
)
def test_files_and_runtimes_that_do_not_fit(file_name: str, runtime: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_runner(Path(file_name), runtime)
