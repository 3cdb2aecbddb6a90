"""A torch module as a runner, on the CPU or on a GPU."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.errors import ConfigError, EnvironmentUnfitError, ModelError
from export.onnx_check import first_line
from export.runners.cuda import Cuda
from export.runners.protocol import check_images, entered, failed
from export.runners.stages import Stages, captured

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.runners.cuda import Launch

_WARMUPS = 3  # before a capture: torch compiles and its libraries choose kernels in the first runs


class TorchRunner:
    """A torch module in evaluation mode; it runs a copy and leaves the original as it is.

    In fp32 on a GPU since SM 8.0 torch computes convolutions in TF32, unless
    ``torch.backends.cudnn.allow_tf32`` is off; so do the other runtimes by default.
    """

    def __init__(
        self,
        model: nn.Module,
        device: str = "cpu",
        *,
        channels_last: bool = False,
        compiled: bool = False,
        precision: Literal["fp32", "fp16"] = "fp32",
        cuda_graph: bool = False,
        threads: int | None = None,
    ) -> None:
        """Take a network.

        Args:
            model: the network.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            channels_last: lay activations out as (N, H, W, C); images are rearranged on the device.
            compiled: through ``torch.compile``, anew for every batch size.
            precision: of weights and activations; images and logits stay float32.
            cuda_graph: capture the network as a CUDA graph, one per batch size.
            threads: of the process, while the runner is entered on the CPU; None leaves them.

        Raises:
            ConfigError: what only a GPU does is asked of the CPU, or no such kind of device.
        """
        how = [
            word for word, on in (("channels_last", channels_last), ("compiled", compiled)) if on
        ]
        self.name = f"torch ({', '.join([device, *how])})"
        self.stages: Stages | None = None
        """On a GPU, within the ``with`` block: its steps one by one."""
        self._on_gpu = device != "cpu"
        if not self._on_gpu and (cuda_graph or precision == "fp16"):
            asked = "cuda_graph" if cuda_graph else "precision = 'fp16'"
            raise ConfigError(f"{asked} needs a GPU and torch was asked for device cpu")
        self._original = model
        self._device = device
        self._channels_last = channels_last
        self._compiled = compiled
        self._half = precision == "fp16"
        self._cuda_graph = cuda_graph
        self._threads = threads
        self._threads_before: int | None = None
        self._model: Any = None
        self._launches: dict[torch.Size, Launch] = {}
        self._compiled_for: set[torch.Size] = set()

    def __enter__(self) -> TorchRunner:
        """Copy the network to the device.

        Raises:
            ConfigError: the device is none that torch knows.
            EnvironmentUnfitError: torch finds no such device, or was not built for it.
        """
        import torch

        if self._on_gpu:
            cuda = Cuda(self._device)
            self._model = self._moved(cuda.device)
            cuda.settle()
            self.stages = Stages(self.name, cuda, lambda images: self._prepare(cuda, images))
        else:
            self._model = self._moved("cpu")
            if self._threads is not None:
                self._threads_before = torch.get_num_threads()
                torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        if self.stages is not None:
            self.stages.close()
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
        self.stages = self._model = self._threads_before = None
        self._launches.clear()
        self._compiled_for.clear()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``."""
        import torch

        entered(self._model, self.name)
        if self.stages is not None:
            return self.stages.infer(images)
        check_images(images)
        owned = np.require(images, requirements=["C", "W"])
        try:
            with torch.inference_mode():
                return self._compute(torch.from_numpy(owned)).numpy()
        except RuntimeError as error:
            raise failed(self.name, images, error) from error

    def _moved(self, device: str) -> Any:
        """Return a copy of the network on a device, as it will run there."""
        import torch

        layout = torch.channels_last if self._channels_last else torch.preserve_format
        model = copy.deepcopy(self._original).eval()
        try:
            model = model.half() if self._half else model
            model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
            torch.ones(1, device=device).add_(1)  # a GPU that torch was not built for says so here
        except RuntimeError as error:
            raise EnvironmentUnfitError(
                f"torch was asked for {self._device} and cannot compute there: {first_line(error)}"
            ) from error
        return torch.compile(model, dynamic=False) if self._compiled else model

    def _compute(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits of images; both lie on the network's device."""
        import torch

        layout = torch.channels_last if self._channels_last else torch.preserve_format
        kind = torch.float16 if self._half else torch.float32
        logits = self._model(images.to(kind, memory_format=layout))
        if not isinstance(logits, torch.Tensor):
            raise ModelError(f"the network returns a {type(logits).__name__}, not one tensor")
        return logits.float()

    def _prepare(self, cuda: Cuda, images: torch.Tensor) -> Launch:
        """Return what queues the network on ``images``; its graph is captured once."""
        import torch

        def launch() -> torch.Tensor:
            with cuda.on_stream(), torch.inference_mode():
                return self._compute(images)

        if self._compiled and images.shape not in self._compiled_for:
            with warnings.catch_warnings():
                # Torch would rather have matrix products in TF32; how fp32 is computed is our word.
                warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
                launch()
            self._compiled_for.add(images.shape)
        if not self._cuda_graph:
            return launch
        if images.shape not in self._launches:
            self._launches[images.shape] = captured(cuda, launch, warmups=_WARMUPS)
        return self._launches[images.shape]
