"""Settings of pruning that say when a step is taken and what it goes by."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judges import Scores
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
from torch.nn import functional as F

from compress.config import ComputeConfig, RunConfig
from compress.criteria import CRITERIA, bind
from compress.criteria.scoring import Context
from compress.data.loading import Batch
from compress.errors import ConfigError, InterruptedRunError
from compress.networks import cost
from compress.runs.loop import train_batches
from compress.runs.prune import check_budget, prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def widths(run: RunDirectory, event: str = "prune_step") -> list[dict[str, int]]:
    return [line["widths"] for line in history(run, event)]


def test_max_steps_ends_pruning_early_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("networks:PreActivation", budget="removed=10", step_size=2, max_steps=3)
    run = pruned_run(tmp_path, config)
    metrics = metrics_of(run)
    assert metrics["dense"]["channels"] - metrics["finetuned"]["channels"] == 6
    assert len(history(run, "prune_step")) == 3
    small = loaded(run.pruned, config)
    assert sum(p.numel() for p in small.model.parameters()) == metrics["finetuned"]["params"]
    assert "pruning ends before the budget removed=10" in caplog.text
    assert "max_steps = 3" in caplog.text
    (end,) = history(run, "prune_end")
    assert end["step"] == 6
    assert len(history(run, "epoch")) == 1  # and finetuning follows


def test_the_first_interval_may_be_longer(tmp_path: Path) -> None:
    """And what is averaged in it is all that was scored in it."""
    config = config_of("networks:PreActivation", interval=2, first_interval_extra=1, steps=3)
    run = pruned_run(tmp_path / "run", config)
    assert_sound(run, config)
    assert [line["step"] for line in history(run, "prune_step")] == [3, 5, 7]
    once = config_of(
        "networks:PreActivation", interval=2, first_interval_extra=1, steps=1, budget="removed=5"
    )
    graph = graph_of(run, once)
    kept = kept_in(pruned_run(tmp_path / "once", once), graph)
    scores = mean_of_first_interval(once, tmp_path / "replay")
    gone = scores[~kept]
    assert (~kept).sum() == 5
    candidates = np.concatenate([g.units[np.argsort(scores[g.units])][:-1] for g in graph.prunable])
    assert sorted(gone) == sorted(scores[candidates])[:5]


@pytest.mark.slow
def test_max_steps_that_suffice_change_nothing(tmp_path: Path) -> None:
    for name, steps in (("free", None), ("enough", 5)):
        config = config_of("networks:Dense", budget="removed=5", step_size=1, max_steps=steps)
        assert_sound(pruned_run(tmp_path / name, config), config)
    runs = [RunDirectory(tmp_path / name) for name in ("free", "enough")]
    graph = graph_of(runs[0], config)
    assert np.array_equal(*(kept_in(run, graph) for run in runs))
    assert not history(RunDirectory(tmp_path / "enough"), "prune_end")


def test_start_after_measures_and_removes_nothing(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation", start_after=2, steps=3)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    dense = metrics_of(run)["dense"]["macs"]
    macs = [line["macs"] for line in history(run, "prune_step")]
    assert macs[:2] == [dense, dense]
    assert macs[2] < dense
    assert len(macs) == 5


def test_max_loss_puts_pruning_off_until_the_loss_has_fallen(tmp_path: Path) -> None:
    """The dense network has random weights: its loss is high at first and falls in training."""
    finetune = {"epochs": 8, "lr": 0.05, "warmup_epochs": 0.0}
    config = config_of("networks:PreActivation", max_loss=1.2, finetune=finetune)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    pauses, steps = history(run, "prune_pause"), history(run, "prune_step")
    assert pauses
    assert all(line["loss"] > 1.2 for line in pauses)
    assert all(line["loss"] <= 1.2 for line in steps)
    at = sorted(line["step"] for line in (*pauses, *steps))
    assert at == [config.prune.interval * (n + 1) for n in range(len(at))]


def test_a_loss_that_stays_too_high_ends_pruning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of("networks:PreActivation", max_loss=1e-6)
    run = pruned_run(tmp_path, config)
    assert metrics_of(run)["finetuned"]["macs"] == metrics_of(run)["dense"]["macs"]
    assert "stayed above max_loss" in caplog.text
    # as long as finetuning would last, and one step more
    assert len(history(run, "prune_pause")) == 4 * config.finetune.epochs // 2 + 1
    assert not history(run, "prune_step")


@pytest.mark.parametrize("criterion", ["taylor-gate", "weight-norm"])
def test_fixed_criteria_remove_in_the_order_of_the_first_interval(
    tmp_path: Path, criterion: str
) -> None:
    """Replayed: one interval of training, then the order of its mean scores decides all steps."""
    config = config_of(
        "networks:Dense",
        criterion=criterion,
        budget="removed=8",
        step_size=2,
        fixed_criteria=True,
        momentum=0.9,
    )
    run = pruned_run(tmp_path / "run", config)
    graph = graph_of(run, config)
    found = kept_in(run, graph)
    scores = mean_of_first_interval(config, tmp_path / "replay")
    units = np.concatenate([group.units for group in graph.prunable])
    removable = []
    for group in graph.prunable:
        removable += group.units[np.argsort(scores[group.units])][:-1].tolist()
    order = sorted(removable, key=lambda unit: scores[unit])
    expected = graph.everything()
    width = dict.fromkeys(units.tolist(), 1)
    for group in graph.prunable:
        width.update(dict.fromkeys(group.units.tolist(), group.width))
    left = 8
    for unit in order:
        if left >= width[unit]:
            expected[unit] = False
            left -= width[unit]
    assert np.array_equal(found, expected)


def mean_of_first_interval(config: RunConfig, path: Path) -> np.ndarray:
    run = start(path, config)
    dense = loaded(run.dense, config)
    model = dense.model.train()
    batches = train_batches(DATA, config, "cpu")
    trainer = Trainer(
        model,
        config.finetune,
        steps_per_epoch=len(batches),
        epochs=None,
        seed=config.seed,
    )
    scoring = bind(config.prune.criterion, Context(model, graph_of(run, config)))
    judge = Scores(scoring)
    minibatches = config.prune.interval + config.prune.first_interval_extra
    taken: list[Batch] = list(batches.epoch(0))[:minibatches]
    for batch in taken:
        trainer.step(batch, judge=judge)
    found = judge.found if scoring.per_minibatch else [scoring.score(1.0)]
    return torch.stack(found).mean(0).double().numpy()


@pytest.mark.slow
def test_only_prunes_the_groups_that_are_named(tmp_path: Path) -> None:
    config = config_of("resnet20", only=["layer1.*.conv1"], budget="removed=12", interval=1)
    run = pruned_run(tmp_path, config)
    assert metrics_of(run)["dense"]["channels"] - metrics_of(run)["finetuned"]["channels"] == 12
    graph = graph_of(run, config)
    kept = kept_in(run, graph)
    lost = {g.name for g in graph.groups if not kept[g.units].all()}
    assert lost <= {f"layer1.{block}.conv1" for block in range(3)}
    assert set(widths(run)[0]) == {f"layer1.{block}.conv1" for block in range(3)}


def test_importance_per_mac_spares_cheap_channels(tmp_path: Path) -> None:
    """With equal scores everywhere the dearest channels go first."""
    config = config_of("networks:PreActivation", rank="importance-per-mac", steps=1)
    run = pruned_run(tmp_path, config)
    assert_sound(run, config)
    by_importance = pruned_run(
        tmp_path / "raw", config_of("networks:PreActivation", steps=1, criterion="taylor-gate")
    )
    assert metrics_of(run)["budget"] == metrics_of(by_importance)["budget"]
    graph = graph_of(run, config)
    kept = kept_in(run, graph)
    assert cost.channels(graph, kept) >= metrics_of(by_importance)["finetuned"]["channels"]


def test_a_prune_step_records_rate_and_importance(tmp_path: Path) -> None:
    config = config_of("networks:PreActivation")
    for line in history(pruned_run(tmp_path, config), "prune_step"):
        importance = line["importance"]
        assert 0 <= importance["min"] <= importance["median"] <= importance["max"]
        assert importance["max"] > 0
        assert 0 < line["lr"] <= config.finetune.lr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 2, "start_after": 2}, "max_steps = 2 ends pruning before"),
        ({"flops_regularization": 1e-9, "rank": "importance-per-mac"}, "exclude each other"),
        ({"criterion": 7}, "no criterion has this number"),
        ({"max_loss": float("inf")}, "max_loss"),
        ({"flops_regularization": float("nan")}, "flops_regularization"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of("resnet20", **settings)


def test_only_and_keep_dense_must_match_a_group() -> None:
    config = config_of("resnet20", only=["layer9.*"])
    with pytest.raises(ConfigError, match="only: no group matches 'layer9"):
        check_budget(config, DATA)


def test_a_criterion_that_cannot_serve_is_refused_before_any_training() -> None:
    config = config_of("networks:Plain", criterion="30")
    assert config.prune.criterion == "bn-scale"
    with pytest.raises(ConfigError, match="bn-scale cannot score this network") as refused:
        check_budget(config, DATA)
    assert "taylor-gate-fg" in str(refused.value)


def test_a_criterion_that_watches_is_refused_for_a_compiled_network() -> None:
    config = config_of("networks:PreActivation", criterion="obd")
    config = config.model_copy(update={"compute": ComputeConfig(compiled=True)})
    with pytest.raises(ConfigError, match="obd watches the network run"):
        check_budget(config, DATA)


@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"random"}))
def test_scoring_does_not_disturb_training(tmp_path: Path, criterion: str) -> None:
    """A step that a criterion judges moves weights as a plain step does."""
    config = config_of("networks:PreActivation", criterion=criterion, budget="macs=0.99", steps=1)
    run = start(tmp_path, config)
    dense = loaded(run.dense, config)
    plain, judged = (copy.deepcopy(dense.model).train() for _ in range(2))
    batch = next(iter(train_batches(DATA, config, "cpu").epoch(0)))
    for model, scoring in (
        (plain, None),
        (judged, bind(criterion, Context(judged, graph_of(run, config)))),
    ):
        trainer = Trainer(model, config.finetune, steps_per_epoch=4, epochs=2)
        trainer.step(batch, judge=None if scoring is None else Scores(scoring))
    for first, second in zip(
        plain.state_dict().values(), judged.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-7)
    assert F.mse_loss(plain.head.weight, dense.model.head.weight) > 0


@pytest.mark.slow
def test_preset_2019_runs(tmp_path: Path) -> None:
    config = config_of("resnet20", preset="seed2019", budget="removed=30", step_size=10, interval=1)
    assert config.prune.as_published
    assert config.prune.residual_gate == "block"
    assert_sound(pruned_run(tmp_path, config), config)


@pytest.mark.slow
def test_the_criterion_that_ended_a_run_early_can_be_resumed(tmp_path: Path) -> None:
    """What a pause has counted is part of the state."""
    config = config_of("networks:PreActivation", max_loss=1e-6, finetune={"epochs": 2})
    whole = pruned_run(tmp_path / "whole", config)
    run = start(tmp_path / "stopped", config)
    session = Session(run)
    session.stop.set()
    while not run.pruned.is_file():
        with suppress(InterruptedRunError):
            prune(config, DATA, session)
        session = Session(run)
        session.stop.set()
    assert history(run) == history(whole)
