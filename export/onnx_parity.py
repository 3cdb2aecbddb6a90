"""Does ONNX Runtime compute, on the CPU, what torch computed? For outputs of any shape and type.

The relative error of an output is its largest difference over its largest magnitude, in float64.
Integers and truth values are decisions, as those of an argmax, and two values that nearly tie may
be decided otherwise: of these, one in ``TIES`` may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.config import ParityLimits
from compress.errors import ModelError, ParityError, first_line
from export.runners.onnx_runner import import_onnxruntime, runtime_errors

if TYPE_CHECKING:
    import torch

TIES = 1000


def onnx_outputs(
    path: Path, batches: Sequence[Mapping[str, torch.Tensor]]
) -> list[list[np.ndarray]]:
    """Return all outputs of an ONNX file for each batch of inputs by name.

    Raises:
        ModelError: ONNX Runtime cannot compute it.
    """
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    errors: tuple[type[Exception], ...] = (*runtime_errors(), RuntimeError, ValueError)
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        read = [value.name for value in session.get_inputs()]
        return [
            session.run(None, {name: batch[name].detach().numpy() for name in read})
            for batch in batches
        ]
    except errors as error:
        raise ModelError(
            f"ONNX Runtime cannot compute this network: {first_line(error)}"
        ) from error


def largest_error(
    names: Sequence[str],
    expected: Sequence[Sequence[torch.Tensor]],
    found: Sequence[Sequence[np.ndarray]],
    sizes: Sequence[int],
) -> float:
    """Return the largest relative error of any output in any batch.

    Args:
        names: the outputs, in order.
        expected: torch's, by batch.
        found: ONNX Runtime's, by batch.
        sizes: of the batches, for messages.

    Raises:
        ParityError: an output lies outside the limits.
    """
    worst = 0.0
    for believed, judged, size in zip(expected, found, sizes, strict=True):
        for name, tensor, array in zip(names, believed, judged, strict=True):
            error, fault = _compared(tensor.detach().numpy(), array)
            if fault:
                raise ParityError(
                    f"ONNX Runtime and torch disagree about {name!r} at batch size {size}: "
                    f"{fault}; see whether the network computes the same twice, or set parity=False"
                )
            worst = max(worst, error)
    return worst


def _compared(expected: np.ndarray, found: np.ndarray) -> tuple[float, str | None]:
    """Return the relative error, and what is wrong with it."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        kinds = (f"{array.dtype} of shape {array.shape}" for array in (found, expected))
        return 0.0, " instead of ".join(kinds)
    if not expected.size:
        return 0.0, None
    if expected.dtype.kind != "f":
        differing = int(np.count_nonzero(expected != found))
        allowed = expected.size // TIES
        said = f"{differing} of {expected.size} values differ and {allowed} may"
        return 0.0, said if differing > allowed else None
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return 0.0, "there are NaN or infinities"
    scale = float(np.abs(expected.astype(np.float64)).max())
    difference = float(np.abs(expected.astype(np.float64) - found).max())
    error = difference / scale if scale else difference
    limit = ParityLimits().relative_error
    if error <= limit:
        return error, None
    return error, f"the relative error {error:.1e} exceeds the limit {limit:.1e}"
