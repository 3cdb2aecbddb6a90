"""What ``export``, ``profile`` and ``doctor`` are asked for. No torch: ``--help`` must not wait."""

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
class ProfileRequest(Request):
    """The options of ``compress profile``."""

    run: Annotated[
        Path | None, Argument("[RUN]", "Run directory, or dense weights: *.safetensors.")
    ] = None
    config: Annotated[
        str | None, Option("--config", "The network of a configuration, with fresh weights.")
    ] = None
    output: Annotated[
        Path | None, Option("--output", "File to write; default in latency/ beside the weights.")
    ] = None
    runtime: Annotated[
        str, Option("--runtime", "What serves the network: onnxruntime-cpu, ...")
    ] = "onnxruntime-cpu"
    precision: Annotated[str, Option("--precision", "fp32, or fp16 on a GPU.")] = "fp32"
    batch: Annotated[int, Option("--batch", "Images of a call.")] = 1
    threads: Annotated[int, Option("--threads", "Of a runtime on the CPU.")] = 1
    channel_multiple: Annotated[
        int | None,
        Option(
            "--channel-multiple", "Widths are multiples of it; default as the run prunes, or 8."
        ),
    ] = None
    overwrite: Annotated[
        bool, Option("--overwrite", "Measure again, even if the table is there.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class DoctorRequest:
    """The options of ``compress doctor``."""

    target: Target = None
