"""A run measured as the command line asks for it: against what, by which budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.benchmark import benchmark
from bench.budgets import Budgets, require_judgeable
from bench.judging.change import change_against, require_same_model
from bench.reports.report import load_report
from bench.reports.schema import GroupRecord, Report
from bench.subject import subjects
from compress.checkpoints.description import Description, read_description
from compress.checkpoints.permission import is_allowed
from compress.checkpoints.summary import inspect_checkpoint
from compress.data.batches import ImageData, eval_batches
from compress.errors import ConfigError
from compress.runs.rundirectory import RunDirectory

if TYPE_CHECKING:
    from compress.config import ModelConfig, RunConfig
    from compress.progress import Progress

DENSE = "dense"


@dataclass(frozen=True)
class Against:
    """What a pruned network is compared with besides its dense parent, if anything."""

    run: Path | None = None
    """A run whose pruned network is measured in place of the dense one."""
    stored: Report | None = None
    """A report of an earlier measurement."""


def against_what(word: str, baseline: Path | None = None) -> Against:
    """Read ``--against`` (``dense``, a run directory, or a stored report) and ``--baseline``.

    Raises:
        ConfigError: it is none of these, or two reports are named.
        CheckpointError: the report cannot be read.
    """
    stored = load_report(baseline) if baseline else None
    path = Path(word)
    if word == DENSE:
        return Against(stored=stored)
    if path.is_dir():
        return Against(run=path, stored=stored)
    if path.is_file() and baseline is not None:
        raise ConfigError(f"--against {word} and --baseline {baseline} are both stored reports")
    if path.is_file():
        return Against(stored=load_report(path))
    raise ConfigError(
        f"--against {word} is neither {DENSE}, nor a run directory, nor a report.json"
    )


def load_compared(path: Path, baseline: Path | None) -> Report:
    """Read a report, and compare it with a baseline if one is named.

    Raises:
        CheckpointError: a file cannot be read, or the baseline is of another model.
    """
    report = load_report(path)
    if baseline is None:
        return report
    return report.model_copy(update={"change": change_against(report, load_report(baseline))})


def measure_run(
    run: RunDirectory,
    config: RunConfig,
    data: ImageData,
    *,
    against: Against = Against(),
    budgets: Budgets | None = None,
    typed: ModelConfig | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure the pruned network of a run, and put the budgets into the report unjudged.

    Args:
        run: the run directory.
        config: its configuration.
        data: validation images.
        against: what it is compared with.
        budgets: what it will be judged by; those that so few images cannot decide are refused.
        typed: the network that the user asked for, where it is not built in.
        progress: told about every step.

    Raises:
        CompressError: as ``benchmark``, ``change_against`` and ``require_judgeable``.
    """
    if budgets is not None:
        require_judgeable(
            budgets,
            images=data.val_images,
            confidence=config.bench.confidence,
            baseline=against.stored is not None,
        )
    if against.stored is not None:
        _check_stored(against.stored, run, config, against.run)

    def batches() -> Iterator[Any]:
        size, workers = config.data.eval_batch_size, config.data.workers
        return eval_batches(data.val, batch_size=size, workers=workers)

    description = read_description(run.pruned)
    report = benchmark(
        run.path,
        config=config.bench,
        batches_factory=batches,
        identity=data.identity,
        precision=config.export.precision,
        against=against.run,
        typed=typed,
        groups=_groups(run.pruned, description, typed),
        pruning=description.metrics if description else None,
        seed=config.seed,
        progress=progress,
    )
    change = change_against(report, against.stored) if against.stored else None
    return report.model_copy(update={"budgets": budgets, "change": change})


def _check_stored(
    stored: Report, run: RunDirectory, config: RunConfig, against: Path | None
) -> None:
    """Refuse a stored report of another model before any time is spent on measuring."""
    precision = config.export.precision
    found = subjects(run.path, config=config.bench, precision=precision, against=against)
    require_same_model(
        stored,
        architecture=found["pruned"].facts["architecture"],
        reference=found["reference"].facts["weights_sha256"],
        config=config.bench,
        precision=precision,
        target=found["pruned"].facts["target"],
        against="dense" if against is None else "run",
    )


def _groups(
    pruned: Path, description: Description | None, typed: ModelConfig | None
) -> tuple[GroupRecord, ...]:
    """Return the channel groups of a pruned network, without those that may not be pruned.

    None of a network that may not be built here: runtimes that read its export measure it as well.
    """
    if description is None or not is_allowed(description.model, typed, pruned):
        return ()
    groups = inspect_checkpoint(pruned, typed)["groups"]
    return tuple(
        GroupRecord(**{name: group[name] for name in GroupRecord.model_fields})
        for group in groups
        if group["frozen"] is None
    )
