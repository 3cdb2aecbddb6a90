"""The command line: parse, load the configuration, call the library, print, exit with a code."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from compress.distributed.torchrun import is_main, leave, require_one_process
from compress.errors import (
    CompressError,
    ConfigError,
    EnvironmentUnfitError,
    InterruptedRunError,
)
from compress.terminal.console import print_json, print_table, print_text, say, say_error
from compress.terminal.signals import hold_on, sigterm_as_ctrl_c

# Nothing else is imported up here: --help must not wait for torch.
if TYPE_CHECKING:
    from bench.judging.verdicts import Verdict
    from bench.reports.schema import Report
    from compress.config import ModelConfig, RunConfig
    from compress.data.batches import ImageData
    from compress.runs.launch import Check, Request, Started
    from compress.runs.rundirectory import RunDirectory
    from export.stage import Exported

EXIT_CODES = (
    "Exit codes: 0 done, every budget holds; 1 the command could not do its job; 2 usage or "
    "configuration; 3 a budget is violated; 4 inconclusive; 5 the environment is unfit or a budget "
    "could not be judged here; 6 parity failed; 130 interrupted."
)


class Commands(TyperGroup):
    """The one place where a user's error becomes a sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a bug keeps its traceback."""
        try:
            with sigterm_as_ctrl_c():
                return super().invoke(ctx)
        except CompressError as error:
            say_error(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            say("stopped")
            raise typer.Exit(InterruptedRunError.exit_code) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make trained convolutional networks small and fast, and prove it.",
    epilog=EXIT_CODES,
)

Run = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
ConfigName = Annotated[
    str | None, typer.Option("--config", help="Named configuration, or a TOML or JSON file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value on top of the configuration; repeatable."),
]
ModelSettings = Annotated[
    list[str] | None, typer.Option("--set", help="model.options.KEY=VALUE; repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", help="Directory to write to.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove the files of an earlier run in --output.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A built-in network, timm:NAME, torchvision:NAME, or package.module:callable.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the data set (image folder: train/, val/), or URL."),
]
BenchData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Of two networks: images (train/ and val/, class folders, or without labels), or "
        "arrays (*.npz, *.npy); default random inputs. Of a run: its data set.",
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option("--criterion", help="Importance formula, by name or the original's number."),
]
TargetName = Annotated[
    str | None, typer.Option("--target", help="Deployment profile: its name, or a TOML file.")
]
PrecisionName = Annotated[
    str | None, typer.Option("--precision", help="fp32, fp16 or int8 in the deployed network.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
BudgetFile = Annotated[
    str | None, typer.Option("--budgets", help="Budget file, or a name under configs/budgets.")
]
Baseline = Annotated[
    Path | None, typer.Option("--baseline", help="Report kept by compress baseline.")
]
ReportFile = Annotated[
    Path, typer.Argument(help="report.json of compress bench.", metavar="REPORT")
]


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make trained convolutional networks small and fast, and prove it."""
    level = logging.WARNING if is_main() else logging.ERROR
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=level)
    if context.invoked_subcommand not in (None, "run", "train", "prune"):
        require_one_process(context.invoked_subcommand)
    if version:
        from compress import __version__

        print(f"compress {__version__}")
        raise typer.Exit


@app.command("run")
def run_command(
    config: ConfigName = None,
    settings: Settings = None,
    output: Output = None,
    model: Model = None,
    data: Data = None,
    criterion: Criterion = None,
    target: TargetName = None,
    precision: PrecisionName = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Do everything: train, prune, finetune, export, bench and gate.

    Without arguments: a ResNet-20 on embedded handwritten digits.
    """
    start = time.monotonic()
    request = _request(
        config,
        _asked(
            settings,
            {
                "prune.criterion": criterion,
                "export.target": target,
                "export.precision": precision,
            },
        ),
        *(output, model, data, resume, overwrite),
    )
    with _started(request, prunes=True, exports=True) as on:
        run = on.run
        _stage(run.dense, f"training {on.config.model.name}", lambda: _train(on))
        on.session.check_stop()
        _stage(run.pruned, f"pruning to {on.config.prune.budget}", lambda: _prune(on))
        on.session.check_stop()
        if not _goes_on():
            return
        export = partial(_export, run, run.export, on.config, on.data, on.config.model)
        _stage(_exported(on), "exporting", export)
        say("measuring")
        budgets = on.config.bench.limits
        report = _measure(run, on.config, on.data, budgets=budgets, typed=on.config.model)
    verdicts = _judge(report)
    _publish(report, verdicts, run.path)
    _print_report(report, verdicts, as_json)
    say(f"{time.monotonic() - start:.0f} s; everything is in {run.path}")
    raise typer.Exit(_exit_code(verdicts))


@app.command("train")
def train_command(
    config: ConfigName = None,
    settings: Settings = None,
    output: Output = None,
    model: Model = None,
    data: Data = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the dense network from scratch; writes dense.safetensors."""
    request = _request(config, settings, output, model, data, resume, overwrite)
    with _started(request) as on:
        _stage(on.run.dense, f"training {on.config.model.name}", lambda: _train(on))
    _print_summary(on.run.dense, on.config.model, as_json)


@app.command("prune")
def prune_command(
    config: ConfigName = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Dense weights: .pth or .safetensors.")
    ] = None,
    data: Data = None,
    model: Model = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="macs=0.5, params=0.4, channels=0.72 or removed=3200."),
    ] = None,
    criterion: Criterion = None,
    target: TargetName = None,
    precision: PrecisionName = None,
    settings: Settings = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune a dense network step by step, shrink and finetune it; writes pruned.safetensors."""
    if (checkpoint is None) != resume:
        raise ConfigError("compress prune needs --checkpoint FILE, or --resume --output DIR")
    request = _request(
        config,
        _asked(
            settings,
            {
                "prune.budget": budget,
                "prune.criterion": criterion,
                "export.target": target,
                "export.precision": precision,
            },
        ),
        *(output, model, data, resume, overwrite),
    )
    with _started(request, prunes=True, checkpoint=checkpoint) as on:
        if checkpoint is not None and not (on.resumed and _is_there(on.run.dense)):
            from compress.runs.dense import import_dense

            import_dense(on.config, on.data, on.session, checkpoint)
        _stage(on.run.pruned, f"pruning to {on.config.prune.budget}", lambda: _prune(on))
    _print_summary(on.run.pruned, on.config.model, as_json)


@app.command("export")
def export_command(
    run: Run,
    target: TargetName = None,
    precision: PrecisionName = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Batch sizes of an engine: 1,8,32 or dynamic."),
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Also build engines with the TensorRT installed here.")
    ] = False,
    triton: Annotated[
        Path | None, typer.Option("--triton", help="Also write a Triton model repository.")
    ] = None,
    data: Data = None,
    model: Model = None,
    settings: Settings = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Export the dense and the pruned network of a run to ONNX, and prove parity with torch."""
    from compress.runs.launch import existing, reading, typed_model
    from export.summary import render_export

    options = {"export.target": target, "export.precision": precision, "export.batch": batch}
    directory, config, images = existing(run, _asked(settings, options), data)
    folder = output or directory.export
    typed = typed_model(model, settings or ())
    with reading(directory):
        delivery = _export(directory, folder, config, images, typed, engine=engine, triton=triton)
    for warning in delivery.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(asdict(delivery))
    else:
        print_table(render_export(delivery, folder))


@app.command("bench")
def bench_command(
    run: Annotated[
        Path,
        typer.Argument(
            help="Run directory; or a reference: *.onnx, *.engine, *.safetensors.", metavar="RUN"
        ),
    ],
    candidate: Annotated[
        Path | None, typer.Argument(help="Another network, measured against the reference.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="What runs the networks: onnxruntime-cpu, ...")
    ] = None,
    precision: PrecisionName = None,
    batch: Annotated[str | None, typer.Option("--batch", help="Batch sizes: 1,8,32.")] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Of a run: dense, another run directory, or a stored report."
        ),
    ] = None,
    budgets: BudgetFile = None,
    baseline: Baseline = None,
    data: BenchData = None,
    model: Model = None,
    settings: Settings = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Measure the pruned network of a run against its dense parent, or any network against another.

    Two networks may be ONNX files, engines, checkpoints and run directories, from whoever made
    them. Latency is measured, and accuracy on labelled images, or how far the two agree on others.
    """
    sizes = None if batch is None else f"[{batch}]"
    options = {
        "bench.runtime": runtime,
        "export.precision": precision,
        "bench.batch_sizes": sizes,
    }
    asked = _asked(settings, options)
    if candidate is None and run.is_file():
        raise ConfigError(f"{run} is one file: name what is measured against it as well")
    if candidate is None:
        report, folder = _bench_run(
            *(run, against, asked, data, model), budgets=budgets, baseline=baseline
        )
    elif against is not None:
        raise ConfigError("--against is for one run directory: name the two networks alone")
    else:
        report, folder = _bench_files(
            *(run, candidate, asked, data, model), budgets=budgets, baseline=baseline
        )
    verdicts = _judge(report)
    _publish(report, verdicts, output or folder)
    if candidate is not None:
        say(f"the report is in {output or folder}")
    _print_report(report, verdicts, as_json)
    raise typer.Exit(_exit_code(verdicts))


@app.command("gate")
def gate_command(
    report: ReportFile,
    budgets: BudgetFile = "default",
    baseline: Baseline = None,
    settings: Settings = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Judge a report by budgets; the exit code is the verdict."""
    from bench.judging.baseline import load_compared
    from bench.limits import load_limits

    loaded = load_limits(budgets or "default", settings or ())
    measured = load_compared(report, baseline).model_copy(update={"limits": loaded})
    verdicts = _judge(measured)
    if output is not None:
        _publish(measured, verdicts, output)
    _print_report(measured, verdicts, as_json)
    raise typer.Exit(_exit_code(verdicts))


@app.command("report")
def report_command(
    report: ReportFile,
    others: Annotated[
        list[Path] | None,
        typer.Argument(help="Further reports, shown beside it.", metavar="[OTHERS]..."),
    ] = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Write a report's Markdown, page and JUnit file again, from its JSON alone."""
    from bench.pages.publish import write_views
    from bench.reports.report import load_report

    measured, more = load_report(report), [load_report(other) for other in others or ()]
    verdicts = _judge(measured)
    write_views(measured, verdicts, output or report.parent, others=more)
    _print_report(measured, verdicts, as_json)


@app.command("baseline")
def baseline_command(
    report: ReportFile,
    output: Annotated[Path, typer.Option("--output", help="File to write: baseline.json.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the baseline in --output.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Keep a report as the baseline that later ones are judged against."""
    from bench.judging.baseline import keep_baseline

    kept = keep_baseline(report, output, overwrite=overwrite)
    say(f"the baseline is in {output}")
    _print_report(kept, [], as_json)


@app.command("oracle")
def oracle_command(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="dense.safetensors, or a run directory.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Directory to write to.")],
    config: ConfigName = None,
    data: Data = None,
    model: Model = None,
    images: Annotated[int, typer.Option("--images", help="Labelled images to measure on.")] = 1024,
    split: Annotated[str, typer.Option("--split", help="train or val.")] = "train",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images of a criterion's minibatch.")
    ] = None,
    criteria: Annotated[
        str | None, typer.Option("--criteria", help="Names, with commas; default all that can.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Also try all pairs of a group, or of all.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the choice of images.")] = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what removing each channel really does, and which criterion predicts it."""
    from compress.oracle.report import render_tables
    from compress.oracle.request import OracleRequest
    from compress.oracle.run import run_oracle

    request = OracleRequest(
        checkpoint=checkpoint,
        output=output,
        config=config,
        settings=settings or [],
        data=data,
        model=model,
        images=images,
        split=split,
        batch_size=batch_size,
        criteria=criteria,
        pairs=pairs,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
    )
    start = time.monotonic()
    document = run_oracle(request)
    say(f"{time.monotonic() - start:.0f} s; everything is in {output}")
    if as_json:
        print_json(document)
    else:
        print_table(render_tables(document))


@app.command("sweep")
def sweep_command(
    output: Annotated[Path, typer.Option("--output", help="Directory to write to.")],
    config: ConfigName = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Dense weights; without them they are trained."),
    ] = None,
    data: Data = None,
    model: Model = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option("--budget", help="A grid: macs=0.7,0.5,params=0.4; repeatable."),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", help="Search the smallest network within this top-1 drop, in pp."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Of the search: macs, params or channels.")
    ] = None,
    lowest: Annotated[
        float | None, typer.Option("--lowest", help="Of the search: least share; default 0.1.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", help="Of the search: how closely; default 0.02.")
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", help="Of the search: most networks.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", help="auto, cpu, or GPUs: cuda:0,cuda:1.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Networks at a time; default one per device.")
    ] = None,
    criterion: Criterion = None,
    target: TargetName = None,
    precision: PrecisionName = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune one dense network to several budgets, and show accuracy against cost.

    Every point is a run directory of its own, for compress export and compress bench.
    """
    from compress.sweep.report import render_sweep
    from compress.sweep.request import SweepRequest
    from compress.sweep.run import require_complete, run_sweep

    options = {
        "prune.criterion": criterion,
        "export.target": target,
        "export.precision": precision,
    }
    request = SweepRequest(
        output=output,
        config=config,
        settings=_asked(settings, options),
        checkpoint=checkpoint,
        data=data,
        model=model,
        budgets=budgets or [],
        max_drop=max_drop,
        kind=kind,
        lowest=lowest,
        tolerance=tolerance,
        points=points,
        devices=devices,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
    )
    start = time.monotonic()
    document = run_sweep(request, say, command=(sys.executable, __file__))
    say(f"{time.monotonic() - start:.0f} s; everything is in {output}")
    if as_json:
        print_json(document)
    else:
        print_table(render_sweep(document, output))
    require_complete(document, output)


@app.command("doctor")
def doctor_command(target: TargetName = None, as_json: Json = False) -> None:
    """Show what is installed here, whether it fits a target, and what mends each misfit."""
    from export.doctor import mend_lines, render_findings, run_doctor

    document = run_doctor(target)
    if as_json:
        print_json(document)
    else:
        print_table(render_findings(document))
        print_text("".join(f"{line}\n" for line in mend_lines(document)))
    raise typer.Exit(0 if document["fits"] else EnvironmentUnfitError.exit_code)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A file of weights.", metavar="FILE")],
    model: Model = None,
    settings: ModelSettings = None,
    as_json: Json = False,
) -> None:
    """Show what a file of weights holds: architecture, groups, widths, MACs, provenance."""
    from compress.runs.launch import typed_model

    _print_summary(file, typed_model(model, settings or ()), as_json)


@app.command("import")
def import_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A state dict: .pth or .safetensors.", metavar="CHECKPOINT")
    ],
    output: Annotated[Path, typer.Option("--output", help="File to write: NAME.safetensors.")],
    model: Model = None,
    data: Data = None,
    settings: Settings = None,
    classes: Annotated[
        int | None, typer.Option("--classes", min=1, help="Classes that there must be.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
    as_json: Json = False,
) -> None:
    """Write a state dict as a file of this tool; gates are taken out, and the channels they close.

    Gates are those of the research code of Molchanov et al. 2019. Nothing is trained.
    """
    from compress.runs.launch import typed_model
    from compress.seed2019.importing import data_asked_for, import_checkpoint

    typed = typed_model(model, settings or ())
    images = data_asked_for(data, settings or ())
    import_checkpoint(
        checkpoint, output, model=typed, data=images, classes=classes, overwrite=overwrite
    )
    _print_summary(output, typed, as_json)


def main() -> None:
    """Run the command line."""
    hold_on()
    try:
        app(prog_name="compress")
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
        raise


# Starting


def _started(
    request: Request, *, prunes: bool = False, exports: bool = False, checkpoint: Path | None = None
) -> AbstractContextManager[Started]:
    """Start a run whose later stages are known to be possible."""
    from compress.runs.launch import started

    checks: list[Check] = []
    if prunes:
        from compress.runs.prune import check_budget

        checks.append(check_budget)
    if exports:
        from bench.limits import load_limits, require_judgeable
        from export.stage import target_of

        checks.append(lambda config, _: target_of(config.export))
        checks.append(
            lambda config, data: require_judgeable(
                load_limits(config.bench.limits),
                images=data.val_images,
                confidence=config.bench.confidence,
                baseline=False,
            )
        )
    return started(request, checks, checkpoint)


def _request(
    config: str | None,
    settings: list[str] | None,
    output: Path | None,
    model: str | None,
    data: Path | None,
    resume: bool,
    overwrite: bool,
) -> Request:
    """Gather the options of a command that starts a run."""
    from compress.runs.launch import Request

    return Request(
        config=config,
        settings=settings or [],
        output=output,
        model=model,
        data=data,
        resume=resume,
        overwrite=overwrite,
    )


def _asked(settings: list[str] | None, options: dict[str, str | None]) -> list[str]:
    """Lay the options that were given, by the keys that they stand for, over --set."""
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    return [*(settings or []), *given]


# Stages


def _stage(result: Path, title: str, work: Callable[[], object]) -> None:
    """Do the work unless its result is there from before the run was resumed."""
    if _is_there(result):
        say(f"{title}: done before")
        return
    start = time.monotonic()
    say(title)
    work()
    say(f"{title}: {time.monotonic() - start:.0f} s")


def _is_there(result: Path) -> bool:
    """Whether a file is there for the main process; others may see it later, and do not look."""
    from compress.distributed.world import current

    return current().first(is_main() and result.is_file())


def _goes_on() -> bool:
    """Part from the other processes of the run; what is left is done by the main one."""
    from compress.distributed.world import part

    return part().main


def _train(on: Started) -> Path:
    from compress.runs.dense import train_dense

    return train_dense(on.config, on.data, on.session)


def _prune(on: Started) -> Path:
    from compress.runs.prune import prune

    return prune(on.config, on.data, on.session)


def _exported(on: Started) -> Path:
    """What an export of the run writes last."""
    from export.stage import onnx_path

    return onnx_path(on.run.export, "pruned", on.config.export.precision)


def _export(
    run: RunDirectory,
    folder: Path,
    config: RunConfig,
    data: ImageData,
    typed: ModelConfig | None,
    *,
    engine: bool = False,
    triton: Path | None = None,
) -> Exported:
    from export.stage import export_stage

    return export_stage(run, folder, config, data, typed, engine=engine, triton=triton)


def _bench_run(
    path: Path,
    against: str | None,
    asked: list[str],
    data: Path | None,
    model: str | None,
    *,
    budgets: str | None,
    baseline: Path | None,
) -> tuple[Report, Path]:
    from compress.runs.launch import existing, reading, typed_model

    run, config, images = existing(path, asked, data)
    typed = typed_model(model, asked)
    with reading(run):
        report = _measure(
            *(run, config, images), against=against, baseline=baseline, budgets=budgets, typed=typed
        )
    return report, run.path


def _bench_files(
    reference: Path,
    candidate: Path,
    asked: list[str],
    data: Path | None,
    model: str | None,
    *,
    budgets: str | None,
    baseline: Path | None,
) -> tuple[Report, Path]:
    from bench.compare import compare, read_settings
    from compress.runs.launch import typed_model
    from compress.terminal.progress import percent_bar

    settings = read_settings(asked)
    with percent_bar("measuring") as show:
        report = compare(
            *(reference, candidate, data),
            limits=budgets,
            baseline=baseline,
            model=typed_model(model, [one for one in asked if one.startswith("model.")]),
            progress=show,
            **settings,
        )
    return report, Path(f"bench-{reference.resolve().stem}-{candidate.resolve().stem}")


def _measure(
    run: RunDirectory,
    config: RunConfig,
    data: ImageData,
    *,
    against: str | None = None,
    baseline: Path | None = None,
    budgets: str | None,
    typed: ModelConfig | None,
) -> Report:
    from bench.compare import DENSE, compare_run
    from bench.limits import load_limits
    from compress.terminal.progress import percent_bar

    judged_by = load_limits(budgets) if budgets else None
    with percent_bar("measuring") as show:
        return compare_run(
            run,
            config,
            data,
            against=against or DENSE,
            baseline=baseline,
            limits=judged_by,
            typed=typed,
            progress=show,
        )


def _judge(report: Report) -> list[Verdict]:
    """Judge a report by the budgets that it names."""
    from bench.judging.quality_gate import judge

    return judge(report, report.limits) if report.limits else []


def _exit_code(verdicts: list[Verdict]) -> int:
    from bench.judging.verdicts import exit_code

    return exit_code(verdicts) if verdicts else 0


# What is printed


def _publish(report: Report, verdicts: list[Verdict], folder: Path) -> None:
    from bench.pages.publish import publish

    publish(report, verdicts, folder)


def _print_report(report: Report, verdicts: list[Verdict], as_json: bool) -> None:
    if as_json:
        from bench.reports.report import sealed

        judged = [asdict(verdict) for verdict in verdicts]
        print_json({"report": sealed(report), "verdicts": judged})
    else:
        from bench.pages.publish import render_table

        print_table(render_table(report, verdicts))


def _print_summary(path: Path, typed: ModelConfig | None, as_json: bool) -> None:
    if not is_main():
        return
    from compress.checkpoints.summary import inspect_checkpoint, render_summary

    document = inspect_checkpoint(path, typed)
    if as_json:
        print_json(document)
    else:
        print_table(render_summary(document))


if __name__ == "__main__":
    main()
