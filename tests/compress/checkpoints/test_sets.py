"""Which weights of a file are taken, and what a file is that holds none."""

from __future__ import annotations

import gzip
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import document, invoke, refused
from conftest import lived_in
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from compress.checkpoints.checkpoint import load_weights
from compress.checkpoints.kinds import require_weights
from compress.checkpoints.tensors import read_state_dict
from compress.errors import CheckpointError
from compress.networks.models import build_model

State = dict[str, torch.Tensor]
LENET = build_model("lenet", num_classes=7, in_channels=1)


def all_of(value: float) -> State:
    return {name: torch.full_like(tensor, value) for name, tensor in LENET.state_dict().items()}


def raw() -> State:
    return all_of(1)


def other() -> State:
    return all_of(2)


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def taken(path: Path, key: str | None = None) -> int:
    """Return which weights are loaded: 1 for raw, 2 for the others."""
    model = build_model("lenet", num_classes=7, in_channels=1)
    load_weights(path, model, key=key)
    (value,) = {float(value) for t in model.state_dict().values() for value in t.unique()}
    return int(value)


OPTIMIZER = {"state": {0: {"step": 3, "exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 0.1}]}
RANDOM = {"cpu": torch.zeros(5000, dtype=torch.uint8), "cuda": torch.zeros(16, dtype=torch.uint8)}

PAIRS: dict[str, tuple[Any, str, str]] = {
    "raw and ema": (
        {"state_dict_ema": other(), "state_dict": raw()},
        "state_dict",
        "state_dict_ema",
    ),
    "model_ema": ({"model": raw(), "model_ema": other(), "epoch": 3}, "model", "model_ema"),
    "the average first": ({"ema": other(), "raw": raw()}, "raw", "ema"),
    "params": ({"params_ema": other(), "params": raw()}, "params", "params_ema"),
    "student and teacher": ({"teacher": other(), "student": raw()}, "student", "teacher"),
    "deeper": (
        {"nets": {"teacher": {"state_dict": other()}, "student": {"state_dict": raw()}}},
        "nets.student.state_dict",
        "nets.teacher.state_dict",
    ),
    "prefixes": (under("teacher.", other()) | under("student.", raw()), "student", "teacher"),
    "prefixes below": (
        {"state_dict": under("ema.", other()) | under("model.", raw())},
        "state_dict.model",
        "state_dict.ema",
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_of_two_sets_the_trained_one_is_taken_and_both_are_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, usual, second = PAIRS[kind]
    path = tmp_path / "two.pth"
    torch.save(content, path)
    assert taken(path) == 1
    assert taken(path) == 1
    (said,) = caplog.messages  # once
    assert repr(second) in said
    assert f"{usual!r} is taken" in said
    caplog.clear()
    assert taken(path, second) == 2
    assert taken(path, usual) == 1
    assert caplog.messages == []
    with pytest.raises(CheckpointError, match="holds no weights 'x': "):
        taken(path, "x")


def test_two_sets_of_a_safetensors_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "two.safetensors"
    save_file(under("model.", raw()) | under("model_ema.", other()), path)
    assert taken(path) == 1
    assert "'model' is taken" in caplog.text
    assert taken(path, "model_ema") == 2


ALONE: dict[str, Any] = {
    "bare": raw(),
    "ema_state_dict": {"ema_state_dict": raw(), "optimizer": OPTIMIZER},
    "params_ema": {"params_ema": raw()},
    "model_state": {"model_state": raw(), "rng": RANDOM, "epoch": 7},
    "any key": {"whatever": raw(), "lr": [0.1]},
    "Lightning": {"state_dict": under("model.", raw()), "optimizer_states": [OPTIMIZER]},
    "two prefixes": under("module.model.", raw()),
    "a backbone": under("net.backbone.", raw()),
    "compiled": {"model": under("_orig_mod.", raw())},
    "AveragedModel": {"n_averaged": torch.tensor(3), **under("module.", raw())},
    "beside a loss": under("model.", raw()) | {"loss.weight": torch.ones(7)},
    "beside another network": {"d": {"conv.weight": torch.ones(3, 3, 3, 3)}, "g": raw()},
}


@pytest.mark.parametrize("kind", ALONE)
def test_one_set_under_another_key_is_found(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.pth"
    torch.save(ALONE[kind], path)
    assert taken(path) == 1
    assert caplog.messages == []


class Prefixed(nn.Module):
    """A network whose own names share a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 2))


class Twins(nn.Module):
    """A network of two halves alike, which are no two sets."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 2), nn.Linear(3, 2)


@pytest.mark.parametrize("kind", [Prefixed, Twins])
def test_names_of_the_network_itself_are_no_prefixes(
    kind: type[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = kind(), kind()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "whole.pth")
    load_weights(tmp_path / "whole.pth", model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])
    assert caplog.messages == []


def test_keys_are_named_where_nothing_is_found(tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    torch.save({"epoch": 3, "optimizer": {"param_groups": [{"lr": 0.1}]}}, path)
    with pytest.raises(CheckpointError, match="no state dict; its keys are 'epoch', 'optimizer'"):
        taken(path)
    torch.save(all_of(1) | {"fc": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="is of another architecture"):
        taken(path)
    torch.save({"weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="one set of weights, which has no name"):
        read_state_dict(path, "model_ema")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_whole_numbers_are_no_weights(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = raw()
    name = next(name for name, tensor in state.items() if tensor.dim() > 1)
    state[name] = state[name].to(dtype)
    path = tmp_path / f"quantised.{suffix}"
    (torch.save if suffix == "pth" else save_file)(state, path)
    with pytest.raises(CheckpointError, match=f"holds '{name}' as (u?int|bool)"):
        taken(path)


def test_the_commands_take_the_weights_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    nets = {
        key: lived_in(build_model("resnet20", num_classes=10, in_channels=1), seed)
        for seed, key in enumerate(("model", "model_ema"))
    }
    torch.nn.init.ones_(nets["model_ema"].get_parameter("fc.bias"))
    torch.save({key: net.state_dict() for key, net in nets.items()}, path)
    found = invoke("inspect", path, "--weights", "model_ema", "--json")
    assert document(found)["architecture"] == "resnet20"
    refused("inspect", path, "--weights", "emma", code=1, says="holds no weights 'emma'")
    for key, network in nets.items():
        out = tmp_path / f"{key}.safetensors"
        result = invoke(
            *("import", path, "--output", out, "--weights", key),
            *("--set", "data.dataset=digits", "--set", "data.image_size=8"),
        )
        assert result.exit_code == 0, result.stderr
        assert torch.equal(read_state_dict(out)["fc.bias"], network.state_dict()["fc.bias"])


# What is no file of weights


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and its files are there
        torch.jit.script(nn.Linear(3, 2)).save(str(path))


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), path)


def graph(path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:])), path)


def zipped(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "x")

    return write


def holding(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def tensors(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


KINDS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "TorchScript": ("model.pt", script, "a TorchScript archive"),
    "torch.export": ("model.pt2", exported, "a program of torch.export"),
    "ONNX": ("model.onnx", graph, "an ONNX file"),
    "ONNX by another name": ("model.pth", graph, "an ONNX file"),
    "Keras": ("model.h5", holding(b"\x89HDF\r\n\x1a\n" + bytes(50)), "an HDF5 file"),
    "Keras 3": ("model.keras", zipped("model.weights.h5"), "a Keras archive"),
    "TFLite": ("model.tflite", holding(b"\x1c\0\0\0TFL3" + bytes(50)), "TensorFlow Lite"),
    "TF data": ("model.ckpt.data-00000-of-00001", holding(bytes(50)), "of TensorFlow"),
    "TF index": ("m.index", holding(bytes(50) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"), "TensorFlow"),
    "TF graph": ("frozen.pb", holding(b"\n\x10abcdefgh"), "a graph of TensorFlow"),
    "shard": ("model-00001-of-00003.safetensors", tensors, "one of 3 files that are a checkpoint"),
    "torch shard": ("pytorch_model-00002-of-00002.bin", holding(b"x"), "one of 2 files"),
    "index": ("model.safetensors.index.json", holding(b"{}"), "the index of a checkpoint in"),
    "tensors as pth": ("model.pth", tensors, "a safetensors file: name it *.safetensors"),
    "pth as tensors": ("m.safetensors", holding(saved([torch.ones(2)])), "name it *.pth"),
    "LFS": ("m.safetensors", holding(b"version https://git-lfs.github.com/spec"), "git lfs pull"),
    "a page": ("m.pth", holding(b"<!DOCTYPE html><html>"), "a web page"),
    "gzip": ("m.pth.tar.gz", holding(gzip.compress(b"x")), "packed with gzip"),
    "NumPy": ("m.npy", holding(b"\x93NUMPY\x01\0" + bytes(99)), "a NumPy array"),
    "npz": ("m.npz", lambda path: np.savez(path, a=np.ones(2)), "a NumPy archive"),
    "empty": ("m.pth", holding(b""), "empty"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    name, write, says = KINDS[kind]
    write(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(tmp_path / name)
    assert says in str(caught.value)
    refused("inspect", tmp_path / name, code=1, says=says)


@pytest.mark.parametrize(
    ("inside", "says"),
    [("saved_model.pb", "a SavedModel"), ("config.toml", "a run directory"), ("x", "a folder")],
)
def test_a_folder_is_called_what_it_is(inside: str, says: str, tmp_path: Path) -> None:
    (tmp_path / inside).touch()
    refused("inspect", tmp_path, code=1, says=says)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_taken_for_nothing_else(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar"
    torch.save(raw(), path, _use_new_zipfile_serialization=not legacy)
    require_weights(path)
    assert taken(path) == 1
