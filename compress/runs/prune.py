"""Prune, shrink and finetune one network: the steps in order, resumable at any minibatch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compress.checkpoints.description import Quantization
from compress.checkpoints.permission import Permission
from compress.config import RunConfig
from compress.criteria import bind
from compress.data.batches import ImageData, first_images
from compress.data.loading import Batch
from compress.distributed.world import current
from compress.errors import (
    BudgetError,
    CheckpointError,
    CompressError,
    ConfigError,
    DataError,
    ModelError,
    OutputError,
)
from compress.latency.stopwatch import Stopwatch
from compress.networks import cost
from compress.networks.trial import tried_graph
from compress.pruning.decision import prunable, reachable, report_dense
from compress.pruning.given import read_importance
from compress.pruning.goal import times_for
from compress.pruning.pruner import Pruner, context_of
from compress.quantization.network import QuantizedNetwork
from compress.quantization.quantizer import Quantizer
from compress.runs.budgeting import TimeBudget, recorded, run_times
from compress.runs.dense import fresh_network
from compress.runs.loop import Loop, train_batches
from compress.runs.plots import plot_history, plot_widths, widths_of
from compress.runs.session import Session
from compress.runs.state import State
from compress.terminal.console import say
from compress.terminal.progress import bar
from compress.training.compute import computing, memory_format_for, pick_device
from compress.training.trainer import OTHER_NETWORK, Trainer, tensors_under

log = logging.getLogger("compress")

NO_END_YET = 10**9
"""What states of version 1 hold for the end of pruning while it is not known."""


def prune(
    config: RunConfig,
    data: ImageData,
    session: Session,
    stopwatch: Stopwatch | None = None,
    quantizer: Quantizer | None = None,
) -> Path:
    """Prune ``dense.safetensors`` of the run to its budget, finetune, write ``pruned.safetensors``.

    Args:
        config: the run's configuration; its network is what the user asked for.
        data: training and validation images.
        session: the run's directory and state.
        stopwatch: measures, where the budget is time.
        quantizer: makes the network round, where it is finetuned in 8 bits.

    Raises:
        BudgetError: the budget cannot be reached; said before any training. Or the network was
            measured to miss a budget of time; it is written nevertheless.
        TableError: a latency table of something else, or a machine too noisy for one.
        ModelError: there is nothing to prune, or its file cannot round as training would. Of the
            latter, where pruning has brought it about, the network is written in float32 first.
        TrainingError: the loss became NaN or infinite.
        ConfigError: the network is to be finetuned in 8 bits and nothing makes it.
        InterruptedRunError: the user stopped; the state is saved.
    """
    if config.finetune.quantize and quantizer is None:
        raise ConfigError("finetune.quantize = true needs somebody who knows the exported file")
    device = pick_device(config.device)
    dense = load_checkpoint(session.run.dense, Permission(config.model))
    run = _PruneRun(config, data, session, dense, device, stopwatch, quantizer)
    finetuning = session.load("finetune")
    state = finetuning or session.load("prune")
    if state:
        with session.taking_up():
            run.load(state)
    with (
        computing(config.compute),
        bar("pruning", run.expected_steps) as shown,
        session.interruptible(),
    ):
        loop = Loop(run.trainer, data, config, session, shown)
        if not finetuning:
            run.prune(loop)
        run.finetune(loop)
    written = run.write()
    if run.refused is not None:
        raise run.refused
    if run.time is not None and not run.time.holds:
        raise run.time.missed()
    return written


def check_budget(config: RunConfig, data: ImageData) -> None:
    """Find out whether the budget can be reached, before anything is trained or written.

    Raises:
        BudgetError: it cannot; the message names the closest that can be reached.
        ModelError: there is nothing to prune, or the network cannot be built or traced.
        ConfigError: the criterion is not known, cannot score this network, or not a compiled one;
            or a file of importance does not fit.
    """
    model = fresh_network(config, data)
    graph = tried_graph(model, data.input_size)
    report_dense(graph)
    times = times_for(config.prune, graph, None)
    if config.prune.budget.kind == "latency" and times is None:
        allowed = prunable(model, graph, config.prune)  # the rest is known when it is measured
    else:
        _, allowed, _ = reachable(model, graph, config.prune, times)
    scoring = bind(config.prune.scored_by, context_of(model, graph, config.prune, config.seed))
    if config.prune.importance_from is not None:
        read_importance(config.prune.importance_from, graph, allowed)
    elif config.compute.compiled and scoring.network is not None:
        raise ConfigError(
            f"the criterion {config.prune.criterion} watches the network run, which it cannot in a "
            "compiled one: set compute.compiled = false, or take taylor-gate at the readers"
        )


class _PruneRun:
    """The phases of one prune, and the state to resume it from."""

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        session: Session,
        dense: Checkpoint,
        device: torch.device,
        stopwatch: Stopwatch | None,
        quantizer: Quantizer | None,
    ) -> None:
        self.quantizer = quantizer if config.finetune.quantize else None
        if self.quantizer is not None:
            self.quantizer.check(dense.model)
        self.refused: CompressError | None = None
        self.config, self.data, self.session, self.dense = config, data, session, dense
        self.graph = graph = tried_graph(
            dense.model, dense.input_size, whole_groups=dense.description.format_version == 1
        )
        teacher = None
        if config.finetune.distill:
            teacher = copy.deepcopy(dense.model).to(device).requires_grad_(False)
        size, world = dense.input_size, current()
        times = run_times(config, dense.model, graph, size, session.run, stopwatch, world)
        before = copy.deepcopy(dense.model) if times is not None else None
        self.model = dense.model.to(device)
        self.trainer = Trainer(
            self.model,
            config.finetune,
            steps_per_epoch=len(train_batches(data, config, device.type, world)),
            epochs=None,  # nobody knows how many steps pruning takes
            seed=config.seed,
            teacher=teacher,
            memory_format=memory_format_for(
                self.model, data.input_size, config.compute.channels_last
            ),
            compute=config.compute,
            world=world,
        )
        self.pruner = Pruner(
            self.model,
            first_images(data, config.prune.proof_images),
            optimizer=self.trainer.optimizer,
            callback=self._record,
            patience=config.finetune.epochs * self.trainer.steps_per_epoch,
            seed=config.seed,
            graph=graph,
            table=times,
            **dict(config.prune),
        )
        self.time = None
        if before is not None:
            rounds = config.prune.latency_rounds
            self.time = TimeBudget(self.pruner, before, size, stopwatch, world, rounds)
        self.accuracy: dict[str, Any] = {}

    @property
    def expected_steps(self) -> int:
        """Steps of the whole run, as far as they are known."""
        pruning = self.pruner.decisions.expected_steps
        settings = self.config.finetune
        epochs = settings.epochs + (settings.quantize_epochs if self.quantizer else 0)
        return pruning + epochs * self.trainer.steps_per_epoch

    def prune(self, loop: Loop) -> None:
        """Take training steps with pruning steps between them until the budget holds."""
        self._until_done(loop)
        if self.time is not None and self.time.stopwatch is not None:
            self._until_fast_enough(loop, self.time)
        self.accuracy["masked"] = loop.accuracy().as_dict()
        seen = self.pruner.reestimate_batchnorm(
            batch.to(self.trainer.device)[0] for batch in loop.batches.epoch(0)
        )
        self.accuracy["pruned"] = {**self._costs(), **loop.accuracy().as_dict()}
        self.session.record(
            "pruned",
            step=self.trainer.step_index,
            batchnorm_batches=seen,
            masked_top1=self.accuracy["masked"]["top1"],
            **self.accuracy["pruned"],
        )
        self.trainer.begin_schedule(self.config.finetune.epochs)

    def _until_done(self, loop: Loop) -> None:
        loop.run(
            self._step,
            snapshot=lambda: self._state("prune"),
            finished=lambda: self.pruner.done,
        )

    def _until_fast_enough(self, loop: Loop, time: TimeBudget) -> None:
        """Measure, and go on with pruning, until the measured time is within the budget."""
        for correction in range(time.rounds + 1):
            self.session.record("latency", step=self.trainer.step_index, **recorded(time.measure()))
            if time.holds or correction == time.rounds or time.settled or self.pruner.at.ended:
                return
            self._until_done(loop)

    def _step(self, batch: Batch) -> None:
        """Train on one minibatch, with the pruner around it."""
        trainer, pruner = self.trainer, self.pruner
        if not trainer.step(batch, judge=pruner):
            return  # broken images left too little of it
        loss = None
        if pruner.due:
            loss = trainer.mean_loss()
        try:
            pruner.step(loss)
        except BudgetError as error:
            if self.time is None or self.time.measured is None:
                raise
            log.warning("%s", error)  # a corrected limit asks for more than may go
            self.time.settle()
            pruner.step(loss)
        if self.time is not None and self.time.calibrates:
            facts = recorded(self.time.calibrate())
            self.session.record("latency", step=trainer.step_index, **facts)

    def _record(self, event: str, facts: Mapping[str, Any]) -> None:
        """Write what the pruner did into the history."""
        if event == "shrink":
            self.trainer.reshaped()
        at: dict[str, Any] = {"step": self.trainer.step_index}
        if event == "prune_step":
            at["lr"] = self.trainer.lr
        self.session.record(event, **at, **facts)

    def finetune(self, loop: Loop) -> None:
        """Train the shrunk network on."""
        self.trainer.start_averaging()
        if self.quantizer is not None and not self._quantized:
            self._train(loop)
            try:
                self._quantize(self.quantizer(self.model))
            except (DataError, ModelError) as error:  # what was trained so far is worth keeping
                self.refused = type(error)(f"{error}; {self.session.run.pruned} is float32")
        self._train(loop)
        if self._quantized:
            self.accuracy["quantized"] = loop.accuracy().as_dict()
        self.accuracy["finetuned"] = {**self._costs(), **loop.accuracy_of(self.result).as_dict()}
        self.session.record("finetuned", **self.accuracy["finetuned"])

    def _quantize(self, network: QuantizedNetwork) -> None:
        settings = self.config.finetune
        lr = settings.quantize_lr * settings.lr
        self.trainer.quantize(network, epochs=settings.quantize_epochs, lr=lr)

    def _train(self, loop: Loop) -> None:
        loop.run(
            self.trainer.step,
            snapshot=lambda: self._state("finetune"),
            finished=lambda: self.trainer.finished,
            each_epoch=lambda epoch: loop.record_epoch("finetune", epoch),
        )

    @property
    def result(self) -> nn.Module:
        """The network that is written, without what rounds around it."""
        found = self.trainer.result
        return found.network if isinstance(found, QuantizedNetwork) else found

    @property
    def _quantized(self) -> bool:
        return isinstance(self.trainer.model, QuantizedNetwork)

    def write(self) -> Path:
        """Write the result and its pictures, and remove the state."""
        run, dense, kept = self.session.run, self.dense, self.pruner.at.kept
        if not self.trainer.world.main:
            self.trainer.world.wait()
            return run.pruned
        description = dense.description.model_copy(
            update={
                "metrics": self._metrics(),
                "quantization": self._quantization(),
                "parent_sha256": dense.sha256,
            }
        )
        say(self._result())  # before it is written: it took hours
        try:
            plot_widths(run.pruning_plot, widths_of(dense.architecture, self.graph, kept))
            plot_history(run.history_plot, run.events())
        except OutputError as error:
            log.warning("%s; the network is written without its pictures", error)
        save_checkpoint(
            run.pruned,
            self.result,
            description=description,
            graph=self.graph,
            kept=kept,
        )
        self.session.finish()
        self.trainer.world.wait()
        return run.pruned

    def _result(self) -> str:
        """Return what came out, in words."""
        found, dense = self.accuracy["finetuned"], cost.totals(self.graph, self.graph.everything())
        costs = ", ".join(f"{name} {found[name] / dense[name]:.3f}" for name in dense)
        return f"pruned to {costs} of the dense network, top-1 {found['top1']:.2f} %"

    def _quantization(self) -> Quantization | None:
        found = self.trainer.result
        if not isinstance(found, QuantizedNetwork):
            return None
        return Quantization(form=found.plan.form, ranges=found.ranges)

    def _metrics(self) -> dict[str, Any]:
        dense = cost.totals(self.graph, self.graph.everything())
        return {
            "budget": str(self.config.prune.budget),
            "criterion": self.config.prune.criterion,
            "dense": {**dense, **self.dense.description.metrics.get("accuracy", {})},
            **({"latency": recorded(self.time.facts)} if self.time else {}),
            "proof": self.pruner.at.largest_difference,
            **self.accuracy,
        }

    def _costs(self) -> dict[str, int]:
        return cost.totals(self.graph, self.pruner.at.kept)

    # Resume

    def _state(self, phase: str) -> State:
        facts = {
            "step": self.trainer.step_index,
            "hold": self.trainer.hold,
            "accuracy": self.accuracy,
            "quantized": self._quantized,
            "time": self.time.state() if self.time else None,
        }
        pruner = {f"pruner.{name}": t for name, t in self.pruner.state_dict().items()}
        return State(phase, facts, {**pruner, **self.trainer.state()})

    def load(self, state: State) -> None:
        """Go on from a saved state: the network takes its shrunk form before its weights.

        Raises:
            CheckpointError: the state is of another network.
        """
        pruner = dict(tensors_under("pruner.", state.tensors)) or self._of_version_1(state)
        try:
            self.pruner.load_state_dict(pruner)
        except CheckpointError as error:
            raise CheckpointError(OTHER_NETWORK) from error
        self.trainer.reshaped()
        if state.facts["hold"] not in (None, NO_END_YET):
            self.trainer.begin_schedule(self.config.finetune.epochs, state.facts["hold"])
        self.trainer.step_index = state.facts["step"]
        if self.quantizer is not None and state.facts.get("quantized"):
            self.trainer.start_averaging()
            self._quantize(self.quantizer(self.model, calibrated=False))
        self.trainer.load_state(state.tensors)
        self.accuracy = state.facts["accuracy"]
        if self.time is not None:
            measured = state.facts.get("measured")  # as earlier versions wrote it
            earlier: dict[str, Any] = {"measured": measured, "calibrated": [], "settled": False}
            self.time.load(state.facts.get("time", earlier))

    def _of_version_1(self, state: State) -> dict[str, torch.Tensor]:
        """Return the pruner's state as earlier versions wrote it, among facts and tensors."""
        facts, own = state.facts, self.pruner.state_dict()
        if len(state.tensors["kept"]) != self.graph.num_units - len(self.graph.branches):
            raise CheckpointError(OTHER_NETWORK)
        names = ("pruning_step", "paused", "ended", "minibatches", "proof")
        return {
            **own,
            **{n: t for n, t in state.tensors.items() if n in ("kept", "shrunk")},
            **{n: t for n, t in state.tensors.items() if n.startswith("importance.")},
            **{name: torch.tensor(facts[name]) for name in names},
            **{f"seconds.{work}": torch.tensor(took) for work, took in facts["seconds"].items()},
            "training_step": torch.tensor(facts["step"]),
        }
