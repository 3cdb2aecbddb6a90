"""``compress sweep`` from its options to its files."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.config import Budget, RunConfig
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.distributed.torchrun import started_again
from compress.errors import BudgetError, CompressError, InterruptedRunError
from compress.files.documents import validated
from compress.latency.times import network_milliseconds
from compress.networks import cost
from compress.networks.trial import tried_graph
from compress.pruning.choice.widths import Chooser
from compress.pruning.decision import prunable
from compress.pruning.goal import times_for
from compress.pruning.masking import smallest
from compress.runs.dense import check_logits, fresh_network, read_dense
from compress.runs.prune import check_budget
from compress.runs.request import SweepRequest
from compress.sweep.flips import ShareInterval
from compress.sweep.plan import DECIMALS, Search
from compress.sweep.points import SweepFiles, point_config
from compress.sweep.processes import Slot, slots_for
from compress.sweep.report import drop_words
from compress.sweep.request import Goal, check_options, goal_of, read_goal
from compress.sweep.sweep import Say, Sweep
from compress.sweep.times import measure_table, needs_table, planned_with, time_words


def run_sweep(
    request: SweepRequest, say: Say, command: Sequence[str], interval: ShareInterval
) -> dict[str, Any]:
    """Prune one dense network to several budgets, each as a run of its own, and compare them.

    Everything that can be refused is refused before a file is written; what only a latency table
    can tell, before anything is trained. A point that fails does not stop the others of a grid; the
    document says so.

    Args:
        request: the options.
        say: told of what starts and ends, in lines.
        command: the words that start this tool's command line, to which each process of the sweep
            adds its arguments: ``(sys.executable, cli.__file__)``.
        interval: gives the drop of accuracy its bounds.

    Returns:
        The document that is written as ``sweep.json``.

    Raises:
        ConfigError: options that cannot be understood, or a directory that must not be written.
        BudgetError: a budget that cannot be reached.
        CheckpointError: the checkpoint is missing, damaged, pruned or of another network.
        TableError: a latency table of something else, or a machine too noisy for one.
        EnvironmentUnfitError: a device is not there.
        InterruptedRunError: the user stopped; the states of all runs are saved.
        CompressError: the dense network could not be trained.
    """
    check_options(request)
    files = SweepFiles(request.output)
    stored = _stored(request, files, say)
    if stored:
        goal, document = stored
        request.permission.require(goal.config.model, files.dense.config)
        slots = slots_for(request.devices, goal.config.device, request.jobs)
    else:
        files.check(resume=False, overwrite=request.overwrite)
        goal, slots = _new(request)
    with files.held():
        if needs_table(goal) and not (stored and document["complete"]):
            table = measure_table(goal, files, slots[0], command, say)
            if not stored:
                goal = _reachable(request, goal, planned_with(goal.config, table))
        sweep = Sweep(goal, files, slots, command, say, interval)
        if stored:
            sweep.remember(document)
        else:
            files.clear()
        try:
            return sweep.run()
        except KeyboardInterrupt as error:
            files.discard_if_bare()
            said = sweep.advice() if files.document.is_file() else "stopped"
            raise InterruptedRunError(said) from error
        finally:
            files.discard_if_bare()


def require_complete(document: dict[str, Any], folder: Path) -> None:
    """Refuse a sweep that has not found what it was asked for.

    Raises:
        CompressError: points failed.
        BudgetError: points of a grid take more time than they may, or no network of a search is
            accurate enough.
    """
    failed = [row for row in document["points"] if row["status"] == "failed"]
    if failed:
        names = ", ".join(row["budget"] for row in failed)
        raise CompressError(
            f"{len(failed)} of {len(document['points'])} points failed, {names}: their logs are "
            f"{', '.join(str(folder / row['name']) + '.log' for row in failed)}; go on with "
            f"--resume --output {shlex.quote(str(folder))}"
        )
    search = document["asked"]["search"]
    missed = [row for row in document["points"] if row.get("missed")]
    if missed and (not search or len(missed) == len(document["points"])):
        said = "; ".join(
            f"{row['budget']}: {time_words(Budget.model_validate(row['budget']), row['latency'])}"
            for row in missed
        )
        raise BudgetError(
            f"{len(missed)} of {len(document['points'])} budgets of time are missed ({said}); all "
            "networks are finished and kept"
        )
    if search and not document["chosen"]:
        held = [row for row in document["points"] if not row.get("missed")]
        best = min(held, key=lambda row: row["drop_pp"])
        raise BudgetError(
            f"no pruned network stays within {search['max_drop']:g} pp of the dense one; the "
            f"closest is {best['budget']}. {drop_words(best)} Finetune for longer, or allow a "
            "larger --max-drop"
        )


def _stored(
    request: SweepRequest, files: SweepFiles, say: Say
) -> tuple[Goal, dict[str, Any]] | None:
    """Return the sweep to go on with and its document; None if a new one is asked for.

    The command that began a sweep goes on with it when it is given again; where a scheduler gives
    it, ``overwrite`` belongs to the first time.
    """
    if request.resume:
        files.check(resume=True, overwrite=request.overwrite)
        return read_goal(files.document)
    if not files.document.is_file() or (request.overwrite and not started_again()):
        return None
    goal, document = read_goal(files.document)
    if not _is_same_goal(request, goal):
        return None
    say(f"started again: going on with the sweep in {files.path}")
    return goal, document


def _is_same_goal(request: SweepRequest, goal: Goal) -> bool:
    """Whether the options are those of a sweep, but for what it had to find out at its start."""
    again = goal_of(request)
    if again.search and goal.search:
        found: dict[str, Any] = {"at_once": goal.search.at_once}
        if request.lowest is None:
            found["lowest"] = goal.search.lowest
        again = again.model_copy(update={"search": again.search.model_copy(update=found)})
    return again == goal


def _new(request: SweepRequest) -> tuple[Goal, tuple[Slot, ...]]:
    """Check what is asked for the first time: all that a run of it would refuse."""
    goal = goal_of(request)
    slots = slots_for(request.devices, goal.config.device, request.jobs)
    data = load_data(goal.config.data)
    if goal.search:
        goal = _searching(goal, goal.search, at_once=len(slots))
    check_logits(goal.config, data)
    goal = _reachable(request, goal, goal.config)
    if goal.checkpoint:
        read_dense(goal.config, data, goal.checkpoint, goal.weights)
    return goal, slots


def _searching(goal: Goal, search: Search, **found: Any) -> Goal:
    """Return a goal whose search knows what had to be found out."""
    made = validated(Search, {**search.model_dump(), **found}, source="compress sweep")
    return goal.model_copy(update={"search": made})


def _reachable(request: SweepRequest, goal: Goal, config: RunConfig) -> Goal:
    """Refuse budgets that cannot be reached; return a search that starts no lower than it can.

    Args:
        request: the options.
        goal: of a new sweep.
        config: with the latency table that budgets of time are planned with, once it is there.

    Raises:
        BudgetError: one cannot; the message names the closest that can be reached.
    """
    data = load_data(config.data)
    if goal.search and request.lowest is None:
        least = least_share(config, data, goal.search.kind)
        goal = _searching(goal, goal.search, lowest=max(goal.search.lowest, least))
    for budget in _hardest(goal):
        check_budget(point_config(config, budget), data)
    return goal


def _hardest(goal: Goal) -> Sequence[Budget]:
    """Return the budgets that all others are easier than."""
    return [goal.search.budget(goal.search.lowest)] if goal.search else goal.budgets


def least_share(config: RunConfig, data: ImageData, kind: str) -> float:
    """Return the share of a cost that is left with every group at its floor, rounded up.

    Args:
        config: of the run.
        data: gives the size of the images and the classes.
        kind: ``macs``, ``params``, ``channels``, or ``latency``, whose share is 0 without a table.

    Raises:
        ModelError: there is nothing to prune, or the network cannot be built or traced.
        TableError: a latency table of another network, or one that does not cover this one.
    """
    settings = point_config(config, Budget(kind=kind, value=1)).prune
    if settings.relax_multiple and kind != "latency":  # a run halves it until it can
        settings = settings.model_copy(update={"channel_multiple": 1})
    model = fresh_network(config, data)
    graph = tried_graph(model, data.input_size)
    allowed, everything = prunable(model, graph, settings), graph.everything()
    if kind == "latency":
        times = times_for(settings, graph, None)
        if times is None:
            return 0.0
        dense = network_milliseconds(graph, times, everything)
        least = Chooser(graph, times, allowed).fastest(everything)
    else:
        dense = cost.totals(graph, everything)[kind]
        least = cost.totals(graph, smallest(graph, allowed))[kind]
    scale = 10**DECIMALS
    return math.ceil(least / dense * scale) / scale
