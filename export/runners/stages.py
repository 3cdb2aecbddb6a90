"""The steps of ``infer`` on a GPU, one by one, for those who time them.

    stage        host     check images and copy them into page-locked memory
    upload       device   H2D: page-locked memory to the device
    enqueue      device   compute: the network, or the replay of its CUDA graph
    download     device   D2H: logits to page-locked memory
    fetch        host     wait for the stream and copy the logits out

``infer`` is these five in this order. The three device steps only queue work on one stream and
return; the time that ``enqueue`` takes on the host is the enqueue time. CUDA events recorded on
``stream`` around a step time it on the device. Each may be repeated without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import ModelError
from export.onnx_check import first_line
from export.runners.protocol import check_images, failed

if TYPE_CHECKING:
    import torch

    from export.runners.cuda import Cuda, Launch


@dataclass
class _Batch:
    """The memory of one batch size; it is kept, because CUDA graphs hold its addresses."""

    host_images: torch.Tensor
    images: torch.Tensor
    host_logits: torch.Tensor | None = None


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
        prepare: Callable[[torch.Tensor], Launch],
        *,
        shape: Sequence[int | str | None] = (),
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        """Take a network.

        Args:
            name: of the runner, for messages.
            cuda: where it runs.
            prepare: given device memory for images (N, C, H, W), returns what queues the network
                on them; called whenever the batch size changes.
            shape: of the images that it reads; None or a word stands for any size.
            errors: what the runtime throws, besides RuntimeError, when it cannot compute.
        """
        self._name = name
        self._cuda = cuda
        self._prepare = prepare
        self._shape = shape
        self._errors: tuple[type[Exception], ...] = (RuntimeError, *errors)
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._current: _Batch | None = None
        self._launch: Launch | None = None
        self._logits: torch.Tensor | None = None

    @property
    def stream(self) -> int:
        """The CUDA stream of all device steps; ``torch.cuda.ExternalStream`` takes it."""
        return self._cuda.stream

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``."""
        try:
            self.stage(images)
            self.upload()
            self.enqueue()
            self.download()
            return self.fetch()
        except self._errors as error:
            raise failed(self._name, images, error) from error

    def stage(self, images: np.ndarray) -> None:
        """Copy images (N, C, H, W) into page-locked memory and prepare the network for them.

        An ``upload`` of the batch before must be done: see ``synchronize``.

        Raises:
            DataError: the images have another shape or type than the network reads.
            ModelError: the network cannot be prepared for them.
        """
        check_images(images, self._shape)
        batch = self._batches.get(images.shape)
        if batch is None:
            batch = self._batches[images.shape] = _Batch(
                self._cuda.host_memory(images.shape), self._cuda.device_memory(images.shape)
            )
        if batch is not self._current:
            self._current, self._launch, self._logits = None, None, None
            self._launch = self._prepare(batch.images)
            self._current = batch
        np.copyto(batch.host_images.numpy(), images)

    def upload(self) -> None:
        """Queue the copy of the staged images to the device."""
        batch = self._staged()
        self._cuda.copy(batch.images, batch.host_images)

    def enqueue(self) -> None:
        """Queue the network on the images that were uploaded last."""
        self._staged()
        assert self._launch is not None
        self._logits = self._launch()

    def download(self) -> None:
        """Queue the copy of the logits of the last ``enqueue`` to page-locked memory."""
        batch = self._staged()
        if self._logits is None:
            raise RuntimeError(f"{self._name} was asked for logits before it was enqueued")
        if batch.host_logits is None:
            batch.host_logits = self._cuda.host_memory(tuple(self._logits.shape))
        self._cuda.copy(batch.host_logits, self._logits)

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""
        self._cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        """Queue an event on the stream; see ``Cuda.mark``."""
        return self._cuda.mark()

    def hold(self, milliseconds: float) -> None:
        """Keep the stream busy while the host queues what comes next; see ``Cuda.hold``."""
        self._cuda.hold(milliseconds)

    def fetch(self) -> np.ndarray:
        """Wait, and return the logits that were downloaded last, (N, classes) float32."""
        batch = self._staged()
        if batch.host_logits is None:
            raise RuntimeError(f"{self._name} was asked for logits before they were downloaded")
        self._cuda.synchronize()
        return batch.host_logits.numpy().copy()

    def close(self) -> None:
        """Wait for what is queued and let go of all memory."""
        self._cuda.close()
        self._batches.clear()
        self._current, self._launch, self._logits = None, None, None

    def _staged(self) -> _Batch:
        if self._current is None:
            raise RuntimeError(f"{self._name} was asked to run before images were staged")
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
