from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from compress.config import ExportConfig
from compress.config.targets import load_target
from compress.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    ParityError,
)
from export import checkpoint_to_onnx
from export.checkpoint_to_onnx import Samples, export_checkpoint
from export.onnx.sidecar import read_sidecar
from export.precision import int8
from export.precision.int8 import rounds_half_precision

IMAGES = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)


def checkpoint() -> SimpleNamespace:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return SimpleNamespace(
        model=model.eval(),
        architecture="tiny",
        classes=("a", "b", "c", "d", "e"),
        num_classes=5,
        input_size=(3, 8, 8),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        sha256="ab" * 32,
        costs={"macs": 4860, "params": 150},
        description=SimpleNamespace(metrics={"criterion": "taylor-gate"}, quantization=None),
        structure=SimpleNamespace(
            groups=(
                SimpleNamespace(name="0", dense=8, kept=5, residual=False, frozen=None),
                SimpleNamespace(name="3", dense=9, kept=9, residual=False, frozen="an output"),
            )
        ),
    )


def export(path: Path, images: np.ndarray = IMAGES, **config: Any) -> dict[str, Any]:
    return export_checkpoint(
        checkpoint(),
        path,
        target=load_target("v100"),
        config=ExportConfig(**config),
        samples=Samples(images, list),
    )


def test_both_files_and_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "export" / "model.onnx"
    document = export(path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.json", "model.onnx"]
    assert json.loads((path.parent / "model.json").read_text()) == document
    assert document["schema_version"] == 2
    assert document["onnx"] == {
        "file": "model.onnx",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "opset": 17,
        "ir_version": 8,
    }
    assert document["target"] == "v100"
    assert document["classes"] == ["a", "b", "c", "d", "e"]
    assert (document["input_size"], document["macs"], document["params"]) == ([3, 8, 8], 4860, 150)
    assert [entry["batch_size"] for entry in document["parity"]] == [1, 3, 8]
    assert all(entry["relative_error"] <= 1e-4 for entry in document["parity"])
    assert document["tools"]["torch"] == torch.__version__
    assert document["groups"] == [{"name": "0", "dense": 8, "kept": 5, "residual": False}]
    assert document["pruning"] == {"criterion": "taylor-gate"}

    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["architecture"] == "tiny"
    assert metadata["weights_sha256"] == "ab" * 32
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]


def test_a_sidecar_is_read_by_either_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    document = export(path)
    assert read_sidecar(path) == document
    assert read_sidecar(path.with_suffix(".json")) == document


def test_without_parity_nothing_gets_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_: Any, **__: Any) -> None:
        raise ParityError("they disagree")

    monkeypatch.setattr(checkpoint_to_onnx, "check_parity", disagree)
    with pytest.raises(ParityError):
        export(tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_a_tolerance_that_float32_cannot_hold(tmp_path: Path) -> None:
    class Restless(nn.Module):
        """It computes something else in torch than what was traced."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sums = images.mean((2, 3))
            return sums if torch.jit.is_tracing() else sums * 1.01

    subject = checkpoint()
    subject.model = Restless()
    earlier = export(tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"ONNX Runtime \(CPU\) disagrees with torch \(cpu\)"):
        export_checkpoint(
            subject,
            tmp_path / "model.onnx",
            target=load_target("cpu"),
            config=ExportConfig(),
            samples=Samples(IMAGES, list),
        )
    assert read_sidecar(tmp_path / "model.onnx") == earlier


def test_a_fault_of_the_runtime_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are rounded at once, in half precision: ONNX Runtime's 32-bit bias overflows."""
    subject = checkpoint()
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=0.03)
        nn.init.normal_(layer.bias)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    subject.model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pooled).eval()
    subject.num_classes, subject.classes = 8, tuple("abcdefgh")
    labels = torch.tensor([0, 1] * 4)
    batch = SimpleNamespace(images=torch.from_numpy(np.tile(IMAGES, (2, 1, 1, 1))), labels=labels)

    def exported() -> dict[str, Any]:
        return export_checkpoint(
            subject,
            tmp_path / "model.onnx",
            target=load_target("a100"),
            config=ExportConfig(precision="int8"),
            samples=Samples(IMAGES, lambda: [batch]),
        )

    document = exported()
    assert document["conversion"]["layers"] == 2
    if not rounds_half_precision():
        pytest.skip("this ONNX Runtime cannot quantise float16, so the rest is float32")
    monkeypatch.setattr(int8, "rounded_at_once", lambda graph, places, layers: set())
    with pytest.raises(ParityError, match=r"disagrees with torch .*; without its optimisations it"):
        exported()


def test_a_full_disk_keeps_the_earlier_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    earlier = export(path)

    flushed = []

    def fill_up(descriptor: int) -> None:
        flushed.append(descriptor)
        if len(flushed) == 2:  # the network fitted, its sidecar does not
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(OutputError, match=r"model\.json: the disk is full"):
        export(path, parity_batches=(2,))
    assert read_sidecar(path) == earlier
    assert len(list(tmp_path.iterdir())) == 2


def test_activations_that_a_gpu_would_turn_into_infinity(tmp_path: Path) -> None:
    subject = checkpoint()
    with torch.no_grad():
        subject.model[0].weight.fill_(3e3)
    arguments = {"target": load_target("v100"), "config": ExportConfig(precision="fp16")}
    samples = Samples(IMAGES, list)
    document = export_checkpoint(subject, tmp_path / "fits.onnx", samples=samples, **arguments)
    with torch.no_grad():
        convolved = subject.model[:2](torch.from_numpy(IMAGES))
    assert document["conversion"]["largest_activation"] == pytest.approx(
        float(convolved.abs().max()), rel=1e-5
    )
    with pytest.raises(ModelError, match="on real images, and the largest number of fp16 is 65504"):
        export_checkpoint(
            *(subject, tmp_path / "beyond.onnx"), samples=Samples(9 * IMAGES, list), **arguments
        )
    assert not (tmp_path / "beyond.onnx").exists()


def test_images_of_another_size_or_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(1, 3, 6, 6\)"):
        export(tmp_path / "model.onnx", IMAGES[:, :, :6, :6])
    with pytest.raises(DataError, match="none were given"):
        export(tmp_path / "model.onnx", IMAGES[:0])
    assert not any(tmp_path.iterdir())


def test_a_name_that_would_hide_the_sidecar(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.json"):
        export(tmp_path / "model.json")


def other_weights(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def edited(path: Path, **changes: Any) -> None:
    sidecar = path.with_suffix(".json")
    document = {**json.loads(sidecar.read_text()), **changes}
    sidecar.write_text(json.dumps({key: item for key, item in document.items() if item != "gone"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_weights, "is not the file that .*model.json describes"),
        (lambda path: path.unlink(), "cannot read .*model.onnx: No such file"),
        (lambda path: path.with_suffix(".json").unlink(), "cannot read .*model.json: No such file"),
        (lambda path: path.with_suffix(".json").write_text("{"), "not valid JSON"),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "schema_version None"),
        (lambda path: edited(path, schema_version=3), "schema_version 3 and this tool reads 2"),
        (lambda path: edited(path, macs="gone"), "lacks macs"),
        (lambda path: edited(path, onnx=None), "is not the file that"),
    ],
)
def test_a_pair_that_does_not_belong_together(tmp_path: Path, damage: Any, words: str) -> None:
    path = tmp_path / "model.onnx"
    export(path)
    damage(path)
    with pytest.raises(CheckpointError, match=words):
        read_sidecar(path)
