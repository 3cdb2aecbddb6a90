from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description, read_description
from compress.config import DataConfig, ModelConfig, RunConfig
from compress.data.batches import ImageData, eval_batches
from compress.data.datasets import load_data
from compress.errors import CheckpointError, ModelError, TrainingError
from compress.networks.models import build_model, build_network
from compress.runs.dense import import_dense, train_dense
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.training.evaluate import evaluate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataConfig(dataset="digits", image_size=8))


def config_of(**sections: Any) -> RunConfig:
    settings = {
        "seed": 2,
        "device": "cpu",
        "data": {"image_size": 8, "batch_size": 128},
        "train": {"epochs": 2, "lr": 0.1},
    }
    return RunConfig.model_validate(settings | sections)


def session_in(path: Path, config: RunConfig) -> Session:
    run = RunDirectory(path)
    run.begin(config)
    return Session(run)


def history(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.history.read_text().splitlines()]


def description_of(data: ImageData, **changes: Any) -> Description:
    facts = {
        "architecture": "resnet20",
        "classes": data.classes,
        "input_size": data.input_size,
        "mean": data.mean,
        "std": data.std,
    }
    return Description.model_validate(facts | changes)


# Training


def test_training_learns_and_its_file_says_what_it_is(tmp_path: Path, digits: ImageData) -> None:
    config = config_of(train={"epochs": 4, "lr": 0.1})
    session = session_in(tmp_path, config)
    assert train_dense(config, digits, session) == session.run.dense
    checkpoint = load_checkpoint(session.run.dense)
    assert checkpoint.architecture == "resnet20"
    assert checkpoint.classes == digits.classes
    assert (checkpoint.input_size, checkpoint.mean, checkpoint.std) == (
        (1, 8, 8),
        digits.mean,
        digits.std,
    )
    assert checkpoint.description.recipe == {}
    measured = evaluate(checkpoint.model, eval_batches(digits.val, batch_size=64), CPU)
    assert checkpoint.description.metrics == {"accuracy": measured.as_dict()}
    assert measured.images == 599
    assert measured.top1 >= 60  # chance is 10; four epochs reach some 90
    epochs = history(session.run)
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    assert [line["step"] for line in epochs] == [9, 18, 27, 36]  # 1198 images in batches of 128
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert epochs[-1]["lr"] == pytest.approx(0, abs=1e-12)
    assert {k: epochs[-1][k] for k in measured.as_dict()} == measured.as_dict()
    assert not session.run.state.exists()


def test_the_average_is_what_is_measured_and_written(tmp_path: Path, digits: ImageData) -> None:
    networks = []
    for ema in (None, 0.9):
        train = {"epochs": 1, "lr": 0.1, **({"ema": ema} if ema else {})}
        config = config_of(train=train)
        session = session_in(tmp_path / str(ema), config)
        networks.append(load_checkpoint(train_dense(config, digits, session)))
    plain, averaged = networks
    assert not torch.equal(plain.model.fc.weight, averaged.model.fc.weight)
    measured = evaluate(averaged.model, eval_batches(digits.val, batch_size=64), CPU)
    assert averaged.description.metrics["accuracy"] == measured.as_dict()


@pytest.mark.slow
def test_weights_follow_from_the_seed_alone(tmp_path: Path, digits: ImageData) -> None:
    weights = []
    for number, seed in enumerate((2, 2, 3)):
        torch.manual_seed(number)  # must not matter
        config = config_of(seed=seed, train={"epochs": 1})
        session = session_in(tmp_path / str(number), config)
        weights.append(load_checkpoint(train_dense(config, digits, session)).model.state_dict())
    first, second, other = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_divergence_leaves_no_network(tmp_path: Path, digits: ImageData) -> None:
    config = config_of(train={"epochs": 1, "lr": 1e30})
    session = session_in(tmp_path, config)
    with pytest.raises(TrainingError, match=r"in epoch 1 at step .* rate .*: lower lr"):
        train_dense(config, digits, session)
    assert {f.name for f in tmp_path.rglob("*")} == {"config.toml"}


def test_a_network_of_which_nothing_can_be_trained(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(model: ModelConfig, **ends: int) -> torch.nn.Module:
        return build_network(model, **ends).requires_grad_(False)

    monkeypatch.setattr("compress.runs.dense.build_network", frozen)
    with pytest.raises(ModelError, match="every parameter of resnet20 is frozen"):
        train_dense(config_of(), digits, session_in(tmp_path, config_of()))


def test_a_network_that_views_its_feature_maps_can_be_trained(
    tmp_path: Path, digits: ImageData
) -> None:
    """``x.view(len(x), -1)`` needs contiguous feature maps, before and after pruning."""
    from compress.runs.prune import prune

    rgb = replace(
        digits, train=Coloured(digits.train), val=Coloured(digits.val), input_size=(3, 12, 12),
        classes=tuple("abcd"), mean=(0.0,) * 3, std=(1.0,) * 3,
    )  # fmt: skip
    config = config_of(
        model={"name": "networks:Plain"},
        train={"epochs": 1},
        prune={"steps": 2, "interval": 2, "min_channels": 1},
        finetune={"epochs": 1},
    )
    session = session_in(tmp_path, config)
    train_dense(config, rgb, session)
    prune(config, rgb, session)
    description = read_description(session.run.pruned)
    assert description is not None
    assert description.metrics["finetuned"]["macs"] <= 0.5 * description.metrics["dense"]["macs"]


class Coloured(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The digits below four as 3 x 12 x 12 images: a plain data set of the user's own."""

    def __init__(self, dataset: Any) -> None:
        self.samples = [(image, label) for image, label in dataset if label < 4]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.samples[index]
        return torch.nn.functional.pad(image, (2, 2, 2, 2)).expand(3, -1, -1), label


# Import


@pytest.fixture
def trained() -> torch.nn.Module:
    torch.manual_seed(5)
    model = build_model("resnet20", num_classes=10, in_channels=1)
    for tensor in model.buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("kind", ["pth", "wrapped pth", "bare safetensors", "own safetensors"])
def test_import_keeps_the_weights_and_measures_them(
    tmp_path: Path, digits: ImageData, trained: torch.nn.Module, kind: str
) -> None:
    state = trained.state_dict()
    file = tmp_path / ("dense.pth" if "pth" in kind else "dense.safetensors")
    if kind == "pth":
        torch.save(state, file)
    elif kind == "wrapped pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    elif kind == "bare safetensors":
        save_file(state, file)
    else:
        save_checkpoint(file, trained, description=description_of(digits))
    config = config_of()
    session = session_in(tmp_path / "run", config)
    before = file.read_bytes()
    assert import_dense(config, digits, session, file) == session.run.dense
    checkpoint = load_checkpoint(session.run.dense)
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    measured = evaluate(trained, eval_batches(digits.val, batch_size=100), CPU)
    assert checkpoint.description.metrics == {"accuracy": measured.as_dict()}
    assert history(session.run) == [
        {"event": "dense", "checkpoint": file.name, **measured.as_dict()}
    ]
    assert file.read_bytes() == before


def test_a_network_that_gives_nan_is_not_taken(
    tmp_path: Path, digits: ImageData, trained: torch.nn.Module
) -> None:
    """Each of its logits is NaN, so that the first class would be right by chance."""
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state["fc.bias"][3] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    config = config_of()
    session = session_in(tmp_path / "run", config)
    with pytest.raises(ModelError, match="the network gives NaN on 599 of 599 images"):
        import_dense(config, digits, session, tmp_path / "nan.safetensors")
    assert not session.run.dense.exists()


def refused(path: Path, file: Path, data: ImageData, config: RunConfig, sentence: str) -> None:
    session = session_in(path, config)
    with pytest.raises(CheckpointError, match=sentence):
        import_dense(config, data, session, file)
    assert {f.name for f in path.iterdir()} == {"config.toml"}


def test_import_of_another_architecture(
    tmp_path: Path, digits: ImageData, trained: torch.nn.Module
) -> None:
    other = config_of(model={"name": "resnet32"})
    own, bare = tmp_path / "own.safetensors", tmp_path / "bare.pth"
    save_checkpoint(own, trained, description=description_of(digits))
    torch.save(trained.state_dict(), bare)
    sentence = "holds a resnet20 and the configuration asks for resnet32: add --model resnet20"
    refused(tmp_path / "a", own, digits, other, sentence)
    sentence = r"of another architecture than CifarResNet: \d+ tensors are missing"
    refused(tmp_path / "b", bare, digits, other, sentence)


def test_import_of_other_classes(
    tmp_path: Path, digits: ImageData, trained: torch.nn.Module
) -> None:
    file = tmp_path / "own.safetensors"
    names = tuple(f"class{i}" for i in range(10))
    save_checkpoint(file, trained, description=description_of(digits, classes=names))
    sentence = (
        r"was trained on 10 classes \(class0, class1, class2, \.\.\.\) and the data has 10 "
        r"\(0, 1, 2, \.\.\.\): give the data of its classes"
    )
    refused(tmp_path / "run", file, digits, config_of(), sentence)


@pytest.mark.parametrize("own", [True, False])
def test_import_of_another_number_of_classes(tmp_path: Path, digits: ImageData, own: bool) -> None:
    model = build_model("resnet20", num_classes=3, in_channels=1)
    file = tmp_path / ("three.safetensors" if own else "three.pth")
    if own:
        three = description_of(digits, classes=("a", "b", "c"))
        save_checkpoint(file, model, description=three)
        sentence = r"was trained on 3 classes \(a, b, c\) and the data has 10 \(0, 1, 2, \.\.\.\)"
    else:
        torch.save(model.state_dict(), file)
        sentence = "has 3 classes and 10 are needed: give the data that it was trained on"
    refused(tmp_path / "run", file, digits, config_of(), sentence)


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors"])
def test_import_of_nothing(tmp_path: Path, digits: ImageData, name: str) -> None:
    refused(
        tmp_path / "run", tmp_path / name, digits, config_of(), f"there is no checkpoint .*{name}"
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_import_of_half_a_file(
    tmp_path: Path, digits: ImageData, trained: torch.nn.Module, suffix: str
) -> None:
    file = tmp_path / f"half.{suffix}"
    (torch.save if suffix == "pth" else save_file)(trained.state_dict(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(tmp_path / "run", file, digits, config_of(), "is truncated or not a")
