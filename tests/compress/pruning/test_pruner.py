"""compress.Pruner in loops of people's own: what goes on, what is exactly kept, what is refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import invoke
from conftest import lived_in
from loops import Block, Loop, batch_of
from runs import DATA, config_of, history, start
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import compress
from compress.checkpoints.checkpoint import load_checkpoint
from compress.config import PruneConfig
from compress.criteria import CRITERIA, bind
from compress.criteria.scoring import Context
from compress.data.batches import TrainBatches, first_images
from compress.data.datasets import load_data
from compress.errors import (
    BudgetError,
    CheckpointError,
    CompressError,
    ConfigError,
    ModelError,
    UsageError,
)
from compress.networks import cost
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=2e-3, amsgrad=True),
    "AdamW": functools.partial(torch.optim.AdamW, lr=2e-3, foreach=False),
    "AdamW, foreach": functools.partial(torch.optim.AdamW, lr=2e-3, foreach=True),
    "AdamW, fused": functools.partial(torch.optim.AdamW, lr=2e-3, fused=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
}

TEN_SHRINKS: dict[str, Any] = {"steps": 12, "shrink_at": 0.001}
"""At least ten: a step may find its share of the budget reached already."""


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_of_rows_that_stay_is_exactly_what_it_was(name: str) -> None:
    loop = Loop(OPTIMIZERS[name], **TEN_SHRINKS)
    shrinks = 0
    while not loop.pruner.done:
        loop.train()
        graph, before = loop.pruner.graph, states(loop)
        loop.pruner.step()
        if loop.pruner.reshaped:
            shrinks += 1
            require_rows(before, states(loop), graph, loop.pruner.at.kept)
    assert shrinks >= 10
    held = [p for g in loop.optimizer.param_groups for p in g["params"]]
    assert list(map(id, held)) == list(map(id, loop.model.parameters()))
    assert set(loop.optimizer.state) <= set(held)
    for _ in range(3):  # and the loop goes on without the pruner
        loop.train()


def states(loop: Loop) -> dict[str, torch.Tensor]:
    """Return weights and what the optimizer keeps for them, by parameter and name."""
    found = {}
    for name, parameter in loop.model.named_parameters():
        found[f"{name}/weight"] = parameter.detach().clone()
        for key, value in loop.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def require_rows(
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    graph: ChannelGraph,
    kept: np.ndarray,
) -> None:
    assert before.keys() == after.keys()
    cut = 0
    for name, old in before.items():
        expected = old.numpy()
        for axis in graph.axes:
            same = axis.tensor == name.split("/")[0] and expected.ndim > axis.dim
            if same and old.shape[axis.dim] == len(axis.units):
                expected = np.take(expected, np.flatnonzero(kept[axis.units]), axis.dim)
        assert np.array_equal(after[name].numpy(), expected), name
        cut += expected.size < old.numel()
    assert cut


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_ten_shrinks_on_the_way_are_one_at_the_end(name: str) -> None:
    """Training a shrunk network is training the masked one, in float64 to rounding."""
    ends = []
    for shrink_at in (0.001, 1.0):
        loop = Loop(OPTIMIZERS[name], steps=12, shrink_at=shrink_at, dtype=torch.float64)
        events: list[str] = []
        loop.pruner.callback = lambda event, facts, events=events: events.append(event)
        loop.until_done()
        assert events.count("shrink") in (range(10, 13) if shrink_at < 1 else [1])
        ends.append(loop.model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for key, expected in ends[1].items():
        torch.testing.assert_close(ends[0][key], expected, rtol=1e-7, atol=1e-9)


def test_graphs_that_a_user_still_holds_stay_valid() -> None:
    loop = Loop(OPTIMIZERS["SGD"], **TEN_SHRINKS)
    losses: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    while not loop.pruner.done:
        losses.append(loop.train())
        norms.append(sum(p.square().sum() for p in loop.model.parameters()))  # type: ignore[arg-type]
        shapes = [p.shape for p in loop.model.parameters()]
        loop.pruner.step()
    assert [p.shape for p in loop.model.parameters()] != shapes
    norms[-1].backward()  # of parameters that are no part of the network any more
    assert len(losses) == 12


def test_hooks_attributes_frozen_and_shared_parameters_go_on() -> None:
    calls: list[str] = []

    def prepare(model: nn.Module) -> None:
        model.two.weight = model.one.weight  # type: ignore[union-attr]
        model.head.bias.requires_grad_(False)  # type: ignore[union-attr]
        model.stem.weight.no_decay = True  # type: ignore[union-attr]
        for kind in ("hook", "post_accumulate_grad_hook"):
            register = getattr(model.stem.weight, f"register_{kind}")  # type: ignore[union-attr]
            handles[kind] = register(lambda value, kind=kind: calls.append(kind))
        model.stem.register_forward_hook(lambda *_: calls.append("module"))  # type: ignore[union-attr]

    handles: dict[str, Any] = {}
    loop = Loop(OPTIMIZERS["SGD"], **TEN_SHRINKS, network=Tied, prepare=prepare)
    stem = loop.model.stem.weight
    loop.until_done()
    model: Any = loop.model
    assert model.stem.weight is not stem
    assert len(model.stem.weight) < len(stem)
    assert model.two.weight is model.one.weight
    assert sum(p is model.one.weight for p in loop.parameters()) == 1
    assert model.stem.weight.no_decay
    assert not model.head.bias.requires_grad
    calls.clear()
    loop.train()
    assert calls == ["module", "hook", "post_accumulate_grad_hook"]
    for handle in handles.values():
        handle.remove()  # what the user got before the shrinks
    calls.clear()
    loop.train()
    assert calls == ["module"]


class Tied(Block):
    """Two convolutions of the inner width, for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.two(torch.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_an_average_shrinks_along_and_goes_on_averaging() -> None:
    loop = Loop(OPTIMIZERS["SGD"], **TEN_SHRINKS, averaged=True)
    average: AveragedModel = loop.average  # type: ignore[assignment]
    while not loop.pruner.done:
        loop.train()
        average.update_parameters(loop.model)
        graph = loop.pruner.graph
        before = {f"{n}/x": p.detach().clone() for n, p in average.module.named_parameters()}
        loop.pruner.step()
        if loop.pruner.reshaped:
            after = {f"{n}/x": p.detach() for n, p in average.module.named_parameters()}
            require_rows(before, after, graph, loop.pruner.at.kept)
    images, _ = batch_of(4)
    assert average(images).shape == (4, 4)
    shapes = [p.shape for p in average.module.parameters()]
    assert shapes == [p.shape for p in loop.model.parameters()]


def test_a_loss_scaler_changes_no_decision() -> None:
    """Scores are of unscaled gradients, whoever unscales them."""
    masks = []
    for how in ("plain", "scaled", "unscaled by the loop"):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=how != "plain")
        loop = Loop(OPTIMIZERS["SGD"], **TEN_SHRINKS, dtype=torch.float64)
        while not loop.pruner.done:
            loop.train(scaler=scaler, unscale=how == "unscaled by the loop")
            loop.pruner.step()
        masks.append(loop.pruner.at.kept)
        average = loop.pruner.at.importance.average
        assert average is not None
        if how == "plain":
            expected = average
        np.testing.assert_allclose(average, expected, rtol=1e-6)
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


def test_accumulated_gradients_are_scored_as_those_of_the_whole_minibatch() -> None:
    ends = []
    for parts in (1, 4):
        loop = Loop(OPTIMIZERS["SGD"], **TEN_SHRINKS, dtype=torch.float64, norm=False)
        while not loop.pruner.done:
            loop.train(parts=parts)
            loop.pruner.step()
        ends.append((loop.pruner.at.kept, loop.model.state_dict()))
    assert np.array_equal(ends[0][0], ends[1][0])
    for key, expected in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][key], expected, rtol=1e-9, atol=1e-12)


SECOND_ORDER = {"obd", "taylor-gate-so"}
"""These take several passes for every minibatch."""


@pytest.mark.parametrize(
    ("criterion", "gate"),
    [
        *(
            pytest.param(name, "read", marks=[pytest.mark.slow] * (name in SECOND_ORDER))
            for name in CRITERIA
        ),
        ("taylor-gate", "block"),
    ],
)
def test_every_criterion_works_around_a_plain_loop(criterion: str, gate: str) -> None:
    """The network itself is called; the reference calls the network with explicit gates."""
    settings = {"criterion": criterion, "residual_gate": gate, "hessian_samples": 0}
    loop = Loop(OPTIMIZERS["SGD"], steps=2, interval=1, dtype=torch.float64, **settings)
    reference = copy.deepcopy(loop.model)
    images, labels = batch_of(16, dtype=torch.float64)
    context = Context(reference, loop.pruner.graph, gate, hessian_samples=0)
    scoring = bind(criterion, context)
    loss = F.cross_entropy((scoring.network or reference)(images), labels)
    if scoring.before_backward:
        scoring.before_backward(loss)
    loss.backward()  # type: ignore[no-untyped-call]
    expected = scoring.score(1.0)
    loop.train(data=(images, labels))
    if not scoring.per_minibatch:  # weights alone are judged when the step is taken
        expected = bind(criterion, Context(loop.model, loop.pruner.graph)).score(1.0)
    loop.pruner.step()
    average = loop.pruner.at.importance.average
    assert average is not None
    np.testing.assert_allclose(average, expected.double().numpy(), rtol=1e-5, atol=1e-30)
    loop.until_done()
    assert not loop.model._forward_hooks  # what watched the network has gone
    assert not loop.model._forward_pre_hooks


def test_budgets_hold_and_are_not_overshot() -> None:
    for budget in ("macs=0.4", "params=0.5", "channels=0.6", "removed=5", "macs=100000"):
        loop = Loop(OPTIMIZERS["SGD"], steps=3, budget=budget)
        loop.until_done()
        graph, kept = loop.pruner.dense_graph, loop.pruner.at.kept
        kind, _, number = budget.partition("=")
        function = getattr(cost, "channels" if kind == "removed" else kind)
        dense, now, limit = (
            function(graph, graph.everything()),
            function(graph, kept),
            float(number),
        )
        limit = dense - limit if kind == "removed" else limit * dense if limit <= 1 else limit
        assert now <= limit
        assert loop.pruner.summary().structure.now == cost.totals(graph, kept)


# Resume


def test_a_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Through a file of safetensors, in the middle of an interval, with weights that are masked."""
    whole = Loop(OPTIMIZERS["AdamW"], steps=6, interval=3, shrink_at=0.3)
    whole.until_done()
    broken = Loop(OPTIMIZERS["AdamW"], steps=6, interval=3, shrink_at=0.3)
    for _ in range(11):
        broken.train()
        broken.pruner.step()
    assert 0 < int(broken.pruner.at.kept.sum()) < int(broken.pruner.at.shrunk.sum())
    safetensors.torch.save_file(broken.pruner.state_dict(), tmp_path / "pruner.safetensors")
    weights, optimizer = broken.model.state_dict(), broken.optimizer.state_dict()
    resumed = Loop(OPTIMIZERS["AdamW"], steps=6, interval=3, shrink_at=0.3)
    resumed.pruner.load_state_dict(safetensors.torch.load_file(tmp_path / "pruner.safetensors"))
    heading = broken.pruner.at.end
    assert heading is not None
    assert np.array_equal(resumed.pruner.at.end, heading)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.taken = broken.taken
    resumed.until_done()
    assert resumed.taken == whole.taken
    assert resumed.pruner.recipe == whole.pruner.recipe
    for key, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], expected), key
    seconds = {key for key in whole.pruner.state_dict() if key.startswith("seconds")}
    for key, expected in whole.pruner.state_dict().items():
        assert key in seconds or torch.equal(resumed.pruner.state_dict()[key], expected), key


def test_a_state_of_another_network_is_refused() -> None:
    loop, other = Loop(OPTIMIZERS["SGD"]), Loop(OPTIMIZERS["SGD"], network=Tied)
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(CheckpointError, match="of another network"):
        loop.pruner.load_state_dict(other.pruner.state_dict())
    state = loop.pruner.state_dict()
    del state["kept"]
    with pytest.raises(CheckpointError, match="lacks 'kept'"):
        loop.pruner.load_state_dict(state)
    for key, expected in before.items():
        assert torch.equal(loop.model.state_dict()[key], expected)
    loop.until_done()
    with pytest.raises(UsageError, match="has shrunk already"):
        loop.pruner.load_state_dict(loop.pruner.state_dict())


def test_a_state_of_other_units_is_refused() -> None:
    loop = Loop(OPTIMIZERS["SGD"])
    while loop.pruner.at.end is None:
        loop.train()
        loop.pruner.step()
    for key in ("kept", "shrunk", "end", "importance.total", "importance.average"):
        damaged = loop.pruner.state_dict()
        damaged[key] = damaged[key][:3]
        with pytest.raises(CheckpointError, match=rf"'{key}' is of shape \(3,\), of \d+ units"):
            Loop(OPTIMIZERS["SGD"]).pruner.load_state_dict(damaged)


# Our own command


@pytest.mark.slow
def test_a_plain_loop_reaches_the_weights_of_the_command_line(tmp_path: Path) -> None:
    """Twenty lines of torch, and ``compress prune``, from the same seed: not a bit apart."""
    torch.manual_seed(3)
    dense = lived_in(build_model("resnet20", num_classes=10, in_channels=1))
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    options = ("--checkpoint", tmp_path / "dense.pth", "--output", tmp_path / "run")
    assert invoke("prune", *options, *(f"--set={setting}" for setting in QUICK)).exit_code == 0
    run = RunDirectory(tmp_path / "run")
    config = run.saved_config()
    data, tune = load_data(config.data), config.finetune

    model = load_checkpoint(run.dense).model.train()
    weights, others = [], []
    for parameter in model.parameters():
        (weights if parameter.dim() > 1 else others).append(parameter)
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    rates = {"lr": tune.lr, "momentum": tune.momentum, "weight_decay": tune.weight_decay}
    optimizer = torch.optim.SGD(groups, **rates, nesterov=True)
    images = first_images(data, config.prune.proof_images)
    pruner = compress.Pruner(model, images, optimizer=optimizer, **dict(config.prune))
    batches = TrainBatches(data, batch_size=config.data.batch_size, seed=config.seed)
    tuned, steps = 0, tune.epochs * len(batches)
    for batch in itertools.chain.from_iterable(map(batches.epoch, itertools.count())):
        for group in optimizer.param_groups:
            group["lr"] = tune.lr * 0.5 * (1 + math.cos(math.pi * tuned / steps))
        logits = model(batch.images)
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=tune.label_smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        pruner.score()
        optimizer.step()
        tuned += pruner.done
        if pruner.step() and pruner.reshaped:
            pruner.reestimate_batchnorm(batch.images for batch in batches.epoch(0))
        if tuned == steps:
            break
    small = load_checkpoint(run.pruned)
    assert small.description.recipe == pruner.recipe
    assert len(history(run, "shrink")) > 1
    for key, expected in small.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], expected), key


QUICK = (
    *("data.image_size=8", "data.batch_size=128", "finetune.epochs=2", "finetune.warmup_epochs=0"),
    *("prune.steps=4", "prune.interval=3", "prune.shrink_at=0.2", "compute.channels_last=off"),
)


# What is refused


@contextmanager
def refused(error: type[CompressError], says: str) -> Iterator[pytest.ExceptionInfo[CompressError]]:
    """Expect an error of ours that speaks no command line's language."""
    with pytest.raises(error, match=says) as caught:
        yield caught
    assert "--" not in str(caught.value)


def test_calls_out_of_order_are_refused_and_change_nothing() -> None:
    loop = Loop(OPTIMIZERS["SGD"], interval=1)
    before = copy.deepcopy(loop.model.state_dict())
    with refused(UsageError, r"score\(\) finds no gradient"):
        loop.pruner.score()
    with refused(UsageError, r"step\(\) was called without a score"):
        loop.pruner.step()
    for key, expected in before.items():
        assert torch.equal(loop.model.state_dict()[key], expected)
    loop.train()
    with refused(UsageError, r"score\(\) was called twice"):
        loop.pruner.score()
    loop.pruner.step()
    kept = loop.pruner.at.kept.copy()
    with refused(UsageError, r"step\(\) was called without a score"):
        loop.pruner.step()
    assert np.array_equal(loop.pruner.at.kept, kept)
    loop.until_done()
    assert loop.pruner.step()  # nothing is left to do
    loop.pruner.score()


def test_criteria_that_watch_say_what_they_miss() -> None:
    loop = Loop(OPTIMIZERS["SGD"], criterion="taylor-gate-fg")
    images, labels = batch_of(8)
    F.cross_entropy(loop.model.forward(images), labels).backward()  # type: ignore[no-untyped-call]
    with refused(UsageError, "computed by calling the network itself"):
        loop.pruner.score()
    loop = Loop(OPTIMIZERS["SGD"], criterion="obd")
    with refused(UsageError, "computed by calling the network itself"):
        loop.pruner.before_backward(F.cross_entropy(loop.model.forward(images), labels))
    F.cross_entropy(loop.model(images), labels).backward()  # type: ignore[no-untyped-call]
    with refused(UsageError, r"call before_backward\(loss\)"):
        loop.pruner.score()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own tracer
@pytest.mark.parametrize(
    "criterion", [pytest.param("taylor-gate", marks=pytest.mark.slow), "taylor-gate-fg", "obd"]
)
def test_a_compiled_network_is_pruned_alike_or_refused(criterion: str) -> None:
    """The compiler runs the graphs that it captures as they are."""
    compiled = functools.partial(torch.compile, backend="eager")
    loop = Loop(OPTIMIZERS["SGD"], steps=3, shrink_at=0.01, criterion=criterion, wrap=compiled)
    try:
        if criterion != "taylor-gate":
            with refused(UsageError, "watches the network run, which it cannot in a compiled one"):
                loop.train()
            return
        loop.until_done()
        plain = Loop(OPTIMIZERS["SGD"], steps=3, shrink_at=0.01)
        plain.until_done()
        assert loop.pruner.recipe == plain.pruner.recipe
    finally:
        torch.compiler.reset()


def test_max_loss_needs_the_loss_and_patience_ends_it() -> None:
    loop = Loop(OPTIMIZERS["SGD"], interval=1, max_loss=1e-6, patience=3)
    loop.train()
    with refused(UsageError, "step\\(\\) needs the loss"):
        loop.pruner.step()
    events: list[str] = []
    loop.pruner.callback = lambda event, facts: events.append(event)
    loop.pruner.step(1.0)
    while not loop.pruner.done:
        loss = loop.train()
        loop.pruner.step(loss)
    assert events == ["prune_pause"] * 4 + ["prune_end"]
    assert loop.pruner.at.kept.all()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"budget": "macs=0.00001"}, BudgetError, "the closest is macs=0"),
        ({"budget": "mac=0.5"}, ConfigError, "Pruner: budget"),
        ({"budgets": "macs=0.5"}, ConfigError, "did you mean 'budget'"),
        ({"criterion": "tailor"}, ConfigError, "no criterion is named 'tailor'"),
        ({"keep_dense": "x*"}, ConfigError, "keep_dense"),
        ({"keep_dense": ["x*"]}, ConfigError, "no group matches 'x"),
        ({"keep_dense": ["*"]}, ModelError, "nothing to prune"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], error: type[CompressError], says: str
) -> None:
    model = lived_in(Block())
    before = copy.deepcopy(model.state_dict())
    with refused(error, says):
        compress.Pruner(model, batch_of(2)[0], optimizer=None, **settings)
    for key, expected in before.items():
        assert torch.equal(model.state_dict()[key], expected)


def test_optimizers_and_copies_that_cannot_follow_are_refused() -> None:
    model, images = lived_in(Block()), batch_of(2)[0]
    partly = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with refused(UsageError, "the optimizer does not hold stem.weight"):
        compress.Pruner(model, images, optimizer=partly)
    rest = torch.optim.AdamW(p for n, p in model.named_parameters() if not n.startswith("head"))
    compress.Pruner(model, images, optimizer=[partly, rest])  # together they do
    with refused(UsageError, "LBFGS"):
        compress.Pruner(model, images, optimizer=torch.optim.LBFGS(model.parameters()))
    with refused(UsageError, "none of torch.optim"):
        compress.Pruner(model, images, optimizer=model)  # type: ignore[arg-type]
    later = compress.Pruner(model, images, optimizer=None)
    with refused(UsageError, "the optimizer does not hold stem.weight"):
        later.follow(partly)
    later.follow([partly, rest])
    assert later.optimizers == (partly, rest)
    with refused(UsageError, "a copy has no"):
        compress.Pruner(model, images, optimizer=None, copies=[nn.Linear(2, 2)])
    with refused(UsageError, "holds no tensor"):
        compress.Pruner(model, 224, optimizer=None)
    with refused(UsageError, "model is a str"):
        compress.Pruner("resnet18", images, optimizer=None)  # type: ignore[arg-type]


def test_an_unknown_state_of_an_optimizer_is_refused_and_changes_nothing() -> None:
    loop = Loop(OPTIMIZERS["SGD"], interval=1, shrink_at=0.001, averaged=True)
    loop.train()
    weight = loop.model.inner.weight
    loop.optimizer.state[weight]["preconditioner"] = torch.eye(7)
    before, kept = copy.deepcopy(loop.model.state_dict()), loop.pruner.at.kept
    with refused(ModelError, "SGD keeps 'preconditioner' of shape"):
        loop.pruner.step()
    assert loop.model.inner.weight is weight
    assert loop.average is not None
    assert loop.average.module.inner.weight.shape == weight.shape
    assert loop.pruner.at.kept is kept
    for key, expected in before.items():
        assert torch.equal(loop.model.state_dict()[key], expected)
    del loop.optimizer.state[weight]["preconditioner"]
    loop.pruner.step()  # once more, with the scores that are there
    assert loop.pruner.reshaped
    other = Loop(OPTIMIZERS["SGD"], interval=1, shrink_at=0.001)
    other.train()
    other.pruner.step()
    assert other.pruner.recipe == loop.pruner.recipe


def test_a_network_that_somebody_else_changed_is_refused() -> None:
    loop = Loop(OPTIMIZERS["SGD"], interval=1)
    loop.model.stem = nn.Conv2d(3, 16, 3, padding=1)
    loop.train()
    with refused(UsageError, "stem.weight is not what the Pruner was made with"):
        loop.pruner.step()
    loop = Loop(OPTIMIZERS["SGD"], interval=1)
    loop.train()
    loop.model.head.weight.data = loop.model.head.weight.data[:, :5].clone()
    with refused(UsageError, "head.weight is not what"):
        loop.pruner.step()


def test_a_network_that_moves_is_followed() -> None:
    """Only float64 stands for a device here: parameters keep their identity."""
    loop = Loop(OPTIMIZERS["SGD"], interval=1, steps=2)
    loop.model.double()
    loop.dtype = torch.float64
    loop.until_done()
    assert loop.pruner.reached


# What is shown


def test_the_signature_names_every_setting_with_its_default() -> None:
    parameters = inspect.signature(compress.Pruner).parameters
    for name, field in PruneConfig.model_fields.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        expected = str(field.default) if name == "budget" else field.default
        assert parameters[name].default == expected
    assert "settings" not in parameters
    own = {"model", "example", "optimizer", "copies", "callback", "patience", "seed", "graph"}
    own |= {"table"}
    assert parameters.keys() == own | PruneConfig.model_fields.keys()


def test_the_summary_says_widths_costs_and_reasons() -> None:
    loop = Loop(OPTIMIZERS["SGD"], steps=2, keep_dense=["stem"])
    loop.until_done()
    summary = loop.pruner.summary()
    text, page = str(summary), summary._repr_html_()
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:]}
    graph = loop.pruner.dense_graph
    assert rows["MACs"][1] == f"{cost.macs(graph, graph.everything()):,}"
    assert rows["stem"][1:3] == ["16", "16"]
    assert rows["inner"][2] == str(len(loop.model.inner.weight))
    assert "network output" in text
    assert page.count("<tr>") == len(text.splitlines()) - 1
    assert "<td>inner</td>" in page
    assert summary.__rich__().row_count == len(rows)


def test_events_are_plain_facts() -> None:
    import json

    loop, told = Loop(OPTIMIZERS["SGD"], steps=3), []
    loop.pruner.callback = lambda event, facts: told.append({"event": event, **facts})
    loop.until_done()
    assert json.loads(json.dumps(told)) == told
    steps = [facts for facts in told if facts["event"] == "prune_step"]
    assert [facts["pruning_step"] for facts in steps] == [1, 2, 3]
    assert steps[-1]["macs"] == cost.macs(loop.pruner.dense_graph, loop.pruner.at.kept)
    assert told[-1]["event"] == "shrink"
    assert told[-1]["difference"] <= 1e-9


def test_a_state_that_a_callback_saves_goes_on_bit_for_bit() -> None:
    whole = Loop(OPTIMIZERS["SGD"], steps=3, interval=3, shrink_at=0.01)
    saved: dict[str, Any] = {}

    def callback(kind: str, facts: Any) -> None:
        if kind == "shrink" and not saved:
            states = whole.pruner, whole.model, whole.optimizer
            saved["states"] = [copy.deepcopy(each.state_dict()) for each in states]
            saved["taken"] = whole.taken

    whole.pruner.callback = callback
    whole.until_done()
    resumed = Loop(OPTIMIZERS["SGD"], steps=3, interval=3, shrink_at=0.01)
    for each, state in zip(
        (resumed.pruner, resumed.model, resumed.optimizer), saved["states"], strict=True
    ):
        each.load_state_dict(state)
    resumed.taken = saved["taken"]
    resumed.until_done()
    assert resumed.taken == whole.taken > saved["taken"]
    for key, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], expected), key


def test_a_callback_that_fails_stops_nothing_but_its_step() -> None:
    whole, broken = (Loop(OPTIMIZERS["SGD"], steps=3, interval=2) for _ in range(2))
    whole.until_done()

    def callback(kind: str, facts: Any) -> None:
        raise ConnectionError("the tracking server is down")

    broken.pruner.callback = callback
    while not broken.pruner.done:
        broken.train()
        with contextlib.suppress(ConnectionError):
            broken.pruner.step()
    assert broken.taken == whole.taken
    assert broken.pruner.recipe == whole.pruner.recipe


def test_a_training_that_has_diverged_is_called_that() -> None:
    loop = Loop(OPTIMIZERS["SGD"], steps=1, interval=1)
    loop.train()
    loop.model.head.weight.data.fill_(float("nan"))
    with refused(ModelError, "its training has diverged"):
        loop.pruner.step()


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16, sparse=True)
        self.conv, self.head = nn.Conv1d(16, 12, 3), nn.Linear(12, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.embedding(tokens).transpose(1, 2)).relu().amax(2))


def test_sparse_gradients_do_not_stand_in_the_way() -> None:
    model, tokens = lived_in(Embedded()).train(), torch.arange(40).view(4, 10) % 20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {"budget": "macs=0.5", "steps": 1, "interval": 1}
    pruner = compress.Pruner(model, tokens, optimizer=optimizer, **settings)
    F.cross_entropy(model(tokens), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    pruner.score()
    optimizer.step()
    assert pruner.step()
    assert model.embedding.weight.shape[1] == model.conv.in_channels < 16


# The pieces


def test_pieces_one_by_one_do_what_the_pruner_does_at_once() -> None:
    model = lived_in(Block()).double()
    images, labels = batch_of(16, dtype=torch.float64)
    graph = compress.analyse(model, images[:1])
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    importance = compress.importance(model, graph)
    kept = compress.choose(graph, importance, budget="macs=0.5")
    masked = copy.deepcopy(model).eval()
    recipe = compress.shrink(model, graph, kept)
    loop = Loop(OPTIMIZERS["SGD"], steps=1, interval=1, dtype=torch.float64)
    loop.train(data=(images, labels))
    loop.pruner.step()
    assert recipe == loop.pruner.recipe
    assert cost.macs(graph, kept) <= 0.5 * cost.macs(graph, graph.everything())
    for name in ("inner", "stem"):  # z = 0 by hand: what the next layer reads of a channel
        reader = {"inner": masked.outer, "stem": masked.inner}[name]
        units = graph.by_tensor[f"{name}.weight", 0].units
        reader.weight.data[:, ~kept[units]] = 0
    stream = graph.by_tensor["stem.weight", 0].units
    masked.head.weight.data[:, ~kept[stream]] = 0
    torch.testing.assert_close(model.eval()(images), masked(images), rtol=1e-12, atol=1e-12)


def test_pieces_refuse_what_does_not_fit() -> None:
    model = lived_in(Block())
    graph = compress.analyse(model, (batch_of(2)[0],))
    scores = np.ones(graph.num_units)
    with refused(UsageError, "finds no gradient"):
        compress.importance(model, graph)
    with refused(ConfigError, "obd watches the network run"):
        compress.importance(model, graph, "obd")
    assert compress.importance(model, graph, "weight-norm").shape == (graph.num_units,)
    with refused(ModelError, "the importance is of shape"):
        compress.choose(graph, scores[1:])
    with refused(ModelError, "the importance is of shape"):
        compress.choose(graph, scores * float("nan"))
    with refused(BudgetError, "cannot be reached"):
        compress.choose(graph, scores, budget="macs=0.0001")
    with refused(ModelError, "the mask is of shape"):
        compress.shrink(model, graph, np.ones(3, bool))
    for name, says in (("inner", "leaves 0 of inner, which needs 1"), ("head", "head stays dense")):
        kept = graph.everything()
        kept[next(group.units for group in graph.groups if group.name == name)] = False
        with refused(ModelError, says):
            compress.shrink(model, graph, kept)


def test_one_shot_frozen_layers_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = lived_in(Block())
    model.outer.requires_grad_(False)
    images, labels = batch_of(8)
    graph = compress.analyse(model, images)
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    scores = compress.importance(model, graph)
    (inner,) = (group for group in graph.prunable if group.name == "inner")
    assert np.isposinf(scores[inner.units]).all()
    assert np.isfinite(scores).any()
    assert "1 groups have frozen readers and stay dense: inner" in caplog.text
    for normalize in ("none", "l2"):
        kept = compress.choose(graph, scores, budget="macs=0.8", normalize=normalize)
        assert kept[inner.units].all()
        assert cost.macs(graph, kept) <= 0.8 * cost.macs(graph, graph.everything())
    assert np.isfinite(compress.importance(model, graph, "weight-norm")).all()  # asks no gradient


def test_pieces_refuse_a_graph_of_before() -> None:
    model = lived_in(Block())
    graph = compress.analyse(model, (batch_of(2)[0],))
    kept = compress.choose(graph, np.arange(graph.num_units), budget="macs=0.7")
    with refused(UsageError, "a copy is the network itself"):
        compress.shrink(model, graph, kept, copies=[model])
    compress.shrink(model, graph, kept)
    before = copy.deepcopy(model.state_dict())
    with refused(ModelError, "analyse the network as it is now"):
        compress.shrink(model, graph, kept)
    with refused(ModelError, "analyse the network as it is now"):
        compress.importance(model, graph, "weight-norm")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_package_has_a_dozen_names_and_no_torch_until_one_is_used() -> None:
    assert len(compress.__all__) <= 14
    for name in compress.__all__:
        assert getattr(compress, name)
    program = "import sys, compress; assert 'torch' not in sys.modules, 'torch is there'"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        compress.prune  # noqa: B018


@pytest.mark.slow
def test_the_loop_of_the_command_line_says_the_same(tmp_path: Path) -> None:
    """``prune_step`` events of a run are the pruner's, with the trainer's step and rate."""
    config = config_of("resnet20", steps=2)
    run = start(tmp_path, config)
    prune(config, DATA, Session(run))
    first = history(run, "prune_step")[0]
    assert first["step"] == config.prune.interval
    assert first["loss"] > 0
    assert first["lr"] > 0
