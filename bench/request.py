"""What the commands that measure and judge are asked for. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from compress.runs.request import Output, Precision, Request
from compress.terminal.options import Argument, Option

ReportFile = Annotated[Path, Argument("REPORT", "report.json of compress bench.")]
Baseline = Annotated[Path | None, Option("--baseline", "Report kept by compress baseline.")]
LimitFile = Annotated[
    str | None,
    Option("--limits", "File of limits, or a name under configs/limits.", earlier="--budgets"),
]


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Request):
    """The options of ``compress bench``."""

    run: Annotated[
        Path,
        Argument("RUN", "Run directory; or a reference: *.onnx, *.engine, *.safetensors."),
    ]
    candidate: Annotated[
        Path | None, Argument("CANDIDATE", "Another network, measured against the reference.")
    ] = None
    runtime: Annotated[
        str | None,
        Option(
            "--runtime", "What runs the networks: onnxruntime-cpu, ...", setting="bench.runtime"
        ),
    ] = None
    precision: Precision = None
    batch: Annotated[
        str | None,
        Option("--batch", "Batch sizes: 1,8,32.", setting="bench.batch_sizes"),
    ] = None
    against: Annotated[
        str | None,
        Option("--against", "Of a run: dense, another run directory, or a stored report."),
    ] = None
    limits: LimitFile = None
    baseline: Baseline = None
    data: Annotated[
        Path | None,
        Option(
            "--data",
            "Of two networks: images (train/ and val/, class folders, or without labels), or "
            "arrays (*.npz, *.npy); default random inputs. Of a run: its data set.",
            key="data.root",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GateRequest:
    """The options of ``compress gate``."""

    report: ReportFile
    limits: LimitFile = "default"
    baseline: Baseline = None
    settings: Annotated[
        tuple[str, ...],
        Option("--set", "A limit on top of those of --limits: latency.max_ratio=0.8; repeatable."),
    ] = ()
    output: Annotated[
        Path | None, Option("--output", "Directory to write the judged report to; default none.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """The options of ``compress report``."""

    report: ReportFile
    others: Annotated[
        tuple[Path, ...], Argument("OTHERS", "Further reports, compared with it.")
    ] = ()
    output: Output = None


@dataclass(frozen=True, kw_only=True)
class BaselineRequest:
    """The options of ``compress baseline``."""

    report: ReportFile
    output: Annotated[Path, Option("--output", "File to write: baseline.json.")]
    overwrite: Annotated[bool, Option("--overwrite", "Replace the baseline in --output.")] = False
