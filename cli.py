"""The command line: parse, load the configuration, call the library, print, exit with a code."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bench.request import BaselineRequest, BenchRequest, GateRequest, ReportRequest
from compress.distributed.torchrun import is_main, leave, require_one_process
from compress.errors import (
    CompressError,
    EnvironmentUnfitError,
    InterruptedRunError,
    refused_by_the_machine,
)
from compress.runs.request import (
    ImportRequest,
    OracleRequest,
    PruneRequest,
    Request,
    RunRequest,
    SweepRequest,
)
from compress.terminal.console import (
    log_to_stderr,
    open_all,
    print_json,
    print_table,
    print_text,
    say,
    say_error,
)
from compress.terminal.options import SWITCH, say_plainly, takes_request
from compress.terminal.signals import hold_on, sigterm_as_ctrl_c
from export.request import DoctorRequest, ExportRequest, ProfileRequest

# Nothing else is imported up here: --help must not wait for torch.
if TYPE_CHECKING:
    from bench.commands import Judged
    from compress.checkpoints.permission import Permission

EXIT_CODES = (
    "Exit codes: 0 done, every limit holds; 1 the command could not do its job; 2 usage or "
    "configuration; 3 a limit is violated; 4 inconclusive; 5 the environment is unfit or a limit "
    "could not be judged here; 6 parity failed; 130 interrupted."
)


class Commands(TyperGroup):
    """The one place where a user's error becomes a sentence on stderr and an exit code."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, with typer's own ones shown as the switches that they are."""
        return [
            _as_switch(param) if getattr(param, "is_flag", False) else param
            for param in super().get_params(ctx)
        ]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, whose ``--help`` is shown so as well."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _as_switch(command.get_help_option(ctx))
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a bug keeps its traceback."""
        try:
            with sigterm_as_ctrl_c():
                return super().invoke(ctx)
        except typer.BadParameter as error:
            say_plainly(error)
            raise
        except CompressError as error:
            say_error(str(error))
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            known = refused_by_the_machine(error)
            if known is None:
                raise
            say_error(str(known))
            raise typer.Exit(known.exit_code) from error
        except KeyboardInterrupt as error:
            say("stopped")
            raise typer.Exit(InterruptedRunError.exit_code) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make trained convolutional networks small and fast, and prove it.",
    epilog=EXIT_CODES,
)

Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout, nothing else.", metavar=SWITCH),
]


@app.callback(invoke_without_command=True)
def main_options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Make trained convolutional networks small and fast, and prove it."""
    log_to_stderr()
    if context.invoked_subcommand not in (None, "run", "train", "prune"):
        require_one_process(context.invoked_subcommand)
    if version:
        from compress import __version__

        print(f"compress {__version__}")
        raise typer.Exit


@app.command("run")
@takes_request
def run_command(request: PruneRequest, as_json: Json = False) -> None:
    """Do everything: train, prune, finetune, export, bench and gate.

    Without arguments: a ResNet-20 on embedded handwritten digits.
    With --checkpoint, the dense network is read and not trained.
    """
    from bench.commands import whole_run

    start = time.monotonic()
    judged = whole_run(request)
    if judged is not None:
        _print_report(judged, as_json)
        judged.publish()
        say(f"{time.monotonic() - start:.0f} s; everything is in {judged.folder}")
        raise typer.Exit(judged.exit_code)


@app.command("train")
@takes_request
def train_command(request: RunRequest, as_json: Json = False) -> None:
    """Train the dense network from scratch; writes dense.safetensors."""
    from compress.runs.stages import train_run

    on = train_run(request)
    _print_weights(on.run.dense, on.permission, as_json)


@app.command("prune")
@takes_request
def prune_command(request: PruneRequest, as_json: Json = False) -> None:
    """Prune a dense network step by step, shrink and finetune it; writes pruned.safetensors."""
    from bench.commands import prune

    on = prune(request)
    _print_weights(on.run.pruned, on.permission, as_json)


@app.command("export")
@takes_request
def export_command(request: ExportRequest, as_json: Json = False) -> None:
    """Export the dense and the pruned network of a run to ONNX, and prove parity with torch."""
    from export.stage import export_existing
    from export.summary import render_export

    exported, folder = export_existing(request)
    for warning in exported.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(asdict(exported))
    else:
        print_table(render_export(exported, folder))


@app.command("profile")
@takes_request
def profile_command(request: ProfileRequest, as_json: Json = False) -> None:
    """Measure a latency table: what each layer of a network takes here, by its widths."""
    from compress.latency.table import document_of
    from export.latency.command import profile_asked_for
    from export.latency.summary import render_latency

    profiled = profile_asked_for(request)
    if not profiled.measured:
        say(f"{profiled.path} was measured before and holds")
    if as_json:
        print_json(document_of(profiled.table))
    else:
        print_table(render_latency(profiled.table, profiled.path))


@app.command("bench")
@takes_request
def bench_command(request: BenchRequest, as_json: Json = False) -> None:
    """Measure the pruned network of a run against its dense parent, or any network against another.

    Two networks may be ONNX files, engines, checkpoints and run directories,
    from whoever made them. Latency is measured, and accuracy on labelled images,
    or how far the two agree on others.
    """
    from bench.commands import bench

    judged = bench(request)
    _print_report(judged, as_json)  # before it is written: it took minutes
    judged.publish()
    say(f"the report is in {judged.folder}")
    raise typer.Exit(judged.exit_code)


@app.command("gate")
@takes_request
def gate_command(request: GateRequest, as_json: Json = False) -> None:
    """Judge a report by limits; the exit code is the verdict."""
    from bench.commands import gate

    judged = gate(request)
    _print_report(judged, as_json)
    if request.output is not None:
        judged.publish()
        say(f"the report is in {judged.folder}")
    raise typer.Exit(judged.exit_code)


@app.command("report")
@takes_request
def report_command(request: ReportRequest, as_json: Json = False) -> None:
    """Write a report's Markdown, page and JUnit file again, from its JSON alone.

    Where several are given, the pages are of the first,
    and set all of them side by side.
    """
    from bench.commands import show_again
    from bench.pages.publish import render_reports

    judged = show_again(request)
    _print_report(judged, as_json)
    if judged.reports and not as_json:
        print_table(render_reports(judged.reports))
    judged.publish_views()
    say(f"report.md and report.html are in {judged.folder}")


@app.command("baseline")
@takes_request
def baseline_command(request: BaselineRequest, as_json: Json = False) -> None:
    """Keep a report as the baseline that later ones are judged against."""
    from bench.commands import keep
    from bench.reports.report import save_report

    kept = keep(request)
    _print_report(kept, as_json)
    save_report(kept.report.model_copy(update={"change": None}), request.output)
    say(f"the baseline is in {request.output}")


@app.command("oracle")
@takes_request
def oracle_command(request: OracleRequest, as_json: Json = False) -> None:
    """Measure what removing each channel really does, and which criterion predicts it."""
    from compress.oracle.report import render_tables
    from compress.oracle.run import run_oracle

    start = time.monotonic()
    document = run_oracle(request)
    say(f"{time.monotonic() - start:.0f} s; everything is in {request.output}")
    if as_json:
        print_json(document)
    else:
        print_table(render_tables(document))


@app.command("sweep")
@takes_request
def sweep_command(request: SweepRequest, as_json: Json = False) -> None:
    """Prune one dense network to several budgets, and show accuracy against cost.

    Every point is a run directory of its own,
    for compress export and compress bench.
    """
    from bench.statistics.shares import tango_interval
    from compress.sweep.report import render_sweep
    from compress.sweep.run import require_complete, run_sweep

    start = time.monotonic()
    command = (sys.executable, __file__)
    document = run_sweep(request, say, command=command, interval=tango_interval)
    say(f"{time.monotonic() - start:.0f} s; everything is in {request.output}")
    if as_json:
        print_json(document)
    else:
        print_table(render_sweep(document, request.output))
    require_complete(document, request.output)


@app.command("doctor")
@takes_request
def doctor_command(request: DoctorRequest, as_json: Json = False) -> None:
    """Show what is installed here, whether it fits a target, and what mends each misfit."""
    from export.doctor import mend_lines, render_findings, run_doctor

    document = run_doctor(request.target)
    if as_json:
        print_json(document)
    else:
        print_table(render_findings(document))
        print_text("".join(f"{line}\n" for line in mend_lines(document)))
    raise typer.Exit(0 if document["fits"] else EnvironmentUnfitError.exit_code)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A file of weights.", metavar="FILE")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The network, where the file does not say which it is."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="model.options.KEY=VALUE; repeatable.", metavar="<str>"),
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Which weights, where it holds several sets.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a file of weights holds: architecture, groups, widths, MACs, provenance."""
    request = Request(model=model, settings=tuple(settings or ()))
    _print_weights(file, request.permission, as_json, weights)


@app.command("import")
@takes_request
def import_command(request: ImportRequest, as_json: Json = False) -> None:
    """Write a state dict as a file of this tool; gates are taken out, and the channels they close.

    Gates are those of the research code of Molchanov et al. 2019.
    Nothing is trained.
    """
    from compress.seed2019.importing import import_asked_for

    _print_weights(import_asked_for(request), request.permission, as_json)


def main() -> None:
    """Run the command line."""
    open_all()
    hold_on()
    try:
        app(prog_name="compress")
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
        raise


def _as_switch(option: Any) -> Any:
    if option is not None:
        option.metavar = SWITCH
    return option


def _print_report(judged: Judged, as_json: bool) -> None:
    if as_json:
        print_json(judged.document)
    else:
        from bench.pages.publish import render_table

        print_table(render_table(judged.report, judged.verdicts))


def _print_weights(
    path: Path, permission: Permission, as_json: bool, key: str | None = None
) -> None:
    """Print what a file of weights holds, in the main process of several."""
    if not is_main():
        return
    from compress.checkpoints.summary import inspect_checkpoint, render_summary

    document = inspect_checkpoint(path, permission, key)
    if as_json:
        print_json(document)
    else:
        print_table(render_summary(document))


if __name__ == "__main__":
    main()
