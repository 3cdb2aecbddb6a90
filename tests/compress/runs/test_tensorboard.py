from __future__ import annotations

import errno
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lived_in, some_slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description
from compress.config import RunConfig
from compress.data.batches import ImageData
from compress.data.loading import TensorImages
from compress.data.views import View
from compress.networks.models import build_model
from compress.runs.dense import train_dense
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import State
from compress.runs.tensorboard import Scalar, scalars

pytestmark = pytest.mark.usefixtures("unpainted")

Curve = dict[str, list[tuple[int, float]]]


def curves_of(folder: Path) -> Curve:
    """Read the scalars of one run as TensorBoard does."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def noise(train: int = 80) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    view = View(12, "none", (0.5,) * 3, (0.25,) * 3)

    def half(count: int) -> TensorImages:
        images = torch.rand(count, 3, 12, 12, generator=generator)
        return TensorImages(images, torch.arange(count) % 4, view)

    names = tuple("abcd")
    return ImageData(half(train), half(40), names, (3, 12, 12), view.mean, view.std, "noise")


DATA = noise()
NAME = "networks:PreActivation"


def config_of(**settings: Any) -> RunConfig:
    document = {
        "device": "cpu",
        "model": {"name": NAME},
        "data": {"batch_size": 20, "eval_batch_size": 40},
        "train": {"epochs": 2, "lr": 0.05},
        "prune": {"steps": 3, "interval": 2, "min_channels": 1, "bn_batches": 1},
        "finetune": {"epochs": 2, "lr": 0.02, "warmup_epochs": 0.5},
        **settings,
    }
    return RunConfig.model_validate(document)


def begun(path: Path, config: RunConfig) -> RunDirectory:
    torch.set_num_threads(1)
    run = RunDirectory(path)
    run.begin(config)
    return run


def start(path: Path, config: RunConfig) -> RunDirectory:
    """Begin a run with a dense network."""
    run = begun(path, config)
    description = Description(
        architecture=NAME,
        classes=DATA.classes,
        input_size=(3, 12, 12),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    save_checkpoint(run.dense, lived_in(build_model(NAME, num_classes=4)), description=description)
    return run


# One event


def test_a_pruning_step() -> None:
    event = {
        "event": "prune_step",
        "step": 20,
        "pruning_step": 2,
        "loss": 0.5,
        "lr": 0.01,
        "widths": {"conv1": 12, "layer1.0.conv1": 7},
        "importance": {"min": 0.0, "median": 1e-9, "max": 2},
        "macs": 4000,
        "params": 300,
        "channels": 19,
    }
    assert sorted(scalars(event)) == [
        ("importance/max", 2.0, 20),
        ("importance/median", 1e-9, 20),
        ("importance/min", 0.0, 20),
        ("left/channels", 19.0, 20),
        ("left/macs", 4000.0, 20),
        ("left/params", 300.0, 20),
        ("training/learning_rate", 0.01, 20),
        ("training/loss", 0.5, 20),
        ("widths/conv1", 12.0, 20),
        ("widths/layer1.0.conv1", 7.0, 20),
    ]


def test_an_epoch() -> None:
    event = {"event": "epoch", "phase": "train", "epoch": 3, "step": 9, "train_skipped": 0}
    facts = {"loss": 0.5, "lr": 0.1, "top1": 90.0, "top5": 99.0, "images": 40, "skipped": 1}
    assert sorted(scalars(event | facts)) == [
        ("accuracy/top1", 90.0, 9),
        ("accuracy/top5", 99.0, 9),
        ("training/learning_rate", 0.1, 9),
        ("training/loss", 0.5, 9),
    ]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"event": "dense", "checkpoint": "a.pth", "top1": 76.0}, [("accuracy/top1", 76.0, 0)]),
        ({"event": "pruned", "macs": 5, "step": 6, "top1": 70.0}, [("accuracy/top1", 70.0, 6)]),
        ({"event": "pruned", "macs": 5, "top1": 70.0}, []),  # of no step
        ({"event": "prune_pause", "step": 6, "loss": 2.5}, [("training/loss", 2.5, 6)]),
        ({"event": "prune_step", "step": 2}, []),
        ({"event": "prune_step", "step": 2, "loss": None, "importance": None, "widths": {}}, []),
        ({"event": "epoch", "step": 2, "loss": True, "lr": "fast"}, []),
        ({"event": "shrink", "step": 2, "difference": 1e-15}, []),
        ({"event": "something new", "step": 2, "loss": 1.0}, []),
    ],
)
def test_facts_that_are_absent_or_no_numbers(event: dict[str, Any], expected: list[Scalar]) -> None:
    assert scalars(event) == expected


# Real runs


def expected_of(run: RunDirectory, phases: tuple[str, ...]) -> Curve:
    """Return the curves that the history of a run tells of."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for line in run.history.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "epoch" and event["phase"] in phases:
            names = {"loss": "training/loss", "lr": "training/learning_rate"}
            names |= {"top1": "accuracy/top1", "top5": "accuracy/top5"}
        elif event["event"] == "prune_step" and "prune" in phases:
            names = {name: f"left/{name}" for name in ("macs", "params", "channels")}
            names |= {"loss": "training/loss", "lr": "training/learning_rate"}
            for kind in ("widths", "importance"):
                for part, value in event.get(kind, {}).items():
                    found[f"{kind}/{part}"][event["step"]] = value
        elif event["event"] == "pruned" and "prune" in phases and "step" in event:
            names = {"top1": "accuracy/top1", "top5": "accuracy/top5"}
        else:
            continue
        for fact in names.keys() & event.keys():
            found[names[fact]][event["step"]] = event[fact]
    return {
        tag: [(step, float(np.float32(value))) for step, value in sorted(curve.items())]
        for tag, curve in found.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Dense training, pruning and finetuning in one run."""
    config = config_of()
    run = begun(tmp_path_factory.mktemp("whole"), config)
    session = Session(run)
    train_dense(config, DATA, session)
    prune(config, DATA, session)
    return run


def test_every_scalar_is_that_of_the_history(whole: RunDirectory) -> None:
    trained, pruned = (curves_of(whole.tensorboard / run) for run in ("train", "prune"))
    assert trained == expected_of(whole, ("train",))
    assert pruned == expected_of(whole, ("prune", "finetune"))
    assert [step for step, _ in trained["accuracy/top1"]] == [4, 8]
    assert [step for step, _ in pruned["left/macs"]] == [2, 4, 6]
    assert {"widths/stem", "widths/conv1", "left/channels", "left/params"} <= pruned.keys()
    assert {step for step, _ in pruned["training/loss"]} >= {2, 4, 6, 10, 14}


def test_the_history_can_be_read_back(whole: RunDirectory) -> None:
    lines = whole.history.read_text().splitlines()
    assert whole.events() == [json.loads(line) for line in lines]


@pytest.mark.parametrize("step", some_slow([1, 3, 5, 9, 13], {1, 3, 9, 13}))
def test_a_resumed_run_leaves_no_trace_of_what_was_lost(tmp_path: Path, step: int) -> None:
    """Killed three steps after the state was saved: those steps are taken, and drawn, again."""
    config = config_of()
    run = start(tmp_path, config)

    class Killed(Session):
        taken = 0

        def after_step(self, snapshot: Callable[[], State]) -> None:
            self.taken += 1
            if self.taken == step:
                self.save(snapshot())
            if self.taken == step + 3 or self.taken == 14:
                # What a step that is taken again draws may differ, on another device for example.
                self.record(
                    "prune_step", step=self.taken, loss=1e9, lr=1e9, macs=1, widths={"x": 1}
                )
                raise MemoryError
            super().after_step(snapshot)

    with pytest.raises(MemoryError):
        prune(config, DATA, Killed(run))
    lost = curves_of(run.tensorboard / "prune")
    assert lost["training/loss"][-1][1] == 1e9
    prune(config, DATA, Session(run))
    found = curves_of(run.tensorboard / "prune")
    found.pop("widths/x", None)
    assert found == expected_of(run, ("prune", "finetune"))
    for curve in found.values():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps))
    assert len(list((run.tensorboard / "prune").iterdir())) == 2


def test_a_phase_that_begins_anew_begins_its_curves_anew(tmp_path: Path) -> None:
    """Killed before the first state was saved; the accuracy of the dense network is kept."""
    run = begun(tmp_path, config_of())
    first = Session(run)
    first.record("dense", top1=76.0, top5=93.0)
    first.record("prune_step", step=2, loss=7.0)
    first.record("prune_step", step=4, loss=8.0)
    second = Session(run)
    assert second.load("prune") is None
    second.record("prune_step", step=2, loss=0.5)
    found = curves_of(run.tensorboard / "prune")
    assert found["training/loss"] == [(2, 0.5)]
    assert found["accuracy/top1"] == [(0, 76.0)]


def test_a_network_that_is_imported_again_is_drawn_once(tmp_path: Path) -> None:
    """Killed in an import, or right after it: the whole run begins anew."""
    run = begun(tmp_path, config_of())
    first = Session(run)
    first.record("dense", top1=76.0, top5=93.0)
    first.record("prune_step", step=2, loss=7.0)
    second = Session(run)
    second.forget("train")
    second.record("dense", top1=75.0, top5=93.0)
    found = curves_of(run.tensorboard / "prune")
    assert found["accuracy/top1"] == [(0, 75.0)]
    assert "training/loss" not in found or found["training/loss"] == []


def test_killed_in_the_middle_of_an_event_the_curves_go_on_after_it(tmp_path: Path) -> None:
    run = begun(tmp_path, config_of())
    first = Session(run)
    first.record("prune_step", step=2, loss=0.5)
    first.save(State("prune", {"step": 2}, {"weight": torch.zeros(1)}))
    first.record("prune_step", step=4, loss=8.0)
    (file,) = (run.tensorboard / "prune").iterdir()
    for cut in (1, 5, 20):
        file.write_bytes(file.read_bytes()[:-cut])
        second = Session(run)
        assert second.load("prune") is not None
        second.record("prune_step", step=4, loss=0.25)
        found = curves_of(run.tensorboard / "prune")
        assert found["training/loss"] == [(2, 0.5), (4, 0.25)]


def test_resuming_pruning_leaves_dense_training_alone(tmp_path: Path) -> None:
    run = begun(tmp_path, config_of())
    first = Session(run)
    first.record("epoch", phase="train", step=9, loss=0.25)
    first.record("prune_step", step=2, loss=0.5)
    first.save(State("prune", {"step": 2}, {"weight": torch.zeros(1)}))
    first.record("prune_step", step=4, loss=8.0)
    second = Session(run)
    assert second.load("finetune") is None
    assert second.load("prune") is not None
    second.record("epoch", phase="finetune", step=5, loss=0.75)
    assert curves_of(run.tensorboard / "train") == {"training/loss": [(9, 0.25)]}
    assert curves_of(run.tensorboard / "prune") == {"training/loss": [(2, 0.5), (5, 0.75)]}


def test_the_switch(tmp_path: Path) -> None:
    config = config_of(tensorboard=False)
    run = start(tmp_path, config)
    prune(config, DATA, Session(run))
    assert run.pruned.is_file()
    assert run.history.is_file()
    assert not run.tensorboard.exists()


def test_a_curve_is_on_disk_when_it_is_recorded(tmp_path: Path) -> None:
    session = Session(begun(tmp_path, config_of()))
    session.record("prune_step", step=2, loss=0.5)
    assert curves_of(session.run.tensorboard / "prune") == {"training/loss": [(2, 0.5)]}


# What cannot be written


def test_a_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """There is one warning; the history, and so the run, goes on."""
    session = Session(begun(tmp_path, config_of()))
    session.run.tensorboard.write_text("in the way")
    session.record("prune_step", step=2, loss=0.5)
    session.record("prune_step", step=4, loss=0.4)
    (message,) = caplog.messages
    assert "tensorboard, so there are no more curves: " in message
    assert [event["step"] for event in session.run.events()] == [2, 4]


def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was drawn before stays readable."""
    session = Session(begun(tmp_path, config_of()))
    session.record("prune_step", step=2, loss=0.5)

    def full(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        session.record("prune_step", step=4, loss=0.4)
    session.record("prune_step", step=6, loss=0.3)
    (message,) = caplog.messages
    assert "No space left on device" in message
    assert curves_of(session.run.tensorboard / "prune") == {"training/loss": [(2, 0.5)]}
