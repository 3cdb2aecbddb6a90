from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision import models

from compress.errors import CheckpointError, DataError, EnvironmentUnfitError, ModelError
from export.onnx_export import export_onnx
from export.runners import OnnxRunner, TorchRunner
from compress.targets import load_target

CUDA = "CUDAExecutionProvider"


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


def images(count: int, size: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32)


def exported(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.onnx"
    export_onnx(model, path, target=load_target("cpu"), input_size=(3, 64, 64), metadata={})
    return path


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(odd_net(), tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize(
    "make",
    [
        odd_net,
        lambda: models.resnet18(num_classes=10),
        lambda: models.resnext50_32x4d(num_classes=10),
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


def test_the_torch_runner_leaves_its_model_alone() -> None:
    model = odd_net().train()
    batch = images(4)
    statistics = model[1].running_mean.clone()  # type: ignore[index]
    with TorchRunner(model) as runner:
        assert runner.name == "torch (cpu)"
        actual = runner.infer(batch)
        np.testing.assert_array_equal(runner.infer(batch), actual)
    assert all(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, statistics)  # type: ignore[index]
    with torch.no_grad():
        np.testing.assert_array_equal(actual, model.eval()(torch.from_numpy(batch)).numpy())


def test_any_memory_layout_will_do(odd_file: Path) -> None:
    batch = images(2)
    flipped = np.ascontiguousarray(batch[:, :, ::-1])[:, :, ::-1]
    flipped.flags.writeable = False
    for runner in (TorchRunner(odd_net()), OnnxRunner(odd_file)):
        with runner:
            np.testing.assert_array_equal(runner.infer(flipped), runner.infer(batch))


def test_outside_of_its_block_a_runner_is_a_bug(odd_file: Path) -> None:
    for runner in (TorchRunner(odd_net()), OnnxRunner(odd_file)):
        with pytest.raises(RuntimeError, match="with block"):
            runner.infer(images(1))
        with runner:
            runner.infer(images(1))
        with pytest.raises(RuntimeError, match="with block"):
            runner.infer(images(1))


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


def test_what_torch_cannot_compute() -> None:
    with (
        TorchRunner(odd_net()) as runner,
        pytest.raises(ModelError, match=r"torch \(cpu\) cannot compute .*\(1, 1, 8, 8\)"),
    ):
        runner.infer(np.zeros((1, 1, 8, 8), np.float32))


def test_what_returns_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images

    with TorchRunner(Pair()) as runner, pytest.raises(ModelError, match="returns a tuple"):
        runner.infer(images(1))


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
    torch.cuda.is_available() or CUDA not in onnxruntime.get_available_providers(),
    reason="needs the GPU build of ONNX Runtime on a machine without a GPU",
)
def test_a_silent_fall_back_is_refused(odd_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(EnvironmentUnfitError, match=f"asked for {CUDA}|cannot start {CUDA}"),
        OnnxRunner(odd_file, provider=CUDA),
    ):
        pass
    assert capsys.readouterr().out == ""


def test_a_session_on_another_provider_is_refused(
    odd_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FallenBack:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", FallenBack)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    with (
        pytest.raises(EnvironmentUnfitError, match="fell back to CPUExecutionProvider"),
        OnnxRunner(odd_file, provider=CUDA),
    ):
        pass


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_without_a_gpu() -> None:
    with (
        pytest.raises(EnvironmentUnfitError, match="no usable GPU"),
        TorchRunner(odd_net(), "cuda"),
    ):
        pass


def test_threads_reach_the_session(odd_file: Path) -> None:
    with OnnxRunner(odd_file, threads=3) as runner:
        options = runner._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
