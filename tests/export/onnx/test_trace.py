from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_models import export_classifier
from torch import nn
from torchvision import models

from compress.config.targets import load_target
from compress.errors import ModelError, OutputError
from export.onnx.check import OnnxFacts

V100 = load_target("v100")


def tiny(channels: int = 5, classes: int = 7) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def export(model: nn.Module, path: Path, size: int = 8, **metadata: str) -> OnnxFacts:
    return export_classifier(
        model, path, target=V100, input_size=(3, size, size), metadata=metadata
    )


def test_resnet18_as_it_lies_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.onnx"
    facts = export(models.resnet18(num_classes=10), path, 64, architecture="resnet18")
    model = onnx.load(path, load_external_data=False)
    census = Counter(node.op_type for node in model.graph.node)
    assert [entry.version for entry in model.opset_import] == [17]
    assert model.ir_version == 8
    assert census == {
        "Conv": 20,
        "Relu": 17,
        "Add": 8,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    assert facts.nodes == census
    assert facts.path == path
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "architecture": "resnet18"
    }
    ends = (*model.graph.input, *model.graph.output)
    assert [end.name for end in ends] == ["input", "logits"]
    assert [end.type.tensor_type.shape.dim[0].dim_param for end in ends] == ["batch"] * 2
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    model = tiny()
    first, second = (export(model, tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert first.sha256 == second.sha256


def test_every_submodule_gets_its_mode_back(tmp_path: Path) -> None:
    model = tiny().train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    export(model, tmp_path / "model.onnx")
    assert [module.training for module in model.modules()] == [True, True, False, *[True] * 4]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_modes_come_back_after_a_failure_too(tmp_path: Path) -> None:
    model = tiny().train()
    with pytest.raises(ModelError, match=r"target v100: .*channels"):
        export_classifier(
            model, tmp_path / "a.onnx", target=V100, input_size=(1, 8, 8), metadata={}
        )
    assert all(module.training for module in model.modules())


class SingularValues(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(images.mean(1))


def test_an_unsupported_operator_is_named_and_stdout_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=r"target v100: .*linalg_svdvals") as caught:
        export(SingularValues(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
    assert not any(tmp_path.iterdir())


def test_what_returns_no_logits_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="4 dimensions instead of 2"):
        export(nn.Conv2d(3, 4, 3), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_a_bug_in_the_network_keeps_its_traceback(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise KeyError("bug")

    with pytest.raises(KeyError):
        export(Broken(), tmp_path / "model.onnx")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(os if where == "fsync" else Path, where, fail)
    with pytest.raises(OutputError, match=f"cannot write {path}: the disk is full"):
        export(tiny(), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_with_an_older_ceiling_is_honoured(tmp_path: Path) -> None:
    target = V100.model_copy(update={"opset": 13, "ir_version": 7})
    facts = export_classifier(
        tiny(), tmp_path / "model.onnx", target=target, input_size=(3, 8, 8), metadata={}
    )
    assert (facts.opset, facts.ir_version) == (13, 7)


def test_a_target_with_a_newer_ceiling_gets_what_the_exporter_has(tmp_path: Path) -> None:
    target = V100.model_copy(update={"opset": 23, "ir_version": 11, "two_input_reduce_mean": True})
    facts = export_classifier(
        tiny(), tmp_path / "model.onnx", target=target, input_size=(3, 8, 8), metadata={}
    )
    assert facts.opset == 20
