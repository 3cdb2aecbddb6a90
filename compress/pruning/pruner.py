"""Pruning around a training loop that is not ours: importance, masks and shrinks of one network."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoints.recipe import Recipe, recipe_of
from compress.config import PruneConfig
from compress.criteria import bind
from compress.criteria.scoring import Context, Scoring
from compress.distributed.world import World, current
from compress.errors import CheckpointError, RunError, UsageError
from compress.latency.times import Times
from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import holder, proof, shrink_
from compress.networks.trial import tried_graph
from compress.pruning.decision import Decisions, Event, report_dense
from compress.pruning.given import read_importance
from compress.pruning.goal import times_for
from compress.pruning.importance import Importance
from compress.pruning.masking import Scores
from compress.pruning.progress import Progress
from compress.pruning.settings import prune_settings, takes_settings
from compress.pruning.summary import Summary
from compress.pruning.training import (
    Bound,
    inner_network,
    inner_optimizers,
    require_trained,
    unscale,
)
from compress.training.recalibration import reestimate_batchnorm

Callback = Callable[[str, dict[str, Any]], None]
"""Told of every event: its kind and the facts of it."""
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]

OTHER_NETWORK = "the state to go on from is of another network, or of another example"
JOINED = 1e-3
"""Share by which the importance of two processes may differ when their gradients are joined."""

log = logging.getLogger("compress")


def context_of(model: nn.Module, graph: ChannelGraph, config: PruneConfig, seed: int) -> Context:
    """Return what a configured criterion is bound to."""
    return Context(
        model,
        graph,
        config.residual_gate,
        seed=seed,
        as_published=config.as_published,
        hessian_samples=config.hessian_samples,
        world=current(),
    )


class Pruner:
    """Prunes a network step by step while a loop of the user's own trains it.

        pruner = compress.Pruner(model, images[:1], optimizer=optimizer, budget="macs=0.5")
        for images, labels in loader:
            loss = my_loss(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            pruner.score()          # after backward, before optimizer.step()
            optimizer.step()
            if pruner.step():       # True when the budget holds
                break

    Importance is averaged over ``interval`` minibatches, then a pruning step removes channels; the
    budget holds after ``steps`` of them. Removed channels are held at zero, and the network shrinks
    whenever a share ``shrink_at`` of its MACs is masked. ``docs/library.md`` tells the rest.

    Attributes:
        settings: the checked settings.
        graph: the channel graph of the network as it is.
        dense_graph: that of the network as it was.
        reshaped: whether the last ``step`` changed shapes. Whoever holds parameters, such as
            DistributedDataParallel, is then made anew.
        at: where the pruning stands: masks, importance, counters.
    """

    @takes_settings
    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        optimizer: Optimizers | None,
        copies: Sequence[nn.Module] = (),
        callback: Callback | None = None,
        patience: int | None = None,
        seed: int = 0,
        graph: ChannelGraph | None = None,
        table: Times | str | Path | None = None,
        **settings: Any,
    ) -> None:
        """Analyse the network and try the analysis; nothing is changed.

        Args:
            model: the network, or the part of it that is pruned, where and as it is trained.
            example: inputs of ``forward`` as training gives them: a tensor, a tuple of arguments,
                a dictionary of keywords, or an ``Example``. What is shrunk is proved on it.
            optimizer: one or several that train the network; parameters and state follow a shrink.
                None for people who make theirs anew whenever ``reshaped`` says so.
            copies: networks of the same shapes that shrink along, such as an ``AveragedModel``.
            callback: called with ``"prune_step"``, ``"prune_pause"``, ``"prune_end"`` or
                ``"shrink"`` and a dictionary of plain facts, after everything is done.
            patience: minibatches that ``max_loss`` may put pruning off in all; None has no end.
            seed: of the criterion ``random``.
            graph: the channel graph, where it is known.
            table: what layers take, for a budget of time: a file that ``compress profile`` wrote,
                or ``Times``; by default the file of ``latency_table``.
            settings: fields of ``[prune]``, see docs/pruning.md.

        Raises:
            ConfigError: a setting that does not exist or does not fit, or a criterion that cannot
                score this network.
            BudgetError: the budget cannot be reached; the message names the closest.
            ModelError: the network cannot be captured, or there is nothing to prune.
            UsageError: an optimizer lacks a parameter, or a copy is of another network.
        """
        self.settings = prune_settings(settings, of="Pruner")
        self.model, self.seed = inner_network(model), seed
        self.example = Example.of(example)
        self.optimizers = inner_optimizers(optimizer)
        self.copies = tuple(map(inner_network, copies))
        self.callback = callback or (lambda kind, facts: None)
        if graph is None:
            graph = tried_graph(self.model, self.example.pair().beside(self.model))
            report_dense(graph)
        self.dense_graph = self.graph = graph
        times = times_for(self.settings, graph, table)
        self.decisions = Decisions(self.model, graph, self.settings, patience, times)
        require_trained(self.model, graph, self.optimizers, self.copies)
        importance = Importance(graph.num_units, momentum=self.settings.momentum)
        if self.settings.importance_from is not None:
            file, allowed = self.settings.importance_from, self.decisions.allowed
            importance.average = read_importance(file, graph, allowed)
        self.at = Progress(graph.everything(), graph.everything(), importance)
        self.reshaped = self._scored = False
        self._detach: Callable[[], None] = lambda: None
        self._bind()

    # What there is to know

    @property
    def reached(self) -> bool:
        """Whether the budget holds."""
        return self.decisions.reached(self.at.kept)

    @property
    def done(self) -> bool:
        """Whether pruning is over and all that was removed is physically gone."""
        return (self.reached or self.at.ended) and self.at.all_gone

    @property
    def world(self) -> World:
        """The processes that train the network together."""
        return current()

    @property
    def due(self) -> bool:
        """Whether the next ``step`` takes a pruning step."""
        counted = self.at.minibatches + 1 - self.settings.first_interval_extra
        return not self.done and counted > 0 and counted % self.settings.interval == 0

    @property
    def recipe(self) -> Recipe:
        """What rebuilds the network as it is from its dense one; ``compress.save`` takes it."""
        return recipe_of(self.dense_graph, self.at.shrunk)

    def summary(self) -> Summary:
        """Return widths and costs before and after, and why groups stay dense."""
        return Summary.of(self.dense_graph, self.at.kept, str(self.settings.budget))

    def follow(self, optimizer: Optimizers | None) -> None:
        """Let other optimizers follow from now on, as ``optimizer`` of the constructor.

        Raises:
            UsageError: none of them holds a parameter that is trained and may shrink.
        """
        optimizers = inner_optimizers(optimizer)
        require_trained(self.model, self.graph, optimizers, self.copies)
        self.optimizers = optimizers

    def limit(self, milliseconds: float) -> None:
        """Correct what a budget of time stands for, when the network was measured.

        A table is not exact. Who has measured a network of ``m`` ms where it predicts ``p`` asks
        for ``p / m`` times the limit; pruning then goes on, if need be.

        Args:
            milliseconds: the limit, as the table predicts times.
        """
        self.decisions.limit(milliseconds)
        self.at.limit = milliseconds

    # Around a training step

    def before_backward(self, loss: torch.Tensor) -> None:
        """Take second derivatives of a loss, for the criteria ``obd`` and ``taylor-gate-so``.

        Others need no such call and take no time for it.

        Args:
            loss: of the minibatch, or of a part of it, before it is scaled.
        """
        if self._listens and self.scoring.before_backward:
            self._require_watched()
            self.scoring.before_backward(loss)

    def score(
        self,
        scaler: torch.amp.GradScaler | None = None,
        *,
        clipped: float | torch.Tensor = 1.0,
    ) -> None:
        """Take the importance of channels from the gradients of a minibatch.

        Call it once for every ``optimizer.step()``, between the last ``backward()`` and that, with
        gradients that are whole (accumulated, and joined where processes share the minibatch).

        Args:
            scaler: what scaled the loss, if anything; gradients are unscaled if that is not done.
            clipped: the factor by which the gradients of parameters were clipped, if they were:
                those that a criterion takes elsewhere are scaled alike.

        Raises:
            UsageError: there are no gradients, or they were scored already, or the criterion
                watches a network that is compiled.
        """
        if not self._listens:
            return
        if self._scored:
            raise UsageError(
                "score() was called twice for one step(): call it once for every optimizer.step(), "
                "after the last backward() of what is accumulated"
            )
        if not self._bound.have_gradients:
            self._bound.require_unchanged(self.model, self.graph)
            raise UsageError(
                "score() finds no gradient in the network: call it after loss.backward() and "
                "before gradients are set to None"
            )
        if self._bound.moved:
            self._bind()
        self._require_watched()
        scale = unscale(scaler, self.optimizers) if scaler is not None else 1.0
        self.at.importance.add(self.scoring.score(scale / clipped))
        self._scored = True

    def step(self, loss: float | torch.Tensor | None = None) -> bool:
        """Hold removed channels at zero; after each interval remove more, and shrink when due.

        Call it after every ``optimizer.step()``.

        Args:
            loss: of the minibatch; needed where ``max_loss`` is set.

        Returns:
            Whether pruning is over: the budget holds, or ``max_steps`` or ``patience`` ended it.

        Raises:
            UsageError: no ``score()`` came before, or the network was changed by somebody else.
            ModelError: the shrunk network would not compute what the masked one does.
            RunError: processes that train together do not agree.
        """
        self.reshaped = False
        if self.done:
            return True
        if self._listens and not self._scored:
            raise UsageError(
                "step() was called without a score() before it: call score() between "
                "loss.backward() and optimizer.step(), then step() once"
            )
        due = self.due
        self._take(loss)
        self._hold()
        events = self._pruning_step() if due else []
        self.at.minibatches += 1
        self._scored = False
        if self.done:
            self._detach()
        for kind, facts in events:  # last: a callback may save the state, or fail
            self.callback(kind, facts)
        return self.done

    def reestimate_batchnorm(self, batches: Iterable[Any]) -> int:
        """Re-estimate BatchNorm's statistics, which are still those before the last shrink.

        Args:
            batches: the inputs of training minibatches, each as the example was given; the first
                ``bn_batches`` of them are used.

        Returns:
            The number of minibatches seen.
        """
        inputs = map(Example.of, itertools.islice(batches, self.settings.bn_batches))
        return reestimate_batchnorm(self.model, inputs, self.world)

    # Pruning steps

    @property
    def _judged(self) -> bool:
        """Whether the importance is final."""
        settings = self.settings
        measured = settings.fixed_criteria and self.at.step > settings.start_after
        return measured or settings.importance_from is not None

    @property
    def _listens(self) -> bool:
        """Whether minibatches are scored."""
        return self.scoring.per_minibatch and not self._judged and not self.done

    def _take(self, loss: float | torch.Tensor | None) -> None:
        if loss is None:
            if self.settings.max_loss is not None and self.due and not self.at.losses:
                raise UsageError("max_loss is set, so step() needs the loss: step(loss)")
            return
        self.at.loss = self.at.loss + (loss.detach() if isinstance(loss, torch.Tensor) else loss)
        self.at.losses += 1

    def _mean_loss(self) -> float | None:
        """Return the mean loss since the last pruning step, of all processes, and begin anew."""
        total, count = float(self.at.loss), self.at.losses
        self.at.loss, self.at.losses = 0.0, 0
        return self.world.mean(total / count) if count else None

    def _pruning_step(self) -> list[Event]:
        """Decide, then shrink or mask; an error leaves everything as it was.

        Returns:
            What is to be told.
        """
        self._bound.require_unchanged(self.model, self.graph)
        before = self.at.snapshot()
        try:
            loss = self._mean_loss()
            with self._timed("decide"):
                events = self.decisions.step(self.at, self._importance, loss)
            kept, step = self.at.kept, self.at.step
            self.world.require_same(f"the mask of pruning step {step}", kept.tobytes())
            here = cost.macs(self.graph, self.at.shrunk)
            masked = 1 - cost.macs(self.graph, kept) / here
            over = self.reached or self.at.ended
            if masked and (over or masked >= self.settings.shrink_at):
                events.append(self._shrink())
            elif masked:
                self._hold = holder(self.model, self.graph, kept)
                self._hold()
        except BaseException:
            self.at = before
            raise
        return events

    def _importance(self) -> Scores:
        """End the interval and return the importance, (units,), the same in every process."""
        if self._judged:
            assert self.at.importance.average is not None
            return self.at.importance.average
        if not self.scoring.per_minibatch:
            self.at.importance.add(self.scoring.score(1.0))
        own = self.at.importance.close_interval()
        shared = self.world.from_first(torch.from_numpy(own)).numpy()
        apart = np.abs(own - shared).max() > JOINED * np.abs(shared).max()
        if self.world.any(bool(apart)):
            raise RunError(
                "the importance of channels differs among processes, so their gradients are not "
                "joined: wrap the network in DistributedDataParallel anew after every step that "
                "sets reshaped, and score when gradients are synchronised"
            )
        self.at.importance.average = shared
        return shared

    def _shrink(self) -> Event:
        example = self.example.first(self.settings.proof_images)
        with self._timed("proof"):
            difference = proof(self.model, self.graph, self.at.kept, example)
        with self._timed("shrink"):
            self._cut(self.at.kept)
        self.at.shrunk = self.at.kept.copy()
        self.at.largest_difference = max(self.at.largest_difference, difference)
        return "shrink", {"difference": difference, "images": example.batch}

    def _cut(self, kept: Mask) -> None:
        """Shrink the network and its copies, and bind the criterion to what is left."""
        before = self.graph
        self.graph = shrink_(self.model, before, kept, self.optimizers)  # the one that may refuse
        for copied in self.copies:
            shrink_(copied, before, kept)
        self.reshaped = True
        self._bind()

    def _bind(self) -> None:
        """Bind the criterion, and what holds masks, to the present parameters."""
        self._detach()
        context = context_of(self.model, self.graph, self.settings, self.seed)
        self.scoring: Scoring = bind(self.settings.scored_by, context)
        self._bound = Bound(self.model, self.graph)
        self._hold = holder(self.model, self.graph, self.at.kept)
        if self.scoring.network is not None and not self._judged:
            self._detach = self.scoring.network.attach()

    def _require_watched(self) -> None:
        if self.scoring.network is not None and self.scoring.network.compiled:
            raise UsageError(
                f"the criterion {self.settings.criterion} watches the network run, which it cannot "
                "in a compiled one: train the network itself, or use taylor-gate with "
                "residual_gate='read'"
            )

    @contextmanager
    def _timed(self, work: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.at.seconds[work] += time.perf_counter() - start

    # Resume

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what to go on from, as tensors by name, which a file of safetensors can hold.

        Weights are no part of it: the network and its optimizer have a ``state_dict`` of their own.
        """
        return {"network": self._fingerprint(), **self.at.tensors()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state: the network, still dense, takes its shrunk form.

        Then load the network's and the optimizer's own states, whose shapes fit from here on.

        Raises:
            CheckpointError: the state is of another network; nothing is changed.
            UsageError: the network is not dense any more.
        """
        if not self.at.shrunk.all():
            raise UsageError(
                "load_state_dict() needs the dense network and this one has shrunk already: build "
                "the network and its Pruner anew"
            )
        try:
            if not torch.equal(state["network"].cpu(), self._fingerprint()):
                raise CheckpointError(OTHER_NETWORK)
            found = Progress.of(state, self.dense_graph, momentum=self.settings.momentum)
        except KeyError as error:
            raise CheckpointError(
                f"the state to go on from lacks {error}: it is damaged"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"the state to go on from is damaged: {error}") from error
        self._bound.require_unchanged(self.model, self.graph)
        before, self.at, self._scored = self.at, found, False
        try:
            self._cut(found.shrunk)
        except BaseException:
            self.at = before
            raise
        self.reshaped = False
        if found.limit is not None:
            self.decisions.limit(found.limit)
        if self.done:
            self._detach()

    def _fingerprint(self) -> torch.Tensor:
        """Return 32 bytes that tell this network's units from another's."""
        digest = hashlib.sha256()
        for axis in self.dense_graph.axes:
            digest.update(f"{axis.tensor} {axis.dim} ".encode() + axis.units.tobytes())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)
