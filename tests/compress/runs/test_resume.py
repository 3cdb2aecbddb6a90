"""An interrupted run that goes on ends bit for bit where an uninterrupted one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lived_in, some_slow

from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description, read_description
from compress.config import DataConfig, RunConfig
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.data.loading import Draw, Reply, TensorImages
from compress.data.views import View
from compress.errors import CheckpointError, InterruptedRunError
from compress.networks.models import build_model
from compress.runs.dense import train_dense
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import State

Work = Callable[[Session], Path]
pytestmark = pytest.mark.usefixtures("unpainted")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # sums over threads have no fixed order


class Broken(TensorImages):
    """Every eleventh image cannot be read for training."""

    def fetch(self, request: Draw) -> Reply:
        batch, broken = super().fetch(request)
        if request.seeds is None:
            return Reply(batch, broken)
        whole = torch.from_numpy(request.indices % 11 != 0)
        lost = int((~whole).sum())
        kept = replace(batch, images=batch.images[whole], labels=batch.labels[whole], skipped=lost)
        return Reply(kept, "an image (torn)" if lost else "")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """320 of the digits for training, some of them broken, and 120 for validation."""
    data = load_data(DataConfig(dataset="digits", image_size=8))
    train, val = data.train, data.val
    assert isinstance(train, TensorImages)
    assert isinstance(val, TensorImages)
    return replace(
        data,
        train=Broken(train.images[:320], train.labels[:320], train.view),
        val=TensorImages(val.images[:120], val.labels[:120], val.view),
    )


@pytest.fixture(scope="module")
def rgb() -> ImageData:
    """Noise of four classes, for the networks in ``networks``."""
    generator = torch.Generator().manual_seed(0)
    view = View(12, "crop", (0.5,) * 3, (0.25,) * 3)

    def half(kind: type[TensorImages], count: int) -> TensorImages:
        images = torch.rand(count, 3, 12, 12, generator=generator)
        return kind(images, torch.arange(count) % 4, view)

    halves = half(Broken, 160), half(TensorImages, 40)
    return ImageData(*halves, tuple("abcd"), (3, 12, 12), view.mean, view.std, "noise")


def config_of(name: str, **sections: Any) -> RunConfig:
    settings = {
        "seed": 4,
        "device": "cpu",
        "model": {"name": name},
        "data": {"image_size": 8, "batch_size": 32, "eval_batch_size": 60},
        "train": {"epochs": 1, "lr": 0.05},
        **sections,
    }
    return RunConfig.model_validate(settings)


class Stopping(Session):
    """A session in which somebody presses Ctrl-C during the given steps, counted from one."""

    def stop_in(self, steps: Iterable[int]) -> Stopping:
        self.steps, self.taken = set(steps), 0
        return self

    def after_step(self, snapshot: Callable[[], State]) -> None:
        self.taken += 1
        if self.taken in self.steps:
            self.stop.set()
        super().after_step(snapshot)


def tensors_of(file: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def metrics_of(file: Path) -> dict[str, Any]:
    description = read_description(file)
    assert description is not None
    return description.metrics


def interrupted(work: Work, run: RunDirectory, steps: Iterable[int]) -> Path:
    """Do the work, stopped in each of the steps (counted over all of it) and taken up again."""
    previous = 0
    for step in sorted(steps):
        with pytest.raises(InterruptedRunError, match="go on with --resume"):
            work(Stopping(run).stop_in([step - previous]))
        assert run.state.is_file()
        previous = step
    return work(Session(run))


def assert_same_run(expected: RunDirectory, actual: RunDirectory, file: Path, other: Path) -> None:
    assert actual.history.read_text() == expected.history.read_text()
    assert metrics_of(other) == metrics_of(file)
    wanted, found = tensors_of(file), tensors_of(other)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert not actual.state.exists()


def steps_of(run: RunDirectory, event: str) -> list[int]:
    lines = [json.loads(line) for line in run.history.read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == event]


# Dense training

TRAINING = {
    "sgd": {"epochs": 2, "lr": 0.1},
    "average": {"epochs": 2, "lr": 0.1, "ema": 0.9, "group_lasso": 1e-4},
    "no momentum": {"epochs": 2, "lr": 0.1, "momentum": 0.0},
}


@pytest.mark.parametrize("kind", some_slow(TRAINING, {"sgd", "no momentum"}))
@pytest.mark.parametrize(
    "steps", [*(pytest.param([at], marks=slow) for at in (1, 10, 20)), [3, 4, 13]], ids=str
)
def test_dense_training(
    tmp_path: Path,
    digits: ImageData,
    kind: str,
    steps: list[int],
    uninterrupted: Callable[..., RunDirectory],
) -> None:
    """Ten steps an epoch: stopped in the first, with an epoch, with the last, and three times."""
    config = config_of("resnet20", train=TRAINING[kind])

    def work(session: Session) -> Path:
        return train_dense(config, digits, session)

    expected = uninterrupted(config, work)
    run = RunDirectory(tmp_path)
    run.begin(config)
    assert_same_run(expected, run, expected.dense, interrupted(work, run, steps))
    assert len(expected.history.read_text().splitlines()) == 2
    assert '"train_skipped": 60' in expected.history.read_text().splitlines()[1]


def test_dropout(tmp_path: Path, rgb: ImageData) -> None:
    """What a step draws follows from its number, not from how often the process was started."""
    config = config_of("networks:Plain", train={"epochs": 2, "lr": 0.1})
    runs = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")

    def work(session: Session) -> Path:
        return train_dense(config, rgb, session)

    for run in runs:
        run.begin(config)
    work(Session(runs[0]))
    torch.rand(17)
    other = interrupted(work, runs[1], [2, 5, 7])
    assert_same_run(*runs, runs[0].dense, other)


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., RunDirectory]:
    """Return a function that does the work of a configuration once, however often it is asked."""
    done: dict[str, RunDirectory] = {}

    def run_of(config: RunConfig, work: Work, dense: Path | None = None) -> RunDirectory:
        key = config.model_dump_json()
        if key not in done:
            run = RunDirectory(tmp_path_factory.mktemp("uninterrupted"))
            run.begin(config)
            if dense:
                shutil.copy(dense, run.dense)
            work(Session(run))
            done[key] = run
        return done[key]

    return run_of


# Pruning and finetuning

PRUNING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "average": ("networks:PreActivation", {}, {"ema": 0.9}),
    "distilled, by block": (
        "resnet20",
        {"residual_gate": "block", "momentum": 0.5},
        {"distill": 0.5, "group_lasso": 1e-4, "epochs": 1},
    ),
    "whole groups": ("networks:Grouped", {"criterion": "weight-norm"}, {"ema": 0.5}),
    "depthwise": ("networks:Separable", {"momentum": 0.0}, {"weight_decay": 0.01}),
    "flattened": ("networks:Plain", {"criterion": "random"}, {"nesterov": False}),
    "second order": (
        "resnet20",
        {"criterion": "taylor-gate-so", "start_after": 1, "max_steps": 4},
        {"epochs": 1},
    ),
    "single examples": (
        "networks:PreActivation",
        {"criterion": "taylor-gate-fg", "fixed_criteria": True, "normalize": "l2"},
        {},
    ),
    "as published": (
        "resnet20",
        {"residual_gate": "block", "as_published": True, "first_interval_extra": 1},
        {"epochs": 1, "clip_gradients": 0.5, "zero_lr_epochs": 0.3, "evaluation_mode": True},
    ),
    "per MAC": ("networks:Dense", {"rank": "importance-per-mac"}, {}),
    "concatenated": ("networks:Dense", {"step_size": 2}, {"momentum": 0.0}),
}


def case(name: str) -> RunConfig:
    architecture, pruning, finetuning = PRUNING[name]
    shared = {"steps": 5, "interval": 2, "min_channels": 1, "bn_batches": 2, "shrink_at": 0.15}
    return config_of(
        architecture,
        prune=shared | {"proof_images": 2} | pruning,
        finetune={"epochs": 2, "lr": 0.05, "warmup_epochs": 0.5} | finetuning,
    )


def dense_of(folder: Path, config: RunConfig, data: ImageData) -> Path:
    torch.manual_seed(6)
    channels = data.input_size[0]
    model = build_model(config.model.name, num_classes=data.num_classes, in_channels=channels)
    description = Description.of(config.model, data, {})
    save_checkpoint(folder / "start.safetensors", lived_in(model), description=description)
    return folder / "start.safetensors"


class Case:
    """One configuration of pruning: what it does, and its uninterrupted run."""

    def __init__(self, folder: Path, config: RunConfig, data: ImageData) -> None:
        self.folder, self.config, self.data = folder, config, data
        self.dense = dense_of(folder, config, data)
        self.expected = self.begun("uninterrupted")
        self.work(Session(self.expected))

    def begun(self, name: str) -> RunDirectory:
        run = RunDirectory(self.folder / name)
        run.begin(self.config)
        shutil.copy(self.dense, run.dense)
        return run

    def work(self, session: Session) -> Path:
        return prune(self.config, self.data, session)

    def check(self, steps: Iterable[int]) -> None:
        steps = sorted(steps)
        run = self.begun("stopped-" + "-".join(map(str, steps)))
        other = interrupted(self.work, run, steps)
        assert_same_run(self.expected, run, self.expected.pruned, other)


@pytest.fixture(params=some_slow(PRUNING, PRUNING.keys() - {"average"}))
def pruning(request: pytest.FixtureRequest, tmp_path: Path, digits: Any, rgb: Any) -> Case:
    config = case(request.param)
    return Case(tmp_path, config, digits if config.model.name == "resnet20" else rgb)


def test_pruning_and_finetuning(pruning: Case) -> None:
    """Stopped before the first shrink, between two, in the last, after it, and in finetuning."""
    shrinks, epochs = steps_of(pruning.expected, "shrink"), steps_of(pruning.expected, "epoch")
    assert len(shrinks) >= 2
    assert epochs[0] > shrinks[-1]
    pruning.check({1, shrinks[0], shrinks[0] + 1, shrinks[-1], shrinks[-1] + 1, epochs[0]})
    pruning.check([shrinks[0] + 1])
    pruning.check([epochs[-1]])  # all steps are taken, the result is not written


@slow
def test_stopped_in_every_single_step(tmp_path: Path, rgb: ImageData) -> None:
    every = Case(tmp_path, case("depthwise"), rgb)
    last = steps_of(every.expected, "epoch")[-1]
    every.check(range(1, last + 1))


@slow
def test_masks_between_two_shrinks_are_held(tmp_path: Path, rgb: ImageData) -> None:
    """Nothing is shrunk before the end, so every state holds a masked network."""
    config = case("depthwise").model_dump()
    config["prune"] |= {"shrink_at": 1.0, "budget": "macs=0.5"}
    masked = Case(tmp_path, RunConfig.model_validate(config), rgb)
    assert len(steps_of(masked.expected, "shrink")) == 1
    assert len(steps_of(masked.expected, "prune_step")) >= 4
    masked.check([3])
    masked.check([4, 5, 8])


def test_killed_after_a_save_the_history_is_cut_to_it(
    tmp_path: Path, rgb: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power lost three steps after the state was saved: those steps are taken, and told, again."""
    killed = Case(tmp_path, case("depthwise"), rgb)
    run = killed.begun("killed")

    class Killed(Session):
        taken = 0

        def after_step(self, snapshot: Callable[[], State]) -> None:
            self.taken += 1
            if self.taken == 5:
                self.save(snapshot())
            if self.taken == 8:
                raise MemoryError
            super().after_step(snapshot)

    with pytest.raises(MemoryError):
        killed.work(Killed(run))
    lines = len(run.history.read_text().splitlines())
    assert lines > len([s for s in steps_of(killed.expected, "prune_step") if s <= 5])
    other = killed.work(Session(run))
    assert_same_run(killed.expected, run, killed.expected.pruned, other)


@pytest.mark.parametrize(
    "names", [("depthwise", "average"), pytest.param(("average", "depthwise"), marks=slow)]
)
def test_state_of_another_network_is_refused(
    tmp_path: Path, rgb: ImageData, names: tuple[str, str]
) -> None:
    """Somebody changed the configuration of a run that was stopped."""
    stopped, other = Case(tmp_path, case(names[0]), rgb), case(names[1])
    run = stopped.begun("stopped")
    with pytest.raises(InterruptedRunError):
        stopped.work(Stopping(run).stop_in([3]))
    shutil.copy(dense_of(tmp_path, other, rgb), run.dense)
    with pytest.raises(CheckpointError, match="of another network: start anew with --overwrite"):
        prune(other, rgb, Session(run))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", ["off", "fp16", "auto"])
def test_on_a_gpu_where_every_algorithm_repeats(
    tmp_path: Path, digits: ImageData, amp: str
) -> None:
    config = case("distilled, by block").model_dump()
    config["device"] = "cuda"
    config["compute"]["deterministic"] = True
    config["finetune"]["amp"] = amp
    on_gpu = Case(tmp_path, RunConfig.model_validate(config), digits)
    shrinks = steps_of(on_gpu.expected, "shrink")
    on_gpu.check([1, shrinks[0] + 1, shrinks[-1] + 3])
