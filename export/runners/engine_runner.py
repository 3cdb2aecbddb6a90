"""A TensorRT engine as a runner, through the API that all of TensorRT 8.5 to 11 have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compress.errors import CheckpointError, DataError, EnvironmentUnfitError, ModelError
from export.runners.cuda import Cuda
from export.runners.protocol import Feeds, Outputs, Runner, TensorSpec, entered, written
from export.runners.stages import Stages, captured

if TYPE_CHECKING:
    import torch

    from export.engines.api import Provider, TensorRT
    from export.runners.cuda import Launch, Tensors

_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's types that numpy has."""


class EngineRunner(Runner):
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
        self._path = path
        self._device = device
        self._cuda_graph = cuda_graph
        self._provider = provider
        self._engine: _Engine | None = None
        self._bound: dict[int, tuple[Tensors, Launch]] = {}

    def __enter__(self) -> EngineRunner:
        """Read the sidecar, refuse an engine of another machine, and load it.

        Raises:
            CheckpointError: the engine or its sidecar is missing or damaged, or its tensors are of
                a type that numpy lacks.
            EnvironmentUnfitError: TensorRT or the GPU is not there or not the one it was built for,
                or TensorRT cannot load it.
        """
        self._engine, cuda = _load(self._path, self._device, self._provider)
        self.name = self._engine.name
        self.inputs = self._engine.reads
        self.most = max(most for _, _, most in self._engine.ranges)
        self.stages = Stages(
            self.name, cuda, lambda tensors: self._prepare(cuda, tensors), inputs=self.inputs
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self.stages is not None:
            self.stages.close()
        self._bound.clear()  # graphs and contexts go before their engine
        self.stages = self.inputs = self.most = self._engine = None

    def run(self, feeds: Feeds) -> Outputs:
        """Return every output; see ``Runner``.

        Raises:
            DataError: also when no profile of the engine holds this batch size.
        """
        found: Outputs = entered(self.stages, self.name).run(feeds)
        return found

    def _prepare(self, cuda: Cuda, tensors: Tensors) -> Launch:
        """Bind the context of the profile that fits to ``tensors``, unless it is bound already."""
        engine: _Engine = entered(self._engine, self.name)
        profile = engine.profile_for(tensors)
        memory, launch = self._bound.get(profile, (None, None))
        if launch is None or memory is not tensors:
            self._bound.pop(profile, None)  # its graph is worthless once the shapes change
            with cuda.on_stream():
                launch = engine.bind(profile, cuda, tensors)
            if self._cuda_graph:
                launch()  # kernels of a new shape are chosen, and in TensorRT-RTX compiled, here
                engine.require_capturable(profile, cuda)
                launch = captured(cuda, launch, warmups=0)
            self._bound[profile] = (tensors, launch)
        return launch


@dataclass
class _Engine:
    """An engine that TensorRT has loaded."""

    name: str
    tensorrt: TensorRT
    runtime: Any
    """Held because it has to outlive the engine."""
    engine: Any
    reads: tuple[TensorSpec, ...]
    writes: tuple[TensorSpec, ...]
    ranges: tuple[tuple[int, int, int], ...]
    """Least, usual and largest batch size of each profile."""
    contexts: dict[int, Any]
    scratch: dict[int, torch.Tensor]
    """Memory of those contexts that take theirs from us."""

    def profile_for(self, tensors: Tensors) -> int:
        """Return the profile made for a batch size, else the narrowest that holds it."""
        size = len(tensors[self.reads[0].name])
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

    def bind(self, profile: int, cuda: Cuda, tensors: Tensors) -> Launch:
        """Point a profile's context at memory and return what queues it on the stream."""
        self.tensorrt.messages.clear()
        context, stream = self._context(profile, cuda), cuda.stream
        shapes = {name: tuple(memory.shape) for name, memory in tensors.items()}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._refusal(f"{name} of shape {shape}")
        outputs = {
            spec.name: cuda.device_memory(self._size_of(context, spec), spec.dtype)
            for spec in self.writes
        }
        for name, memory in {**tensors, **outputs}.items():
            if not context.set_tensor_address(name, memory.data_ptr()):
                raise self._refusal(f"the memory of its tensor {name}")

        def launch() -> Tensors:
            with cuda.on_stream():  # for its device: TensorRT runs on the current one
                done = context.execute_async_v3(stream)
            if not done:
                raise self._refusal(f"to run on {', '.join(f'{n} {s}' for n, s in shapes.items())}")
            return outputs

        return launch

    def require_capturable(self, profile: int, cuda: Cuda) -> None:
        """Refuse a network that cannot be captured as a CUDA graph, where a release can tell.

        Raises:
            ModelError: it cannot.
        """
        ask = getattr(self.contexts[profile], "is_stream_capturable", None)
        self.tensorrt.messages.clear()
        if ask is not None and not ask(cuda.stream):
            raise ModelError(
                f"{self.name} says that the network cannot be captured as a CUDA graph: "
                f"{self.tensorrt.messages.reason()}; build the engine again with this version of "
                "the tool, or run it without a graph"
            )

    def _size_of(self, context: Any, spec: TensorSpec) -> tuple[int, ...]:
        shape = tuple(context.get_tensor_shape(spec.name))
        if min(shape, default=0) < 0:
            raise ModelError(
                f"{self.name} does not know the size of {spec.name} {written(shape)} before it "
                "runs, and its memory is set aside before"
            )
        return shape

    def _context(self, profile: int, cuda: Cuda) -> Any:
        """Return the context of a profile; TensorRT 8 allows no two contexts for one profile."""
        if profile not in self.contexts:
            context = self.tensorrt.create_context(self.engine)
            if context is None:
                raise EnvironmentUnfitError(
                    f"{self.name} cannot make an execution context: "
                    f"{self.tensorrt.messages.reason()}; is the GPU's memory used up?"
                )
            if not context.set_optimization_profile_async(profile, cuda.stream):
                raise self._refusal(f"its own optimization profile {profile}")
            if self.tensorrt.compiles_when_run:
                size = max(1, self.engine.device_memory_size_v2)
                self.scratch[profile] = cuda.device_memory((size,), "uint8")
                context.set_device_memory(self.scratch[profile].data_ptr(), size)
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
    found = _Engine(
        name=f"{tensorrt.title} ({cuda.name})",
        tensorrt=tensorrt,
        runtime=runtime,
        engine=engine,
        reads=reads,
        writes=writes,
        ranges=_batch_ranges(engine, reads[0].name),
        contexts={},
        scratch={},
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


def _ends(
    module: Any, engine: Any, path: Path
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and the outputs."""
    reads: list[TensorSpec] = []
    writes: list[TensorSpec] = []
    for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name).name
        if kind not in _NUMPY:
            raise CheckpointError(
                f"{path} has {kind} at its tensor {name}, which no array holds: export the network "
                "and build it again"
            )
        shape = tuple(size if size >= 0 else None for size in engine.get_tensor_shape(name))
        is_input = engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
        (reads if is_input else writes).append(TensorSpec(name, _NUMPY[kind], shape))
    if not reads or not writes:
        raise CheckpointError(f"{path} has no input or no output: build it again")
    return tuple(reads), tuple(writes)


def _batch_ranges(engine: Any, reads: str) -> tuple[tuple[int, int, int], ...]:
    """Return the least, usual and largest batch size of every optimization profile."""
    profiles = range(engine.num_optimization_profiles)
    shapes = [engine.get_tensor_profile_shape(reads, profile) for profile in profiles]
    return tuple((least[0], usual[0], most[0]) for least, usual, most in shapes)


def _listed(ranges: Sequence[tuple[int, int, int]]) -> str:
    """Return the batch sizes of profiles in words."""
    words = sorted({(least, most) for least, _, most in ranges})
    return " or ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in words)
