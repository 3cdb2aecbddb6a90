from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from host_gpu import HostGpu, fresh_host_gpu
from torch import nn

from compress.errors import ConfigError, DataError, EnvironmentUnfitError, ModelError
from export.runners import Stages, TensorSpec, TorchRunner, stages_of

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


class Pair(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images, images


def images(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size)).astype(np.float32)


def plain(model: nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(batch)).numpy()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[HostGpu]:
    stand_in = fresh_host_gpu()
    monkeypatch.setattr("export.runners.torch_runner.Cuda", stand_in)
    return stand_in


def test_the_torch_runner_leaves_its_model_alone() -> None:
    model = odd_net().train()
    batch = images(4)
    statistics = model[1].running_mean.clone()  # type: ignore[index]
    with TorchRunner(model) as runner:
        assert runner.name == "torch (cpu)"
        assert stages_of(runner) is None
        actual = runner.infer(batch)
        np.testing.assert_array_equal(runner.infer(batch), actual)
    assert all(module.training for module in model.modules())
    assert torch.equal(model[1].running_mean, statistics)  # type: ignore[index]
    np.testing.assert_array_equal(actual, plain(model.eval(), batch))


def test_what_torch_cannot_compute() -> None:
    with (
        TorchRunner(odd_net()) as runner,
        pytest.raises(ModelError, match=r"torch \(cpu\) cannot compute .*\(1, 1, 8, 8\)"),
    ):
        runner.infer(np.zeros((1, 1, 8, 8), np.float32))


def test_what_returns_no_tensor() -> None:
    with (
        TorchRunner(Pair()) as runner,
        pytest.raises(ModelError, match=r"returns 2 tensors \(0, 1\)"),
    ):
        runner.infer(images(1))


class Several(nn.Module):
    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> dict[str, object]:
        rows = images.flatten(1)
        return {"rows": rows, "more": [ids * 2, (rows[:, :1],)]}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_several_arrays_are_handed_over_in_order(device: str) -> None:
    specs = [TensorSpec("images", "float32"), TensorSpec("ids", "int64", (None,))]
    with TorchRunner(Several(), device, inputs=specs) as runner:
        for count in (2, 4):
            batch = images(count)
            # By name, whatever the order in which they are given.
            found = runner.run({"ids": np.arange(count), "images": batch})
            assert list(found) == ["rows", "more.0", "more.1.0"]
            np.testing.assert_array_equal(found["rows"], batch.reshape(count, -1))
            np.testing.assert_array_equal(found["more.0"], 2 * np.arange(count))
        with pytest.raises(DataError, match="reads images, ids, and it was given images"):
            runner.run({"images": batch})
    with TorchRunner(nn.Identity(), device) as free:
        (same,) = free.run({"anything": np.arange(3)}).values()
        np.testing.assert_array_equal(same, np.arange(3))


def test_channels_last_is_another_layout_of_the_same_network() -> None:
    model = odd_net().eval()
    with TorchRunner(model, channels_last=True) as runner:
        weight = runner._model[0].weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        np.testing.assert_allclose(runner.infer(images(3)), plain(model, images(3)), atol=1e-6)
    assert model[0].weight.is_contiguous()  # type: ignore[index, union-attr, operator]


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_cudnn_searches_while_the_runner_is_entered_and_not_after_it() -> None:
    assert torch.backends.cudnn.benchmark is False
    with TorchRunner(odd_net(), "cuda"):
        assert torch.backends.cudnn.benchmark is True
        with TorchRunner(odd_net(), "cuda"):
            pass
        assert torch.backends.cudnn.benchmark is True
    assert torch.backends.cudnn.benchmark is False
    with TorchRunner(odd_net(), "cpu"):
        assert torch.backends.cudnn.benchmark is False


def test_threads_are_those_asked_for_and_then_those_before() -> None:
    before = torch.get_num_threads()
    with TorchRunner(odd_net(), threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_compiled_network_is_compiled_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiled(model: nn.Module, **options: Any) -> Any:
        asked.append(options)
        return lambda batch: model(batch) + 1

    monkeypatch.setattr(torch, "compile", compiled)
    model = odd_net().eval()
    with TorchRunner(model, compiled=True) as runner:
        np.testing.assert_array_equal(runner.infer(images(2)), plain(model, images(2)) + 1)
    assert asked == [{"dynamic": False}]


@pytest.mark.parametrize(
    ("wishes", "words"),
    [({"cuda_graph": True}, "cuda_graph needs a GPU"), ({"precision": "fp16"}, "fp16.*needs a")],
)
def test_what_only_a_gpu_does(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TorchRunner(odd_net(), **wishes)


@pytest.mark.parametrize(("device", "words"), [("gpu", "is none"), ("meta", "no CUDA device")])
def test_devices_that_are_none(device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words), TorchRunner(odd_net(), device):
        pass


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_torch_without_a_gpu() -> None:
    with (
        pytest.raises(EnvironmentUnfitError, match=r"asked for cuda:1 and finds no usable GPU"),
        TorchRunner(odd_net(), "cuda:1"),
    ):
        pass


@pytest.mark.parametrize("wishes", [{}, {"cuda_graph": True}, {"channels_last": True}])
def test_every_batch_size_has_its_own_memory(gpu: type[HostGpu], wishes: dict[str, Any]) -> None:
    model = odd_net().eval()
    with TorchRunner(model, "cuda:3", **wishes) as runner:
        for seed, count in enumerate((1, 4, 1, 2, 4, 4)):
            batch = images(count, seed=seed)
            np.testing.assert_allclose(runner.infer(batch), plain(model, batch), atol=1e-6)
    (opened,) = gpu.opened
    assert opened.asked == ("cuda:3", None)
    assert sorted(shape[0] for shape in opened.device_shapes) == [1, 2, 4]
    assert set(opened.uploads) <= opened.pinned
    assert (opened.captures, opened.replays) == ((3, 6) if wishes.get("cuda_graph") else (0, 0))
    assert opened.closed


@pytest.mark.usefixtures("gpu")
def test_half_precision_keeps_images_and_logits_in_single() -> None:
    model = odd_net().eval()
    seen: list[torch.dtype] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with TorchRunner(model, "cuda", precision="fp16") as runner:
        actual = runner.infer(images(3))
    expected = plain(model, images(3))
    assert seen[0] is torch.float16
    assert actual.dtype == np.float32
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert 2**-24 < error < 2e-2  # eleven significant bits, and not by accident twenty-four


@pytest.mark.usefixtures("gpu")
def test_the_steps_can_be_taken_one_by_one() -> None:
    model = odd_net().eval()
    with TorchRunner(model, "cuda") as runner:
        stages = stages_of(runner)
        assert isinstance(stages, Stages)
        for early in (stages.upload, stages.enqueue, stages.download, stages.fetch):
            with pytest.raises(RuntimeError, match="before anything was staged"):
                early()
        first, second = images(2, seed=1), images(2, seed=2)
        stages.stage({"input": first})
        with pytest.raises(RuntimeError, match="before it was enqueued"):
            stages.download()
        with pytest.raises(RuntimeError, match="before they were downloaded"):
            stages.fetch()
        stages.upload()
        stages.stage({"input": second})  # page-locked memory changes, that of the device does not
        for _ in range(3):
            stages.enqueue()
        stages.download()
        stages.synchronize()
        (fetched,) = stages.fetch().values()
        np.testing.assert_allclose(fetched, plain(model, first), atol=1e-6)
        kept = fetched.copy()
        runner.infer(second)
        np.testing.assert_array_equal(fetched, kept)
    assert stages_of(runner) is None


@pytest.mark.usefixtures("gpu")
def test_what_torch_advises_when_it_compiles_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []

    def compiled(model: nn.Module, **_: Any) -> Any:
        def call(batch: torch.Tensor) -> torch.Tensor:
            if batch.shape not in calls:
                warnings.warn("TensorFloat32 tensor cores for ... not enabled.", stacklevel=1)
            calls.append(batch.shape)
            return model(batch)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with TorchRunner(odd_net(), "cuda", compiled=True) as runner:
        for count in (2, 3, 2):
            runner.infer(images(count))
    assert [shape[0] for shape in calls] == [2, 2, 3, 3, 2]  # once more for each new size


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_same_mistakes_are_named() -> None:
    runner = TorchRunner(odd_net(), "cuda")
    with pytest.raises(RuntimeError, match="with block"):
        runner.infer(images(1))
    with runner:
        with pytest.raises(DataError, match="float64"):
            runner.infer(images(1).astype(np.float64))
        with pytest.raises(ModelError, match=r"torch \(cuda\) cannot compute .*\(1, 1, 8, 8\)"):
            runner.infer(np.zeros((1, 1, 8, 8), np.float32))
        assert runner.infer(images(2)).shape == (2, 11)
    with (
        TorchRunner(Pair(), "cuda") as pair,
        pytest.raises(ModelError, match=r"returns 2 tensors \(0, 1\)"),
    ):
        pair.infer(images(1))


def test_a_graph_is_captured_after_three_runs(gpu: type[HostGpu]) -> None:
    runs: list[int] = []
    model = odd_net().eval()
    model.register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    with TorchRunner(model, "cuda", cuda_graph=True) as runner:
        runner._model.register_forward_pre_hook(lambda *_: runs.append(-gpu.opened[0].captures))
        runner.infer(images(2))
    assert runs == [2, 0, 2, 0, 2, 0, 2, -1, 2, -1]  # three, the capture, the replay


def test_what_no_graph_can_hold(gpu: type[HostGpu], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "capture", refuse)
    with (
        TorchRunner(odd_net(), "cuda", cuda_graph=True) as runner,
        pytest.raises(ModelError, match=r"captured .*: operation not permitted .*capturing; run"),
    ):
        runner.infer(images(1))


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
@pytest.mark.parametrize(
    ("wishes", "tolerance"),
    [
        ({}, 1e-4),
        ({"cuda_graph": True}, 1e-4),
        ({"channels_last": True}, 1e-4),
        ({"compiled": True}, 1e-4),
        ({"compiled": True, "cuda_graph": True, "channels_last": True}, 1e-4),
        ({"precision": "fp16", "cuda_graph": True, "channels_last": True}, 2e-2),
    ],
    ids=str,
)
def test_a_gpu_gives_the_logits_of_the_cpu(wishes: dict[str, Any], tolerance: float) -> None:
    model = odd_net().eval()
    with (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        TorchRunner(model) as reference,
        TorchRunner(model, "cuda", **wishes) as candidate,
    ):
        for seed, count in enumerate((1, 8, 3, 8, 1)):
            batch = images(count, size=32, seed=seed)
            expected, actual = reference.infer(batch), candidate.infer(batch)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
def test_events_on_the_stream_see_the_steps() -> None:
    with TorchRunner(odd_net(), "cuda") as runner:
        runner.infer(images(8))
        stages = stages_of(runner)
        assert stages is not None
        marks = [stages.event() for _ in range(4)]
        for mark, step in zip(
            marks, (stages.upload, stages.enqueue, stages.download, None), strict=True
        ):
            stages.record(mark)
            if step is not None:
                step()
        stages.synchronize()
        assert all(a.elapsed_time(b) > 0 for a, b in pairwise(marks))
