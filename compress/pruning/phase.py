"""The pruning phase of a run: training steps, with pruning steps and shrinks between them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.config import RunConfig
from compress.criteria import bind
from compress.criteria.scoring import Context, Scoring
from compress.data.loading import Batch
from compress.distributed.world import current
from compress.errors import CheckpointError
from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import mask_, proof, shrink_
from compress.pruning.decision import decide, prunable
from compress.pruning.importance import Importance, ranked, summary
from compress.pruning.masking import goal_for, smallest
from compress.runs.session import Session
from compress.training.trainer import OTHER_NETWORK, Trainer

log = logging.getLogger("compress")


def context_of(model: nn.Module, graph: ChannelGraph, config: RunConfig) -> Context:
    """Return what the configured criterion is bound to."""
    return Context(
        model,
        graph,
        config.prune.residual_gate,
        seed=config.seed,
        as_published=config.prune.as_published,
        hessian_samples=config.prune.hessian_samples,
        world=current(),
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


class PruningPhase:
    """What pruning does to the network that a trainer trains.

    Args:
        trainer: trains the network, which is dense so far.
        graph: the network's channel graph.
        config: the run's configuration.
        session: takes what happened into the history.
        images: (N, C, H, W) on which masked and shrunk are compared.

    Raises:
        BudgetError: the budget cannot be reached.
        ModelError: there is nothing to prune.
    """

    def __init__(
        self,
        trainer: Trainer,
        graph: ChannelGraph,
        config: RunConfig,
        session: Session,
        images: torch.Tensor,
    ) -> None:
        self.trainer, self.model, self.config = trainer, trainer.model, config
        self.session, self.images = session, images
        self.dense_graph = self.graph = graph
        self.allowed = prunable(self.model, graph, config.prune)
        self.goal = goal_for(graph, config.prune.budget, self.allowed)
        self.at = Progressed(graph.everything(), graph.everything())
        self.importance = Importance(graph.num_units, momentum=config.prune.momentum)
        self.scoring = self._bind()
        self.seconds = {"decide": 0.0, "shrink": 0.0, "proof": 0.0}
        self.largest_difference = 0.0
        """Of masked and shrunk, over all shrinks."""

    @property
    def expected_steps(self) -> int:
        """Training steps until the budget is reached, as far as that is known."""
        prune = self.config.prune
        steps = prune.steps
        if prune.step_size is not None:
            steps = math.ceil(self._channels_to_remove / prune.step_size)
        steps += prune.start_after
        return min(steps, prune.max_steps or steps) * prune.interval

    @property
    def _channels_to_remove(self) -> float:
        budget = self.config.prune.budget
        if budget.kind == "removed":
            return budget.value
        dense, least = self.dense_graph.everything(), smallest(self.dense_graph, self.allowed)
        return self.goal.channels_of(dense) - self.goal.channels_of(least)

    @property
    def reached(self) -> bool:
        """Whether the budget holds."""
        return self.goal.cost_of(self.at.kept) <= self.goal.limit

    @property
    def done(self) -> bool:
        """Whether pruning is over and all that was removed is physically gone."""
        return (self.reached or self.at.ended) and bool((self.at.kept == self.at.shrunk).all())

    @property
    def _judged(self) -> bool:
        """Whether the importance is final."""
        prune = self.config.prune
        return prune.fixed_criteria and self.at.step > prune.start_after

    def step(self, batch: Batch) -> None:
        """Train on one minibatch; after each interval, take a pruning step."""
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
        with _timed(self.seconds, "decide"):
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
        self.trainer.world.require_same(
            f"the mask of pruning step {self.at.step}", self.at.kept.tobytes()
        )
        self.session.record(
            "prune_step",
            step=self.trainer.step_index,
            pruning_step=self.at.step,
            loss=loss,
            lr=self.trainer.lr,
            importance=summary(importance, before, self.allowed),
            widths={c.group.name: int(self.at.kept[c.group.units].sum()) for c in self.allowed},
            **cost.totals(self.dense_graph, self.at.kept),
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
        with _timed(self.seconds, "proof"):
            example = Example((self.images,))
            difference = proof(self.model, self.graph, self.at.kept, example)
        with _timed(self.seconds, "shrink"):
            with self.trainer.reshaping():
                self.graph = shrink_(self.model, self.graph, self.at.kept, [self.trainer.optimizer])
            self.at.shrunk = self.at.kept.copy()
            self.scoring = self._bind()
        self.largest_difference = max(self.largest_difference, difference)
        self.session.record(
            "shrink", step=self.trainer.step_index, difference=difference, images=len(self.images)
        )

    def _bind(self) -> Scoring:
        return bind(self.config.prune.criterion, context_of(self.model, self.graph, self.config))

    # Resume

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return the facts and the tensors to go on from."""
        tensors = {
            "kept": torch.from_numpy(self.at.kept.copy()),
            "shrunk": torch.from_numpy(self.at.shrunk.copy()),
            "importance.total": self.importance.total,
        }
        if self.importance.average is not None:
            tensors["importance.average"] = torch.from_numpy(self.importance.average)
        facts = {
            "pruning_step": self.at.step,
            "paused": self.at.paused,
            "ended": self.at.ended,
            "minibatches": self.importance.minibatches,
            "proof": self.largest_difference,
            "seconds": self.seconds,
        }
        return facts, tensors

    def load(self, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state: the network takes its shrunk form, its weights come later.

        Raises:
            CheckpointError: the state is of another network.
        """
        if len(tensors["kept"]) != self.dense_graph.num_units:
            raise CheckpointError(OTHER_NETWORK)
        self.at = Progressed(
            tensors["kept"].numpy().astype(bool),
            tensors["shrunk"].numpy().astype(bool),
            facts["pruning_step"],
            facts["paused"],
            facts["ended"],
        )
        with self.trainer.reshaping():
            self.graph = shrink_(self.model, self.graph, self.at.shrunk)
        self.importance.total = tensors["importance.total"]
        self.importance.minibatches = facts["minibatches"]
        if "importance.average" in tensors:
            self.importance.average = tensors["importance.average"].numpy()
        self.largest_difference, self.seconds = facts["proof"], facts["seconds"]
        self.scoring = self._bind()


@contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to an entry of a table."""
    start = time.perf_counter()
    yield
    table[name] += time.perf_counter() - start
