"""What the commands do that measure and judge; the command line parses, prints and exits."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.compare import DENSE, compare, compare_run, read_settings
from bench.judging.baseline import baseline_of, load_compared, undecided
from bench.judging.quality_gate import judge
from bench.judging.verdicts import Verdict, exit_code
from bench.limits import Limits, load_limits, require_judgeable
from bench.pages.beside import names_of
from bench.pages.publish import publish, write_views
from bench.reports.report import REPORT, load_report, save_report, sealed
from bench.stopwatch import stopwatch_for
from compress.distributed.world import part
from compress.errors import ConfigError, OutputError
from compress.runs.dense import note_import
from compress.runs.launch import Started, existing, reading, started, weights_of
from compress.runs.prune import check_budget
from compress.runs.stages import prune_run, prune_stage, stage, train_stage
from compress.terminal.console import say
from compress.terminal.progress import percent_bar
from export.quantizing import quantizer_for
from export.stage import export_stage, onnx_path, target_of

if TYPE_CHECKING:
    from bench.reports.schema import Report
    from bench.request import BaselineRequest, BenchRequest, GateRequest, ReportRequest
    from compress.config import RunConfig
    from compress.data.batches import ImageData
    from compress.runs.request import PruneRequest


@dataclass(frozen=True)
class Judged:
    """A report, and how it was judged by the limits that it names."""

    report: Report
    verdicts: list[Verdict]
    folder: Path
    """Where its files are, or would be."""
    reports: dict[str, Report] | None = None
    """It and others that it is compared with, by name, itself first; None for it alone."""

    def publish(self) -> None:
        """Write the report, and what people and CI read of it.

        Raises:
            OutputError: a file cannot be written; the report is then where the message says.
        """
        try:
            publish(self.report, self.verdicts, self.folder)
        except OutputError as error:
            rescued = _rescued(self.report)
            where = f"; the report is in {rescued}" if rescued else ""
            raise OutputError(f"{error}{where}") from error

    def publish_views(self) -> None:
        """Write what people and CI read of the report.

        Raises:
            OutputError: a file cannot be written.
        """
        write_views(self.report, self.verdicts, self.folder, reports=self.reports)

    @property
    def exit_code(self) -> int:
        """What the process ends with; 0 where nothing was judged."""
        return exit_code(self.verdicts) if self.verdicts else 0

    @property
    def document(self) -> dict[str, Any]:
        """What machines read of it."""
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {"report": sealed(self.report), "verdicts": verdicts}


def whole_run(request: PruneRequest) -> Judged | None:
    """Train, prune, export, measure and judge; None in every process but the main one.

    Where a checkpoint is named, its network is the dense one and nothing is trained before.

    Raises:
        CompressError: see ``started`` and the stages.
    """
    weights = weights_of(request)
    checks = [check_budget, _check_target, _check_limits, quantizer_for]
    with started(request, checks, weights) as on:
        if weights is None:
            train_stage(on)
        note_import(on.session)
        on.session.check_stop()
        prune_stage(on, stopwatch_for, quantizer_for)
        on.session.check_stop()
        if not part().main:  # what is left is done by one process
            return None
        _export(on)
        say("measuring")
        with percent_bar("measuring") as show:
            report = compare_run(
                *(on.run, on.config, on.data),
                limits=_limits(on.config),
                permission=on.permission,
                progress=show,
            )
        return _judged(report, on.run.path)


def prune(request: PruneRequest) -> Started:
    """Prune the network of a checkpoint, or go on with a run that does.

    Raises:
        CompressError: see ``prune_run``.
    """
    return prune_run(request, stopwatch_for, quantizer_for)


def bench(request: BenchRequest) -> Judged:
    """Measure a run against its dense network or another, or any two networks.

    Raises:
        CompressError: see ``compare_run`` and ``compare``.
    """
    if request.candidate is None:
        if request.run.is_file():
            raise ConfigError(
                f"{request.run} is one file: name what is measured against it as well"
            )
        report, folder = _bench_run(request)
    else:
        if request.against is not None:
            raise ConfigError("--against is for one run directory: name the two networks alone")
        report, folder = _bench_files(request)
    return _judged(report, request.output or folder)


def gate(request: GateRequest) -> Judged:
    """Judge a stored report.

    Raises:
        CompressError: a file cannot be read, or limits that cannot be.
    """
    limits = load_limits(request.limits or "default", request.settings)
    report = load_compared(request.report, request.baseline).model_copy(update={"limits": limits})
    return _judged(report, request.output or request.report.parent)


def show_again(request: ReportRequest) -> Judged:
    """Return a report whose files for people and CI are to be written again, from its JSON alone.

    Raises:
        CheckpointError: a report cannot be read.
    """
    paths = tuple({path.resolve(): path for path in (request.report, *request.others)}.values())
    measured, *others = map(load_report, paths)
    reports = dict(zip(names_of(paths), (measured, *others), strict=True)) if others else None
    folder = request.output or request.report.parent
    return Judged(measured, _verdicts(measured), folder, reports)


def keep(request: BaselineRequest) -> Judged:
    """Return a report that may be kept as the baseline that later ones are judged against.

    Raises:
        CompressError: see ``baseline_of``.
    """
    kept = baseline_of(request.report, request.output, overwrite=request.overwrite)
    if doubt := undecided(kept):
        say(f"warning: {doubt}")
    return Judged(kept, [], request.output.parent)


def _bench_run(request: BenchRequest) -> tuple[Report, Path]:
    run, config, data = existing(request.run, request)
    with reading(run), percent_bar("measuring") as show:
        report = compare_run(
            *(run, config, data),
            against=request.against or DENSE,
            baseline=request.baseline,
            limits=load_limits(request.limits) if request.limits else None,
            permission=request.permission,
            progress=show,
        )
    return report, run.path


def _bench_files(request: BenchRequest) -> tuple[Report, Path]:
    assert request.candidate is not None
    settings = read_settings(request.asked)
    with percent_bar("measuring") as show:
        report = compare(
            *(request.run, request.candidate, request.data),
            limits=request.limits,
            baseline=request.baseline,
            model=request.permission.typed,
            progress=show,
            **settings,
        )
    names = (path.resolve().stem for path in (request.run, request.candidate))
    return report, Path("-".join(("bench", *names)))


def _export(on: Started) -> None:
    """Export both networks of a run, unless they are there."""
    folder, precision = on.run.export, on.config.export.precision
    last = onnx_path(folder, "pruned", precision)  # of all that is written
    stage(
        *(last, "exporting"),
        lambda: export_stage(on.run, folder, on.config, on.data, on.permission),
    )


def _check_target(config: RunConfig, data: ImageData) -> None:
    """Refuse a target that does not compute the precision before anything is trained."""
    target_of(config.export)


def _check_limits(config: RunConfig, data: ImageData) -> None:
    """Refuse limits that nothing measured could show to hold before anything is trained."""
    confidence, images = config.bench.confidence, data.val_images
    require_judgeable(_limits(config), images=images, confidence=confidence, baseline=False)


def _limits(config: RunConfig) -> Limits:
    """Return what a run of everything is judged by."""
    return load_limits(config.bench.limits, above=config.limits)


def _verdicts(report: Report) -> list[Verdict]:
    return judge(report, report.limits) if report.limits else []


def _judged(report: Report, folder: Path) -> Judged:
    return Judged(report, _verdicts(report), folder)


def _rescued(report: Report) -> Path | None:
    """Write a report where temporary files go; it took minutes. None if that fails as well."""
    with suppress(OSError, OutputError):
        path = Path(tempfile.mkdtemp(prefix="compress-")) / REPORT
        save_report(report, path)
        return path
    return None
