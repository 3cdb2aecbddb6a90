"""Make trained convolutional networks small and fast, and prove it.

The library, for people with a training loop of their own; docs/library.md shows every name at work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from bench.compare import compare
    from bench.judging.quality_gate import judge
    from compress.checkpoints.checkpoint import load_model
    from compress.checkpoints.library import load, save
    from compress.pruning.pieces import analyse, choose, importance, shrink
    from compress.pruning.pruner import Pruner
    from export.module_to_onnx import export_onnx
    from export.quantizing import quantized

__all__ = [
    "CompressError",
    "Pruner",
    "__version__",
    "analyse",
    "choose",
    "compare",
    "export_onnx",
    "importance",
    "judge",
    "load",
    "load_model",
    "quantized",
    "save",
    "shrink",
]

__version__ = "0.2.0"

_ROOMS = {
    "Pruner": "compress.pruning.pruner",
    "analyse": "compress.pruning.pieces",
    "choose": "compress.pruning.pieces",
    "compare": "bench.compare",
    "export_onnx": "export.module_to_onnx",
    "importance": "compress.pruning.pieces",
    "judge": "bench.judging.quality_gate",
    "load": "compress.checkpoints.library",
    "load_model": "compress.checkpoints.checkpoint",
    "quantized": "export.quantizing",
    "save": "compress.checkpoints.library",
    "shrink": "compress.pruning.pieces",
}
"""Where the public names live; they are loaded on first use, so that importing stays fast."""


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return __all__
