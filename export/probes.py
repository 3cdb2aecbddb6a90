"""What is asked of each library, in a process of its own: it may be broken, print or crash.

Every probe returns facts that JSON can hold. ``ask`` starts one, ``main`` is where it begins.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

SECONDS = 120.0
"""Longest that a probe may take; torch alone can take half a minute from a cold disk."""
PROBLEM = "problem"
"""Key of the answer of a library that is there and does not work."""
_NOT_LOADED = "its libraries cannot be loaded"

# The module search path is handed over, or the child would look into the working directory first.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from export.probes import main; main(*sys.argv[2:])"
)
# Add(x, x) -> y over one float, opset 13, IR 8: here as bytes, because onnx may be what is broken.
ADD_MODEL = (
    b'\x08\x08:7\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x03addZ\x0f\n\x01x\x12\n\n\x08'
    b"\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"B\x04\n\x00\x10\r"
)


def ask(name: str, *arguments: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Run a probe in a process of its own.

    Returns:
        Its facts; nothing where the library is not installed; the one key ``problem``, with half a
        sentence, where it cannot be used.
    """
    command = [sys.executable, "-c", _START, json.dumps(sys.path), name, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {PROBLEM: f"it did not answer within {seconds:g} s"}
    except OSError as error:
        return {PROBLEM: f"Python cannot be started: {error.strerror or error}"}
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return {PROBLEM: f"loading it ends the process: {_ending(done.returncode)}"}
    return answer if isinstance(answer, dict) else {PROBLEM: "it gave no facts"}


def main(name: str, *arguments: str) -> None:
    """Run one probe and write its facts to standard output, and nothing else."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not be taken for the answer
    try:
        facts = PROBES[name](*arguments)
    except ModuleNotFoundError as error:
        facts = {} if error.name == name else {PROBLEM: _sentence(error)}
    except Exception as error:  # whatever a library raises is what was to be found out
        facts = {PROBLEM: _sentence(error)}
    os.write(answer, json.dumps(facts).encode())
    os._exit(0)  # some libraries crash only when the process ends


def probe_torch() -> dict[str, Any]:
    """Version, CUDA, compiled architectures, cuDNN, and the GPUs that torch can use."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", None)  # get_arch_list() needs a GPU
    usable = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": ((flags() if flags else None) or "").split(),
        "cudnn": cudnn_version(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "sm": "{}.{}".format(*torch.cuda.get_device_capability(index)),
            }
            for index in usable
        ],
    }


def probe_torchvision() -> dict[str, Any]:
    """Version, and whether its operators were built for the torch beside it."""
    import torch
    import torchvision

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    return {"version": torchvision.__version__}


def probe_version(module: str) -> dict[str, Any]:
    """Version of a module that loads."""
    return {"version": importlib.import_module(module).__version__}


def probe_onnxruntime() -> dict[str, Any]:
    """Version, and the execution providers that it was built with."""
    import onnxruntime

    return {
        "version": onnxruntime.__version__,
        "providers": list(onnxruntime.get_available_providers()),
    }


def probe_provider(provider: str) -> dict[str, Any]:
    """Whether an execution provider of ONNX Runtime loads and computes.

    Asked for one that cannot load, ONNX Runtime takes the CPU without an error.
    """
    import numpy as np
    import onnxruntime

    if provider != "CPUExecutionProvider":
        _load_cuda_libraries(onnxruntime)
    try:
        session = onnxruntime.InferenceSession(ADD_MODEL, providers=[provider], enable_fallback=0)
    except RuntimeError as error:  # pages of C++ signatures; only CUDA's own words say something
        cause = re.search(r"CUDA failure \d+: [^;]*[^; ]", str(error))
        return {PROBLEM: cause.group() if cause else _NOT_LOADED}
    if session.get_providers()[0] != provider:
        return {PROBLEM: _NOT_LOADED}
    (total,) = session.run(None, {"x": np.ones(1, np.float32)})
    return {"usable": total.tolist() == [2.0]}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "onnx": partial(probe_version, "onnx"),
    "onnxruntime": probe_onnxruntime,
    "provider": probe_provider,
    "tensorrt": partial(probe_version, "tensorrt"),
    "tensorrt_rtx": partial(probe_version, "tensorrt_rtx"),
}
"""Every probe by its name; but for ``provider`` the name is that of a module."""


def cudnn_version(number: int | None) -> str | None:
    """Return cuDNN's version as people write it: 91002 is 9.10.2, and 8902 is 8.9.2."""
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _load_cuda_libraries(onnxruntime: Any) -> None:
    """Let ONNX Runtime find the CUDA libraries that lie inside of pip's packages."""
    if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
        onnxruntime.preload_dlls()
    else:
        import torch  # noqa: F401 (it loads the same libraries)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _sentence(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
