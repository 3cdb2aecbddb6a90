"""Timings of kernels that an earlier build measured, on the same GPU generation and release.

A cache of another GPU or another TensorRT can fail a build, so both are in the file's name. A cache
is an aid: one that cannot be used or written costs time and a warning, never the engine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError
from compress.files.atomic import write_atomically

if TYPE_CHECKING:
    from export.engines.api import TensorRT
    from export.nvml import Gpu

log = logging.getLogger("compress")


def cache_path(folder: Path, tensorrt: TensorRT, gpu: Gpu) -> Path:
    """Return where the timings of this TensorRT on GPUs like this one lie."""
    return folder / f"{tensorrt.provider}-{tensorrt.version}-sm{gpu.sm}.timing"


def use_cache(tensorrt: TensorRT, config: Any, path: Path) -> bool:
    """Give a build the timings of a file, or none where it is missing, damaged or foreign.

    Args:
        tensorrt: the library.
        config: the build's ``IBuilderConfig``.
        path: the file; it need not be there.

    Returns:
        Whether the file's timings are used.
    """
    data = _read(path)
    if data:
        fault = _set(tensorrt, config, data)
        if fault is None:
            return True
        log.warning("the timing cache %s is ignored: %s", path, fault)
    _set(tensorrt, config, b"")
    return False


def save_cache(config: Any, path: Path) -> None:
    """Write the timings of a build, old and new; warn where they cannot be written."""
    cache = config.get_timing_cache()
    timings = None if cache is None else cache.serialize()
    if timings is None:
        log.warning("TensorRT hands over no timings; %s is left as it was", path)
        return
    try:
        write_atomically(path, bytes(timings))
    except OutputError as error:
        log.warning("the timing cache is not saved: %s", error)


def _set(tensorrt: TensorRT, config: Any, data: bytes) -> str | None:
    """Return why a build does not take timings; TensorRT 10 takes none and only complains."""
    tensorrt.messages.clear()
    cache = config.create_timing_cache(data)
    if cache is None or tensorrt.messages.errors:
        return tensorrt.messages.reason()
    return None if config.set_timing_cache(cache, False) else "it is of another GPU or release"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        log.warning("the timing cache %s is ignored: %s", path, error.strerror or error)
        return b""
