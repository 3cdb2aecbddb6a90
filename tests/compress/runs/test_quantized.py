"""Pruned networks that are finetuned in 8 bits: written, exported, interrupted, trained by two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import joined_work
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from ranks import together
from runs import DATA, Stopping, config_of, history, loaded, start
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint
from compress.checkpoints.description import Quantization, read_description
from compress.config import RunConfig
from compress.config.targets import load_target
from compress.errors import ConfigError, DataError, InterruptedRunError, ModelError
from compress.runs.dense import fresh_network
from compress.runs.prune import prune
from compress.runs.request import PruneRequest
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.training.trainer import Trainer
from export.checkpoint_to_onnx import export_checkpoint, samples_of
from export.quantizing import quantizer_for

pytestmark = pytest.mark.usefixtures("unpainted")
FINETUNE = {"epochs": 2, "quantize": True, "ema": 0.9}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quantised_config(name: str = "networks:Separable", **settings: Any) -> RunConfig:
    config = config_of(name, finetune={**FINETUNE, **settings}, blocks=True).model_dump()
    config["export"] |= {"calibration_images": 64, "parity_images": 32}
    return RunConfig.model_validate(config)


def work(config: RunConfig, session: Session) -> Path:
    return prune(config, DATA, session, quantizer=quantizer_for(config, DATA))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    torch.set_num_threads(1)
    config = quantised_config()
    found = start(tmp_path_factory.mktemp("quantised"), config)
    work(config, Session(found))
    return found


def exported(checkpoint: Checkpoint, path: Path, target: str = "cpu") -> dict[str, Any]:
    config = quantised_config()
    asked = config.export.model_copy(update={"precision": "int8"})
    samples = samples_of(DATA, config)
    aim = load_target(target)
    return export_checkpoint(checkpoint, path, target=aim, config=asked, samples=samples)


def written_scales(path: Path) -> dict[str, float]:
    """Return the scale of every activation that a file rounds, by the activation's name."""
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {
        node.input[0]: float(held[node.input[1]])
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in held
    }


def test_the_file_is_written_with_the_scales_that_were_learned(
    run: RunDirectory, tmp_path: Path
) -> None:
    pruned = loaded(run.pruned, quantised_config())
    learned = pruned.description.quantization
    assert learned is not None
    assert pruned.description.format_version == 4
    document = exported(pruned, tmp_path / "pruned.onnx")
    assert document["conversion"]["calibration"] == "trained"
    written = written_scales(tmp_path / "pruned.onnx")
    steps = {255: 0, 127: 0}
    for name, largest in learned.ranges.items():
        fitting = [n for n in steps if np.float32(largest / n) == np.float32(written[name])]
        assert len(fitting) == 1, name
        steps[fitting[0]] += 1
    assert written.keys() == learned.ranges.keys()
    assert min(steps.values()) > 0
    assert max(each["relative_error"] for each in document["parity"]) < 0.05
    measured = exported(loaded(run.dense, quantised_config()), tmp_path / "dense.onnx")
    assert measured["conversion"]["calibration"] == "mse"


def test_scales_are_learned_and_not_only_measured(run: RunDirectory) -> None:
    config = quantised_config()
    pruned = loaded(run.pruned, config)
    learned = pruned.description.quantization
    quantizer = quantizer_for(config, DATA)
    assert learned is not None
    assert quantizer is not None
    measured = quantizer(pruned.model).ranges
    assert measured.keys() == learned.ranges.keys()
    assert any(measured[name] != learned.ranges[name] for name in measured)


def test_the_history_tells_accuracy_in_8_bits_and_without(run: RunDirectory) -> None:
    epochs = history(run, "epoch")
    (finetuned,) = history(run, "finetuned")
    description = read_description(run.pruned)
    assert description is not None
    assert description.metrics["quantized"]["top1"] == epochs[-1]["top1"]
    assert description.metrics["finetuned"]["top1"] == finetuned["top1"]
    assert len(epochs) == 3


class Refusing:
    """Refuses a network: dense ones, or those that have been pruned."""

    def __init__(self, config: RunConfig, *, dense: bool) -> None:
        self.quantizer, self.dense, self.asked = quantizer_for(config, DATA), dense, 0

    def check(self, network: nn.Module) -> None:
        assert self.quantizer is not None
        self.quantizer.check(network)
        if self.dense:
            raise ModelError("it cannot be trained in 8 bits")

    def __call__(self, network: nn.Module, *, calibrated: bool = True) -> Any:
        self.asked += 1
        raise ModelError("it cannot be trained in 8 bits")


def test_what_cannot_be_trained_in_8_bits_is_refused_before_it_is_pruned(tmp_path: Path) -> None:
    config = quantised_config()
    session = Session(start(tmp_path, config))
    with pytest.raises(ModelError, match="it cannot be trained in 8 bits"):
        prune(config, DATA, session, quantizer=Refusing(config, dense=True))
    assert not session.run.pruned.exists()
    assert not session.run.history.exists()


def test_too_few_images_to_calibrate_on_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quantised_config()
    session = Session(start(tmp_path, config))
    monkeypatch.setattr("export.precision.calibration.FEWEST_IMAGES", 100)
    with pytest.raises(DataError, match="calibration needs at least 100 images and has 64"):
        work(config, session)
    assert not session.run.history.exists()


def test_a_network_that_pruning_has_made_unfit_for_8_bits_is_kept(tmp_path: Path) -> None:
    config = quantised_config()
    session, refusing = Session(start(tmp_path, config)), Refusing(config, dense=False)
    with pytest.raises(ModelError, match=r"8 bits; .*pruned\.safetensors is float32"):
        prune(config, DATA, session, quantizer=refusing)
    assert refusing.asked == 1
    found = loaded(session.run.pruned, config)
    assert found.description.quantization is None
    assert "quantized" not in found.description.metrics
    assert len(history(session.run, "epoch")) == FINETUNE["epochs"]
    assert exported(found, tmp_path / "x.onnx")["conversion"]["calibration"] == "mse"


def test_another_form_is_measured_and_said(
    run: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    document = exported(loaded(run.pruned, quantised_config()), tmp_path / "x.onnx", "v100")
    assert document["conversion"]["calibration"] == "mse"
    assert "trained in 8 bits of the form onnxruntime, and the file for v100" in caplog.text


@pytest.mark.parametrize("before_end", [1, 4, 5])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    run: RunDirectory, tmp_path: Path, before_end: int
) -> None:
    """Four steps an epoch: in the quantised one, with its first step, and with the one before."""
    config = quantised_config()
    last = history(run, "epoch")[-1]["step"]
    other = start(tmp_path, config)
    with pytest.raises(InterruptedRunError):
        work(config, Stopping(other).stop_in(last - before_end))
    work(config, Session(other))
    ours, theirs = (loaded(each.pruned, config) for each in (run, other))
    assert theirs.description.quantization == ours.description.quantization
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(theirs.model.state_dict()[name], tensor), name
    assert other.history.read_text() == run.history.read_text()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    settings = {"epochs": 1, "quantize": True}
    config = joined_work.config_for("PreActivation", finetune=settings)
    for name in ("alone", "joined"):
        start(tmp_path / name, config)
    expected = joined_work.prune_together(tmp_path / "alone", config)
    for found in together(2, joined_work.prune_together, tmp_path / "joined", config):
        assert not isinstance(found, Exception), found
        assert found["quantization"].ranges == pytest.approx(
            expected["quantization"].ranges, rel=2e-3
        )
        for key, tensor in expected["weights"].items():
            # A number that is rounded to its other neighbour moves a gradient by a step.
            torch.testing.assert_close(found["weights"][key], tensor, rtol=2e-2, atol=2e-3)


def test_without_somebody_who_knows_the_file_nothing_is_trained(tmp_path: Path) -> None:
    config = quantised_config()
    with pytest.raises(ConfigError, match="needs somebody who knows the exported file"):
        prune(config, DATA, Session(start(tmp_path, config)))


def test_epochs_in_8_bits_come_after_those_that_there_are_without(
    run: RunDirectory, tmp_path: Path
) -> None:
    plain = quantised_config(quantize=False)
    without = start(tmp_path, plain)
    prune(plain, DATA, Session(without))

    def epochs(of: RunDirectory) -> list[dict[str, Any]]:
        return [e for e in of.events() if e["event"] == "epoch" and e["phase"] == "finetune"]

    assert epochs(run)[:-1] == epochs(without)
    assert len(epochs(run)) == FINETUNE["epochs"] + 1


def test_in_8_bits_the_learning_rate_falls_once_more_from_a_share() -> None:
    config = quantised_config()
    model = fresh_network(config, DATA)
    trainer = Trainer(model, config.finetune, steps_per_epoch=4, epochs=2, seed=0)
    trainer.step_index = 8
    assert trainer.finished
    trainer.quantize(quantizer_for(config, DATA)(model), epochs=1, lr=0.05)
    found = []
    for trainer.step_index in range(8, 13):
        assert trainer.finished == (trainer.step_index == 12)
        found.append(trainer.lr)
    falling = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(5)]
    assert found == pytest.approx([0.05 * share for share in falling])


def test_a_precision_of_8_bits_asks_for_training_in_it() -> None:
    assert "finetune.quantize=true" in PruneRequest(precision="int8").asked
    assert PruneRequest(precision="fp16").asked == ["export.precision=fp16"]
    said = PruneRequest(precision="int8", settings=("finetune.quantize=false",)).asked
    assert said == ["finetune.quantize=false", "export.precision=int8"]


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_a_range_that_is_not_positive_is_refused(wrong: float) -> None:
    with pytest.raises(ValidationError):
        Quantization(form="tensorrt", ranges={"input": wrong})
