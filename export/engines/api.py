"""TensorRT as this project uses it: the one place that imports it.

Only names that every release from 8.5.3 to 11.4 and TensorRT-RTX have are used without asking;
whatever only some have is behind one of the questions below. tests/export/tensorrt_api holds the
recorded API of these releases, and the tests run this package against each of them.
"""

from __future__ import annotations

import importlib
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

from compress.errors import EnvironmentUnfitError, first_line

Provider = Literal["tensorrt", "tensorrt_rtx"]

_EXTRAS = {
    "tensorrt": "pip install 'compress-convnets[tensorrt]', or 'compress-convnets[v100]' "
    "for a V100",
    "tensorrt_rtx": "pip install 'compress-convnets[rtx]'",
}
_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG,
}
_KEPT = 20

log = logging.getLogger("compress.tensorrt")


class Messages:
    """What TensorRT says: passed on to the log ``compress.tensorrt``, its complaints kept.

    Errors are passed on as debug messages: whoever asked TensorRT for something turns them into
    one sentence, and does not say it twice.
    """

    def __init__(self) -> None:
        self._errors: list[str] = []
        self._warnings: list[str] = []

    def receive(self, severity: str, text: str) -> None:
        """Take one message; ``severity`` is TensorRT's name for it."""
        level = _LEVELS.get(severity, logging.ERROR)
        text = text.strip()
        kept = {logging.ERROR: self._errors, logging.WARNING: self._warnings}.get(level)
        if kept is not None and len(kept) < _KEPT and text not in kept:
            kept.append(text)
        log.log(min(level, logging.INFO), "%s: %s", severity, text)

    def clear(self) -> None:
        """Forget what was said so far."""
        self._errors.clear()
        self._warnings.clear()

    @property
    def errors(self) -> tuple[str, ...]:
        """The first errors since the last ``clear``, in the order of their arrival."""
        return tuple(self._errors)

    def reason(self) -> str:
        """Return TensorRT's own reason for a failure, as half a sentence.

        The first error is the cause and those after it are its consequences; where there is none
        a warning is better than nothing.
        """
        said = (*self._errors, *self._warnings)
        if not said:
            return "it gives no reason"
        text = next(iter(said[0].splitlines()))
        return re.sub(r"^\[[^\]]*::[^\]]*\] ", "", text).rstrip(".")


@dataclass(frozen=True)
class TensorRT:
    """One imported TensorRT, and the answers to what it can."""

    module: Any
    """The Python module."""
    provider: Provider
    """Its name."""
    version: str
    """Its version, as it says itself."""
    logger: Any
    """An ``ILogger`` of the module; TensorRT wants one and the same in a whole process."""
    messages: Messages
    """What came in through the logger."""

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{_NAMES[self.provider]} {self.version}"

    @property
    def has_explicit_batch(self) -> bool:
        """Whether networks must be created with the flag EXPLICIT_BATCH; gone in 11.0."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH")

    @property
    def has_strongly_typed(self) -> bool:
        """Whether networks can be created with the flag STRONGLY_TYPED; since 10.0."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def has_precision_flags(self) -> bool:
        """Whether the builder has the flags FP16 and INT8; gone in 11.0 and never in RTX."""
        flags = self.module.BuilderFlag
        return hasattr(flags, "FP16") and hasattr(flags, "INT8")

    @property
    def has_progress_monitor(self) -> bool:
        """Whether a build can be watched and cancelled; since 10.0."""
        return hasattr(self.module, "IProgressMonitor")

    @property
    def has_timing_cache(self) -> bool:
        """Whether builds time kernels; TensorRT-RTX does not, and its caches are empty."""
        return self.provider == "tensorrt"

    @property
    def compiles_when_run(self) -> bool:
        """Whether kernels are compiled for shapes as they come, by default beside the runs: RTX."""
        return hasattr(self.module, "DynamicShapesKernelSpecializationStrategy")

    @property
    def has_user_allocation(self) -> bool:
        """Whether a build can rule out allocations in a run; TensorRT-RTX, since 1.2."""
        return hasattr(self.module.BuilderFlag, "REQUIRE_USER_ALLOCATION")

    @property
    def network_flags(self) -> int:
        """The creation flags of a network whose types are those of its ONNX file.

        Zero where it cannot be otherwise, which is the case since 11.0 and in TensorRT-RTX.
        """
        names = [
            *(["EXPLICIT_BATCH"] if self.has_explicit_batch else []),
            *(["STRONGLY_TYPED"] if self.has_strongly_typed and self.has_precision_flags else []),
        ]
        flags = self.module.NetworkDefinitionCreationFlag
        return sum(1 << int(getattr(flags, name)) for name in names)

    def create_builder(self) -> Any:
        """Create a ``Builder``.

        Raises:
            EnvironmentUnfitError: TensorRT finds no GPU or no driver.
        """
        return self._create("Builder")

    def create_context(self, engine: Any) -> Any:
        """Create an execution context of an engine; None where TensorRT does not.

        Of TensorRT-RTX it needs ``device_memory_size_v2`` bytes before it runs: what it sets aside
        itself may be set aside while it is timed or captured.
        """
        if not self.compiles_when_run:
            return engine.create_execution_context()
        module, how = self.module, engine.create_runtime_config()
        # Lazily, it would change kernels while they are timed, or leave a captured graph behind.
        eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
        how.dynamic_shapes_kernel_specialization_strategy = eager
        # Graphs are captured here, as those of every other runtime are; since 1.2 it can as well.
        if hasattr(module, "CudaGraphStrategy"):
            how.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        how.set_execution_context_allocation_strategy(
            module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        return engine.create_execution_context(how)

    def create_runtime(self) -> Any:
        """Create a ``Runtime``.

        Raises:
            EnvironmentUnfitError: TensorRT finds no GPU or no driver.
        """
        return self._create("Runtime")

    def _create(self, kind: str) -> Any:
        self.messages.clear()
        try:
            return getattr(self.module, kind)(self.logger)
        except TypeError as error:  # "factory function returned nullptr" without a driver
            raise EnvironmentUnfitError(
                f"{self.title} finds no usable GPU or driver on this machine "
                f"({self.messages.reason()}); use a machine with a GPU, where nvidia-smi works"
            ) from error


def load_tensorrt(provider: Provider) -> TensorRT:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        EnvironmentUnfitError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(provider)
    except ModuleNotFoundError as error:
        raise EnvironmentUnfitError(
            f"{_NAMES[provider]} is not installed: {_EXTRAS[provider]}"
        ) from error
    except (ImportError, OSError) as error:
        raise EnvironmentUnfitError(
            f"{_NAMES[provider]} is installed and cannot be loaded ({first_line(error)}): "
            f"{_EXTRAS[provider]}"
        ) from error
    return _wrap(module, provider)


@lru_cache(maxsize=2)
def _wrap(module: ModuleType, provider: Provider) -> TensorRT:
    """Return the same object for the same module, for TensorRT warns of a second logger."""
    messages = Messages()

    class Logger(module.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # pybind11 wants it called by name

        def log(self, severity: Any, msg: str) -> None:
            messages.receive(severity.name, msg)

    return TensorRT(module, provider, module.__version__, Logger(), messages)
