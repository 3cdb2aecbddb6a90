"""An ONNX file in ONNX Runtime as a runner, on the CPU or on a GPU."""

from __future__ import annotations

import io
import re
import tempfile
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CheckpointError, ConfigError, EnvironmentUnfitError
from export.onnx_check import first_line, require_one_file
from export.runners.cuda import Cuda
from export.runners.protocol import check_images, entered, failed
from export.runners.stages import Stages

if TYPE_CHECKING:
    import torch

    from export.runners.cuda import Launch

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

_SOURCE = re.compile(r"^\S+\.(cc|cpp|h):\d+ .*?\) ")  # where in its source it gave up
_ERRORS_ONLY = 3  # ONNX Runtime's severity scale: 2 is warning, 3 is error
_LABELS = {CPU: "CPU", CUDA: "CUDA", TENSORRT: "TensorRT provider"}


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on exactly the execution provider that was asked for.

    A session that starts without the provider is refused. What stays invisible: nodes that the
    provider does not support. TensorRT's go to CUDA and CUDA's to the CPU, node by node, while the
    session still names the provider first; only a CUDA graph refuses a network that is not whole.
    With a CUDA graph ONNX Runtime may itself wait for the GPU in ``enqueue``.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: str = CPU,
        threads: int | None = None,
        device: str = "cuda",
        cuda_graph: bool = False,
        cache: Path | None = None,
        profile_to: Path | None = None,
    ) -> None:
        """Take a file.

        Args:
            path: the ONNX file.
            provider: ONNX Runtime's name of an execution provider.
            threads: of the CPU; None takes all physical cores.
            device: of the providers that use a GPU, ``cuda`` or ``cuda:N``.
            cuda_graph: capture the network as a CUDA graph, one per batch size.
            cache: folder in which the TensorRT provider keeps engines and timings; by default a
                temporary one. It builds in the first run on a batch size outside of those before,
                which takes minutes for a large network.
            profile_to: folder for a profile of every call, which slows them; see ``end_profile``.

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
        self.stages: Stages | None = None
        """On a GPU, within the ``with`` block: its steps one by one."""
        self._path = path
        self._provider = provider
        self._threads = threads
        self._device = device
        self._cuda_graph = cuda_graph
        self._cache = cache
        self._profile_to = profile_to
        self._session: Any = None
        self._expected: list[int | str | None] = []
        self._launches: dict[torch.Size, Launch] = {}
        self._leave = ExitStack()

    def __enter__(self) -> OnnxRunner:
        """Load the file and optimise its graph fully, for ``threads`` threads (None: all cores).

        Raises:
            CheckpointError: the file is missing, damaged or not ONNX.
            EnvironmentUnfitError: ONNX Runtime, the execution provider or the GPU is not there.
        """
        runtime = import_onnxruntime()
        available = runtime.get_available_providers()
        if self._provider not in available:
            raise EnvironmentUnfitError(
                f"this ONNX Runtime has no {self._provider}; it has {', '.join(available)}"
            )
        if not self._path.is_file():
            raise CheckpointError(f"there is no ONNX file {self._path}")
        require_one_file(self._path)
        with ExitStack() as stack:
            cuda = self._open_gpu(runtime) if self._provider in (CUDA, TENSORRT) else None
            session = self._create_session(runtime, self._providers(cuda, stack))
            used = session.get_providers()[0]
            if used != self._provider:
                raise EnvironmentUnfitError(
                    f"ONNX Runtime was asked for {self._provider} and fell back to {used}; "
                    "its libraries or its device cannot be used on this machine"
                )
            self._expected = session.get_inputs()[0].shape
            if cuda is not None:
                self.stages = self._open_stages(runtime, session, cuda)
            self._session = session
            self._leave = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self.stages is not None:
            self.stages.close()
        self.stages = self._session = None
        self._launches.clear()
        self._leave.close()

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``."""
        session = entered(self._session, self.name)
        if self.stages is not None:
            return self.stages.infer(images)
        check_images(images, self._expected)
        (end,) = session.get_inputs()
        try:
            (logits,) = session.run(None, {end.name: images})
        except runtime_errors() as error:
            raise failed(self.name, images, error) from error
        return np.asarray(logits, dtype=np.float32)

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
        cache = self._cache or stack.enter_context(tempfile.TemporaryDirectory())
        options = {
            "trt_engine_cache_enable": "True",  # its parser takes no 1
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        }
        return [(TENSORRT, {**place, **options}), (CUDA, place)]

    def _create_session(self, runtime: Any, providers: list[Any]) -> Any:
        runtime.set_default_logger_severity(_ERRORS_ONLY)  # of the process; it has no getter
        options = runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
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

    def _open_stages(self, runtime: Any, session: Any, cuda: Cuda) -> Stages:
        (end,) = session.get_outputs()
        classes = end.shape[1] if len(end.shape) == 2 else None
        if not isinstance(classes, int):
            raise CheckpointError(
                f"{self._path} gives logits of shape {end.shape}, and on a GPU their number must "
                "be known; export it again"
            )

        def prepare(images: torch.Tensor) -> Launch:
            if images.shape not in self._launches:
                number = len(self._launches)
                launch = _bound_launch(runtime, session, cuda, (images, classes), number)
                if self._cuda_graph:
                    launch()  # ONNX Runtime captures in its first run
                self._launches[images.shape] = launch
            return self._launches[images.shape]

        return Stages(self.name, cuda, prepare, shape=self._expected, errors=runtime_errors())


def _bound_launch(
    runtime: Any, session: Any, cuda: Cuda, ends: tuple[torch.Tensor, int], number: int
) -> Launch:
    """Bind a session to memory by name and return what queues it on the stream.

    ``ends`` are the images in device memory and the number of classes; ``number`` tells its CUDA
    graph from those of other batch sizes.
    """
    images, classes = ends
    logits = cuda.device_memory((len(images), classes))
    (reads,), (writes,) = session.get_inputs(), session.get_outputs()
    binding = session.io_binding()
    binding.bind_input(
        *(reads.name, cuda.memory, cuda.index, np.float32, tuple(images.shape), images.data_ptr())
    )
    binding.bind_output(
        *(writes.name, cuda.memory, cuda.index, np.float32, tuple(logits.shape), logits.data_ptr())
    )
    options = runtime.RunOptions()
    # The stream is ours, so waiting for it is ours too.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(number))  # ignored where none is captured

    def launch() -> torch.Tensor:
        session.run_with_iobinding(binding, options)
        return logits

    return launch


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
