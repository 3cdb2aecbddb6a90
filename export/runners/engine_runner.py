"""A TensorRT engine as a runner, through the API that all of TensorRT 8.5 to 11 have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from compress.errors import CheckpointError, DataError, EnvironmentUnfitError, ModelError
from export.runners.cuda import Cuda
from export.runners.protocol import entered
from export.runners.stages import Stages, captured

if TYPE_CHECKING:
    import torch

    from export.engines.api import Provider, TensorRT
    from export.runners.cuda import Launch


class EngineRunner:
    """An engine on the GPU for which it was built.

    Every batch size runs in the optimization profile that fits it best, and every profile has its
    own execution context. Sizes that share a profile share its context: going from one to another
    sets its shapes anew, and captures its CUDA graph anew. An engine with one profile per size
    never pays for that.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cuda",
        cuda_graph: bool = False,
        provider: Provider | None = None,
    ) -> None:
        """Take an engine.

        Args:
            path: the engine; its sidecar lies beside it.
            device: ``cuda`` or ``cuda:N``.
            cuda_graph: capture the network as a CUDA graph.
            provider: the library that runs it; None takes the one that built it.
        """
        self.name = f"TensorRT ({path.name})"
        self.stages: Stages | None = None
        """Within the ``with`` block: its steps one by one."""
        self._path = path
        self._device = device
        self._cuda_graph = cuda_graph
        self._provider = provider
        self._engine: _Engine | None = None
        self._bound: dict[int, tuple[torch.Tensor, Launch]] = {}

    def __enter__(self) -> EngineRunner:
        """Read the sidecar, refuse an engine of another machine, and load it.

        Raises:
            CheckpointError: the engine or its sidecar is missing or damaged, or is no classifier.
            EnvironmentUnfitError: TensorRT or the GPU is not there or not the one it was built for,
                or TensorRT cannot load it.
        """
        self._engine, cuda = _load(self._path, self._device, self._provider)
        self.name = self._engine.name
        self.stages = Stages(
            self.name, cuda, lambda images: self._prepare(cuda, images), shape=self._engine.shape
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.stages is not None:
            self.stages.close()
        self._bound.clear()  # graphs and contexts go before their engine
        self.stages = self._engine = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``.

        Raises:
            DataError: also when no profile of the engine holds this batch size.
        """
        return entered(self.stages, self.name).infer(images)

    def _prepare(self, cuda: Cuda, images: torch.Tensor) -> Launch:
        """Bind the context of the profile that fits to ``images``, unless it is bound already."""
        engine: _Engine = entered(self._engine, self.name)
        profile = engine.profile_for(len(images))
        memory, launch = self._bound.get(profile, (None, None))
        if launch is None or memory is not images:
            self._bound.pop(profile, None)  # its graph is worthless once the shapes change
            with cuda.on_stream():
                launch = engine.bind(profile, cuda, images)
            if self._cuda_graph:
                launch = captured(cuda, launch)
            self._bound[profile] = (images, launch)
        return launch


@dataclass
class _Engine:
    """An engine that TensorRT has loaded, with one input and one output of float32."""

    name: str
    tensorrt: TensorRT
    runtime: Any
    """Held because it has to outlive the engine."""
    engine: Any
    reads: str
    writes: str
    shape: tuple[int | None, ...]
    """Of the images, None where any size will do."""
    ranges: tuple[tuple[int, int, int], ...]
    """Least, usual and largest batch size of each profile."""
    contexts: dict[int, Any]

    def profile_for(self, size: int) -> int:
        """Return the profile made for a batch size, else the narrowest that holds it."""
        fit = [i for i, (least, _, most) in enumerate(self.ranges) if least <= size <= most]
        if not fit:
            raise DataError(
                f"this engine has no optimization profile for {size} images: it takes "
                f"{_listed(self.ranges)}; build it with this size in export.batch"
            )

        def distance(index: int) -> tuple[int, int]:
            least, usual, most = self.ranges[index]
            return abs(usual - size), most - least

        return min(fit, key=distance)

    def bind(self, profile: int, cuda: Cuda, images: torch.Tensor) -> Launch:
        """Point a profile's context at memory and return what queues it on the stream."""
        self.tensorrt.messages.clear()
        context, stream = self._context(profile, cuda), cuda.stream
        if not context.set_input_shape(self.reads, tuple(images.shape)):
            raise self._refusal(f"images of shape {tuple(images.shape)}")
        logits = cuda.device_memory(tuple(context.get_tensor_shape(self.writes)))
        for name, memory in ((self.reads, images), (self.writes, logits)):
            if not context.set_tensor_address(name, memory.data_ptr()):
                raise self._refusal(f"the memory of its tensor {name}")

        def launch() -> torch.Tensor:
            with cuda.on_stream():  # for its device: TensorRT runs on the current one
                done = context.execute_async_v3(stream)
            if not done:
                raise self._refusal(f"to run on images {tuple(images.shape)}")
            return logits

        return launch

    def _context(self, profile: int, cuda: Cuda) -> Any:
        """Return the context of a profile; TensorRT 8 allows no two contexts for one profile."""
        if profile not in self.contexts:
            context = self.engine.create_execution_context()
            if context is None:
                raise EnvironmentUnfitError(
                    f"{self.name} cannot make an execution context: "
                    f"{self.tensorrt.messages.reason()}; is the GPU's memory used up?"
                )
            if not context.set_optimization_profile_async(profile, cuda.stream):
                raise self._refusal(f"its own optimization profile {profile}")
            self.contexts[profile] = context
        return self.contexts[profile]

    def _refusal(self, what: str) -> ModelError:
        return ModelError(f"{self.name} refuses {what}: {self.tensorrt.messages.reason()}")


def _load(path: Path, device: str, provider: Provider | None) -> tuple[_Engine, Cuda]:
    """Load an engine on a device, once it is known to belong there."""
    from export.engines.api import load_tensorrt
    from export.engines.sidecar import read_engine_sidecar, refuse_foreign_engine
    from export.nvml import Gpu

    document = read_engine_sidecar(path)
    tensorrt = load_tensorrt(provider or _builder(document, path))
    cuda = Cuda(device, asked=f"{tensorrt.title} was asked to run {path.name} on {device}")
    refuse_foreign_engine(
        document,
        provider=tensorrt.provider,
        version=tensorrt.version,
        gpu=Gpu(cuda.name, cuda.sm),
    )
    with cuda.on_stream():
        runtime = tensorrt.create_runtime()
        tensorrt.messages.clear()
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        # An engine of TensorRT-RTX is for many GPUs, and would be the same if built again.
        built_here = tensorrt.provider == "tensorrt"
        mend = "build it again on this machine" if built_here else "use it on another GPU"
        raise EnvironmentUnfitError(
            f"{tensorrt.title} cannot load {path}: {tensorrt.messages.reason()}; {mend}"
        )
    reads, writes = _ends(tensorrt.module, engine, path)
    shape = tuple(size if size > 0 else None for size in engine.get_tensor_shape(reads))
    found = _Engine(
        name=f"{tensorrt.title} ({cuda.name})",
        tensorrt=tensorrt,
        runtime=runtime,
        engine=engine,
        reads=reads,
        writes=writes,
        shape=shape,
        ranges=_batch_ranges(engine, reads),
        contexts={},
    )
    return found, cuda


def _builder(document: dict[str, Any], path: Path) -> Provider:
    """Return the library that built an engine; a file shall not make us import what it likes."""
    from export.engines.api import Provider

    known: tuple[Provider, ...] = get_args(Provider)
    for provider in known:
        if document["provider"] == provider:
            return provider
    raise CheckpointError(
        f"{path} was built by {document['provider']!r}, which is none of {', '.join(known)}; "
        "build it again"
    )


def _ends(module: Any, engine: Any, path: Path) -> tuple[str, str]:
    """Return the names of the one input and the one output, both float32."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    reads = [name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT]
    writes = [name for name in names if name not in reads]
    if len(reads) != 1 or len(writes) != 1:
        raise CheckpointError(
            f"{path} has inputs {', '.join(reads)} and outputs {', '.join(writes)}; a classifier "
            "has one of each: export the network and build it again"
        )
    for name in names:
        kind = engine.get_tensor_dtype(name)
        if kind != module.DataType.FLOAT:
            raise CheckpointError(
                f"{path} has {kind.name} at its tensor {name}, and images and logits are float32: "
                "export the network and build it again"
            )
    return reads[0], writes[0]


def _batch_ranges(engine: Any, reads: str) -> tuple[tuple[int, int, int], ...]:
    """Return the least, usual and largest batch size of every optimization profile."""
    profiles = range(engine.num_optimization_profiles)
    shapes = [engine.get_tensor_profile_shape(reads, profile) for profile in profiles]
    return tuple((least[0], usual[0], most[0]) for least, usual, most in shapes)


def _listed(ranges: Sequence[tuple[int, int, int]]) -> str:
    """Return the batch sizes of profiles in words."""
    words = sorted({(least, most) for least, _, most in ranges})
    return " or ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in words)
