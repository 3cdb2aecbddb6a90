"""The training scripts and the page that people copy from work, and each proves what it says."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

import compress

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Of Lightning about itself, with a newer torch than it knows.
of_lightning = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*num_workers")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return import_module


def macs_of(model: nn.Module, image: torch.Tensor) -> int:
    """Return the multiply-adds of one image as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2


def falls(values: list[float]) -> bool:
    """Whether the last quarter is below the first."""
    part = max(1, len(values) // 4)
    return sum(values[-part:]) < sum(values[:part])


def test_a_loop_of_ones_own_is_stopped_and_goes_on_to_the_same_weights(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = example("plain_torch").main
    whole = train(tmp_path / "whole", updates=16, save_every=100, interval=1)
    assert falls(whole)
    train(tmp_path / "parts", updates=6, save_every=6, interval=1)
    shrunk = torch.load(tmp_path / "parts" / "checkpoint.pt")["pruner"]["shrunk"]
    assert not shrunk.all(), "it is stopped between two shrinks"
    rest = train(tmp_path / "parts", updates=16, resume=True, interval=1)
    assert rest == whole[6:]
    assert capsys.readouterr().out.count("the file holds the same network: True") == 3
    one, other = (load_file(tmp_path / name / "pruned.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accelerate(example: Any) -> None:
    pytest.importorskip("accelerate", reason="the example is a loop of accelerate")
    module = example("accelerate_loop")
    dense, image = macs_of(module.build(), torch.zeros(1, 3, 16, 16)), torch.zeros(1, 3, 16, 16)
    assert 0.4 * dense < macs_of(module.main(steps=8), image) <= 0.5 * dense


@pytest.mark.slow
def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the example is a loop of accelerate")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    command = (*launcher, "--master-port", free_port(), ROOT / "examples" / "accelerate_loop.py")
    result = subprocess.run(
        [*map(str, command), "--steps", "8"],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "2 processes, the same weights: True" in result.stdout, result.stderr


@of_lightning
def test_a_callback_of_lightning_does_what_a_plain_loop_does(example: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="the example is a callback of lightning")
    module = example("lightning_callback")
    fitted = module.main(tmp_path, epochs=2, count=8, interval=1)

    lightning.seed_everything(0, verbose=False)
    loader, images = module.minibatches(8)
    plain = module.Classifier()
    optimizer = plain.configure_optimizers()
    pruner = compress.Pruner(
        plain, images[:1], optimizer=optimizer, budget="macs=0.5", steps=8, interval=1
    )
    for batch in [*loader, *loader]:
        loss = F.cross_entropy(plain(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        pruner.score()
        optimizer.step()
        pruner.step()
    assert pruner.done
    expected, found = plain.state_dict(), fitted.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@of_lightning
def test_a_fit_of_lightning_is_stopped_and_goes_on_to_the_same_weights(
    example: Any, tmp_path: Path
) -> None:
    pytest.importorskip("lightning", reason="the example is a callback of lightning")
    fit = example("lightning_callback").main
    whole = fit(tmp_path / "whole", epochs=3, count=4, interval=1)
    half = fit(tmp_path / "parts", epochs=1, count=4, interval=1)
    resumed = fit(tmp_path / "parts", epochs=3, count=4, interval=1, resume=True)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (half, whole, resumed)]
    assert sizes[0] > sizes[1] == sizes[2]
    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@of_lightning
def test_a_fit_of_lightning_ends_with_the_budget_and_accumulates(
    example: Any, tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning", reason="the example is a callback of lightning")
    module = example("lightning_callback")
    loader, images = module.minibatches(20)
    pruning = module.PruningCallback(images[:1], part="network", stop=True, steps=4, interval=2)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[pruning],
        accumulate_grad_batches=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.Classifier(), loader)
    assert pruning.pruner.done
    assert trainer.global_step == 4 * 2
    assert trainer.current_epoch < 3


@pytest.mark.slow
def test_a_train_script_of_timm(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="the example is a train script of timm's kind")
    path = tmp_path / "pruned.safetensors"
    share = example("timm_train").main(epochs=2, minibatches=8, output=path)
    printed = capsys.readouterr().out
    assert "the budget holds: True" in printed
    assert f"accuracy of the file: {share:.3f}" in printed
    assert share > 0.3, "of ten classes"


@pytest.mark.slow
def test_a_detector_trains_on_around_its_pruned_backbone(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = example("detection").main(steps=6, count=2, output=tmp_path / "pruned.safetensors")
    assert falls(losses)
    printed = capsys.readouterr().out
    assert "the budget holds: True" in printed
    assert "the file holds the same backbone: True" in printed


@pytest.mark.slow
def test_a_unet_goes_on_finding_discs(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("segmentation")
    path = tmp_path / "pruned.safetensors"
    found = module.main(steps=32, size=16, output=path)
    assert falls([-overlap for overlap in found])
    loaded, image = compress.load(path, build=module.UNet), torch.zeros(1, 1, 16, 16)
    assert macs_of(loaded, image) <= 0.5 * macs_of(module.UNet(), image)
    printed = capsys.readouterr().out
    assert "the file holds the same network: True" in printed
    assert "pruned.onnx: {'images': ('batch', 1, 16, 16)} -> {'output': ('batch', 2" in printed


def scalars(folder: Path) -> dict[str, list[float]]:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


class StandIn:
    """Takes numbers as MLflow and a run of Weights & Biases do."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.steps: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        assert step is not None
        self.log(metrics)
        self.steps.append(step)

    def log(self, data: dict[str, float]) -> None:
        self.logged.append(data)


def test_events_reach_tensorboard_mlflow_and_wandb(example: Any, tmp_path: Path) -> None:
    module, mlflow, wandb = example("callbacks"), StandIn(), StandIn()
    with SummaryWriter(str(tmp_path)) as writer:
        callback = module.to_all(
            module.to_tensorboard(writer), module.to_mlflow(mlflow), module.to_wandb(wandb)
        )
        model = module.main(callback)
    macs = [logged["prune/macs"] for logged in mlflow.logged]
    assert mlflow.steps == [1, 2, 3, 4, 5, 6]
    assert macs[-1] == macs_of(model, torch.zeros(1, 3, 16, 16))
    assert wandb.logged == mlflow.logged
    drawn = scalars(tmp_path)
    assert drawn.keys() == mlflow.logged[0].keys()
    assert drawn["prune/macs"] == macs


@pytest.mark.slow
def test_one_step_from_analysis_to_a_smaller_network(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("one_shot")
    before, after = module.main(trained=16, finetuned=16, output=tmp_path)
    assert after < before
    printed = capsys.readouterr().out
    assert "the file holds the same network: True" in printed
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("dense", "pruned")]
    assert f"x {sizes[1] / sizes[0]:.3f}" in printed
    path, image = tmp_path / "pruned.safetensors", torch.zeros(1, 3, 16, 16)
    pruned = compress.load(path, build=module.build)
    assert macs_of(pruned, image) <= 0.5 * macs_of(module.build(), image)
    widths = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():  # as torchrun would
        monkeypatch.setenv(name, value)
    # A C++ compiler is not part of what the tests need.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    space: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"<block {number} of library.md>", "exec"), space)
    shown = capsys.readouterr().out
    assert "file size" in shown
    assert re.search(r"^MACs +617,632 +\d{3},\d{3} +(4\d|50)\.\d %$", shown, re.MULTILINE)


class Said:
    """What the page's table of mistakes is about: each is made in a loop as the page has it."""

    def __init__(self) -> None:
        space: dict[str, Any] = {}
        for block in (BLOCKS[0], next(block for block in BLOCKS if "def new(" in block)):
            exec(block, space)
        self.new, self.network, self.loss = space["new"], space["MyNet"], space["my_loss"]
        self.images, self.labels = space["images"], space["labels"]

    def backward(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.loss(model(self.images), self.labels).backward()

    def score_twice(self) -> None:
        model, _, pruner = self.new()
        self.backward(model)
        pruner.score()
        pruner.score()

    def step_without_the_loss(self) -> None:
        model, _, pruner = self.new(max_loss=1.0, interval=1)
        self.backward(model)
        pruner.score()
        pruner.step()

    def no_second_derivatives(self) -> None:
        model, _, pruner = self.new(criterion="obd")
        self.backward(model)
        pruner.score()

    def forward_alone(self) -> None:
        model, _, pruner = self.new(criterion="taylor-gate-fg")
        self.backward(model.forward)
        pruner.score()

    def compiled(self) -> None:
        model, _, pruner = self.new(criterion="taylor-gate-fg")
        self.backward(torch.compile(model, backend="eager"))
        pruner.score()

    def another_optimizer(self) -> None:
        optimizer = torch.optim.SGD(self.network().parameters(), lr=0.1)
        compress.Pruner(self.network(), self.images[:1], optimizer=optimizer)

    def another_head(self) -> None:
        model, _, pruner = self.new(interval=1)
        model.head = nn.Linear(16, 10)
        self.backward(model)
        pruner.score()
        pruner.step()

    def another_state(self) -> None:
        other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        state = compress.Pruner(other, self.images[:1], optimizer=None).state_dict()
        self.new()[2].load_state_dict(state)

    def a_state_too_late(self) -> None:
        model, _, pruner = self.new(interval=1)
        while not pruner.done:
            self.backward(model)
            pruner.score()
            pruner.step()
        pruner.load_state_dict(pruner.state_dict())

    def mistakes(self) -> list[Callable[[], Any]]:
        """Return what is done wrong, row by row."""
        return [
            lambda: self.new()[2].score(),
            self.score_twice,
            lambda: self.new()[2].step(),
            self.step_without_the_loss,
            self.no_second_derivatives,
            self.forward_alone,
            self.compiled,
            lambda: self.new(intervall=3),
            lambda: self.new(budget="macs=0.01"),
            self.another_optimizer,
            self.another_head,
            self.another_state,
            self.a_state_too_late,
        ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's own tracer
def test_the_page_quotes_what_errors_say() -> None:
    table = PAGE.split("## What goes wrong")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    mistakes = Said().mistakes()
    assert len(rows[1:]) == len(mistakes)
    for (done, said), mistake in zip(rows[1:], mistakes, strict=True):
        with pytest.raises(compress.CompressError) as caught:
            mistake()
        assert str(caught.value) == said, done
