"""What ``compress export`` and ``doctor`` are asked for. No torch: ``--help`` must not wait."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from compress.runs.request import Precision, Request, Target
from compress.terminal.options import Argument, Option


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Request):
    """The options of ``compress export``."""

    run: Annotated[Path, Argument("RUN", "Run directory.")]
    target: Target = None
    precision: Precision = None
    batch: Annotated[
        str | None,
        Option("--batch", "Batch sizes of an engine: 1,8,32 or dynamic.", setting="export.batch"),
    ] = None
    engine: Annotated[
        bool, Option("--engine", "Also build engines with the TensorRT installed here.")
    ] = False
    triton: Annotated[Path | None, Option("--triton", "Also write a Triton model repository.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """The options of ``compress doctor``."""

    target: Target = None
