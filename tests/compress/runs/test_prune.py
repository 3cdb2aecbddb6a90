from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import some_slow
from networks import NETWORKS
from runs import (
    DATA,
    assert_sound,
    config_of,
    graph_of,
    history,
    kept_in,
    loaded,
    metrics_of,
    pruned_run,
    start,
)
from torch import nn
from torch.nn import functional as F

from compress.config import RunConfig, SaveConfig
from compress.criteria import CRITERIA
from compress.data.batches import ImageData, TrainBatches
from compress.data.loading import Batch, Draw, Reply, TensorImages
from compress.errors import BudgetError, DataError, ModelError, TrainingError
from compress.networks import cost
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import mask_
from compress.runs.prune import check_budget, prune
from compress.runs.session import Session
from compress.training.trainer import Trainer

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Whole runs


@pytest.mark.parametrize(
    "budget",
    some_slow(
        [
            "macs=0.5",
            "macs=20000",
            "params=0.4",
            "params=700",
            "channels=0.6",
            "channels=15",
            "removed=9",
        ],
        {"macs=0.5", "params=0.4", "params=700", "channels=0.6"},
    ),
)
def test_every_kind_of_budget_holds_and_is_not_overshot(tmp_path: Path, budget: str) -> None:
    config = config_of("networks:PreActivation", budget=budget)
    run = pruned_run(tmp_path, config)
    before = run.dense.read_bytes()
    metrics = assert_sound(run, config)
    assert metrics["budget"] == budget
    assert run.dense.read_bytes() == before
    if config.prune.budget.kind == "removed":
        assert metrics["dense"]["channels"] - metrics["finetuned"]["channels"] == 9


@pytest.mark.parametrize(
    "name", some_slow(sorted(NETWORKS), NETWORKS.keys() - {"Dense", "FewGroups"})
)
def test_every_topology_goes_through(tmp_path: Path, name: str) -> None:
    config = config_of(f"networks:{name}", budget="params=0.6")
    assert_sound(pruned_run(tmp_path, config), config)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"residual_gate": "read"}, marks=slow),
        pytest.param({"residual_gate": "block"}, marks=slow),
        pytest.param({"channel_multiple": 4}, marks=slow),
        {"channel_multiple": 8, "budget": "params=0.5", "step_size": 40},
    ],
    ids=["read", "block", "multiples of 4", "multiples of 8"],
)
def test_resnet20(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = config_of("resnet20", steps=3, **({"interval": 1} | settings))
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    multiple = settings.get("channel_multiple", 1)
    for line in history(run, "prune_step"):
        assert all(width % multiple == 0 for width in line["widths"].values())


@pytest.mark.parametrize(
    "criterion", some_slow(sorted(CRITERIA), CRITERIA.keys() - {"obd", "taylor-output"})
)
@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=slow), 0.9])
def test_every_criterion_goes_through(tmp_path: Path, criterion: str, momentum: float) -> None:
    config = config_of("networks:PreActivation", criterion=criterion, momentum=momentum)
    assert assert_sound(pruned_run(tmp_path, config), config)["criterion"] == criterion


@pytest.mark.parametrize(
    "finetune",
    [
        pytest.param({"ema": 0.9}, marks=slow),
        {"distill": 0.7, "temperature": 3.0},
        pytest.param({"group_lasso": 1e-4, "weight_decay": 1e-2}, marks=slow),
        pytest.param({"recipe": "seed2019", "epochs": 1}, marks=slow),
        pytest.param({"epochs": 0}, marks=slow),
        {"epochs": 0, "ema": 0.9},
        pytest.param({"momentum": 0.0}, marks=slow),
    ],
    ids=lambda settings: "-".join(settings) + str(settings.get("epochs", "")),
)
def test_every_finetuning_goes_through(tmp_path: Path, finetune: dict[str, Any]) -> None:
    config = config_of("networks:PreActivation", finetune=finetune)
    run = pruned_run(tmp_path, config)
    metrics = assert_sound(run, config)
    assert len(history(run, "epoch")) == config.finetune.epochs
    if config.finetune.epochs == 0:
        assert metrics["finetuned"] == metrics["pruned"]


@slow
def test_the_average_is_what_is_written(tmp_path: Path) -> None:
    """Averaging changes no step, so only what is written can differ."""
    networks, masks = [], []
    for ema in (None, 0.9):
        config = config_of("networks:PreActivation", finetune={"ema": ema, "epochs": 2})
        run = pruned_run(tmp_path / str(ema), config)
        networks.append(loaded(run.pruned, config))
        masks.append(kept_in(run, graph_of(run, config)))
    plain, averaged = networks
    assert np.array_equal(*masks)
    assert plain.description.metrics["pruned"] == averaged.description.metrics["pruned"]
    assert not torch.equal(plain.model.head.weight, averaged.model.head.weight)


def test_finetuning_learns_what_the_network_did_not_know(tmp_path: Path) -> None:
    """The dense network has random weights; chance is 25 %."""
    config = config_of("networks:PreActivation", finetune={"epochs": 12, "lr": 0.1})
    metrics = assert_sound(pruned_run(tmp_path, config), config)
    assert metrics["finetuned"]["top1"] >= 80


@pytest.mark.parametrize("step_size", [pytest.param(1, marks=slow), 4])
def test_step_size_removes_so_many_channels_at_a_time(tmp_path: Path, step_size: int) -> None:
    config = config_of(
        "networks:PreActivation", budget="removed=10", step_size=step_size, interval=1
    )
    run = pruned_run(tmp_path, config)
    metrics = assert_sound(run, config)
    channels = [metrics["dense"]["channels"], *(s["channels"] for s in history(run, "prune_step"))]
    assert [a - b for a, b in pairwise(channels)] == [step_size] * (10 // step_size) + (
        [10 % step_size] if 10 % step_size else []
    )


@slow
def test_steps_share_the_way_evenly(tmp_path: Path) -> None:
    config = config_of("resnet20", budget="channels=0.5", steps=5, interval=1)
    run = pruned_run(tmp_path, config)
    dense = assert_sound(run, config)["dense"]["channels"]
    wanted = [int(dense - dense * 0.1 * step) for step in range(1, 6)]
    assert [line["channels"] for line in history(run, "prune_step")] == wanted
    assert [line["step"] for line in history(run, "prune_step")] == [1, 2, 3, 4, 5]


@slow
def test_keep_dense_keeps_dense(tmp_path: Path) -> None:
    config = config_of("resnet20", keep_dense=["conv1", "layer2.*"], interval=1)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    graph = graph_of(run, config)
    left = kept_in(run, graph)
    widths = {g.name: int(left[g.units].sum()) for g in graph.prunable}
    kept = {n for n in widths if n == "conv1" or n.startswith("layer2.")}
    sizes = {g.name: g.size for g in graph.prunable}
    assert len(kept) >= 4
    assert all(widths[n] == sizes[n] for n in kept)
    assert not kept & set(history(run, "prune_step")[-1]["widths"])


def test_floors_are_honoured(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation", budget="channels=0.65", min_channels=6)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    for line in history(run, "prune_step"):
        assert all(width >= 6 for width in line["widths"].values())
    unreachable = config_of("networks:PreActivation", budget="channels=0.55", min_channels=6)
    with pytest.raises(BudgetError, match=r"closest is channels=0\.\d+"):
        prune(unreachable, DATA, Session(start(tmp_path / "b", unreachable)))


def test_a_budget_that_holds_already_prunes_nothing(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation", budget="macs=1", finetune={"epochs": 0})
    run = pruned_run(tmp_path, config)
    dense, small = loaded(run.dense, config), loaded(run.pruned, config)
    assert kept_in(run, graph_of(run, config)).all()
    assert small.description.recipe == {}
    assert not history(run, "prune_step")
    for expected, actual in zip(dense.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


# Decisions, against an emulation by explicit gates


def greedy(scores: np.ndarray, kept: Mask, graph: ChannelGraph, floor: int, limit: float) -> Mask:
    """Remove the unit of least score, one after the other, until the MACs fit.

    What the last one made needless comes back, the most important first.
    """
    kept, gone = kept.copy(), []
    while cost.macs(graph, kept) > limit:
        free = [
            int(unit)
            for group in graph.prunable
            for unit in group.units
            if kept[unit] and kept[group.units].sum() > floor
        ]
        gone.append(min(free, key=lambda unit: scores[unit]))
        kept[gone[-1]] = False
    for unit in reversed(gone[:-1]):
        if any({unit, gone[-1]} <= set(group.units.tolist()) for group in graph.prunable):
            continue
        kept[unit] = True
        if cost.macs(graph, kept) > limit:
            kept[unit] = False
            break
    return kept


def saved_by_each(graph: ChannelGraph, kept: Mask) -> np.ndarray:
    """The MACs that a network without each unit alone has less."""
    saved = np.ones(graph.num_units)
    for unit in np.flatnonzero(kept):
        smaller = kept.copy()
        smaller[unit] = False
        saved[unit] = max(1, cost.macs(graph, kept) - cost.macs(graph, smaller))
    return saved


def squared_gates(model: nn.Module, graph: ChannelGraph, batch: Batch) -> np.ndarray:
    gated = GatedNetwork(model.train(), graph, "read")
    F.cross_entropy(gated(batch.images), batch.labels).backward()
    assert gated.gates.grad is not None
    return gated.gates.grad.double().square().numpy()


@pytest.mark.parametrize("group_lasso", [pytest.param(0.0, marks=slow), 100.0])
def test_taylor_decisions_are_those_of_explicit_gates(
    tmp_path: Path, group_lasso: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean over an interval, exponential average over steps, ranking per MAC, linear way down.

    With a vanishing learning rate the weights stay, so the whole pruning can be done again by hand.
    """
    monkeypatch.setattr("compress.pruning.goal.ROOM", 1)  # a filter is a large part of this network
    frozen = {"lr": 1e-12, "label_smoothing": 0.0, "epochs": 0, "group_lasso": group_lasso}
    config = config_of(
        "networks:Separable",
        steps=3,
        interval=2,
        momentum=0.75,
        min_channels=2,
        finetune=frozen,
    )
    run = pruned_run(tmp_path, config)
    dense = loaded(run.dense, config)
    graph, model = graph_of(run, config), dense.model
    batches = list(TrainBatches(DATA, batch_size=32, seed=1).epoch(0))
    batches += list(TrainBatches(DATA, batch_size=32, seed=1).epoch(1))
    whole = cost.macs(graph, graph.everything())
    kept, average = graph.everything(), None
    for step in range(3):
        pair = [squared_gates(model, graph, batch) for batch in batches[2 * step : 2 * step + 2]]
        mean = (pair[0] + pair[1]) / 2
        average = mean if average is None else 0.75 * average + 0.25 * mean
        ratio = average / saved_by_each(graph, kept)
        kept = greedy(ratio, kept, graph, 2, whole * (1 - 0.5 * (step + 1) / 3))
        mask_(model, graph, kept)
        line = history(run, "prune_step")[step]
        assert line["widths"] == {g.name: int(kept[g.units].sum()) for g in graph.prunable}
    assert np.array_equal(kept_in(run, graph), kept)


def test_weight_norm_decisions_by_hand(tmp_path: Path) -> None:
    config = config_of(
        "networks:Plain",
        criterion="weight-norm",
        rank="importance",
        steps=1,
        min_channels=2,
        finetune={"epochs": 0, "lr": 1e-12},
    )
    run = pruned_run(tmp_path, config)
    dense = loaded(run.dense, config)
    graph = graph_of(run, config)
    scores = np.zeros(graph.num_units)
    for group in graph.prunable:
        (writer,) = group.writers
        weight = dense.model.get_parameter(f"{writer}.weight").detach().double()
        scores[group.units] = weight.square().flatten(1).sum(1).numpy()
    expected = greedy(scores, graph.everything(), graph, 2, 0.5 * metrics_of(run)["dense"]["macs"])
    assert np.array_equal(kept_in(run, graph), expected)


# Shrinking while pruning changes nothing


def own_network(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module]) -> str:
    """Make a network known under a name that can be imported."""
    module = ModuleType("own_network_under_test")
    module.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:build"


def in_float64(name: str) -> nn.Module:
    """Return a network that computes in float64 on float32 images."""
    model = NETWORKS[name]().double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model


@pytest.mark.parametrize(
    "name",
    some_slow(
        ["PreActivation", "Dense", "Separable", "Grouped"], {"PreActivation", "Dense", "Separable"}
    ),
)
@pytest.mark.parametrize("criterion", ["taylor-gate", pytest.param("weight-norm", marks=slow)])
def test_shrinking_at_once_or_at_the_end_gives_the_same_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, criterion: str
) -> None:
    """In float64, with everything that couples weights: momentum, decay, lasso, smoothing.

    The two differ by the order of float64 sums (1e-16), amplified by some twenty steps, and by the
    rounding of importance to float32, which decides nothing here.
    """
    architecture = own_network(monkeypatch, lambda: in_float64(name))
    finetune = {"epochs": 2, "lr": 0.05, "weight_decay": 0.01, "group_lasso": 1e-3, "ema": 0.5}
    ends, masks = [], []
    for shrink_at in (1.0, 0.02):
        config = config_of(
            architecture,
            budget="params=0.5",
            steps=6,
            criterion=criterion,
            shrink_at=shrink_at,
            finetune=finetune,
        )
        run = pruned_run(tmp_path / str(shrink_at), config)
        ends.append((loaded(run.pruned, config), history(run, "shrink")))
        masks.append(kept_in(run, graph_of(run, config)))
    (late, one_shrink), (early, many_shrinks) = ends
    assert len(one_shrink) == 1
    assert len(many_shrinks) >= 2
    assert np.array_equal(*masks)
    for key, expected in late.model.state_dict().items():
        actual = early.model.state_dict()[key]
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(
            actual, expected, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: k + m
        )


# What is refused, and what is survived


def frozen_network(*names: str) -> nn.Module:
    model = NETWORKS["PreActivation"]()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def test_a_group_with_a_frozen_reader_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = own_network(monkeypatch, lambda: frozen_network("conv2.weight"))
    config = config_of(name, budget="macs=0.6")
    run = pruned_run(tmp_path, config)
    small = loaded(run.pruned, config)
    graph = graph_of(run, config)
    kept = kept_in(run, graph)
    (read_by_conv2,) = (g for g in graph.prunable if g.readers == ("conv2.weight",))
    assert kept[read_by_conv2.units].all()
    assert kept.sum() < len(kept)
    assert "frozen readers and stay dense: conv1" in caplog.text
    # Its weights are as they were, less the outputs that nothing reads any more.
    dense = loaded(run.dense, config)
    stream = next(g for g in graph.prunable if g.residual)
    expected = dense.model.conv2.weight[torch.from_numpy(kept[stream.units])]
    assert torch.equal(small.model.conv2.weight, expected)


def test_when_everything_is_frozen_there_is_nothing_to_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = ("conv1.weight", "conv2.weight", "head.weight")
    config = config_of(own_network(monkeypatch, lambda: frozen_network(*readers)))
    run = start(tmp_path, config)
    with pytest.raises(ModelError, match="every layer that reads prunable channels is frozen"):
        prune(config, DATA, Session(run))
    with pytest.raises(ModelError, match="every layer that reads prunable channels is frozen"):
        check_budget(config, DATA)
    assert not run.history.exists()


def test_unknown_operations_are_named_and_stay_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("networks:Unknown", budget="params=0.8")
    check_budget(config, DATA)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    assert caplog.text.count("channel groups that stay dense: b (unknown operation fft_fft)") == 1
    assert set(history(run, "prune_step")[-1]["widths"]) == {"a", "c"}


def replace_budget(config: RunConfig, budget: str) -> RunConfig:
    document = config.model_dump()
    document["prune"]["budget"] = budget
    return RunConfig.model_validate(document)


@pytest.mark.parametrize("name", ["networks:PreActivation", pytest.param("resnet20", marks=slow)])
def test_an_unreachable_budget_is_said_before_any_training(tmp_path: Path, name: str) -> None:
    config = config_of(name, budget="macs=0.001")
    run = start(tmp_path, config)
    with pytest.raises(BudgetError, match=r"macs=0\.001 cannot be reached.*closest is macs="):
        prune(config, DATA, Session(run))
    with pytest.raises(BudgetError, match=r"macs=0\.001 cannot be reached"):
        check_budget(config, DATA)
    assert not run.history.exists()
    assert not run.state.exists()
    assert not run.pruned.exists()


def test_the_closest_budget_that_the_error_names_can_be_reached(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation", budget="params=0.001")
    with pytest.raises(BudgetError) as caught:
        check_budget(config, DATA)
    named = str(caught.value).split("closest is ")[1].split(";")[0]
    assert named.startswith("params=")
    floors = replace_budget(config, f"params={float(named.split('=')[1]) + 1e-4}")
    run = pruned_run(tmp_path, floors)
    assert set(history(run, "prune_step")[-1]["widths"].values()) == {1}


def test_diverging_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("networks:PreActivation")
    config = config.model_copy(update={"save": SaveConfig(every_steps=1)})
    run = start(tmp_path, config)
    states: list[bytes] = []
    step = Trainer.step

    def poisoned(self: Trainer, batch: Batch, **options: Any) -> bool:
        if self.step_index == 5:
            states.append(run.state.read_bytes())
            batch = replace(batch, images=batch.images * float("nan"))
        return step(self, batch, **options)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(TrainingError, match="became nan in epoch 2 at step 6"):
        prune(config, DATA, Session(run))
    assert [run.state.read_bytes()] == states
    assert not run.pruned.exists()
    monkeypatch.setattr(Trainer, "step", step)
    prune(config, DATA, Session(run))  # from that state
    assert_sound(run, config)


class Torn(TensorImages):
    """Training images of which whole batches cannot be read."""

    unreadable: frozenset[int] = frozenset()
    left = 0
    calls = 0

    def fetch(self, request: Draw) -> Reply:
        if request.seeds is None:
            return super().fetch(request)
        self.calls += 1
        reply = super().fetch(request)
        if (self.calls - 1) % 4 not in self.unreadable:
            return reply
        whole = reply.batch
        left = replace(
            whole,
            images=whole.images[: self.left],
            labels=whole.labels[: self.left],
            skipped=len(whole.labels) - self.left,
        )
        return Reply(left, "a.png (torn)")


def torn(unreadable: set[int], left: int) -> ImageData:
    whole = DATA.train
    assert isinstance(whole, TensorImages)
    train = Torn(whole.images, whole.labels, whole.view)
    train.unreadable, train.left = frozenset(unreadable), left
    return replace(DATA, train=train)


@pytest.mark.parametrize("left", [pytest.param(0, marks=slow), 1])
def test_batches_that_broken_images_emptied_are_passed_over(tmp_path: Path, left: int) -> None:
    """With one batch an interval and no memory, nothing may be judged by a batch that is not."""
    config = config_of("networks:PreActivation", interval=1, momentum=0.0, bn_batches=0)
    run = start(tmp_path, config)
    data = torn({1, 2}, left)
    prune(config, data, Session(run))
    assert_sound(run, config)
    assert [line["step"] for line in history(run, "prune_step")] == [1, 4, 5, 8]
    (epoch,) = history(run, "epoch")
    assert epoch["train_skipped"] == history_skips(left, epoch["step"])


def history_skips(left: int, steps: int) -> int:
    """Two batches in four lose all but ``left`` of 32 images."""
    return sum(32 - left for step in range(steps) if step % 4 in (1, 2))


def test_no_readable_training_image_is_an_error(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation")
    run = start(tmp_path, config)
    with pytest.raises(DataError, match="training needs images, and none of 128 could be read"):
        prune(config, torn({0, 1, 2, 3}, 0), Session(run))
    assert not run.pruned.exists()


def test_batches_of_one_image_each_do_not_train_for_ever(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation")
    run = start(tmp_path, config)
    with pytest.raises(DataError, match="no batch of 32 held two readable images"):
        prune(config, torn({0, 1, 2, 3}, 1), Session(run))
    assert not run.pruned.exists()


def test_a_few_lost_batches_at_the_end_of_an_epoch_are_no_error(tmp_path: Path) -> None:
    """Finetuning begins in the middle of an epoch, whose rest cannot be read."""
    config = config_of("networks:PreActivation", steps=3, interval=1, bn_batches=0)
    run = start(tmp_path, config)
    prune(config, torn({3}, 0), Session(run))
    assert_sound(run, config)
    (epoch,) = history(run, "epoch")  # counted from the end of pruning
    assert (epoch["epoch"], epoch["step"], epoch["train_skipped"]) == (1, 7, 32)
