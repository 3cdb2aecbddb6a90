from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host_gpu import fresh_host_gpu

from bench.measuring.device_timing import STAGES, DeviceCalls, advice, time_on_device
from export.runners.cuda import Cuda
from export.runners.stages import Stages

Steps = list[tuple[float, float]]
SWITCH = 16.0
NO_GPU = not torch.cuda.is_available()


class SimulatedGpu:
    """A host and a stream, and the steps of a runner on them; times in milliseconds.

    A step takes the host so long to queue, and the stream so long once it is free and the step is
    queued. Making the stream torch's current one takes the host ``SWITCH``, and steps that find it
    to be so already are not charged for it.
    """

    def __init__(
        self, upload: Steps, enqueue: Steps, download: Steps, *, mark: float = 0.0
    ) -> None:
        self._steps: dict[str, Iterator[tuple[float, float]]] = {
            "upload": iter(upload),
            "enqueue": iter(enqueue),
            "download": iter(download),
        }
        self._mark = mark  # that the host takes to record an event
        self.host = 1000.0
        self.idle_from = 0.0
        self.made = 0
        self.waits = 0
        self.blocks = 0
        self._switched = False

    def clock(self) -> float:
        return self.host / 1000

    def upload(self) -> None:
        self._queue("upload")

    def enqueue(self) -> None:
        self._queue("enqueue")

    def download(self) -> None:
        self._queue("download")

    def synchronize(self) -> None:
        self.waits += 1
        self.host = max(self.host, self.idle_from)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        self.blocks += 1
        self.host += SWITCH
        self._switched = True
        yield
        self._switched = False

    def event(self) -> Any:
        self.made += 1
        passed: list[float] = []

        def elapsed_time(later: Any) -> float:
            if later.passed[0] > self.host:
                raise RuntimeError("device not ready")
            return later.passed[0] - passed[0]

        return SimpleNamespace(elapsed_time=elapsed_time, passed=passed)

    def record(self, event: Any) -> None:
        self.host += self._mark
        event.passed[:] = [max(self.host, self.idle_from)]

    def _queue(self, step: str) -> None:
        host, device = next(self._steps[step])
        self.host += 0.0 if self._switched else SWITCH
        self.host += host
        self.idle_from = max(self.host, self.idle_from) + device


def timed(gpu: SimulatedGpu, iterations: int) -> DeviceCalls:
    stages: Any = gpu
    return time_on_device(stages, iterations, clock=gpu.clock)


def approximately(calls: DeviceCalls) -> dict[str, Any]:
    found = {"latency": calls.latency_ms, "host": calls.host_ms, **calls.stages_ms}
    return {name: pytest.approx(times) for name, times in found.items()}


def test_a_network_that_keeps_the_gpu_busy() -> None:
    gpu = SimulatedGpu(
        upload=[(0.25, 2.0), (0.25, 3.0)],
        enqueue=[(0.5, 8.0), (1.0, 6.0)],
        download=[(0.25, 1.0), (0.25, 1.5)],
    )
    # An event on an idle stream passes at once, so queueing the copy counts as part of it.
    assert approximately(timed(gpu, 2)) == {
        "h2d": [2.25, 3.25],
        "compute": [8.0, 6.0],
        "d2h": [1.0, 1.5],
        "enqueue": [0.5, 1.0],
        "latency": [11.25, 10.75],
        "host": [11.25, 10.75],
    }


def test_a_network_that_waits_for_the_host() -> None:
    gpu = SimulatedGpu(
        upload=[(0.5, 0.5)], enqueue=[(4.0, 1.0)], download=[(2.0, 0.25)], mark=0.125
    )
    # host: mark .125, upload .625, mark .75, mark .875 [enqueue] 4.875, mark 5, mark 5.125,
    # download 7.125, mark 7.25. Stream: copy .625-1.125, network 4.875-5.875, logits 7.125-7.375.
    assert approximately(timed(gpu, 1)) == {
        "h2d": [1.125 - 0.125],
        "compute": [5.875 - 1.125],
        "d2h": [7.375 - 5.875],
        "enqueue": [4.0],
        "latency": [7.25],
        "host": [7.375],
    }


def test_waiting_between_the_steps_is_in_the_call_and_not_in_its_latency() -> None:
    gpu = SimulatedGpu(upload=[(0.0, 1.0)], enqueue=[(0.0, 1.0)], download=[(0.0, 1.0)], mark=4.0)
    # Each step is done before the event after it is recorded, four milliseconds later.
    found = timed(gpu, 1)
    assert found.latency_ms == pytest.approx([12.0])
    assert found.host_ms == pytest.approx([24.0])


def test_what_was_queued_before_belongs_to_no_call() -> None:
    gpu = SimulatedGpu(upload=[(0.0, 1.0)], enqueue=[(0.0, 2.0)], download=[(0.0, 4.0)])
    gpu.idle_from = gpu.host + 50.0
    found = timed(gpu, 1)
    assert found.host_ms == pytest.approx([7.0])
    assert found.latency_ms == pytest.approx([7.0])


def test_events_are_made_once_and_the_stream_is_entered_once_before_any_clock_is_read() -> None:
    gpu = SimulatedGpu(*([(0.0, 1.0)] * 5 for _ in range(3)))
    found = timed(gpu, 5)
    assert found.host_ms == pytest.approx([3.0] * 5)
    assert found.stages_ms["enqueue"] == pytest.approx([0.0] * 5)
    assert (gpu.made, gpu.blocks, gpu.waits) == (6, 1, 1 + 5)


def test_no_call_takes_no_time() -> None:
    gpu = SimulatedGpu([], [], [])
    nothing = DeviceCalls(latency_ms=[], host_ms=[], stages_ms={stage: [] for stage in STAGES})
    assert timed(gpu, 0) == nothing


def test_real_stages_compute_the_logits_that_are_timed() -> None:
    cuda = fresh_host_gpu()()
    weight = torch.arange(12.0).reshape(4, 3)
    launches = []

    def prepare(tensors: dict[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
        def launch() -> dict[str, torch.Tensor]:
            launches.append(1)
            return {"logits": tensors["input"].mean(dim=(2, 3)) @ weight.T}

        return launch

    stages = Stages("stand-in", cuda, prepare)
    images = np.random.default_rng(0).standard_normal((2, 3, 5, 5)).astype(np.float32)
    stages.stage({"input": images})
    ticks = count()
    found = time_on_device(stages, 3, clock=lambda: next(ticks))
    assert (len(launches), len(cuda.uploads)) == (3, 3)
    np.testing.assert_allclose(
        stages.fetch()["logits"], images.mean(axis=(2, 3)) @ weight.numpy().T, rtol=1e-5, atol=1e-5
    )
    assert found.stages_ms["enqueue"] == [1000.0] * 3
    found = time_on_device(stages, 2)
    for call, latency in enumerate(found.latency_ms):
        assert latency == sum(found.stages_ms[stage][call] for stage in ("h2d", "compute", "d2h"))
        assert latency <= found.host_ms[call]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
@pytest.mark.parametrize("graph", [False, True])
def test_a_call_on_a_real_gpu_is_no_shorter_than_its_steps(graph: bool) -> None:
    cuda = Cuda()
    model = torch.nn.Conv2d(3, 16, 3).to(cuda.device).eval()

    def prepare(tensors: dict[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
        def launch() -> dict[str, torch.Tensor]:
            with torch.inference_mode(), cuda.on_stream():
                return {"logits": model(tensors["input"]).mean(dim=(2, 3))}

        launch()
        return cuda.capture(launch) if graph else launch

    stages = Stages("conv", cuda, prepare)
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32)
    expected = stages.run({"input": images})["logits"]
    found = time_on_device(stages, 20)
    np.testing.assert_allclose(stages.fetch()["logits"], expected, rtol=1e-4, atol=1e-5)
    assert all(len(found.stages_ms[stage]) == 20 for stage in STAGES)
    assert all(time > 0 for times in found.stages_ms.values() for time in times)
    for latency, host in zip(found.latency_ms, found.host_ms, strict=True):
        assert latency <= 1.01 * host + 0.01  # two clocks, one of half a microsecond


def medians(**changes: float) -> dict[str, float]:
    return {"h2d": 0.5, "compute": 4.0, "d2h": 0.1, "enqueue": 1.0, **changes}


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_busy_gpu_needs_no_advice(cuda_graph: bool) -> None:
    assert advice(medians(enqueue=0.8 * 4.0, h2d=3.999, d2h=3.999), cuda_graph=cuda_graph) == ()


def test_trtexecs_thresholds() -> None:
    (found,) = advice(medians(enqueue=3.21), cuda_graph=False)
    assert "host 3.21 ms" in found
    assert "the GPU 4 ms" in found
    assert "bench.cuda_graph = true" in found
    (found,) = advice(medians(enqueue=3.21), cuda_graph=True)
    assert "bench.cuda_graph" not in found
    (found,) = advice(medians(h2d=4.0), cuda_graph=False)
    assert found.startswith("Copying images to the GPU takes 4 ms")
    (found,) = advice(medians(d2h=4.5), cuda_graph=False)
    assert found.startswith("Copying logits to the host takes 4.5 ms")
    assert len(advice(medians(compute=0.1), cuda_graph=False)) == 3


def test_importing_it_loads_no_torch() -> None:
    modules = "bench.measuring.device_timing, bench.measuring.conditions"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
