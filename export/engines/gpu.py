"""The GPU of this process, as far as an engine depends on it."""

from __future__ import annotations

from export.nvml import Gpu, driver_version


def find_gpu() -> Gpu | None:
    """Return the current GPU of this process, or None where torch can use none.

    Torch names it, as CUDA sees it: an instance of a divided GPU has a name of its own.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", driver_version())
