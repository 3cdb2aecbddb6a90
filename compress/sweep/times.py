"""Budgets of time in a sweep: one latency table for all points, measured before anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.config import Budget, PruneConfig, RunConfig, save_config
from compress.errors import (
    CompressError,
    ConfigError,
    EnvironmentUnfitError,
    InterruptedRunError,
    TableError,
)
from compress.latency.table import read_table, table_name
from compress.networks.models import is_builtin
from compress.sweep.plan import misses
from compress.sweep.points import SweepFiles, table_folder
from compress.sweep.processes import Ended, Slot, Task, run_tasks
from compress.sweep.request import Goal

TABLE = "latency-table"
KINDS: Mapping[int, type[CompressError]] = {2: ConfigError, 5: EnvironmentUnfitError}
"""What an exit code of ``compress profile`` says, where it is no matter of the table."""


def needs_table(goal: Goal) -> bool:
    """Whether a latency table must be measured: a budget is a time, and none is given."""
    kinds = {budget.kind for budget in goal.budgets} | {goal.search and goal.search.kind}
    return "latency" in kinds and goal.config.prune.latency_table is None


def planned_with(config: RunConfig, table: Path) -> RunConfig:
    """Return a configuration that plans with a table."""
    pruning = config.prune.model_copy(update={"latency_table": table})
    return config.model_copy(update={"prune": pruning})


def measure_table(
    goal: Goal,
    files: SweepFiles,
    slot: Slot,
    command: Sequence[str],
    say: Callable[[str], None],
) -> Path:
    """Measure the latency table of a sweep in a process of its own, unless it is there and holds.

    The network has fresh weights: no time depends on them. A table stays whatever becomes of the
    sweep, and so does what was measured of one, for the same command to go on with.

    Returns:
        The table's file.

    Raises:
        TableError: the machine is too noisy, or a layer cannot be measured by itself.
        ConfigError: settings that no table is measured for.
        EnvironmentUnfitError: the runtime or its device is not there.
        InterruptedRunError: the user stopped.
        OutputError: the directory cannot be written.
    """
    config = files.latency / "config.toml"
    save_config(goal.config, config)
    table = table_folder(files, goal.config) / _name(goal.config.prune)
    task = Task(TABLE, profile_words(goal.config, config, table), files.latency / "profile.log")
    before = table.stat().st_mtime_ns if table.exists() else None
    doing = "measuring" if before is None else "looking whether it holds"
    say(f"latency table: {doing} on {slot.device}, log in {task.log}")
    ends: list[Ended] = []
    done = run_tasks([task], [slot], command=command, started=lambda *_: None, ended=ends.append)
    if not done:
        raise InterruptedRunError(
            f"stopped; what was measured of the latency table is kept in {table.parent}, and the "
            "same command goes on"
        )
    (end,) = ends
    if end.code != 0:
        raise KINDS.get(end.code, TableError)(
            f"no latency table was measured: {end.words}; the log is {task.log}"
        )
    found, kept = read_table(table), table.stat().st_mtime_ns == before
    when = "measured before" if kept else f"done in {end.seconds:.0f} s"
    say(
        f"latency table: {when}, the dense network takes {found.dense_ms:.4g} ms, others are "
        f"predicted within {found.error.mean:.1%}, at worst {found.error.largest:.1%}"
    )
    return table


def profile_words(config: RunConfig, file: Path, table: Path) -> tuple[str, ...]:
    """Return the words of ``compress profile`` for the network of a configuration's file."""
    pruning, model = config.prune, config.model
    words = ["profile", "--config", str(file), "--output", str(table)]
    for name in ("runtime", "precision", "batch", "threads"):
        words += [f"--{name}", str(getattr(pruning, f"latency_{name}"))]
    return (*words, *(() if is_builtin(model) else model.words))


def _name(pruning: PruneConfig) -> str:
    """Return the name under which a run looks for its table in ``prune.latency_cache``."""
    words = ("runtime", "precision", "batch", "threads")
    return table_name(*(getattr(pruning, f"latency_{word}") for word in words))


def time_words(budget: Budget, latency: Mapping[str, Any]) -> str:
    """Say what a network takes, and whether that misses its budget."""
    if "measured_ms" not in latency:
        return (
            f"predicted {latency['predicted_ms']:.4g} ms, {100 * latency['predicted_share']:.1f} %"
            " of the dense time"
        )
    low, high = (100 * bound for bound in latency["measured_interval"])
    said = (
        f"measured {latency['measured_ms']:.4g} ms, {100 * latency['measured_share']:.1f} % of the "
        f"dense time ({low:.1f} to {high:.1f})"
    )
    return f"{said}, which misses the budget" if misses(budget, latency) else said
