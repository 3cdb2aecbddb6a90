"""The GPU of this machine, as far as an engine depends on it."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    """As the driver calls it."""
    sm: str
    """CUDA compute capability, ``7.0``."""
    driver: str | None = None
    """Version of the driver; None where nobody says."""

    def to_dict(self) -> dict[str, str | None]:
        """Return the fields by name."""
        return asdict(self)


def find_gpu() -> Gpu | None:
    """Return the current GPU of this process, or None where torch can use none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", _find_driver())


def _find_driver() -> str | None:
    """Ask nvidia-smi, the one tool that comes with every driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)
