"""``compress sweep`` from its options to its files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.config import Budget
from compress.data.datasets import load_data
from compress.distributed.torchrun import started_again
from compress.errors import BudgetError, CompressError, InterruptedRunError
from compress.files.documents import validated
from compress.runs.dense import check_logits, read_dense
from compress.runs.launch import require_allowed, typed_model
from compress.runs.prune import check_budget
from compress.sweep.devices import Slot, slots_for
from compress.sweep.plan import Search
from compress.sweep.points import SweepFiles, point_config
from compress.sweep.reach import least_share
from compress.sweep.request import Asked, SweepRequest, asked_for, check_options, read_asked
from compress.sweep.sweep import Say, Sweep


def run_sweep(request: SweepRequest, say: Say) -> dict[str, Any]:
    """Prune one dense network to several budgets, each as a run of its own, and compare them.

    Everything that can be refused is refused before a file is written. A point that fails does not
    stop the others of a grid; the document says so.

    Args:
        request: the options.
        say: told of what starts and ends, in lines.

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
        asked, document = stored
        require_allowed(
            asked.config.model, typed_model(request.model, request.settings), files.dense.config
        )
        slots = slots_for(request.devices, asked.config.device, request.jobs)
    else:
        files.check(resume=False, overwrite=request.overwrite)
        asked, slots = _new(request)
    with files.held():
        sweep = Sweep(asked, files, slots, say)
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
) -> tuple[Asked, dict[str, Any]] | None:
    """Return the sweep to go on with and its document; None if a new one is asked for.

    A scheduler that starts a command again gives the options of the first time.
    """
    if request.resume:
        files.check(resume=True, overwrite=request.overwrite)
        return read_asked(files.document)
    if not (started_again() and files.document.is_file()):
        return None
    asked, document = read_asked(files.document)
    if not _is_asked_again(request, asked):
        return None
    say(f"started again: going on with the sweep in {files.path}")
    return asked, document


def _is_asked_again(request: SweepRequest, asked: Asked) -> bool:
    """Whether the options are those of a sweep, but for what it had to find out at its start."""
    again = asked_for(request)
    if again.search and asked.search:
        found: dict[str, Any] = {"at_once": asked.search.at_once}
        if request.lowest is None:
            found["lowest"] = asked.search.lowest
        again = again.model_copy(update={"search": again.search.model_copy(update=found)})
    return again == asked


def _new(request: SweepRequest) -> tuple[Asked, tuple[Slot, ...]]:
    """Check what is asked for the first time: all that a run of it would refuse."""
    asked = asked_for(request)
    slots = slots_for(request.devices, asked.config.device, request.jobs)
    data = load_data(asked.config.data)
    if asked.search:
        least = least_share(asked.config, data, asked.search.kind) if request.lowest is None else 0
        lowest = max(asked.search.lowest, least)
        found = {**asked.search.model_dump(), "at_once": len(slots), "lowest": lowest}
        search = validated(Search, found, source="compress sweep")
        asked = asked.model_copy(update={"search": search})
    check_logits(asked.config, data)
    for budget in _hardest(asked):
        check_budget(point_config(asked.config, budget), data)
    if asked.checkpoint:
        read_dense(asked.config, data, asked.checkpoint)
    return asked, slots


def _hardest(asked: Asked) -> Sequence[Budget]:
    """Return the budgets that all others are easier than."""
    return [asked.search.budget(asked.search.lowest)] if asked.search else asked.budgets
