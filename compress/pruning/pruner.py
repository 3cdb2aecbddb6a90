"""Pruning around a training loop that is not ours: importance, masks and shrinks of one network."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoints.recipe import Recipe, recipe_from_cuts
from compress.config import PruneConfig
from compress.criteria import bind
from compress.criteria.scoring import Context, Scoring
from compress.distributed.world import World, current
from compress.errors import CheckpointError, RunError, UsageError
from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.cuts import cuts_of, tensor_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import holder, proof, shrink_
from compress.networks.trial import tried_graph
from compress.pruning.decision import decide, prunable, report_dense
from compress.pruning.importance import Importance, ranked, summary
from compress.pruning.masking import Scores, goal_for
from compress.pruning.settings import prune_settings, takes_settings
from compress.pruning.summary import Summary
from compress.pruning.training import inner_network, inner_optimizers, require_trained, unscale
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


@dataclass
class Progress:
    """Where the pruning stands: masks by dense unit id."""

    kept: Mask
    """Units that are left."""
    shrunk: Mask
    """Units that are physically there; those not kept are masked."""
    minibatches: int = 0
    """Training steps so far."""
    step: int = 0
    """Pruning steps taken, with those that only measured."""
    paused: int = 0
    """Pruning steps that were put off because the loss was too high."""
    ended: bool = False
    """Whether pruning is over although the budget is not reached."""


class Pruner:
    """Prunes a network step by step while a loop of the user's own trains it.

    ::

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
        largest_difference: of masked and shrunk outputs, over all shrinks, relative, in float64.
        seconds: what pruning took, by the kind of work.
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
            settings: fields of ``[prune]``, see docs/pruning.md.

        Raises:
            ConfigError: a setting that does not exist or does not fit, or a criterion that cannot
                score this network.
            BudgetError: the budget cannot be reached; the message names the closest.
            ModelError: the network cannot be captured, or there is nothing to prune.
            UsageError: an optimizer lacks a parameter, or a copy is of another network.
        """
        self.settings = prune_settings(settings, of="Pruner")
        self.model, self.seed, self.patience = inner_network(model), seed, patience
        self.example = Example.of(example)
        self.optimizers = inner_optimizers(optimizer)
        self.copies = tuple(map(inner_network, copies))
        self.callback = callback or (lambda kind, facts: None)
        if graph is None:
            graph = tried_graph(self.model, self.example.pair().beside(self.model))
            report_dense(graph)
        self.dense_graph = self.graph = graph
        self.allowed = prunable(self.model, graph, self.settings)
        self.goal = goal_for(graph, self.settings.budget, self.allowed)
        require_trained(self.model, graph, self.optimizers, self.copies)
        self.at = Progress(graph.everything(), graph.everything())
        self.importance = Importance(graph.num_units, momentum=self.settings.momentum)
        self.reshaped = self._scored = self._reached = False
        self._counted: Mask | None = None
        self._loss: list[float | torch.Tensor] = [0.0, 0]
        self.largest_difference = 0.0
        self.seconds = {"decide": 0.0, "shrink": 0.0, "proof": 0.0}
        self._detach: Callable[[], None] = lambda: None
        self._bind()

    # What there is to know

    @property
    def reached(self) -> bool:
        """Whether the budget holds."""
        if self._counted is not self.at.kept:  # asked at every minibatch, and counting takes time
            self._counted = self.at.kept
            self._reached = self.goal.cost_of(self.at.kept) <= self.goal.limit
        return self._reached

    @property
    def done(self) -> bool:
        """Whether pruning is over and all that was removed is physically gone."""
        return (self.reached or self.at.ended) and bool((self.at.kept == self.at.shrunk).all())

    @property
    def world(self) -> World:
        """The processes that train the network together."""
        return current()

    @property
    def due(self) -> bool:
        """Whether the next ``step`` takes a pruning step."""
        return not self.done and (self.at.minibatches + 1) % self.settings.interval == 0

    @property
    def recipe(self) -> Recipe:
        """What rebuilds the network as it is from its dense one; ``compress.save`` takes it."""
        return recipe_from_cuts(cuts_of(self.dense_graph, self.at.shrunk))

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

    def score(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take the importance of channels from the gradients of a minibatch.

        Call it once for every ``optimizer.step()``, between the last ``backward()`` and that, with
        gradients that are whole (accumulated, and joined where processes share the minibatch).

        Args:
            scaler: what scaled the loss, if anything; gradients are unscaled if that is not done.

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
        if all(parameter.grad is None for parameter in self._bound.values()):
            self._require_unchanged()
            raise UsageError(
                "score() finds no gradient in the network: call it after loss.backward() and "
                "before gradients are set to None"
            )
        if next(iter(self._bound.values())).device != self._device:
            self._bind()  # the network was moved
        self._require_watched()
        scale = unscale(scaler, self.optimizers) if scaler is not None else 1.0
        self.importance.add(self.scoring.score(scale))
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
        if due:
            self._pruning_step()
        self.at.minibatches += 1
        self._scored = False
        if self.done:
            self._detach()
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
        return self.settings.fixed_criteria and self.at.step > self.settings.start_after

    @property
    def _listens(self) -> bool:
        """Whether minibatches are scored."""
        return self.scoring.per_minibatch and not self._judged and not self.done

    def _take(self, loss: float | torch.Tensor | None) -> None:
        if loss is None:
            if self.settings.max_loss is not None and self.due and not self._loss[1]:
                raise UsageError("max_loss is set, so step() needs the loss: step(loss)")
            return
        value = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._loss = [self._loss[0] + value, self._loss[1] + 1]

    def _mean_loss(self) -> float | None:
        """Return the mean loss since the last pruning step, of all processes, and begin anew."""
        total, count = self._loss
        self._loss = [0.0, 0]
        if not count:
            return None
        return self.world.mean(float(total) / float(count))

    def _pruning_step(self) -> None:
        """Decide, then shrink or mask; an error leaves everything as it was."""
        self._require_unchanged()
        loss, before, settings = self._mean_loss(), replace(self.at), self.settings
        try:
            if settings.max_loss is not None and loss is not None and loss > settings.max_loss:
                events = self._pause(loss)
            else:
                events = self._remove(loss)
            here = cost.macs(self.graph, self.at.shrunk)
            masked = 1 - cost.macs(self.graph, self.at.kept) / here
            if masked and (self.reached or self.at.ended or masked >= settings.shrink_at):
                events.append(self._shrink())
            elif masked:
                self._hold = holder(self.model, self.graph, self.at.kept)
                self._hold()
        except BaseException:
            self.at = before
            raise
        for kind, facts in events:
            self.callback(kind, facts)

    def _remove(self, loss: float | None) -> list[tuple[str, dict[str, Any]]]:
        """Go from importance to a smaller mask; return what is to be told."""
        settings, before = self.settings, self.at.kept
        with self._timed("decide"):
            importance = self._importance()
            self.at.step += 1
            if self.at.step > settings.start_after:
                self.at.kept = decide(
                    ranked(
                        importance, before, self.allowed, graph=self.dense_graph, config=settings
                    ),
                    before,
                    self.allowed,
                    goal=self.goal,
                    config=settings,
                    step=self.at.step - settings.start_after,
                )
        self.world.require_same(f"the mask of pruning step {self.at.step}", self.at.kept.tobytes())
        facts = {
            "pruning_step": self.at.step,
            "loss": loss,
            "importance": summary(importance, before, self.allowed),
            "widths": {c.group.name: int(self.at.kept[c.group.units].sum()) for c in self.allowed},
            **cost.totals(self.dense_graph, self.at.kept),
        }
        events = [("prune_step", facts)]
        most = settings.max_steps
        if most is not None and self.at.step >= most and not self.reached:
            events.append(self._end(f"max_steps = {most} pruning steps are taken"))
        return events

    def _importance(self) -> Scores:
        """End the interval and return the importance, (units,), the same in every process."""
        if self._judged:
            assert self.importance.average is not None
            return self.importance.average
        if not self.scoring.per_minibatch:
            self.importance.add(self.scoring.score(1.0))
        own = self.importance.close_interval()
        shared = self.world.from_first(torch.from_numpy(own)).numpy()
        apart = np.abs(own - shared).max() > JOINED * np.abs(shared).max()
        if self.world.any(bool(apart)):
            raise RunError(
                "the importance of channels differs among processes, so their gradients are not "
                "joined: wrap the network in DistributedDataParallel anew after every step that "
                "sets reshaped, and score when gradients are synchronised"
            )
        self.importance.average = shared
        return shared

    def _pause(self, loss: float) -> list[tuple[str, dict[str, Any]]]:
        """Train on without removing anything; in the end, give up."""
        self.at.paused += 1
        events: list[tuple[str, dict[str, Any]]] = [("prune_pause", {"loss": loss})]
        patience = self.patience
        if patience is not None and self.at.paused * self.settings.interval > patience:
            limit = self.settings.max_loss
            events.append(self._end(f"the loss {loss:.3f} stayed above max_loss = {limit}"))
        return events

    def _end(self, reason: str) -> tuple[str, dict[str, Any]]:
        self.at.ended = True
        share = self.goal.cost_of(self.at.kept) / self.goal.dense
        log.warning(
            "pruning ends before the budget %s, at %.3f of the dense cost: %s",
            self.settings.budget,
            share,
            reason,
        )
        return "prune_end", {"reason": reason}

    def _shrink(self) -> tuple[str, dict[str, Any]]:
        example = self.example.first(self.settings.proof_images)
        with self._timed("proof"):
            difference = proof(self.model, self.graph, self.at.kept, example)
        with self._timed("shrink"):
            self._cut(self.at.kept)
        self.at.shrunk = self.at.kept.copy()
        self.largest_difference = max(self.largest_difference, difference)
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
        self.scoring: Scoring = bind(self.settings.criterion, context)
        self._device = context.device
        self._bound = {
            axis.tensor: tensor
            for axis in self.graph.axes
            if isinstance(tensor := _held(self.model, axis.tensor), nn.Parameter)
        }
        self._hold = holder(self.model, self.graph, self.at.kept)
        if self.scoring.network is not None:
            self._detach = self.scoring.network.attach()

    def _require_watched(self) -> None:
        if self.scoring.network is not None and self.scoring.network.compiled:
            raise UsageError(
                f"the criterion {self.settings.criterion} watches the network run, which it cannot "
                "in a compiled one: train the network itself, or use taylor-gate with "
                "residual_gate='read'"
            )

    def _require_unchanged(self) -> None:
        """Refuse a network in which somebody else exchanged or resized parameters."""
        for axis in self.graph.axes:
            bound = self._bound.get(axis.tensor)
            if bound is None:
                continue
            now = _held(self.model, axis.tensor)
            if now is not bound or bound.shape[axis.dim] != len(axis.units):
                raise UsageError(
                    f"{axis.tensor} is not what the Pruner was made with: the network was changed "
                    "by somebody else (a module replaced, a parameter exchanged or resized); make "
                    "a new Pruner for the network as it is now"
                )

    @contextmanager
    def _timed(self, work: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[work] += time.perf_counter() - start

    # Resume

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what to go on from, as tensors by name, which a file of safetensors can hold.

        Weights are no part of it: the network and its optimizer have a ``state_dict`` of their own.
        """
        at, average = self.at, self.importance.average
        state = {
            "network": self._fingerprint(),
            "kept": torch.from_numpy(at.kept.copy()),
            "shrunk": torch.from_numpy(at.shrunk.copy()),
            "importance.total": self.importance.total.detach().clone(),
            "loss": torch.tensor([float(part) for part in self._loss], dtype=torch.float64),
        }
        if average is not None:
            state["importance.average"] = torch.from_numpy(average.copy())
        numbers = {
            "training_step": at.minibatches,
            "pruning_step": at.step,
            "paused": at.paused,
            "ended": at.ended,
            "minibatches": self.importance.minibatches,
            "proof": self.largest_difference,
            **{f"seconds.{work}": seconds for work, seconds in self.seconds.items()},
        }
        for name, number in numbers.items():
            exact = torch.float64 if isinstance(number, float) else None
            state[name] = torch.tensor(number, dtype=exact)
        return state

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
        self._require_state(state)
        with self._timed("shrink"):
            self._cut(state["shrunk"].numpy().astype(bool))
        self.reshaped = False
        self.at = Progress(
            state["kept"].numpy().astype(bool),
            state["shrunk"].numpy().astype(bool),
            int(state["training_step"]),
            int(state["pruning_step"]),
            int(state["paused"]),
            bool(state["ended"]),
        )
        self.importance.total = state["importance.total"].clone()
        self.importance.minibatches = int(state["minibatches"])
        average = state.get("importance.average")
        self.importance.average = None if average is None else average.numpy().copy()
        self._loss = [float(state["loss"][0]), int(state["loss"][1])]
        self.largest_difference = float(state["proof"])
        self.seconds = {work: float(state[f"seconds.{work}"]) for work in self.seconds}
        self._scored = False
        self._hold = holder(self.model, self.graph, self.at.kept)
        if self.done:
            self._detach()

    def _require_state(self, state: Mapping[str, torch.Tensor]) -> None:
        missing = sorted(self.state_dict().keys() - state.keys() - {"importance.average"})
        if missing:
            raise CheckpointError(f"the state to go on from lacks {missing[0]!r}: it is damaged")
        if not torch.equal(state["network"].cpu(), self._fingerprint()):
            raise CheckpointError(OTHER_NETWORK)

    def _fingerprint(self) -> torch.Tensor:
        """Return 32 bytes that tell this network's units from another's."""
        digest = hashlib.sha256()
        for axis in self.dense_graph.axes:
            digest.update(f"{axis.tensor} {axis.dim} ".encode() + axis.units.tobytes())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _held(model: nn.Module, name: str) -> object:
    """Return what a network has under the name of an axis: a tensor, an integer, or nothing."""
    try:
        return tensor_of(model, name)
    except AttributeError:
        return None
