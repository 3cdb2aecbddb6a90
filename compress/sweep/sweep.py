"""A sweep at work: the dense network, then its points, wave after wave."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.config import Budget
from compress.data.datasets import load_data
from compress.errors import CompressError, InterruptedRunError
from compress.files.atomic import write_atomically, write_json
from compress.networks.models import is_builtin
from compress.runs.dense import import_dense, note_import
from compress.runs.session import Session
from compress.sweep.flips import Flips, ShareInterval, count_flips
from compress.sweep.picture import plot_sweep
from compress.sweep.plan import Search, SearchState, misses, search_state
from compress.sweep.points import (
    SweepFiles,
    dense_accuracy,
    name_of,
    point_metrics,
    prepare_point,
)
from compress.sweep.processes import Ended, Slot, Task, run_tasks
from compress.sweep.report import PointState, stored_flips, sweep_csv, sweep_document
from compress.sweep.request import Goal
from compress.sweep.times import time_words

Say = Callable[[str], None]
DENSE = "dense"


@dataclass
class Sweep:
    """A sweep, what has failed in this process, and what everything took so far, in seconds."""

    goal: Goal
    files: SweepFiles
    slots: tuple[Slot, ...]
    command: Sequence[str]
    """Starts this tool's command line in a process."""
    say: Say
    interval: ShareInterval
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    flips: dict[str, Flips] = field(default_factory=dict)

    def remember(self, document: dict[str, Any]) -> None:
        """Take over what an earlier process spent and counted, as ``read_goal`` returns it."""
        for row in (document[DENSE], *document["points"]):
            self.seconds[row["name"]] = row["seconds"]
            if counted := stored_flips(row):
                self.flips[row["name"]] = counted

    def run(self) -> dict[str, Any]:
        """Do what is not done yet, and return the document."""
        self.write()
        self.make_dense()
        self.write()
        self.say_done_before()
        while wave := self.unfinished():
            self.prune(wave)
        self.compare()
        document = self.write()
        plot_sweep(self.files.plot, document)
        return document

    # The dense network

    def make_dense(self) -> None:
        """Train the dense network, or read it and measure its accuracy."""
        run = self.files.dense
        if self.has_dense:
            return
        asked = self.goal.config.model_copy(update={"device": "auto"})
        if self.goal.checkpoint:
            self.say(f"dense: reading and measuring {self.goal.checkpoint}")
            start = time.monotonic()
            config = self.goal.config.model_copy(update={"device": self.slots[0].device})
            data = load_data(config.data)
            import_dense(config, data, self.goal.checkpoint, run.imported, self.goal.weights)
            run.begin(asked)
            note_import(Session(run))
            self.seconds[DENSE] = time.monotonic() - start
        else:
            if not run.is_begun:
                run.begin(asked)
            task = self.task(DENSE, "train")
            self.all_run([task], self.slots[:1])
        if DENSE in self.errors:
            raise CompressError(
                f"the dense network was not trained: {self.errors[DENSE]}; the log is "
                f"{self.files.log(DENSE)}, go on with --resume --output {self.quoted}"
            )

    # Points

    def unfinished(self) -> list[Budget]:
        """Return the points to start now; none when all are done, or when a search has failed."""
        if self.goal.search and self.errors:
            return []
        names = {*self.errors, *(state.name for state in self.states() if state.metrics)}
        return [budget for budget in self.budgets() if name_of(budget) not in names]

    def prune(self, budgets: Sequence[Budget]) -> None:
        """Prune to budgets, as many at a time as there are places."""
        for budget in budgets:
            prepare_point(self.files, budget, self.goal.config)
        self.all_run([self.task(name_of(budget), "prune") for budget in budgets], self.slots)

    def compare(self) -> None:
        """Count, for every finished point, which images it answers otherwise than the dense."""
        config = self.goal.config.model_copy(update={"device": self.slots[0].device})
        new = {
            state.name: self.files.run(state.name).pruned
            for state in self.states()
            if state.metrics and state.name not in self.flips
        }
        if new:
            self.flips |= count_flips(self.files.dense.dense, new, config)

    def budgets(self) -> tuple[Budget, ...]:
        """Return the points that are known so far: in a search, those of the rounds until now."""
        search, state = self.goal.search, self.search()
        if search is None or state is None:
            return self.goal.budgets
        return tuple(search.budget(share) for share in (*state.tried, *state.next))

    def search(self) -> SearchState | None:
        """Return where a search stands by the points that are finished, and by nothing else."""
        search, within = self.goal.search, dict[float, bool]()
        if search is None:
            return None
        while True:
            state = search_state(search, within)
            new = {share: self.within(search, share) for share in state.next if share not in within}
            known = {share: good for share, good in new.items() if good is not None}
            if not known:
                return state
            within |= known

    def within(self, search: Search, share: float) -> bool | None:
        """Return whether a point is accurate, and fast, enough; None before it is finished."""
        budget = search.budget(share)
        found = point_metrics(self.files.run(name_of(budget)))
        if found is None:
            return None
        dense = dense_accuracy(self.files.dense)
        accurate = search.within(dense["top1"], found["finetuned"]["top1"])
        return accurate and not misses(budget, found.get("latency"))

    # Processes

    def task(self, name: str, stage: str) -> Task:
        """Return what goes on with a run, or starts one that is prepared."""
        path, model = str(self.files.run(name).path), self.goal.config.model
        # The process may be unable to read the notes of this one.
        own = () if is_builtin(model) else model.words
        return Task(name, (stage, "--resume", "--output", path, *own), self.files.log(name))

    def all_run(self, tasks: Sequence[Task], slots: Sequence[Slot]) -> None:
        """Run tasks, or raise InterruptedRunError when the user stopped them."""
        done = run_tasks(tasks, slots, command=self.command, started=self.started, ended=self.ended)
        if not done:
            self.write()
            raise InterruptedRunError(self.advice())

    def started(self, task: Task, slot: Slot) -> None:
        """Say what has been started."""
        doing = "training" if task.name == DENSE else "pruning"
        self.say(f"{self.title(task.name)}: {doing} on {slot.device}, log in {task.log}")

    def ended(self, end: Ended) -> None:
        """Keep how a process ended; with a stop that the user asked for nothing has failed."""
        name = end.task.name
        self.seconds[name] = self.seconds.get(name, 0.0) + end.seconds
        run = self.files.run(name)
        result = run.dense if name == DENSE else run.pruned
        if result.is_file():
            self.say(
                f"{self.title(name)}: done in {self.seconds[name]:.0f} s, {self.figures(name)}"
            )
        elif end.stopped:
            self.say(f"{self.title(name)}: stopped")
        else:
            self.errors[name] = end.words
            self.say(f"{self.title(name)}: failed: {end.words}")
        self.write()

    # What is said and written

    def write(self) -> dict[str, Any]:
        """Write the document and the table, and return the document."""
        document = sweep_document(
            self.goal,
            accuracy=dense_accuracy(self.files.dense) if self.has_dense else None,
            dense_seconds=self.seconds.get(DENSE, 0.0),
            points=self.states(),
            search=self.search(),
            chosen=self.chosen(),
            interval=self.interval,
        )
        write_json(self.files.document, document)
        write_atomically(self.files.table, sweep_csv(document))
        return document

    @property
    def has_dense(self) -> bool:
        """Whether the dense network is there."""
        return self.files.dense.dense.is_file()

    def states(self) -> list[PointState]:
        """Return what is known of each point."""
        return [
            PointState(
                name_of(budget),
                budget,
                point_metrics(self.files.run(name_of(budget))),
                self.errors.get(name_of(budget)),
                self.seconds.get(name_of(budget), 0.0),
                self.flips.get(name_of(budget)),
            )
            for budget in self.budgets()
        ]

    def chosen(self) -> str | None:
        """Return the name of the point that a search which is over has found."""
        search, state = self.goal.search, self.search()
        if search is None or state is None or state.next or state.passed == 1:
            return None
        return name_of(search.budget(state.passed))

    def say_done_before(self) -> None:
        """Say which points an earlier process has finished."""
        for state in self.states():
            if state.metrics:
                self.say(f"{state.budget}: done before, {self.figures(state.name)}")

    def figures(self, name: str) -> str:
        """Return the accuracy of a finished network in words."""
        dense = dense_accuracy(self.files.dense)["top1"]
        found = None if name == DENSE else point_metrics(self.files.run(name))
        if found is None:
            return f"top-1 {dense:.2f} %"
        top1, latency = found["finetuned"]["top1"], found.get("latency")
        said = f"top-1 {top1:.2f} % ({top1 - dense:+.2f} pp)"
        budget = Budget.model_validate(self.title(name))
        return f"{said}, {time_words(budget, latency)}" if latency else said

    def title(self, name: str) -> str:
        """Return the budget that a name stands for."""
        return name.replace("-", "=", 1)

    def advice(self) -> str:
        """Say how a sweep that was stopped goes on."""
        return f"stopped; all states are saved, go on with --resume --output {self.quoted}"

    @property
    def quoted(self) -> str:
        """The directory, for a shell."""
        return shlex.quote(str(self.files.path))
