"""Networks by name on a folder of images, from the command line and without a configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import document, invoke, refused
from conftest import some_slow
from PIL import Image

from compress.checkpoints.description import read_description
from compress.config import RunConfig, load_config
from compress.networks.models import build_model

QUICK = {
    "data.batch_size": 6,
    "data.workers": 0,
    "tensorboard": "false",
    "train.epochs": 1,
    "prune.steps": 1,
    "prune.interval": 1,
    "prune.bn_batches": 1,
    "finetune.epochs": 1,
    "bench.batch_sizes": "[1]",
    "bench.block_ms": 1,
    "bench.min_blocks": 4,
    "bench.max_seconds": 0.3,
}


def quick(**changes: object) -> list[str]:
    """Return --set options for seconds; data_image_size=32 changes data.image_size."""
    settings = QUICK | {key.replace("_", ".", 1): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for half in ("train", "val"):
        for label in ("cat", "dog", "owl"):
            (root / half / label).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / half / label / f"{number}.png")
    return root


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def saved(name: str, classes: int = 3) -> Path:
    """Write fresh weights of a network as people have them."""
    path = Path("weights.pth")
    torch.save(build_model(name, num_classes=classes).state_dict(), path)
    return path


def written(output: str) -> RunConfig:
    return load_config(f"{output}/config.toml")


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_the_whole_path_of_a_network_of_timm(images: Path, tmp_path: Path) -> None:
    name = "timm:test_resnet"
    arguments = ("--checkpoint", saved(name), "--data", images, "--output", "run")
    result = invoke("prune", "--model", name, *arguments, *quick())
    assert result.exit_code == 0, result.stderr
    data = written("run").data
    assert (data.dataset, data.root, data.image_size) == ("imagefolder", images, 160)
    assert (data.mean, data.crop, data.augment) == ((0.5, 0.5, 0.5), 0.95, "auto")
    about = read_description(Path("run/pruned.safetensors"))
    assert about is not None
    assert (about.architecture, about.mean, about.input_size) == (name, data.mean, (3, 160, 160))
    for command in (
        ("inspect", "run/pruned.safetensors"),
        ("export", "run"),
        ("bench", "run"),
        ("bench", "run", "--runtime", "torch-cpu"),
        ("oracle", "--checkpoint", "run", "--output", "o", "--images", "6", "--criteria", "random"),
        ("prune", "--resume", "--output", "run"),
    ):
        result = invoke(*command)
        assert result.exit_code == 0, (command, result.stderr)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_network_of_torchvision_with_options_and_a_chosen_output(images: Path) -> None:
    arguments = ("train", "--model", "torchvision:googlenet", "--data", images, "--output", "run")
    settings = quick(data_image_size=64, model_options="{init_weights = false}", train_epochs=0)
    says = "GoogLeNetOutputs(logits, aux_logits2, aux_logits1) in training"
    refused(*arguments, *settings, code=1, says=says)
    assert not Path("run").exists()
    result = invoke(*arguments, *settings, "--set", "model.output=logits", "--json")
    assert result.exit_code == 0, result.stderr
    assert document(result)["output"] == "logits"
    assert document(result)["options"] == {"init_weights": False}
    assert written("run").data.crop == pytest.approx(224 / 256)
    # It goes on, and a new run of its configuration asks for the name alone.
    assert invoke("train", "--resume", "--output", "run").exit_code == 0
    again = ("train", "--config", "run/config.toml", "--output", "again")
    refused(*again, code=2, says="pass --model torchvision:googlenet to allow it")
    assert invoke(*again, "--model", "torchvision:googlenet").exit_code == 0


@pytest.mark.usefixtures("_here")
def test_what_is_said_wins_over_what_is_usual(images: Path) -> None:
    Path("own.toml").write_text(
        '[data]\ndataset = "imagefolder"\nimage_size = 48\ncrop = 0.5\nworkers = 0\n'
    )
    arguments = ("--model", "timm:test_resnet", "--data", images, "--output", "run")
    settings = ("--set", "data.mean=[0.1, 0.2, 0.3]", "--set", "train.epochs=0")
    result = invoke("train", "--config", "own.toml", *arguments, *settings)
    assert result.exit_code == 0, result.stderr
    data = written("run").data
    assert (data.image_size, data.crop) == (48, 0.5)
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("model", "size", "augment"),
    [
        (None, 32, "crop"),
        ("preact_resnet18", 32, "crop"),
        pytest.param("resnet18", 224, "auto", marks=pytest.mark.slow),
    ],
)
def test_a_folder_is_one_of_images(
    images: Path, model: str | None, size: int, augment: str
) -> None:
    chosen = ("--model", model) if model else ()
    result = invoke("train", *chosen, "--data", images, "--output", "run", *quick(train_epochs=0))
    assert result.exit_code == 0, result.stderr
    data = written("run").data
    assert (data.dataset, data.augment) == ("imagefolder", augment)
    about = read_description(Path("run/dense.safetensors"))
    assert about is not None
    assert about.input_size == (3, size, size)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    "name",
    some_slow(
        ["timm:test_resnet", "torchvision:squeezenet1_1", "resnet18"],
        ["torchvision:squeezenet1_1", "resnet18"],
    ),
)
def test_a_classifier_that_begins_anew(
    name: str, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ("prune", "--model", name, "--checkpoint", saved(name, 7), "--data", images)
    settings = quick(data_image_size=64, prune_budget="macs=0.9")
    says = "has 7 classes and 3 are needed: give the data that it was trained on, or add --set "
    refused(*arguments, "--output", "run", *settings, code=1, says=f"{says}model.new_head=true")
    anew = ("--set", "model.new_head=true", "--output", "run")
    result = invoke(*arguments, *settings, *anew)
    assert result.exit_code == 0, result.stderr
    assert "the classifier begins anew" in caplog.text


@pytest.mark.usefixtures("_here")
def test_a_classifier_of_other_classes_in_a_file_of_this_tool(images: Path, run: Path) -> None:
    arguments = ("prune", "--checkpoint", run / "dense.safetensors", "--output", "out")
    refused(*arguments, "--data", images, *quick(), code=1, says="model.new_head=true")


@pytest.mark.usefixtures("_here")
def test_inspecting_and_importing_bare_weights() -> None:
    name = "timm:test_resnet"
    path = saved(name, 5)
    shown = document(invoke("inspect", path, "--model", name, "--json"))
    assert (shown["num_classes"], shown["input_size"]) == (5, [3, 160, 160])
    result = invoke("import", path, "--model", name, "--output", "own.safetensors")
    assert result.exit_code == 0, result.stderr
    about = read_description(Path("own.safetensors"))
    assert about is not None
    assert (about.num_classes, about.std) == (5, (0.5, 0.5, 0.5))
    assert invoke("inspect", "own.safetensors").exit_code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_options_belong_to_what_is_allowed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, option = "timm:test_resnet", ("--set", "model.options.drop_rate=0.25")
    arguments = ("--data", images, "--output", "run", *quick(data_image_size=32, train_epochs=0))
    assert invoke("train", "--model", name, *option, *arguments).exit_code == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(Path.cwd()))
    says = f"pass --model {name} {' '.join(option)} to allow it"
    refused("inspect", "run/dense.safetensors", "--model", name, code=1, says=says)
    refused("train", "--resume", "--output", "run", "--model", name, code=2, says=says)
    assert invoke("inspect", "run/dense.safetensors", "--model", name, *option).exit_code == 0
    resumed = invoke("train", "--resume", "--output", "run", "--model", name, *option)
    assert resumed.exit_code == 0, resumed.stderr


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.options.x={a = 1}", "model.options.x"),
        ("model.options.x=[[[1]]]", "input should be a number, a text, true or false, or a list"),
        ("model.options.x=nan", "input should be finite"),
        ("model.options.a-b=1", "should match pattern"),
        ("model.options=1", "keys with values belong here"),
        ("data.mean=[0.5]", "data.mean has 1 numbers and the images of imagefolder have 3"),
        ("data.crop=0", "data.crop"),
        ("data.interpolation=nearest", "data.interpolation"),
    ],
)
def test_settings_that_cannot_be(setting: str, says: str, images: Path) -> None:
    arguments = ("--data", images, "--output", "run", "--set", setting)
    refused("train", *arguments, code=2, says=says)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_sweep_of_a_network_of_timm(images: Path) -> None:
    name = "timm:test_resnet"
    arguments = ("--checkpoint", saved(name), "--data", images, "--output", "sweep")
    settings = quick(data_image_size=32)
    result = invoke("sweep", "--model", name, "--budget", "macs=0.7", *arguments, *settings)
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("sweep/sweep.json").read_text())["points"][0]["status"] == "done"
    assert invoke("inspect", "sweep/macs-0.7/pruned.safetensors").exit_code == 0
    assert invoke("sweep", "--resume", "--output", "sweep").exit_code == 0
