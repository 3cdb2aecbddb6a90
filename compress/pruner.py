"""Prune, shrink and finetune one network: the steps in order, resumable at any minibatch."""

from __future__ import annotations

import copy
import itertools
import logging
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
from compress.config import PruneConfig, RunConfig
from compress.criteria import Context, Importance, Scoring, bind
from compress.data import Batch, ImageData, first_images
from compress.errors import CheckpointError, ModelError
from compress.groups import ChannelGraph, Mask
from compress.loop import Loop, train_batches
from compress.masking import Candidate, Goal, Scores, candidates, goal_for, prune_to
from compress.models import build_model, is_custom
from compress.progress import bar
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
    bind(config.prune.criterion, Context(model, graph, config.prune.residual_gate))


@dataclass
class Progressed:
    """Where the pruning stands: masks by dense unit id."""

    kept: Mask
    """Units that are left."""
    shrunk: Mask
    """Units that are physically there; those not kept are masked."""
    step: int = 0


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
        config = self.config
        finetuning = config.finetune.epochs * self.trainer.steps_per_epoch
        return config.prune.steps * config.prune.interval + finetuning

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
        return self.reached and bool((self.at.kept == self.at.shrunk).all())

    def _step(self, batch: Batch) -> None:
        score = self._score if self.scoring.per_minibatch else None
        self.trainer.step(batch, network=self.scoring.network, after_backward=score)
        self._hold_masked()
        if self.trainer.step_index % self.config.prune.interval == 0:
            self._prune_step()

    def _score(self) -> None:
        self.importance.add(self.scoring.score())

    def _hold_masked(self) -> None:
        if not (self.at.kept == self.at.shrunk).all():
            mask_(self.model, self.graph, self.at.kept)

    def _prune_step(self) -> None:
        self.trainer.check()
        if not self.scoring.per_minibatch:
            self._score()
        if not self.importance.minibatches:
            return  # broken images left no minibatch to judge by
        with _timed(self.metrics["seconds"], "decide"):
            self.at.step += 1
            scores = self.importance.close_interval()
            before = self.at.kept
            self.at.kept = decide(
                scores,
                self.at.kept,
                self.allowed,
                goal=self.goal,
                config=self.config.prune,
                step=self.at.step,
            )
            mask_(self.model, self.graph, self.at.kept | ~before)  # the rest is masked already
        here = cost.macs(self.graph, self.at.shrunk)
        masked = 1 - cost.macs(self.graph, self.at.kept) / here
        if self.reached or masked >= self.config.prune.shrink_at:
            self._shrink()
        self.session.record(
            "prune_step",
            step=self.trainer.step_index,
            pruning_step=self.at.step,
            loss=self.trainer.mean_loss(),
            widths={c.group.name: int(self.at.kept[c.group.units].sum()) for c in self.allowed},
            **self._costs(self.at.kept),
        )

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
        config = self.config.prune
        context = Context(self.model, self.graph, config.residual_gate, self.config.seed)
        return bind(config.criterion, context)

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


def prunable(model: nn.Module, graph: ChannelGraph, config: PruneConfig) -> tuple[Candidate, ...]:
    """Return the groups of a network that may be pruned.

    Raises:
        ModelError: there is none; the message names what stands in the way.
    """
    modules = dict(model.named_modules())
    found: list[Candidate] = []
    frozen: list[Candidate] = []
    for candidate in candidates(graph, config):
        trainable = all(modules[r].weight.requires_grad for r in candidate.group.readers)
        (found if trainable else frozen).append(candidate)
    if frozen:
        names = ", ".join(c.group.name for c in frozen[:5])
        log.warning("%d groups have frozen readers and stay dense: %s", len(frozen), names)
    if graph.unknown:
        log.warning("unknown operations keep their channels dense: %s", ", ".join(graph.unknown))
    if not any(c.floor < c.group.size for c in found):
        raise ModelError(_nothing_to_prune(graph, bool(frozen)))
    return tuple(found)


def decide(
    scores: Scores,
    kept: Mask,
    allowed: tuple[Candidate, ...],
    *,
    goal: Goal,
    config: PruneConfig,
    step: int,
) -> Mask:
    """Return the mask after one pruning step: a share of the way to the goal, never past it."""
    if config.step_size is None:
        limit = goal.at(step, config.steps)
        return prune_to(scores, kept, allowed, cost_of=goal.cost_of, limit=limit)
    fewest = goal.channels_of(kept) - config.step_size
    last = prune_to(scores, kept, allowed, cost_of=goal.cost_of, limit=goal.limit)
    if goal.channels_of(last) >= fewest:
        return last
    return prune_to(scores, kept, allowed, cost_of=goal.channels_of, limit=fewest)


def _nothing_to_prune(graph: ChannelGraph, frozen: bool) -> str:
    if graph.unknown:
        return f"nothing to prune: unknown operations touch every group: {', '.join(graph.unknown)}"
    if frozen:
        return "nothing to prune: every layer that reads prunable channels is frozen"
    return "nothing to prune: no group is above its floor (min_channels, min_share, keep_dense)"


@contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to an entry of a table."""
    start = time.perf_counter()
    yield
    table[name] += time.perf_counter() - start
