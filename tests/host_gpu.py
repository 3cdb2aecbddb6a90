"""A stand-in for a GPU on host memory, for runners whose GPU is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Tensors = dict[str, torch.Tensor]
Launch = Callable[[], Tensors]


class HostGpu:
    """What ``export.runners.cuda.Cuda`` is, but for the GPU.

    Copies back to the host happen when somebody waits for them, so that not to wait is seen.
    """

    memory = "cpu"
    device = "cpu"
    index = 0
    stream = 4711
    sm = "9.0"
    name = "Host GPU"
    opened: list[HostGpu]

    def __init__(self, device: str = "cuda", *, asked: str | None = None) -> None:
        self.asked = (device, asked)
        self.pinned: set[int] = set()
        self.device_shapes: list[tuple[int, ...]] = []
        self.uploads: list[int] = []
        self.captures = 0
        self.replays = 0
        self.holds: list[float] = []
        self.closed = False
        self._queued: list[tuple[torch.Tensor, torch.Tensor]] = []
        type(self).opened.append(self)

    def on_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def host_memory(self, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
        memory = _garbage(shape, dtype)
        self.pinned.add(memory.data_ptr())
        return memory

    def device_memory(self, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
        self.device_shapes.append(tuple(shape))
        return _garbage(shape, dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.data_ptr() in self.pinned:
            self._queued.append((target, source))
        else:
            self.uploads.append(source.data_ptr())
            target.copy_(source)

    def synchronize(self) -> None:
        for target, source in self._queued:
            target.copy_(source)
        self._queued.clear()

    def event(self) -> HostEvent:
        return HostEvent()

    def record(self, event: HostEvent) -> None:
        event.passed = time.perf_counter()

    def hold(self, milliseconds: float) -> None:
        self.holds.append(milliseconds)

    def settle(self) -> None:
        self.synchronize()

    def capture(self, launch: Launch) -> Launch:
        self.captures += 1
        outputs = launch()

        def replay() -> Tensors:
            self.replays += 1
            with torch.inference_mode():
                for name, values in launch().items():
                    outputs[name].copy_(values)
            return outputs

        return replay

    def close(self) -> None:
        self.closed = True


def _garbage(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    kind = getattr(torch, dtype)
    return torch.full(shape, torch.nan if kind.is_floating_point else 77, dtype=kind)


class HostEvent:
    """What a stream is marked with, by the clock of the host."""

    passed: float | None = None

    def elapsed_time(self, later: HostEvent) -> float:
        assert self.passed is not None
        assert later.passed is not None
        return 1000 * (later.passed - self.passed)


def fresh_host_gpu() -> type[HostGpu]:
    """Return the stand-in with a list of its own of what was opened."""
    return type("FreshHostGpu", (HostGpu,), {"opened": []})
