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
from compress.networks import cost
from compress.networks.trial import tried_graph
from compress.pruning.decision import prunable
from compress.pruning.masking import smallest
from compress.runs.dense import check_logits, fresh_network, read_dense
from compress.runs.prune import check_budget
from compress.runs.request import SweepRequest
from compress.sweep.plan import DECIMALS, Search
from compress.sweep.points import SweepFiles, point_config
from compress.sweep.processes import Slot, slots_for
from compress.sweep.request import Goal, check_options, goal_of, read_goal
from compress.sweep.sweep import Say, Sweep


def run_sweep(request: SweepRequest, say: Say, command: Sequence[str]) -> dict[str, Any]:
    """Prune one dense network to several budgets, each as a run of its own, and compare them.

    Everything that can be refused is refused before a file is written. A point that fails does not
    stop the others of a grid; the document says so.

    Args:
        request: the options.
        say: told of what starts and ends, in lines.
        command: the words that start this tool's command line, to which each process of the sweep
            adds its arguments: ``(sys.executable, cli.__file__)``.

    Returns:
        The document that is written as ``sweep.json``.

    Raises:
        ConfigError: options that cannot be understood, or a directory that must not be written.
        BudgetError: a budget that cannot be reached.
        CheckpointError: the checkpoint is missing, damaged, pruned or of another network.
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
        sweep = Sweep(goal, files, slots, command, say)
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
        BudgetError: no network is accurate enough.
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
    if search and not document["chosen"]:
        best = min(document["points"], key=lambda row: row["drop_pp"])
        raise BudgetError(
            f"no pruned network stays within {search['max_drop']:g} pp of the dense one: the "
            f"closest, {best['budget']}, drops by {best['drop_pp']:.2f} pp; finetune for longer, "
            "or allow a larger --max-drop"
        )


def _stored(
    request: SweepRequest, files: SweepFiles, say: Say
) -> tuple[Goal, dict[str, Any]] | None:
    """Return the sweep to go on with and its document; None if a new one is asked for.

    A scheduler that starts a command again gives the options of the first time.
    """
    if request.resume:
        files.check(resume=True, overwrite=request.overwrite)
        return read_goal(files.document)
    if not (started_again() and files.document.is_file()):
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
        least = least_share(goal.config, data, goal.search.kind) if request.lowest is None else 0
        lowest = max(goal.search.lowest, least)
        found = {**goal.search.model_dump(), "at_once": len(slots), "lowest": lowest}
        search = validated(Search, found, source="compress sweep")
        goal = goal.model_copy(update={"search": search})
    check_logits(goal.config, data)
    for budget in _hardest(goal):
        check_budget(point_config(goal.config, budget), data)
    if goal.checkpoint:
        read_dense(goal.config, data, goal.checkpoint)
    return goal, slots


def _hardest(goal: Goal) -> Sequence[Budget]:
    """Return the budgets that all others are easier than."""
    return [goal.search.budget(goal.search.lowest)] if goal.search else goal.budgets


def least_share(config: RunConfig, data: ImageData, kind: str) -> float:
    """Return the share of a cost that is left with every group at its floor, rounded up.

    Args:
        config: of the run.
        data: gives the size of the images and the classes.
        kind: ``macs``, ``params`` or ``channels``.

    Raises:
        ModelError: there is nothing to prune, or the network cannot be built or traced.
    """
    model = fresh_network(config, data)
    graph = tried_graph(model, data.input_size)
    dense = cost.totals(graph, graph.everything())[kind]
    least = cost.totals(graph, smallest(graph, prunable(model, graph, config.prune)))[kind]
    scale = 10**DECIMALS
    return math.ceil(least / dense * scale) / scale
