"""Prune, shrink and finetune one network: the steps in order, resumable at any minibatch."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import cost
from compress.analysis import analyse
from compress.batchnorm import reestimate_batchnorm
from compress.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compress.config import RunConfig
from compress.criteria import bind
from compress.data import Batch, ImageData, first_images
from compress.decision import decide, prunable
from compress.errors import CheckpointError
from compress.groups import ChannelGraph, Mask
from compress.importance import Importance, ranked, summary
from compress.loop import Loop, train_batches
from compress.masking import goal_for, smallest
from compress.models import build_model, is_custom
from compress.progress import bar
from compress.scoring import Context, Scoring
from compress.session import Session, State
from compress.shrink import mask_, proof, shrink_
from compress.training import OTHER_NETWORK, Trainer, memory_format_for, pick_device

log = logging.getLogger("compress")

UNKNOWN_END = 10**9
"""Stands for the end of pruning while it is not known."""


def prune(config: RunConfig, data: ImageData, session: Session, model: str | None = None) -> Path:
    """Prune ``dense.safetensors`` of the run to its budget, finetune, write ``pruned.safetensors``.

    Args:
        config: the run's configuration.
        data: training and validation images.
        session: the run's directory and state.
        model: the user's own architecture, where the checkpoint is of one.

    Raises:
        BudgetError: the budget cannot be reached; said before any training.
        ModelError: there is nothing to prune.
        TrainingError: the loss became NaN or infinite.
        InterruptedRunError: the user stopped; the state is saved.
    """
    device = pick_device(config.device)
    dense = load_checkpoint(session.run.dense, model)
    run = _PruneRun(config, data, session, dense, device)
    finetuning = session.load("finetune")
    state = finetuning or session.load("prune")
    if state:
        run.load(state)
    with bar("pruning", run.expected_steps) as shown, session.interruptible():
        loop = Loop(run.trainer, data, config, session, shown)
        if not finetuning:
            run.prune(loop)
        run.finetune(loop)
    return run.write()


def check_budget(config: RunConfig, data: ImageData) -> None:
    """Find out whether the budget can be reached, before anything is trained or written.

    Raises:
        BudgetError: it cannot; the message names the closest that can be reached.
        ModelError: there is nothing to prune, or the network cannot be built or traced.
        ConfigError: the criterion is not known, or has no use for residual_gate.
    """
    name = config.model.name
    with torch.device("cpu" if is_custom(name) else "meta"):
        model = build_model(name, num_classes=data.num_classes, in_channels=data.input_size[0])
    graph = analyse(model, data.input_size)
    goal_for(graph, config.prune.budget, prunable(model, graph, config.prune))
    bind(config.prune.criterion, context_of(model, graph, config))


def context_of(model: nn.Module, graph: ChannelGraph, config: RunConfig) -> Context:
    """Return what the configured criterion is bound to."""
    return Context(
        model,
        graph,
        config.prune.residual_gate,
        seed=config.seed,
        as_published=config.prune.as_published,
        hessian_samples=config.prune.hessian_samples,
    )


@dataclass
class Progressed:
    """Where the pruning stands: masks by dense unit id."""

    kept: Mask
    """Units that are left."""
    shrunk: Mask
    """Units that are physically there; those not kept are masked."""
    step: int = 0
    """Pruning steps taken, with those that only measured."""
    paused: int = 0
    """Pruning steps that were put off because the loss was too high."""
    ended: bool = False
    """Whether pruning is over although the budget is not reached."""


class _PruneRun:
    """The state and the phases of one prune."""

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        session: Session,
        dense: Checkpoint,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.session, self.dense = config, data, session, dense
        self.dense_graph = dense.dense_graph
        self.allowed = prunable(dense.model, self.dense_graph, config.prune)
        self.goal = goal_for(self.dense_graph, config.prune.budget, self.allowed)
        teacher = None
        if config.finetune.distill:
            teacher = copy.deepcopy(dense.model).to(device).requires_grad_(False)
        self.model = dense.model.to(device).train()
        self.graph = self.dense_graph
        everything = self.dense_graph.everything()
        self.at = Progressed(everything, everything.copy())
        self.importance = Importance(self.dense_graph.num_units, momentum=config.prune.momentum)
        self.trainer = Trainer(
            self.model,
            config.finetune,
            steps_per_epoch=len(train_batches(data, config, device.type)),
            total=UNKNOWN_END,
            hold=UNKNOWN_END,
            seed=config.seed,
            teacher=teacher,
            memory_format=memory_format_for(self.model, data.input_size),
        )
        self.metrics: dict[str, Any] = {
            "budget": str(config.prune.budget),
            "criterion": config.prune.criterion,
            "dense": {**self._costs(everything), **dense.description.metrics.get("accuracy", {})},
            "proof": 0.0,
            "seconds": {"decide": 0.0, "shrink": 0.0, "proof": 0.0},
        }
        self.scoring = self._bind()

    @property
    def expected_steps(self) -> int:
        """Steps of the whole run, as far as they are known."""
        prune = self.config.prune
        steps = prune.steps
        if prune.step_size is not None:
            units = self.goal.channels_of(self.at.kept) - self.goal.channels_of(
                smallest(self.dense_graph, self.allowed)
            )
            if prune.budget.kind == "removed":
                units = prune.budget.value
            steps = math.ceil(units / prune.step_size)
        steps = min(prune.start_after + steps, prune.max_steps or steps + prune.start_after)
        finetuning = self.config.finetune.epochs * self.trainer.steps_per_epoch
        return steps * prune.interval + finetuning

    @property
    def reached(self) -> bool:
        """Whether the budget holds."""
        return self.goal.cost_of(self.at.kept) <= self.goal.limit

    # Phases

    def prune(self, loop: Loop) -> None:
        """Take training steps with pruning steps between them until the budget holds."""
        loop.run(self._step, snapshot=lambda: self._state("prune"), finished=lambda: self._shrunk)
        self.metrics["masked"] = loop.accuracy().as_dict()
        batches = itertools.islice(loop.batches.epoch(0), self.config.prune.bn_batches)
        seen = reestimate_batchnorm(self.model, batches, self.trainer.device)
        measured = loop.accuracy()
        self.metrics["pruned"] = {**self._costs(self.at.kept), **measured.as_dict()}
        self.session.record("pruned", batchnorm_batches=seen, **self.metrics["pruned"])
        self.trainer.hold = self.trainer.step_index

    def finetune(self, loop: Loop) -> None:
        """Train the shrunk network on."""
        trainer = self.trainer
        trainer.total = trainer.hold + self.config.finetune.epochs * trainer.steps_per_epoch
        trainer.start_averaging()
        loop.run(
            trainer.step,
            snapshot=lambda: self._state("finetune"),
            finished=lambda: trainer.step_index >= trainer.total,
            each_epoch=lambda epoch: loop.record_epoch("finetune", epoch),
        )
        measured = loop.accuracy()
        self.metrics["finetuned"] = {**self._costs(self.at.kept), **measured.as_dict()}
        self.session.record("finetuned", **self.metrics["finetuned"])

    def write(self) -> Path:
        """Write the result and remove the state."""
        description = self.dense.description.model_copy(
            update={"metrics": self.metrics, "parent_sha256": self.dense.sha256}
        )
        path = self.session.run.pruned
        save_checkpoint(
            path,
            self.trainer.result,
            description=description,
            dense_graph=self.dense_graph,
            kept=self.at.kept,
        )
        self.session.finish()
        return path

    # One step

    @property
    def _shrunk(self) -> bool:
        return (self.reached or self.at.ended) and bool((self.at.kept == self.at.shrunk).all())

    @property
    def _judged(self) -> bool:
        """Whether the importance is final."""
        prune = self.config.prune
        return prune.fixed_criteria and self.at.step > prune.start_after

    def _step(self, batch: Batch) -> None:
        scoring = None if self._judged or not self.scoring.per_minibatch else self.scoring
        self.trainer.step(batch, scoring=scoring, scored=self.importance.add)
        self._hold_masked()
        if self.trainer.step_index % self.config.prune.interval == 0:
            self._prune_step()

    def _hold_masked(self) -> None:
        if not (self.at.kept == self.at.shrunk).all():
            mask_(self.model, self.graph, self.at.kept)

    def _prune_step(self) -> None:
        self.trainer.check()
        if not self._judged:
            if not self.scoring.per_minibatch:
                self.importance.add(self.scoring.score(1.0))
            if not self.importance.minibatches:
                return  # broken images left no minibatch to judge by
        loss = self.trainer.mean_loss()
        if self._too_high(loss):
            self._pause(loss)
        else:
            self._remove(loss)
        here = cost.macs(self.graph, self.at.shrunk)
        masked = 1 - cost.macs(self.graph, self.at.kept) / here
        if masked and (self.reached or self.at.ended or masked >= self.config.prune.shrink_at):
            self._shrink()

    def _remove(self, loss: float) -> None:
        """Take one pruning step: from importance to a smaller mask."""
        prune = self.config.prune
        with _timed(self.metrics["seconds"], "decide"):
            if not self._judged:
                self.importance.close_interval()
            self.at.step += 1
            importance, before = self.importance.average, self.at.kept
            assert importance is not None
            if self.at.step > prune.start_after:
                self.at.kept = decide(
                    ranked(importance, before, self.allowed, graph=self.dense_graph, config=prune),
                    before,
                    self.allowed,
                    goal=self.goal,
                    config=prune,
                    step=self.at.step - prune.start_after,
                )
                mask_(self.model, self.graph, self.at.kept | ~before)  # the rest is masked already
        self.session.record(
            "prune_step",
            step=self.trainer.step_index,
            pruning_step=self.at.step,
            loss=loss,
            lr=self.trainer.lr,
            importance=summary(importance, before, self.allowed),
            widths={c.group.name: int(self.at.kept[c.group.units].sum()) for c in self.allowed},
            **self._costs(self.at.kept),
        )
        if prune.max_steps is not None and self.at.step >= prune.max_steps and not self.reached:
            self._end(f"max_steps = {prune.max_steps} pruning steps are taken")

    def _too_high(self, loss: float) -> bool:
        limit = self.config.prune.max_loss
        return limit is not None and loss > limit

    def _pause(self, loss: float) -> None:
        """Train on without removing anything; in the end, give up."""
        self.at.paused += 1
        self.session.record("prune_pause", step=self.trainer.step_index, loss=loss)
        patience = self.config.finetune.epochs * self.trainer.steps_per_epoch
        if self.at.paused * self.config.prune.interval > patience:
            self._end(f"the loss {loss:.3f} stayed above max_loss = {self.config.prune.max_loss}")

    def _end(self, reason: str) -> None:
        self.at.ended = True
        share = self.goal.cost_of(self.at.kept) / self.goal.dense
        log.warning(
            "pruning ends before the budget %s, at %.3f of the dense cost: %s",
            self.config.prune.budget,
            share,
            reason,
        )
        self.session.record("prune_end", step=self.trainer.step_index, reason=reason)

    def _shrink(self) -> None:
        seconds = self.metrics["seconds"]
        with _timed(seconds, "proof"):
            images = first_images(self.data, self.config.prune.proof_images)
            difference = proof(self.model, self.graph, self.at.kept, images)
        with _timed(seconds, "shrink"):
            self.graph = shrink_(self.model, self.graph, self.at.kept, self.trainer.optimizer)
            self.at.shrunk = self.at.kept.copy()
            self.trainer.settle()
            self.scoring = self._bind()
        self.metrics["proof"] = max(self.metrics["proof"], difference)
        self.session.record(
            "shrink", step=self.trainer.step_index, difference=difference, images=len(images)
        )

    def _bind(self) -> Scoring:
        return bind(self.config.prune.criterion, context_of(self.model, self.graph, self.config))

    def _costs(self, kept: Mask) -> dict[str, int]:
        return cost.totals(self.dense_graph, kept)

    # Resume

    def _state(self, phase: str) -> State:
        average = self.importance.average
        tensors = self.trainer.state() | {
            "kept": torch.from_numpy(self.at.kept.copy()),
            "shrunk": torch.from_numpy(self.at.shrunk.copy()),
            "importance.total": self.importance.total,
        }
        if average is not None:
            tensors["importance.average"] = torch.from_numpy(average)
        facts = {
            "step": self.trainer.step_index,
            "hold": self.trainer.hold,
            "pruning_step": self.at.step,
            "paused": self.at.paused,
            "ended": self.at.ended,
            "minibatches": self.importance.minibatches,
            "metrics": self.metrics,
        }
        return State(phase, facts, tensors)

    def load(self, state: State) -> None:
        """Go on from a saved state: the network takes its shrunk form before its weights.

        Raises:
            CheckpointError: the state is of another network.
        """
        facts, tensors = state.facts, state.tensors
        if len(tensors["kept"]) != self.dense_graph.num_units:
            raise CheckpointError(OTHER_NETWORK)
        self.at = Progressed(
            tensors["kept"].numpy().astype(bool),
            tensors["shrunk"].numpy().astype(bool),
            facts["pruning_step"],
            facts["paused"],
            facts["ended"],
        )
        self.graph = shrink_(self.model, self.graph, self.at.shrunk)
        self.trainer.settle()
        self.trainer.hold = facts["hold"]
        self.trainer.step_index = facts["step"]
        self.trainer.load_state(tensors)
        self.importance.total = tensors["importance.total"]
        self.importance.minibatches = facts["minibatches"]
        if "importance.average" in tensors:
            self.importance.average = tensors["importance.average"].numpy()
        self.metrics = facts["metrics"]
        self.scoring = self._bind()


@contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to an entry of a table."""
    start = time.perf_counter()
    yield
    table[name] += time.perf_counter() - start
