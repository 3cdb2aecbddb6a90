"""One small interface to every runtime: enter, infer, exit.

A runner takes float32 images of shape (N, C, H, W) and returns float32 logits of shape
(N, classes). Timing and comparing live outside of it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.errors import CheckpointError, DataError, EnvironmentUnfitError, ModelError
from export.onnx_check import first_line

if TYPE_CHECKING:
    from types import TracebackType

    from torch import nn

_ERRORS_ONLY = 3  # ONNX Runtime's severity scale: 2 is warning, 3 is error


class Runner(Protocol):
    """A network loaded in some runtime; usable only inside its ``with`` block."""

    @property
    def name(self) -> str:
        """What runs and where, for messages."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images, (N, C, H, W) float32 -> (N, classes) float32.

        Raises:
            DataError: the images have another shape or type than the network reads.
            ModelError: the runtime cannot compute the network on them.
        """
        ...


class TorchRunner:
    """A torch module in evaluation mode; it runs a copy and leaves the original as it is."""

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.name = f"torch ({device})"
        self._original = model
        self._device = device
        self._model: nn.Module | None = None

    def __enter__(self) -> TorchRunner:
        """Copy the network to the device.

        Raises:
            EnvironmentUnfitError: torch finds no such device.
        """
        import torch

        if torch.device(self._device).type == "cuda" and not torch.cuda.is_available():
            raise EnvironmentUnfitError(
                f"torch was asked for {self._device} and finds no usable GPU; use device cpu"
            )
        self._model = copy.deepcopy(self._original).to(self._device).eval()
        return self

    def __exit__(self, *_: object) -> None:
        self._model = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``."""
        import torch

        model = _entered(self._model, self.name)
        _check_images(images)
        owned = np.require(images, requirements=["C", "W"])
        try:
            with torch.inference_mode():
                logits = model(torch.from_numpy(owned).to(self._device))
        except RuntimeError as error:
            raise _failed(self.name, images, error) from error
        if not isinstance(logits, torch.Tensor):
            raise ModelError(f"the network returns a {type(logits).__name__}, not one tensor")
        return logits.float().cpu().numpy()


class OnnxRunner:
    """An ONNX file in ONNX Runtime, on exactly the execution provider that was asked for."""

    def __init__(
        self,
        path: Path,
        *,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
    ) -> None:
        self.name = f"ONNX Runtime ({provider.removesuffix('ExecutionProvider')})"
        self._path = path
        self._provider = provider
        self._threads = threads
        self._session: Any = None
        self._expected: list[int | str | None] = []

    def __enter__(self) -> OnnxRunner:
        """Load the file and optimise its graph fully, for ``threads`` threads (None: all cores).

        Raises:
            CheckpointError: the file is missing, damaged or not ONNX.
            EnvironmentUnfitError: ONNX Runtime or the execution provider is not there.
        """
        runtime = _import_onnxruntime()
        available = runtime.get_available_providers()
        if self._provider not in available:
            raise EnvironmentUnfitError(
                f"this ONNX Runtime has no {self._provider}; it has {', '.join(available)}"
            )
        if not self._path.is_file():
            raise CheckpointError(f"there is no ONNX file {self._path}")
        session = self._create_session(runtime)
        used = session.get_providers()[0]
        if used != self._provider:
            raise EnvironmentUnfitError(
                f"ONNX Runtime was asked for {self._provider} and fell back to {used}; "
                "its libraries or its device cannot be used on this machine"
            )
        self._session = session
        self._expected = session.get_inputs()[0].shape
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images; see ``Runner``."""
        session = _entered(self._session, self.name)
        _check_images(images, self._expected)
        (end,) = session.get_inputs()
        try:
            (logits,) = session.run(None, {end.name: images})
        except _runtime_errors() as error:
            raise _failed(self.name, images, error) from error
        return np.asarray(logits, dtype=np.float32)

    def _create_session(self, runtime: Any) -> Any:
        runtime.set_default_logger_severity(_ERRORS_ONLY)  # of the process; it has no getter
        options = runtime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self._threads or 0  # 0 is its word for all physical cores
        options.inter_op_num_threads = 1
        # An idle pool that spins takes the cores from whatever network is measured next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return runtime.InferenceSession(
                str(self._path), options, providers=[self._provider], enable_fallback=0
            )
        except _runtime_errors() as error:
            raise CheckpointError(
                f"ONNX Runtime cannot load {self._path}: {first_line(error)}"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise EnvironmentUnfitError(
                f"ONNX Runtime cannot start {self._provider}: {first_line(error)}"
            ) from error


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentUnfitError(
            "ONNX Runtime is not installed: pip install onnxruntime-gpu, "
            "or onnxruntime where there is no such wheel"
        ) from error
    return onnxruntime


def _runtime_errors() -> tuple[type[Exception], ...]:
    """Return ONNX Runtime's own exceptions, which have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (value for value in vars(state).values() if isinstance(value, type))
    return tuple(kind for kind in kinds if issubclass(kind, Exception))


def _entered(loaded: Any, name: str) -> Any:
    if loaded is None:
        raise RuntimeError(f"{name} is used outside of its with block")
    return loaded


def _failed(name: str, images: np.ndarray, error: Exception) -> ModelError:
    return ModelError(
        f"{name} cannot compute the network on images {images.shape}: {first_line(error)}"
    )


def _check_images(images: np.ndarray, expected: list[int | str | None] | None = None) -> None:
    """Refuse what is no batch of float32 images, or not of the fixed sizes in ``expected``."""
    if images.ndim != 4 or images.dtype != np.float32:
        raise DataError(
            "images must be float32 of shape (N, C, H, W), "
            f"not {images.dtype} of shape {images.shape}"
        )
    for size, wanted in zip(images.shape, expected or (), strict=False):
        if isinstance(wanted, int) and size != wanted:
            shape = ", ".join(str(dimension or "any") for dimension in expected or ())
            raise DataError(f"the network reads images of shape ({shape}), not {images.shape}")
