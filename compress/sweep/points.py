"""The files of a sweep, and the run directory of each point."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoints.description import read_description
from compress.config import Budget, PruneConfig, RunConfig
from compress.errors import CheckpointError, ConfigError, writing
from compress.files.atomic import link_or_copy, real_name, write_atomically
from compress.files.documents import Section, validated
from compress.runs.lock import locked
from compress.runs.rundirectory import (
    RunDirectory,
    check_directory,
    check_resumable,
    entries_of,
)
from compress.sweep.request import read_goal

STAGES = ("masked", "pruned", "finetuned")
"""When a point's accuracy is measured: before the shrink, after it, at the end."""
COSTS = ("macs", "params", "channels")


def name_of(budget: Budget) -> str:
    """Return the name of a point's run directory."""
    return str(budget).replace("=", "-")


@dataclass(frozen=True)
class SweepFiles:
    """The files of a sweep, by name."""

    path: Path

    @property
    def document(self) -> Path:
        """What was asked, and what was found."""
        return self.path / "sweep.json"

    @property
    def table(self) -> Path:
        """One row for each network."""
        return self.path / "sweep.csv"

    @property
    def plot(self) -> Path:
        """Accuracy against costs."""
        return self.path / "pareto.png"

    @property
    def latency(self) -> Path:
        """What measured the latency table of budgets of time, and the table."""
        return self.path / "latency"

    @property
    def lock(self) -> Path:
        """Held by the sweep that works here."""
        return self.path / "state" / "lock"

    @property
    def dense(self) -> RunDirectory:
        """The run of the dense network."""
        return self.run("dense")

    def run(self, name: str) -> RunDirectory:
        """Return the run directory of a point."""
        return RunDirectory(self.path / name)

    def log(self, name: str) -> Path:
        """Return what the processes of a point printed."""
        return self.path / f"{name}.log"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a directory that must not be written.

        Raises:
            ConfigError: it is a file, not empty, or holds nothing to go on with or to overwrite.
        """
        if resume:
            check_resumable(self.document)
            return
        marker = self.document
        own = {self.document.name, self.table.name, self.plot.name}
        held = [path for path in self._entries() if real_name(path.name) not in own]
        check_directory(self.path, held, marker=marker, holds=marker.name, overwrite=overwrite)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other sweeps out of the directory, which is made, until the block ends.

        A directory that is empty then is removed.

        Raises:
            ConfigError: another sweep is at work in it.
            OutputError: it cannot be made.
        """
        try:
            with locked(self.lock):
                yield
        finally:
            with suppress(OSError):  # it is not empty
                self.path.rmdir()

    def clear(self) -> None:
        """Remove the files of an earlier sweep and of its runs, and only those.

        Raises:
            OutputError: they cannot be removed.
        """
        if not self.document.is_file():
            return
        names = ["dense"]
        with suppress(ConfigError):  # damaged; what it holds is not known
            names += [point["name"] for point in read_goal(self.document)[1]["points"]]
        for name in names:
            run = self.run(Path(name).name)
            if run.is_begun:
                run.begin(RunConfig())  # removes what runs write, and leaves a configuration
                run.config.unlink(missing_ok=True)
                with suppress(OSError):  # somebody else's files lie there
                    run.path.rmdir()
            with writing(self.path):
                self.log(run.path.name).unlink(missing_ok=True)
        with writing(self.path):
            for file in (self.table, self.plot, self.document):
                file.unlink(missing_ok=True)

    def discard_if_bare(self) -> None:
        """Remove what was written before anything was done: the documents and bare runs."""
        self.dense.discard_if_bare()
        if self._entries() <= {self.document, self.table}:
            self.table.unlink(missing_ok=True)
            self.document.unlink(missing_ok=True)

    def _entries(self) -> set[Path]:
        """Return what lies here besides the lock, and a latency table, which a new sweep takes."""
        return {*entries_of(self.path)} - {self.lock.parent, self.latency}


def prepare_point(files: SweepFiles, budget: Budget, config: RunConfig) -> RunDirectory:
    """Make a run directory in which ``compress prune --resume`` prunes the dense network.

    One that was made before is left as it is. The dense network is a hard link where the file
    system has them; the first line of the history comes last, and says that the directory is ready.

    Raises:
        OutputError: it cannot be written.
    """
    run = files.run(name_of(budget))
    if run.dense.is_file() and run.events():
        return run
    asked = point_config(config, budget)
    if budget.kind == "latency":  # one table serves all
        kept = {"latency_cache": table_folder(files, config)}
        asked = asked.model_copy(update={"prune": asked.prune.model_copy(update=kept)})
    accuracy = dense_accuracy(files.dense)
    event = {"event": "dense", "checkpoint": files.dense.dense.name, **accuracy}
    with writing(run.path):
        run.imported.parent.mkdir(parents=True, exist_ok=True)
    link_or_copy(files.dense.dense, run.imported)
    run.begin(asked)
    write_atomically(run.history, json.dumps(event) + "\n")
    return run


class _Pruning(Section):
    """What messages call the settings of pruning."""

    prune: PruneConfig


def point_config(config: RunConfig, budget: Budget) -> RunConfig:
    """Return the configuration of a point; the sweep shows its process one device alone.

    Raises:
        ConfigError: other settings exclude such a budget.
    """
    asked = {"prune": {**config.prune.model_dump(), "budget": budget}}
    checked = validated(_Pruning, asked, source=f"the budget {budget}")
    return config.model_copy(update={"prune": checked.prune, "device": "auto"})


def table_folder(files: SweepFiles, config: RunConfig) -> Path:
    """Return where the latency table of all points lies."""
    return config.prune.latency_cache or files.latency.absolute()


def dense_accuracy(run: RunDirectory) -> dict[str, Any]:
    """Return what the file of the dense network says of its accuracy.

    Raises:
        CheckpointError: it says nothing, or cannot be read.
    """
    accuracy = _metrics(run.dense).get("accuracy")
    if not isinstance(accuracy, Mapping) or "top1" not in accuracy:
        raise CheckpointError(f"{run.dense} does not say how accurate its network is")
    return dict(accuracy)


def point_metrics(run: RunDirectory) -> dict[str, Any] | None:
    """Return the figures of a finished point; None for one that is not.

    Raises:
        CheckpointError: its file is damaged, or not of a pruned network.
    """
    if not run.pruned.is_file():
        return None
    metrics = _metrics(run.pruned)
    try:
        return {
            "dense": {key: metrics["dense"][key] for key in COSTS},
            "costs": {key: metrics["finetuned"][key] for key in COSTS},
            **{s: {key: metrics[s][key] for key in ("top1", "top5")} for s in STAGES},
            **({"latency": dict(metrics["latency"])} if "latency" in metrics else {}),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.pruned} is not of this sweep: remove {run.path} to prune it again"
        ) from error


def _metrics(file: Path) -> dict[str, Any]:
    description = read_description(file)
    return description.metrics if description else {}
