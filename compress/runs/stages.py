"""The stages of a run that this package knows: a dense network is trained, or read, and pruned."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from compress.config import RunConfig
from compress.data.batches import ImageData
from compress.distributed.torchrun import is_main
from compress.distributed.world import current
from compress.errors import CheckpointError, ConfigError
from compress.latency.stopwatch import Stopwatch
from compress.quantization.quantizer import Quantizer
from compress.runs.dense import note_import, train_dense
from compress.runs.launch import Started, started, weights_of
from compress.runs.prune import check_budget, prune
from compress.runs.request import PruneRequest, RunRequest
from compress.terminal.console import say

StopwatchFor = Callable[[RunConfig], Stopwatch | None]
"""What measures networks as a configuration says, where a budget of time asks for it."""


QuantizerFor = Callable[[RunConfig, ImageData], Quantizer | None]
"""What makes networks round to 8 bits as a configuration says, where finetuning asks for it."""


def train_run(request: RunRequest) -> Started:
    """Train the dense network of a run from scratch.

    Raises:
        CompressError: see ``started`` and ``train_dense``.
    """
    with started(request) as on:
        train_stage(on)
    say(f"the dense network is {on.run.dense}")
    return on


def prune_run(
    request: PruneRequest,
    stopwatch: StopwatchFor | None = None,
    quantizer: QuantizerFor | None = None,
) -> Started:
    """Prune the network of a checkpoint, or go on with a run that does.

    Args:
        request: what is asked for.
        stopwatch: measures, where the budget is time.
        quantizer: makes the network round, where it is finetuned in 8 bits; asked before anything
            is written, too.

    Raises:
        CompressError: see ``started`` and ``prune``.
    """
    if (request.checkpoint is None) != request.resume:
        raise ConfigError("compress prune needs --checkpoint FILE, or --resume --output DIR")
    checks = [check_budget, *([quantizer] if quantizer else [])]
    with started(request, checks, weights_of(request)) as on:
        if not is_there(on.run.dense):
            raise CheckpointError(
                f"{on.run.path} holds no dense network yet: end its training with compress train "
                "--resume, or give the --checkpoint that it was begun with"
            )
        note_import(on.session)
        prune_stage(on, stopwatch, quantizer)
    say(f"the pruned network is {on.run.pruned}")
    return on


def train_stage(on: Started) -> None:
    """Train the dense network, unless it is there."""
    title = f"training {on.config.model.name}"
    stage(on.run.dense, title, lambda: train_dense(on.config, on.data, on.session))


def prune_stage(
    on: Started, stopwatch: StopwatchFor | None = None, quantizer: QuantizerFor | None = None
) -> None:
    """Prune the dense network, unless the pruned one is there."""
    title = f"pruning to {on.config.prune.budget}"
    timed = stopwatch(on.config) if stopwatch and on.config.prune.budget.kind == "latency" else None
    rounding = quantizer(on.config, on.data) if quantizer else None
    if on.config.finetune.quantize:
        epochs = on.config.finetune.quantize_epochs
        last = "one epoch rounds" if epochs == 1 else f"{epochs} epochs round"
        target = on.config.export.target
        say(f"after finetuning, {last} to 8 bits, as the file for target {target} will")
    stage(on.run.pruned, title, lambda: prune(on.config, on.data, on.session, timed, rounding))


def stage(result: Path, title: str, work: Callable[[], object]) -> None:
    """Do the work unless its result is there from before the run was resumed, and say so."""
    if is_there(result):
        say(f"{title}: done before")
        return
    start = time.monotonic()
    say(title)
    work()
    say(f"{title}: {time.monotonic() - start:.0f} s")


def is_there(result: Path) -> bool:
    """Whether a file is there for the main process; others may see it later, and do not look."""
    return current().first(is_main() and result.is_file())
