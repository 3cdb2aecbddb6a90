from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lived_in
from host_gpu import HostGpu, fresh_host_gpu
from networks import NETWORKS
from torch import nn

from bench.measuring.device_timing import time_on_device
from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description
from compress.errors import CheckpointError, ConfigError, ModelError
from compress.networks.models import build_model
from export.profiling import WARMUPS, Profile, profile_network, torch_profile
from export.profiling.torch_profile import OUTSIDE, profile_module
from export.runners import TorchRunner

SIZE = (3, 12, 12)


class Clock:
    """Stands still but for what the tests say."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.queued = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(torch_profile, "time", clock)
    return clock


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SIZE)).astype(np.float32)


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


class Slow(nn.Module):
    """Takes so many seconds, one more for every call before."""

    def __init__(self, clock: Clock, seconds: float, *, queues: bool = False) -> None:
        super().__init__()
        self.take, self.calls = seconds, 0
        self.tell = lambda seconds: setattr(clock, "queued" if queues else "seconds", seconds)
        self.now = lambda: clock.queued if queues else clock.seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tell(self.now() + self.take + self.calls)
        self.calls += 1
        return x


class Net(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.first = Slow(clock, 10)
        self.inner = nn.Sequential(nn.Identity(), Slow(clock, 20))
        self.wait = lambda: setattr(clock, "seconds", clock.seconds + 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.first(x))
        self.wait()
        return x.mean((2, 3))


def test_each_module_takes_what_its_clock_says(clock: Clock) -> None:
    model = Net(clock).eval()
    profile = profile_module(model, "cpu", images(1), calls=3)
    # Of the calls that count, the second is the median: WARMUPS + 1 went before it.
    late = WARMUPS + 1
    found = [(layer.name, layer.kind, layer.nodes) for layer in profile.layers]
    assert found == [
        ("first", "Slow", ("first",)),
        ("inner.0", "Identity", ("inner.0",)),
        ("inner.1", "Slow", ("inner.1",)),
        (OUTSIDE, "functions", ()),
    ]
    times = [layer.milliseconds for layer in profile.layers]
    assert times == pytest.approx([1000 * (10 + late), 0, 1000 * (20 + late), 5000])
    assert profile.calls == 3
    assert profile.total_ms == pytest.approx(1000 * (35 + 2 * late))
    assert hooks_of(model) == 0


class QueuedMark:
    """Passes when the device is done with what was queued before it."""

    seconds = 0.0

    def elapsed_time(self, later: QueuedMark) -> float:
        return 1000 * (later.seconds - self.seconds)


def test_on_a_gpu_the_device_is_timed_and_not_the_host(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu(fresh_host_gpu()):  # type: ignore[misc]
        def event(self) -> QueuedMark:
            return QueuedMark()

        def record(self, event: QueuedMark) -> None:
            clock.seconds += 0.25  # of the host, for launching
            event.seconds = clock.queued

    monkeypatch.setattr("export.runners.torch_runner.Cuda", Gpu)
    model = nn.Sequential(
        Slow(clock, 3, queues=True), Slow(clock, 7, queues=True), nn.Flatten()
    ).eval()
    profile = profile_module(model, "cuda", images(1), calls=1)
    late = WARMUPS
    times = [layer.milliseconds for layer in profile.layers]
    assert times == pytest.approx([1000 * (3 + late), 1000 * (7 + late), 0, 0])
    (gpu,) = Gpu.opened
    assert isinstance(gpu, HostGpu)
    assert gpu.closed
    # The host takes two seconds to queue eight marks, so the stream is held for longer.
    assert gpu.holds == [pytest.approx(500)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_real_gpu_launches_do_not_count() -> None:
    """A chain so small that the host takes longer to launch it than the GPU to compute it."""
    chain = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(60)]
    model = nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with TorchRunner(model, "cuda", cuda_graph=True) as runner:
        runner.infer(images(2))
        replayed = time_on_device(runner.stages, 50).stages_ms["compute"]
    profile = profile_module(model, "cuda", images(2), calls=20)
    assert len(profile.layers) == 63
    assert all(layer.milliseconds > 0 for layer in profile.layers[:-1])
    # A mark takes a few microseconds of the stream too; a launch takes the host far more.
    assert profile.total_ms < 2 * np.median(replayed) + 0.01 * len(profile.layers)


def test_a_module_that_runs_twice_is_there_twice() -> None:
    model = NETWORKS["Shared"]().eval()
    profile = profile_module(model, "cpu", images(2), calls=2, threads=1)
    names = [layer.name for layer in profile.layers]
    assert names == ["stem", "twice", "norm", "twice", "head", OUTSIDE]


def test_a_single_module_is_all_there_is() -> None:
    profile = profile_module(nn.Flatten(), "cpu", images(1), calls=1)
    assert [(layer.name, layer.nodes) for layer in profile.layers] == [("Flatten", ())]


def test_a_network_that_fails_is_left_without_hooks() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(ModelError):
        profile_module(model, "cpu", images(1), calls=1)
    assert hooks_of(model) == 0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "dense.safetensors"
    description = Description(
        architecture="resnet20",
        classes=("a", "b", "c", "d"),
        input_size=SIZE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    save_checkpoint(path, lived_in(build_model("resnet20", num_classes=4)), description=description)
    return path


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_checkpoint_is_profiled_by_the_paths_of_its_modules(
    checkpoint: Path, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts: list[bool] = []
    from export.runners.torch_runner import TorchRunner

    initialise = TorchRunner.__init__

    def noted(self: TorchRunner, *given: Any, **named: Any) -> None:
        layouts.append(named["channels_last"])
        initialise(self, *given, **named)

    monkeypatch.setattr(TorchRunner, "__init__", noted)
    profile = profile_network(
        *(checkpoint, "torch-cpu", images(1)), calls=1, threads=1, channels_last=channels_last
    )
    assert isinstance(profile, Profile)
    model = build_model("resnet20", num_classes=4)
    weighted = [n for n, of in model.named_modules() if isinstance(of, nn.Conv2d | nn.Linear)]
    kinds = ("Conv2d", "Linear")
    assert [layer.name for layer in profile.layers if layer.kind in kinds] == weighted
    assert layouts == [channels_last]


def test_what_torch_cannot_tell(checkpoint: Path) -> None:
    none = profile_network(checkpoint, "torch-cpu", images(1), calls=1, compiled=True)
    assert none is None
    with pytest.raises(ConfigError, match="fp16"):
        profile_network(checkpoint, "torch-cpu", images(1), calls=1, precision="fp16")
    with pytest.raises(CheckpointError):
        profile_network(checkpoint.with_name("none.safetensors"), "torch-cpu", images(1), calls=1)
