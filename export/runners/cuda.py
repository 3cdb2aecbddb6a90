"""One GPU as the runners use it: a stream, memory, copies and CUDA graphs, all through torch.

Nothing else in this package touches ``torch.cuda``, so a stand-in on host memory can take the
place of a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from compress.errors import ConfigError, EnvironmentUnfitError, first_line

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]
    """By the name of an input or an output."""
    Launch = Callable[[], Tensors]
    """Queues a network on the stream and returns where its outputs will be, on the device."""

Shape = tuple[int, ...]
_CYCLES_PER_MS = 2_000_000  # at 2 GHz; a slower chip is held for longer


class Cuda:
    """A CUDA device and one stream of its own, on which a runner does all its work.

    Torch makes streams that do not wait for the default stream, nor it for them. Types of memory go
    by the names that numpy and torch share. It is for one thread, as torch's current stream is.
    """

    memory = "cuda"
    """ONNX Runtime's word for where ``device_memory`` lies."""

    def __init__(self, device: str = "cuda", *, asked: str | None = None) -> None:
        """Open the device.

        Args:
            device: ``cuda`` or ``cuda:N``.
            asked: how a message begins; by default that torch was asked for the device.

        Raises:
            ConfigError: the device is no CUDA device.
            EnvironmentUnfitError: there is no such GPU, or it cannot be used.
        """
        import torch

        parsed = _parsed(device)
        asked = asked or f"torch was asked for {device}"
        require_gpu(asked)
        try:
            with torch.cuda.device(parsed):
                self.index = torch.cuda.current_device()
                """The number of the device."""
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                properties = torch.cuda.get_device_properties(self.index)
        except (RuntimeError, AssertionError) as error:  # torch asserts that the number exists
            raise EnvironmentUnfitError(
                f"{asked} and cannot use it: {first_line(error)}"
            ) from error
        self.name: str = properties.name
        """The GPU's name, as its maker gives it."""
        self.sm = f"{properties.major}.{properties.minor}"
        """Its compute capability."""
        self.device = f"cuda:{self.index}"
        """The device, as torch names it."""
        self._switched = False

    @property
    def stream(self) -> int:
        """The ``cudaStream_t`` as a number."""
        return int(self._stream.cuda_stream)

    def on_stream(self) -> AbstractContextManager[object]:
        """Queue torch's work of a block on the stream; within such a block it changes nothing.

        To switch takes the host microseconds, so whoever times steps enters a block around them.
        """
        return nullcontext() if self._switched else self._switch()

    @contextmanager
    def _switch(self) -> Iterator[None]:
        import torch

        with torch.cuda.stream(self._stream):
            self._switched = True
            try:
                yield
            finally:
                self._switched = False

    def host_memory(self, shape: Shape, dtype: str = "float32") -> torch.Tensor:
        """Return page-locked host memory, which copies need to run beside the host."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True)

    def device_memory(self, shape: Shape, dtype: str = "float32") -> torch.Tensor:
        """Return memory of the device that belongs to the stream."""
        import torch

        with self.on_stream():
            return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy in either direction; it is done after ``synchronize``."""
        with self.on_stream():
            target.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self._stream.synchronize()

    def event(self) -> torch.cuda.Event:
        """Return an event, to be asked by ``elapsed_time`` for milliseconds once it has passed."""
        import torch

        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def record(self, event: torch.cuda.Event) -> None:
        """Queue an event; the stream is torch's own and knows its device, as no number does."""
        event.record(self._stream)

    def hold(self, milliseconds: float) -> None:
        """Keep the stream busy for at least so long, while the host queues what comes next."""
        import torch

        with self.on_stream():
            torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MS))  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Wait for the whole device: for what was loaded beside the stream, as weights are."""
        import torch

        torch.cuda.synchronize(self.index)

    def capture(self, launch: Launch) -> Launch:
        """Capture what ``launch`` queues as a CUDA graph and return the launch of that graph.

        It always reads and writes the memory that ``launch`` used; ``launch`` must have run before.
        """
        import torch

        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            outputs = launch()

        def replay() -> Tensors:
            with self.on_stream():
                graph.replay()
            return outputs

        return replay

    def close(self) -> None:
        """Wait for what is still queued; after a failed launch there is nothing to wait for."""
        with suppress(RuntimeError):
            self.synchronize()


def require_gpu(asked: str) -> None:
    """Refuse a machine without a GPU that torch can use.

    Args:
        asked: how the message begins.

    Raises:
        EnvironmentUnfitError: there is none; the sentence says why, as far as torch tells.
    """
    reason = _unusable()
    if reason is not None:
        raise EnvironmentUnfitError(
            f"{asked} and finds no usable GPU{reason}; use a runtime on the CPU"
        )


def _parsed(device: str) -> torch.device:
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device = {device!r} is none; it is cpu, cuda or cuda:N") from error
    if parsed.type != "cuda":
        raise ConfigError(f"device = {device!r} is no CUDA device; it is cuda or cuda:N")
    return parsed


def _unusable() -> str | None:
    """Return None if torch can use a GPU, else why not, as the rest of a sentence or nothing."""
    import torch

    if torch.version.cuda is None:
        return ": this torch is built without CUDA"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    return f": {first_line(Warning(said[0].message))}" if said else ""
