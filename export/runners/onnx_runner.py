"""An ONNX file in ONNX Runtime as a runner, on the CPU or on a GPU."""

from __future__ import annotations

import io
import re
import tempfile
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CheckpointError, ConfigError, EnvironmentUnfitError, first_line
from export.onnx.check import weight_files
from export.runners.cuda import Cuda
from export.runners.protocol import (
    Feeds,
    Outputs,
    Runner,
    TensorSpec,
    check_feeds,
    entered,
    failed,
)
from export.runners.stages import Stages

if TYPE_CHECKING:
    import torch

    from export.runners.cuda import Launch, Tensors

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_SOURCE = re.compile(r"^\S+\.(cc|cpp|h):\d+ .*?\) ")  # where in its source it gave up
_ERRORS_ONLY = 3  # ONNX Runtime's severity scale: 2 is warning, 3 is error
_NUMPY = {"float": "float32", "double": "float64"}  # what ONNX Runtime calls otherwise
_TENSOR = re.compile(r"tensor\((\w+)\)")
_LABELS = {CPU: "CPU", CUDA: "CUDA", TENSORRT: "TensorRT provider"}


class OnnxRunner(Runner):
    """An ONNX file in ONNX Runtime, on exactly the execution provider that was asked for.

    A session that starts without the provider is refused. What stays invisible: nodes that the
    provider does not support. TensorRT's go to CUDA and CUDA's to the CPU, node by node, while the
    session still names the provider first; only a CUDA graph refuses a network that is not whole.
    With a CUDA graph ONNX Runtime may itself wait for the GPU in ``enqueue``.

    The TensorRT provider builds one engine for all batch sizes from the least to the largest that
    it has met, tuned for the largest, and builds it anew for one outside of these, which takes
    minutes for a large network. Engines and timings are kept in a temporary folder, or that of
    ``keep_builds``.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: str = CPU,
        threads: int | None = None,
        device: str = "cuda",
        cuda_graph: bool = False,
        profile_to: Path | None = None,
        optimised: bool = True,
    ) -> None:
        """Take a file.

        Args:
            path: the ONNX file.
            provider: ONNX Runtime's name of an execution provider.
            threads: of the CPU; None takes all physical cores.
            device: of the providers that use a GPU, ``cuda`` or ``cuda:N``.
            cuda_graph: capture the network as a CUDA graph, one per batch size.
            profile_to: folder for a profile of every call, which slows them; see ``end_profile``.
            optimised: let ONNX Runtime rewrite the graph, as it does by default; False runs the
                file as it is written. TensorRT is given it as it is written in any case.

        Raises:
            ConfigError: the provider captures no CUDA graphs of several batch sizes.
        """
        if cuda_graph and provider != CUDA:
            raise ConfigError(
                f"cuda_graph needs {CUDA} and ONNX Runtime was asked for {provider}: the CPU has "
                "none, and its TensorRT provider captures one batch size only"
            )
        label = _LABELS.get(provider, provider.removesuffix("ExecutionProvider"))
        self.name = f"ONNX Runtime ({label})"
        self._path = path
        self._provider = provider
        self._threads = threads
        self._device = device
        self._cuda_graph = cuda_graph
        self.builds_for_sizes = provider == TENSORRT
        self._builds: tuple[Path, Path] | None = None
        self._profile_to = profile_to
        # TensorRT refuses what ONNX Runtime puts in, such as biases of 32 bits dequantised.
        self._optimised = optimised and provider != TENSORRT
        self._session: Any = None
        self._launches: dict[tuple[torch.Size, ...], Launch] = {}
        self._leave = ExitStack()

    def __enter__(self) -> OnnxRunner:
        """Load the file and optimise its graph, for ``threads`` threads (None: all cores).

        Raises:
            CheckpointError: the file is missing, damaged or not ONNX.
            EnvironmentUnfitError: ONNX Runtime, the execution provider or the GPU is not there.
        """
        runtime = import_onnxruntime()
        require_provider(self._provider)
        if not self._path.is_file():
            raise CheckpointError(f"there is no ONNX file {self._path}")
        weight_files(self._path)
        with ExitStack() as stack:
            cuda = self._open_gpu(runtime) if self._provider in (CUDA, TENSORRT) else None
            session = self._create_session(runtime, self._providers(cuda, stack))
            used = session.get_providers()[0]
            if used != self._provider:
                raise EnvironmentUnfitError(
                    f"ONNX Runtime was asked for {self._provider} and fell back to {used}; "
                    "its libraries or its device cannot be used on this machine"
                )
            self.inputs = tuple(self._spec(end) for end in session.get_inputs())
            if cuda is not None:
                self.stages = self._open_stages(runtime, session, cuda)
            self._session = session
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self.stages is not None:
            self.stages.close()
        self.stages = self.inputs = self._session = None
        self._launches.clear()
        self._leave.close()

    def keep_builds(self, folder: Path, name: str) -> None:
        """See ``Runner``; the provider tells engines apart by the names in a file alone."""
        self._builds = folder, folder / name

    def run(self, feeds: Feeds) -> Outputs:
        """Return every output; see ``Runner``."""
        session = entered(self._session, self.name)
        if self.stages is not None:
            return self.stages.run(feeds)
        check_feeds(feeds, self.inputs or ())
        try:
            values = session.run(None, dict(feeds))
        except runtime_errors() as error:
            raise failed(self.name, feeds, error) from error
        names = (end.name for end in session.get_outputs())
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def end_profile(self) -> Path:
        """Finish the profile that ``profile_to`` asked for and return its JSON file."""
        return Path(entered(self._session, self.name).end_profiling())

    def _open_gpu(self, runtime: Any) -> Cuda:
        """Open the device and bring the libraries that pip installed within the loader's reach."""
        asked = f"ONNX Runtime was asked for {self._provider} on {self._device}"
        cuda = Cuda(self._device, asked=asked)
        if hasattr(runtime, "preload_dlls"):
            with redirect_stdout(io.StringIO()):  # it prints what it misses, needed or not
                runtime.preload_dlls()
        if self._provider == TENSORRT:
            with suppress(EnvironmentUnfitError):  # it may be installed where pip knows nothing
                _load_tensorrt()
        return cuda

    def _providers(self, cuda: Cuda | None, stack: ExitStack) -> list[Any]:
        """Return the providers with their options; what follows the first takes its leavings."""
        if cuda is None:
            return [self._provider]
        place = {"device_id": str(cuda.index), "user_compute_stream": str(cuda.stream)}
        if self._provider == CUDA:
            return [(CUDA, {**place, "enable_cuda_graph": "1" if self._cuda_graph else "0"})]
        if self._builds is None:
            timings = engines = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            timings, engines = self._builds
            engines.mkdir(parents=True, exist_ok=True)
        options = {
            "trt_engine_cache_enable": "True",  # its parser takes no 1
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(timings),
        }
        return [(TENSORRT, {**place, **options}), (CUDA, place)]

    def _create_session(self, runtime: Any, providers: list[Any]) -> Any:
        runtime.set_default_logger_severity(_ERRORS_ONLY)  # of the process; it has no getter
        options = runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if self._optimised else levels.ORT_DISABLE_ALL
        )
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self._threads or 0  # 0 is its word for all physical cores
        options.inter_op_num_threads = 1
        # An idle pool that spins takes the cores from whatever network is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self._profile_to / "profile")
        try:
            return runtime.InferenceSession(
                str(self._path), options, providers=providers, enable_fallback=0
            )
        except runtime_errors() as error:
            raise CheckpointError(
                f"ONNX Runtime cannot load {self._path}: {first_line(error)}"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise EnvironmentUnfitError(
                f"ONNX Runtime cannot start {self._provider}: {_SOURCE.sub('', first_line(error))}"
            ) from error

    def _spec(self, end: Any) -> TensorSpec:
        """Return what ONNX Runtime says of an input or output."""
        found = _TENSOR.fullmatch(end.type)
        if found is None or found[1] in ("string", "bfloat16"):
            raise CheckpointError(
                f"{self._path} has {end.type} at its {end.name}, which is no array of numbers"
            )
        return TensorSpec(end.name, _NUMPY.get(found[1], found[1]), tuple(end.shape))

    def _open_stages(self, runtime: Any, session: Any, cuda: Cuda) -> Stages:
        outputs = tuple(self._spec(end) for end in session.get_outputs())
        for spec in outputs:
            self._require_sizes(spec)

        def prepare(tensors: Tensors) -> Launch:
            key = tuple(tensor.shape for tensor in tensors.values())
            if key not in self._launches:
                number = len(self._launches)
                memory = {
                    spec.name: cuda.device_memory(self._sizes(spec, tensors), spec.dtype)
                    for spec in outputs
                }
                launch = _bound_launch(runtime, session, cuda, (tensors, memory), number)
                if self._cuda_graph:
                    launch()  # ONNX Runtime captures in its first run
                self._launches[key] = launch
            return self._launches[key]

        return Stages(self.name, cuda, prepare, inputs=self.inputs, errors=runtime_errors())

    def _require_sizes(self, spec: TensorSpec) -> None:
        """Refuse an output whose sizes, but for the batch, do not follow from those of inputs."""
        known = {size for reads in self.inputs or () for size in reads.shape or ()} - {None}
        shape = spec.shape or (None, None)
        if any(isinstance(size, str | None) and size not in known for size in shape[1:]):
            raise CheckpointError(
                f"{self._path} gives {spec.name} of shape {list(spec.shape or ())}, and on a GPU "
                "its sizes must be known; export it again"
            )

    def _sizes(self, spec: TensorSpec, tensors: Tensors) -> tuple[int, ...]:
        """Return the shape of an output for inputs of these shapes."""
        words: dict[Any, int] = {}
        for reads in self.inputs or ():
            words.update(zip(reads.shape or (), tensors[reads.name].shape, strict=False))
        batch = len(next(iter(tensors.values())))
        return tuple(
            size if isinstance(size, int) else words.get(size, batch) if size else batch
            for size in spec.shape or ()
        )


def _bound_launch(
    runtime: Any, session: Any, cuda: Cuda, ends: tuple[Tensors, Tensors], number: int
) -> Launch:
    """Bind a session to memory by name and return what queues it on the stream.

    ``ends`` are inputs and outputs in device memory; ``number`` tells its CUDA graph from those of
    other batch sizes.
    """
    binding = session.io_binding()
    for tensors, bind in zip(ends, (binding.bind_input, binding.bind_output), strict=True):
        for name, memory in tensors.items():
            kind = np.dtype(str(memory.dtype).removeprefix("torch."))
            place = (cuda.memory, cuda.index, kind)
            bind(name, *place, tuple(memory.shape), memory.data_ptr())
    options = runtime.RunOptions()
    # The stream is ours, so waiting for it is ours too.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(number))  # ignored where none is captured

    def launch() -> Tensors:
        session.run_with_iobinding(binding, options)
        return ends[1]

    return launch


def require_provider(provider: str) -> None:
    """Refuse an execution provider that this ONNX Runtime was built without.

    Raises:
        EnvironmentUnfitError: it was, or ONNX Runtime is not installed.
    """
    available = import_onnxruntime().get_available_providers()
    if provider not in available:
        raise EnvironmentUnfitError(
            f"this ONNX Runtime has no {provider}; it has {', '.join(available)}"
        )


def import_onnxruntime() -> Any:
    """Return ONNX Runtime's module.

    Raises:
        EnvironmentUnfitError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentUnfitError(
            "ONNX Runtime is not installed: pip install onnxruntime-gpu, "
            "or onnxruntime where there is no such wheel"
        ) from error
    return onnxruntime


def _load_tensorrt() -> None:
    """Load TensorRT's Python package, which loads the libraries that came with it."""
    from export.engines.api import load_tensorrt

    load_tensorrt("tensorrt")


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return ONNX Runtime's own exceptions, which have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (value for value in vars(state).values() if isinstance(value, type))
    return tuple(kind for kind in kinds if issubclass(kind, Exception))
