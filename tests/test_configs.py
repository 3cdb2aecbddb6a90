"""Every named configuration, target and file of limits loads; its network can reach its budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import some_slow
from typer.testing import CliRunner

import cli
from bench.limits import load_limits
from compress.config import (
    DEFAULT_CONFIG,
    DataConfig,
    RunConfig,
    load_config,
    save_config,
)
from compress.config.targets import load_target
from compress.criteria import CRITERIA
from compress.data import datasets
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.files.documents import named_files
from compress.networks.models import BUILTIN_MODELS
from compress.runs.prune import check_budget

RUNS = sorted(named_files(""))
CLASSES = {"mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100, "imagefolder": 1000}


def images_like(config: RunConfig) -> ImageData:
    """Return a data set with the shape of the one that a configuration names."""
    digits = load_data(DataConfig())
    data = config.data
    if data.dataset == "digits":
        return digits
    size = data.image_size or (224 if data.dataset == "imagefolder" else 32)
    classes = tuple(str(label) for label in range(CLASSES[data.dataset]))
    channels = 1 if data.dataset.endswith("mnist") else 3
    return dataclasses.replace(digits, classes=classes, input_size=(channels, size, size))


def test_there_are_named_files_of_every_kind() -> None:
    assert DEFAULT_CONFIG in RUNS
    assert "default" in named_files("limits")
    assert {"cpu", "v100"} <= set(named_files("targets"))


@pytest.mark.parametrize("name", RUNS)
def test_named_configuration_is_complete(name: str) -> None:
    config = load_config(name)
    assert config.model.name in BUILTIN_MODELS
    assert config.prune.criterion in CRITERIA
    load_target(config.export.target)
    load_limits(config.bench.limits)
    assert named_files("")[name].startswith("#"), "the first line says what it is for"


LARGE_RUNS = [n for n in RUNS if n.startswith(("imagenet", "cifar10")) or n == "image-folder"]


@pytest.mark.parametrize("name", some_slow(RUNS, LARGE_RUNS))
def test_budget_of_named_configuration_can_be_reached(name: str) -> None:
    config = load_config(name)
    check_budget(config, images_like(config))


@pytest.mark.parametrize("name", RUNS)
def test_named_configuration_survives_being_saved(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    save_config(config, tmp_path / "config.toml")
    assert load_config(str(tmp_path / "config.toml")) == config


@pytest.mark.parametrize("name", sorted(named_files("limits")))
def test_named_limits_load(name: str) -> None:
    load_limits(name)


@pytest.mark.parametrize("name", sorted(named_files("targets")))
def test_named_targets_load(name: str) -> None:
    assert load_target(name).name == name


@pytest.mark.parametrize("name", [n for n in RUNS if load_config(n).data.dataset != "digits"])
def test_configuration_without_its_images_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fashion = datasets._GREY["fashion-mnist"]._replace(installed=tmp_path / "not there")
    monkeypatch.setitem(datasets._GREY, "fashion-mnist", fashion)
    output = tmp_path / "run"
    result = CliRunner().invoke(cli.app, ["train", "--config", name, "--output", str(output)])
    assert result.exit_code == 1
    assert "data.root is not set" in result.stderr
    assert not output.exists()
