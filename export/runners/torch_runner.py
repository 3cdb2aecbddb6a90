"""A torch module as a runner, on the CPU or on a GPU."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.errors import ConfigError, EnvironmentUnfitError, ModelError, first_line
from export.onnx.check import OUTPUT
from export.runners.cuda import Cuda
from export.runners.protocol import Feeds, Outputs, Runner, TensorSpec, check_feeds, entered, failed
from export.runners.stages import Stages, captured

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.runners.cuda import Launch, Tensors

    Key = tuple[torch.Size, ...]

_WARMUPS = 3  # before a capture: torch compiles and its libraries choose kernels in the first runs


class TorchRunner(Runner):
    """A torch module in evaluation mode; it runs a copy and leaves the original as it is.

    Arrays are handed to it in the order of its inputs. Outputs are named by the keys, fields or
    positions of what it returns, a single tensor ``logits``.

    In fp32 on a GPU since SM 8.0 torch computes convolutions in TF32, unless
    ``torch.backends.cudnn.allow_tf32`` is off; so do the other runtimes by default. On a GPU cuDNN
    tries its algorithms in the first calls of each shape (``torch.backends.cudnn.benchmark``) while
    the runner is entered: dense and pruned are both given the fastest.
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
        inputs: Sequence[TensorSpec] | None = None,
    ) -> None:
        """Take a network.

        Args:
            model: the network.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            channels_last: lay activations out as (N, H, W, C); images are rearranged on the device.
            compiled: through ``torch.compile``, anew for every batch size.
            precision: of weights and activations; what is read and returned stays float32.
            cuda_graph: capture the network as a CUDA graph, one per batch size.
            threads: of the process, while the runner is entered on the CPU; None leaves them.
            inputs: what the network reads, in the order of its arguments; None takes what comes.

        Raises:
            ConfigError: what only a GPU does is asked of the CPU, or no such kind of device.
        """
        how = [
            word for word, on in (("channels_last", channels_last), ("compiled", compiled)) if on
        ]
        self.name = f"torch ({', '.join([device, *how])})"
        self.inputs = None if inputs is None else tuple(inputs)
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
        self._searched_before: bool | None = None
        self._model: Any = None
        self._launches: dict[Key, Launch] = {}
        self._compiled_for: set[Key] = set()

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
            self.stages = Stages(
                self.name, cuda, lambda tensors: self._prepare(cuda, tensors), inputs=self.inputs
            )
            # As who serves torch has it; dense and control share what cuDNN finds for one shape.
            self._searched_before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True
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
        if self._searched_before is not None:
            torch.backends.cudnn.benchmark = self._searched_before
        self.stages = self._model = self._threads_before = self._searched_before = None
        self._launches.clear()
        self._compiled_for.clear()

    def run(self, feeds: Feeds) -> Outputs:
        """Return every output; see ``Runner``."""
        import torch

        entered(self._model, self.name)
        if self.stages is not None:
            return self.stages.run(feeds)
        if self.inputs is not None:
            check_feeds(feeds, self.inputs)
        try:
            with torch.inference_mode():
                tensors = {name: _tensor(array) for name, array in feeds.items()}
                return {name: found.numpy() for name, found in self._compute(tensors).items()}
        except RuntimeError as error:
            raise failed(self.name, feeds, error) from error

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

    def _compute(self, tensors: Tensors) -> Tensors:
        """Return every output, float32 where it is a float; all lie on the network's device."""
        import torch

        named = [spec.name for spec in self.inputs or ()] or list(tensors)
        outputs = dict(_named(self._model(*(self._cast(tensors[name]) for name in named)), ""))
        if not outputs:
            raise ModelError("the network returns no tensor")
        half = (torch.float16, torch.bfloat16)
        return {
            name: found.float() if found.dtype in half else found for name, found in outputs.items()
        }

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an input in the precision and the layout of the network."""
        import torch

        images = self._channels_last and tensor.dim() == 4
        layout = torch.channels_last if images else torch.preserve_format
        kind = torch.float16 if self._half and tensor.is_floating_point() else tensor.dtype
        return tensor.to(kind, memory_format=layout)

    def _prepare(self, cuda: Cuda, tensors: Tensors) -> Launch:
        """Return what queues the network on ``tensors``; its graph is captured once."""
        import torch

        def launch() -> Tensors:
            with cuda.on_stream(), torch.inference_mode():
                return self._compute(tensors)

        key = tuple(tensor.shape for tensor in tensors.values())
        if self._compiled and key not in self._compiled_for:
            with warnings.catch_warnings():
                # Torch would rather have matrix products in TF32; how fp32 is computed is our word.
                warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
                launch()
            self._compiled_for.add(key)
        if not self._cuda_graph:
            return launch
        if key not in self._launches:
            self._launches[key] = captured(cuda, launch, warmups=_WARMUPS)
        return self._launches[key]


def _tensor(array: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _named(output: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of what a network returns, by key, field or position."""
    import torch

    if isinstance(output, torch.Tensor):
        yield path or OUTPUT, output
        return
    if isinstance(output, Mapping):
        parts = [(str(key), part) for key, part in output.items()]
    elif dataclasses.is_dataclass(output):
        parts = [(one.name, getattr(output, one.name)) for one in dataclasses.fields(output)]
    elif isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        parts = [(str(name), part) for name, part in zip(names, output, strict=True)]
    else:
        parts = []
    for name, part in parts:
        yield from _named(part, f"{path}.{name}" if path else name)
