"""Whole runs under faults: killed, on disks that fail, with images that are torn."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import RUN_FILES, contents, files_in, invoke, refused
from PIL import Image
from runs import DATA, Stopping, config_of
from runs import start as begun

from benchmarks.kill_and_resume import (
    SETTINGS,
    command,
    differences,
    steps_of,
    tensors_sha256,
)
from benchmarks.killed import PREVIOUS, STATE, Moment, Runs, drawn
from compress.config import RunConfig, SaveConfig
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.data.loading import Draw, Reply, TensorImages
from compress.errors import DataError, InterruptedRunError, OutputError
from compress.runs import state as state_module
from compress.runs.dense import import_dense, note_import, train_dense
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session

pytestmark = pytest.mark.usefixtures("unpainted")
slow = pytest.mark.slow

SHORT = {"train.epochs": "1", "prune.steps": "4", "prune.interval": "2", "finetune.epochs": "1"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # sums over threads have no fixed order


# kill -9


@slow
def test_killed_in_training_after_a_shrink_and_while_a_state_is_written(tmp_path: Path) -> None:
    """benchmarks/kill_and_resume.py does this at twenty moments."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    settings = SETTINGS | SHORT
    with Runs(until_pruned=True) as runs:
        assert runs.run(command(alone, settings)) == 0, runs.said()
        lines = [json.loads(line) for line in (alone / "history.jsonl").read_text().splitlines()]
        shrinks = [line["step"] for line in lines if line["event"] == "shrink"]
        steps = steps_of(alone)
        assert steps["prune"] >= shrinks[-1] + 6
        moments = (
            Moment("train", 4),
            Moment("prune", shrinks[0] + 1),
            Moment("prune", shrinks[-1] + 1, "half", STATE),
        )
        for moment in moments:
            assert runs.run(command(killed, settings), moment) == -signal.SIGKILL, runs.said()
        assert {path.name.split(".")[1] for path in (killed / "state").glob(".*")} == {"state"}
        assert runs.run(command(killed, settings)) == 0, runs.said()
        assert "Traceback" not in runs.said()
    assert differences(alone, killed) == []
    assert not list(killed.rglob(".*"))


def test_moments_are_drawn_in_every_phase_and_every_part_of_a_write() -> None:
    steps = {"train": 27, "prune": 45}
    found = drawn(20, steps, random.Random(3))
    assert found == drawn(20, steps, random.Random(3))
    assert len(found) == 20
    places = [(("train", "prune", "end").index(m.phase), m.step) for m in found if m.step > 1]
    assert places == sorted(places)
    assert {m.phase for m in found} == {"train", "prune", "end"}
    actions = {("half", STATE), ("before", PREVIOUS), ("before", STATE), ("after", STATE)}
    assert {(m.action, m.file) for m in found} >= actions


# Disks and images that fail on the way, and what goes on from there

NAME = "networks:PreActivation"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    save = SaveConfig(every_steps=2)
    return config_of(NAME, finetune={"ema": 0.9, "distill": 0.5}).model_copy(update={"save": save})


@pytest.fixture(scope="module")
def expected(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of pruning and finetuning that nothing has happened to."""
    torch.set_num_threads(1)
    run = begun(tmp_path_factory.mktemp("expected"), config)
    prune(config, DATA, Session(run))
    return run


def assert_same(expected: RunDirectory, run: RunDirectory) -> None:
    assert tensors_sha256(run.pruned) == tensors_sha256(expected.pruned)
    assert run.history.read_text() == expected.history.read_text()
    assert files_in(run.path) == files_in(expected.path)


def failing(monkeypatch: pytest.MonkeyPatch, after: int, number: int) -> None:
    """Let so many states be written, and half of the next."""
    write, done = state_module.write_flushed, list[Path]()

    def fail(path: Path, data: bytes) -> None:
        if len(done) == after:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        done.append(path)
        write(path, data)

    monkeypatch.setattr(state_module, "write_flushed", fail)


@pytest.mark.parametrize(
    ("after", "number", "says"),
    [
        pytest.param(0, errno.ENOSPC, "the disk is full", marks=slow),
        (3, errno.ENOSPC, "the disk is full"),
        pytest.param(4, errno.EROFS, "the file system is read-only", marks=slow),
        pytest.param(5, errno.EIO, "the disk does not answer as it should", marks=slow),
    ],
)
def test_a_disk_that_fails_on_the_way(
    after: int,
    number: int,
    says: str,
    config: RunConfig,
    expected: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = begun(tmp_path, config)
    with monkeypatch.context() as patch:
        failing(patch, after, number)
        with pytest.raises(OutputError, match=f"{STATE}: {says}; what was there before is kept"):
            prune(config, DATA, Session(run))
    names = {path.name for path in run.state.parent.glob("*")}
    assert names == ({STATE, PREVIOUS} if after else set())
    prune(config, DATA, Session(run))
    assert_same(expected, run)


@pytest.mark.parametrize("step", [pytest.param(5, marks=slow), 11])
def test_a_truncated_state_gives_way_to_the_one_before_it(
    step: int,
    config: RunConfig,
    expected: RunDirectory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In pruning, and when the state before it is of another phase or another width."""
    run = begun(tmp_path, config)
    with pytest.raises(InterruptedRunError):
        prune(config, DATA, Stopping(run).stop_in(step))
    run.state.write_bytes(run.state.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "compress"):
        prune(config, DATA, Session(run))
    said = [message for message in caplog.messages if "is damaged" in message]
    assert said
    assert all("the run goes on from the state before it" in message for message in said)
    assert_same(expected, run)


class Dying(TensorImages):
    """A worker dies, once, when so many batches were read for training."""

    left = 0

    def fetch(self, request: Draw) -> Reply:
        if request.seeds is not None:
            self.left -= 1
            if not self.left:
                raise DataError("one of the 2 processes that decode images died")
        return super().fetch(request)


@pytest.mark.parametrize("batches", [pytest.param(1, marks=slow), 6, pytest.param(11, marks=slow)])
def test_a_worker_that_dies_costs_no_more_than_the_steps_since_the_save(
    batches: int, config: RunConfig, expected: RunDirectory, tmp_path: Path
) -> None:
    train = DATA.train
    assert isinstance(train, TensorImages)
    dying = Dying(train.images, train.labels, train.view)
    dying.left = batches
    run = begun(tmp_path, config)
    with pytest.raises(DataError, match="died"):
        prune(config, replace(DATA, train=dying), Session(run))
    prune(config, DATA, Session(run))
    assert_same(expected, run)


def photographs(folder: Path) -> ImageData:
    """Return an image folder of two classes, in which two of 24 training images are torn."""
    rng = np.random.default_rng(0)
    for half, count in (("train", 12), ("val", 4)):
        for name in ("cats", "dogs"):
            place = folder / half / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.jpg")
    for torn in ("cats/3.jpg", "dogs/7.jpg"):
        path = folder / "train" / torn
        path.write_bytes(path.read_bytes()[:300])
    document = {"dataset": "imagefolder", "root": folder, "image_size": 16}
    return load_data(RunConfig.model_validate({"data": document}).data)


def test_torn_images_in_the_middle_of_an_epoch_that_is_stopped_and_resumed(tmp_path: Path) -> None:
    data = photographs(tmp_path / "photographs")
    settings = {"epochs": 2, "lr": 0.05, "warmup_epochs": 0.0}
    config = config_of("resnet20").model_copy(
        update={"train": config_of("resnet20").train.model_validate(settings)}
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 4})})
    runs = RunDirectory(tmp_path / "alone"), RunDirectory(tmp_path / "stopped")
    for run in runs:
        run.begin(config)
    train_dense(config, data, Session(runs[0]))
    skipped = [event["train_skipped"] for event in runs[0].events()]
    assert skipped == [2, 4]
    taken = 0
    for step in (2, 5, 8):
        with pytest.raises(InterruptedRunError):
            train_dense(config, data, Stopping(runs[1]).stop_in(step - taken))
        taken = step
    train_dense(config, data, Session(runs[1]))
    assert tensors_sha256(runs[1].dense) == tensors_sha256(runs[0].dense)
    assert runs[1].history.read_text() == runs[0].history.read_text()


# The stages without a state


def test_an_import_whose_line_was_cut_off_is_told_once(tmp_path: Path) -> None:
    config = config_of(NAME)
    checkpoint = begun(tmp_path / "source", config).dense
    run = RunDirectory(tmp_path / "run")
    run.imported.parent.mkdir(parents=True)
    import_dense(config, DATA, checkpoint, run.imported)
    run.begin(config)
    run.history.write_text('{"event": "den')
    for _ in range(2):
        note_import(Session(run))
        assert [event["event"] for event in run.events()] == ["dense"]


def terminated_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Have a scheduler end the process when a function is called."""

    def ended(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it came too late")

    monkeypatch.setattr(owner, name, ended)


@slow
def test_sigterm_in_an_export_or_a_measurement_leaves_nothing_half_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.measuring import session
    from export import checkpoint_to_onnx

    for path in (copied / "export", copied / "report.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    arguments = ("run", "--resume", "--output", copied)
    says = f"stopped; go on with --resume --output {copied}"
    for owner, name in ((checkpoint_to_onnx, "check_parity"), (session, "measure_latency")):
        before = contents(copied)
        with monkeypatch.context() as patch:
            terminated_in(patch, owner, name)
            refused(*arguments, code=130, says=says)
        assert contents(copied).items() >= before.items()
        assert not list(copied.rglob(".*"))
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert files_in(copied) == RUN_FILES


@slow
def test_an_export_that_was_killed_before_its_last_file_is_made_again_whole(copied: Path) -> None:
    """The description of a network is written before the network takes its name."""
    (copied / "export" / "pruned.onnx").rename(copied / "export" / ".pruned.77.onnx")
    (copied / "export" / "dense.onnx").write_bytes(b"old")
    result = invoke("run", "--resume", "--output", copied)
    assert result.exit_code == 0, result.stderr
    assert files_in(copied) == RUN_FILES
    for name in ("dense", "pruned"):
        document = json.loads((copied / "export" / f"{name}.json").read_text())
        assert document["onnx"]["bytes"] == (copied / "export" / f"{name}.onnx").stat().st_size
