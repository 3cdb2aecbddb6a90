"""The steps of ``run`` on a GPU, one by one, for those who time them.

    stage        host     check the arrays and copy them into page-locked memory
    upload       device   H2D: page-locked memory to the device
    enqueue      device   compute: the network, or the replay of its CUDA graph
    download     device   D2H: outputs to page-locked memory
    fetch        host     wait for the stream and copy the outputs out

``run`` is these five in this order. The three device steps only queue work on one stream and
return; the time that ``enqueue`` takes on the host is the enqueue time. Events recorded before and
after a step time it on the device. Each may be repeated without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import ModelError, first_line
from export.runners.protocol import IMAGES, Feeds, Outputs, TensorSpec, check_feeds, failed

if TYPE_CHECKING:
    import torch

    from export.runners.cuda import Cuda, Launch, Tensors

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class _Batch:
    """The memory of one batch size; it is kept, because CUDA graphs hold its addresses."""

    host_inputs: Tensors
    inputs: Tensors
    host_outputs: Tensors = field(default_factory=dict)


class Stages:
    """A network on a GPU that takes batches of several sizes, one after the other.

    Page-locked and device memory is allocated once per batch size. A change of size prepares the
    network for it in ``stage``, and the first ``enqueue`` after a change may be slower than the
    next: warm up every size that is timed, and again after each change.
    """

    def __init__(
        self,
        name: str,
        cuda: Cuda,
        prepare: Callable[[Tensors], Launch],
        *,
        inputs: Sequence[TensorSpec] | None = (IMAGES,),
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        """Take a network.

        Args:
            name: of the runner, for messages.
            cuda: where it runs.
            prepare: given device memory for each input by its name, returns what queues the
                network on them; called whenever the batch size changes.
            inputs: what it reads; None where the network does not say.
            errors: what the runtime throws, besides RuntimeError, when it cannot compute.
        """
        self._name = name
        self._cuda = cuda
        self._prepare = prepare
        self._inputs = inputs
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *errors)
        self._batches: dict[Shapes, _Batch] = {}
        self._current: _Batch | None = None
        self._launch: Launch | None = None
        self._outputs: Tensors | None = None

    def on_stream(self) -> AbstractContextManager[object]:
        """Make the stream of all device steps torch's current one, for a block that times them."""
        return self._cuda.on_stream()

    def run(self, feeds: Feeds) -> Outputs:
        """Return every output; see ``Runner``."""
        try:
            self.stage(feeds)
            self.upload()
            self.enqueue()
            self.download()
            return self.fetch()
        except self._errors as error:
            raise failed(self._name, feeds, error) from error

    def stage(self, feeds: Feeds) -> None:
        """Copy arrays into page-locked memory and prepare the network for them.

        An ``upload`` of the batch before must be done: see ``synchronize``.

        Raises:
            DataError: the arrays have other names, shapes or types than the network reads.
            ModelError: the network cannot be prepared for them.
        """
        if self._inputs is not None:
            check_feeds(feeds, self._inputs)
        shapes = tuple(array.shape for array in feeds.values())
        batch = self._batches.get(shapes)
        if batch is None:
            batch = self._batches[shapes] = _Batch(
                {name: self._cuda.host_memory(*_form(array)) for name, array in feeds.items()},
                {name: self._cuda.device_memory(*_form(array)) for name, array in feeds.items()},
            )
        if batch is not self._current:
            self._current, self._launch, self._outputs = None, None, None
            self._launch = self._prepare(batch.inputs)
            self._current = batch
        for name, array in feeds.items():
            np.copyto(batch.host_inputs[name].numpy(), array)

    def upload(self) -> None:
        """Queue the copies of the staged arrays to the device."""
        batch = self._staged()
        for name, memory in batch.inputs.items():
            self._cuda.copy(memory, batch.host_inputs[name])

    def enqueue(self) -> None:
        """Queue the network on the arrays that were uploaded last."""
        self._staged()
        assert self._launch is not None
        self._outputs = self._launch()

    def download(self) -> None:
        """Queue the copies of the outputs of the last ``enqueue`` to page-locked memory."""
        batch = self._staged()
        if self._outputs is None:
            raise RuntimeError(f"{self._name} was asked for outputs before it was enqueued")
        for name, memory in self._outputs.items():
            if name not in batch.host_outputs:
                dtype = str(memory.dtype).removeprefix("torch.")
                batch.host_outputs[name] = self._cuda.host_memory(tuple(memory.shape), dtype)
            self._cuda.copy(batch.host_outputs[name], memory)

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""
        self._cuda.synchronize()

    def event(self) -> torch.cuda.Event:
        """Return an event that ``record`` takes, again and again; see ``Cuda.event``."""
        return self._cuda.event()

    def record(self, event: torch.cuda.Event) -> None:
        """Queue an event between two steps."""
        self._cuda.record(event)

    def mark(self) -> torch.cuda.Event:
        """Queue a new event and return it."""
        event = self.event()
        self.record(event)
        return event

    def hold(self, milliseconds: float) -> None:
        """Keep the stream busy while the host queues what comes next; see ``Cuda.hold``."""
        self._cuda.hold(milliseconds)

    def fetch(self) -> Outputs:
        """Wait, and return the outputs that were downloaded last."""
        batch = self._staged()
        if not batch.host_outputs:
            raise RuntimeError(f"{self._name} was asked for outputs before they were downloaded")
        self._cuda.synchronize()
        return {name: memory.numpy().copy() for name, memory in batch.host_outputs.items()}

    def close(self) -> None:
        """Wait for what is queued and let go of all memory."""
        self._cuda.close()
        self._batches.clear()
        self._current, self._launch, self._outputs = None, None, None

    def _staged(self) -> _Batch:
        if self._current is None:
            raise RuntimeError(f"{self._name} was asked to run before anything was staged")
        return self._current


def captured(cuda: Cuda, launch: Launch, *, warmups: int = 1) -> Launch:
    """Return the launch of a CUDA graph of what ``launch`` queues, after running it to warm up.

    Raises:
        ModelError: the network does what no graph can hold, such as waiting for the GPU.
    """
    try:
        for _ in range(warmups):
            launch()
        return cuda.capture(launch)
    except RuntimeError as error:
        raise ModelError(
            f"the network cannot be captured as a CUDA graph: {first_line(error)}; "
            "run it without one"
        ) from error


def _form(array: np.ndarray) -> tuple[tuple[int, ...], str]:
    return array.shape, array.dtype.name
