from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_gpu import HostGpu

from compress.errors import EnvironmentUnfitError
from export.runners.cuda import Cuda

NO_GPU = not torch.cuda.is_available()


def test_the_stand_in_has_what_a_gpu_has() -> None:
    public = {name for name in vars(Cuda) if not name.startswith("_")}
    assert {"copy", "capture"} < public <= set(dir(HostGpu))


def test_the_reason_of_torch_is_part_of_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn("the driver is too old\nand much more", UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(EnvironmentUnfitError, match=r"usable GPU: the driver is too old; use"):
        Cuda()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EnvironmentUnfitError, match="torch is built without CUDA"):
        Cuda()


class RecordedTorch:
    """Takes the place of torch.cuda and writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, word: str) -> Any:
        @contextmanager
        def block() -> Iterator[None]:
            self.said.append(f"{word} begins")
            yield
            self.said.append(f"{word} ends")

        return block()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedTorch:
    found = RecordedTorch()
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: found.said.append("wait"))
    graph = SimpleNamespace(replay=lambda: found.said.append("replay"))
    properties = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)

    def capture(graph: Any, *, stream: Any, capture_error_mode: str) -> Any:
        return found.note(f"capture on {stream.cuda_stream} {capture_error_mode}")

    replacements = {
        "is_available": lambda: True,
        "device": lambda device: nullcontext(),
        "current_device": lambda: 2,
        "Stream": lambda: stream,
        "get_device_properties": lambda index: properties,
        "stream": lambda stream: found.note(f"stream {stream.cuda_stream}"),
        "CUDAGraph": lambda: graph,
        "Event": lambda **options: SimpleNamespace(
            record=lambda stream: found.said.append(f"mark on {stream.cuda_stream}"), **options
        ),
        "graph": capture,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return found


def test_a_graph_is_captured_and_replayed_on_the_stream(recorded: RecordedTorch) -> None:
    cuda = Cuda("cuda:2")
    assert (cuda.name, cuda.sm, cuda.device, cuda.stream) == ("NVIDIA H100", "9.0", "cuda:2", 7)
    logits = torch.zeros(1)

    def launch() -> torch.Tensor:
        recorded.said.append("launch")
        return logits

    replay = cuda.capture(launch)
    capture = "capture on 7 thread_local"
    assert recorded.said == ["wait", f"{capture} begins", "launch", f"{capture} ends"]
    recorded.said.clear()
    assert replay() is logits
    assert recorded.said == ["stream 7 begins", "replay", "stream 7 ends"]


def test_copies_are_queued_on_the_stream(recorded: RecordedTorch) -> None:
    class Memory:
        def copy_(self, source: Any, *, non_blocking: bool) -> None:
            recorded.said.append(f"copy {source} {non_blocking}")

    cuda = Cuda("cuda:2")
    cuda.copy(Memory(), "images")  # type: ignore[arg-type]
    assert recorded.said == ["stream 7 begins", "copy images True", "stream 7 ends"]


def test_within_a_block_on_the_stream_no_step_switches_to_it(recorded: RecordedTorch) -> None:
    cuda = Cuda("cuda:2")
    replay = cuda.capture(dict)
    recorded.said.clear()
    with cuda.on_stream():
        replay()
        with cuda.on_stream():
            replay()
    replay()
    block = ["stream 7 begins", "replay", "stream 7 ends"]
    assert recorded.said == [*block[:1], "replay", *block[1:], *block]
    recorded.said.clear()
    with suppress(KeyError), cuda.on_stream():
        raise KeyError
    replay()
    assert recorded.said == ["stream 7 begins", *block]


def test_events_are_recorded_on_torchs_own_stream_object(recorded: RecordedTorch) -> None:
    # A stream made again from its number would lie on torch's current device, here not cuda:2.
    cuda = Cuda("cuda:2")
    event: Any = cuda.event()
    assert event.enable_timing is True
    cuda.record(event)
    assert recorded.said == ["mark on 7"]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(EnvironmentUnfitError, match="asked for cuda:99"):
        Cuda("cuda:99")
