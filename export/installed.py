"""What is installed on this machine, as facts: nothing here judges, and nothing here can crash.

Libraries are loaded in processes of their own (``export/probes.py``), so one that is broken shows
up as a sentence in ``Installed.problems``.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from export.nvml import Gpu, driver_version, query_gpus
from export.probes import PROBLEM, SECONDS, ask

_LIBRARIES = ("torch", "torchvision", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")
_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_CUDNNS = ("nvidia-cudnn-cu11", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
_TENSORRTS = {
    "tensorrt": ("tensorrt", "tensorrt-cu11", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Installed:
    """What one Python environment on one machine holds; None is what is not there."""

    python: str
    """Version of the interpreter."""
    torch: str | None = None
    torchvision: str | None = None
    """Version, if its operators work with the torch beside it."""
    cuda: str | None = None
    """CUDA version that torch was built with; None for a CPU build."""
    architectures: tuple[str, ...] = ()
    """What torch was compiled for: ``sm_70`` is machine code, ``compute_70`` is PTX."""
    cudnn: str | None = None
    """Version that torch loads, else that of the installed distribution."""
    torch_gpus: int = 0
    """GPUs that torch can use."""
    onnx: str | None = None
    onnxruntime: str | None = None
    onnxruntime_distributions: tuple[str, ...] = ()
    """Distributions that own the module ``onnxruntime``; there must be one."""
    providers: tuple[str, ...] = ()
    """Execution providers that ONNX Runtime was built with."""
    usable_providers: tuple[str, ...] = ()
    """Those that really loaded here and computed one sum."""
    tensorrt: str | None = None
    tensorrt_rtx: str | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Version of the NVIDIA driver."""
    problems: Mapping[str, str] = field(default_factory=dict)
    """Half a sentence for each library or provider that is there and cannot be used."""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON can hold them."""
        gpus = [{"name": gpu.name, "sm": gpu.sm} for gpu in self.gpus]
        return {**asdict(self), "gpus": gpus}


def inspect_installed(*, seconds: float = SECONDS) -> Installed:
    """Find out what is installed; ``seconds`` is the longest that one library may take to load."""
    with ThreadPoolExecutor(max_workers=2) as pool:  # each probe is mostly one busy process
        answers = dict(
            zip(
                _LIBRARIES,
                pool.map(lambda name: ask(name, seconds=seconds), _LIBRARIES),
                strict=True,
            )
        )
        providers = tuple(answers["onnxruntime"].get("providers", ()))
        sessions = dict(
            zip(
                providers,
                pool.map(lambda name: ask("provider", name, seconds=seconds), providers),
                strict=True,
            )
        )
    torch = answers["torch"]
    return Installed(
        python=platform.python_version(),
        torch=torch.get("version"),
        torchvision=answers["torchvision"].get("version"),
        cuda=torch.get("cuda"),
        architectures=tuple(torch.get("architectures", ())),
        cudnn=torch.get("cudnn") or _version_of(*_CUDNNS),
        torch_gpus=len(torch.get("gpus", ())),
        onnx=answers["onnx"].get("version"),
        onnxruntime=answers["onnxruntime"].get("version"),
        onnxruntime_distributions=tuple(name for name in _ONNXRUNTIMES if _version_of(name)),
        providers=providers,
        usable_providers=tuple(name for name in providers if sessions[name].get("usable")),
        tensorrt=_builder_version(answers, "tensorrt"),
        tensorrt_rtx=_builder_version(answers, "tensorrt_rtx"),
        gpus=query_gpus() or tuple(Gpu(**gpu) for gpu in torch.get("gpus", ())),
        driver=driver_version() or driver_from(_DRIVER_FILE),
        problems={
            name: answer[PROBLEM]
            for name, answer in {**answers, **sessions}.items()
            if PROBLEM in answer
        },
    )


def driver_from(path: Path) -> str | None:
    """Read the driver's version from what its kernel module says of itself."""
    with suppress(OSError, UnicodeDecodeError):
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", path.read_text())
        return match.group(1) if match else None
    return None


def _builder_version(answers: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    """Return TensorRT's version; of a library that is installed and cannot be loaded as well."""
    return answers[name].get("version") or _version_of(*_TENSORRTS[name])


def _version_of(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed."""
    for distribution in distributions:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None
