"""A network with gates and the file that is imported from it compute the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lived_in, some_slow
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner, Result

import cli
import compress
from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.weights import is_gate
from compress.config import ModelConfig
from compress.errors import CheckpointError, ConfigError, ModelError
from compress.files.atomic import sha256_of
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.seed2019.gates import find_gates, ungated
from compress.seed2019.importing import data_asked_for, import_checkpoint

State = dict[str, torch.Tensor]
CLASSES = 6


def blocks_of(model: nn.Module) -> Iterable[tuple[int, str, nn.Module]]:
    for stage in (1, 2, 3, 4):
        for number, block in enumerate(getattr(model, f"layer{stage}")):
            yield stage, f"layer{stage}.{number}", block


def gated_forward(model: Any, gates: State, x: torch.Tensor) -> torch.Tensor:
    """A ResNet with gates, written out: behind both inner BatchNorms and behind every block."""

    def times(x: torch.Tensor, name: str) -> torch.Tensor:
        gate = gates.get(f"{name}.weight")
        return x if gate is None else x * gate[None, :, None, None]

    x = F.max_pool2d(F.relu(model.bn1(model.conv1(x))), 3, 2, 1)
    for _, name, block in blocks_of(model):
        shortcut: Any = block.downsample
        kept = x if shortcut is None else shortcut(x)
        conv: Any = block
        y = F.relu(times(conv.bn1(conv.conv1(x)), f"{name}.gate1"))
        y = times(conv.bn2(conv.conv2(y)), f"{name}.gate2")
        if hasattr(block, "conv3"):
            y = conv.bn3(conv.conv3(F.relu(y)))
        x = times(F.relu(y + kept), f"{name}.gate")
    return model.fc(x.mean((2, 3)))


def random_gates(model: nn.Module, seed: int, open_share: float, *, streams: bool = True) -> State:
    """Gates of zeros and ones, under the names that the research code gives them."""
    rng = np.random.default_rng(seed)

    def draw(width: int) -> torch.Tensor:
        gate = rng.random(width) < open_share
        gate[rng.integers(width)] = True
        return torch.from_numpy(gate).double()

    gates: State = {}
    for stage, name, block in blocks_of(model):
        bn1, bn2, bn3 = (getattr(block, f"bn{i}", None) for i in (1, 2, 3))
        gates[f"{name}.gate1.weight"] = draw(bn1.num_features)  # type: ignore[union-attr]
        gates[f"{name}.gate2.weight"] = draw(bn2.num_features)  # type: ignore[union-attr]
        if streams:
            shared = f"gate_skip{32 * 2**stage}.weight"
            gates.setdefault(shared, draw((bn3 or bn2).num_features))  # type: ignore[union-attr]
            gates[f"{name}.gate.weight"] = gates[shared]
    return gates


@lru_cache(maxsize=3)
def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(build_model(name, num_classes=CLASSES)).double().eval()


@lru_cache(maxsize=4)
def graph_of(name: str) -> ChannelGraph:
    with torch.device("meta"):
        return analyse(build_model(name, num_classes=CLASSES), (3, 32, 32))


def without_gates(name: str, model: nn.Module, gates: State) -> tuple[nn.Module, dict[str, int]]:
    """Return the shrunk network, and how many units each group kept."""
    graph = graph_of(name)
    placed = find_gates(name, graph, [g.removesuffix(".weight") for g in gates], "test.pth")
    clean, kept = ungated({**model.state_dict(), **gates}, placed, graph, "test.pth")
    result = copy.deepcopy(model)
    result.load_state_dict(clean)
    left = {group.name: int(kept[group.units].sum()) for group in graph.groups}
    return shrink(result, graph, kept), left


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def same(name: str, gates: State, model: nn.Module | None = None) -> dict[str, int]:
    """Check that the imported network computes what the gated one does; return its widths."""
    model = model or dense(name)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gated_forward(model, gates, images)
    assert relative(model(images), expected) > 1e-3  # the gates do something
    result, left = without_gates(name, model, gates)
    assert relative(result(images), expected) <= 1e-9
    return left


def saved(folder: Path, name: str, state: State, **around: Any) -> Path:
    path = folder / f"{name}.pth"
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in floats.items()}, **around}, path)
    return path


# The same function


@pytest.mark.parametrize(
    "name", some_slow(["resnet18", "resnet34", "resnet50"], ["resnet34", "resnet50"])
)
@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 10_000), share=st.floats(0.1, 0.95), streams=st.booleans())
def test_a_network_without_its_gates_computes_the_same(
    name: str, seed: int, share: float, streams: bool
) -> None:
    model = dense(name)
    same(name, random_gates(model, seed, share, streams=streams), model)


@pytest.mark.parametrize("name", some_slow(["resnet18", "resnet50"], ["resnet50"]))
def test_units_of_closed_gates_are_gone(name: str) -> None:
    model = dense(name)
    gates = random_gates(model, 1, 0.5)
    left = same(name, gates, model)
    bottleneck = name == "resnet50"
    for stage, block, _ in blocks_of(model):
        for number in (1, 2) if bottleneck else (1,):
            width = int(gates[f"{block}.gate{number}.weight"].sum())
            assert left[f"{block}.conv{number}"] == width
        if bottleneck or stage > 1:
            stream = f"layer{stage}.0.conv{3 if bottleneck else 2}"
            assert left[stream] == int(gates[f"{block}.gate.weight"].sum())
    assert left["conv1"] == 64


def test_the_first_stream_of_basic_blocks_stays_and_is_not_read() -> None:
    """Its channels are the stem's, which the first block reads in front of the gate."""
    model = dense("resnet18")
    gates = random_gates(model, 2, 0.5)
    result: Any = without_gates("resnet18", model, gates)[0]
    closed = gates["gate_skip64.weight"] == 0
    assert closed.any()
    for reader in (result.layer1[1].conv1, result.layer2[0].conv1, result.layer2[0].downsample[0]):
        assert (reader.weight[:, closed] == 0).all()
        assert (reader.weight[:, ~closed] != 0).any()
    assert (result.layer1[0].conv1.weight[:, closed] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    "gate", ["layer1.0.gate1", "layer3.1.gate2", "gate_skip64", "gate_skip256"]
)
def test_a_group_whose_gates_are_all_closed_keeps_one_unit_that_is_not_read(
    name: str, gate: str
) -> None:
    model = dense(name)
    gates = random_gates(model, 3, 0.7)
    for other, tensor in gates.items():
        stream = {"gate_skip64": "layer1.", "gate_skip256": "layer3."}.get(gate, "-")
        part_of = other.startswith(stream) and other.endswith(".gate.weight")
        if other == f"{gate}.weight" or part_of:
            gates[other] = torch.zeros_like(tensor)
    left = same(name, gates, model)
    group = {
        ("resnet50", "gate_skip64"): "layer1.0.conv3",
        ("resnet50", "gate_skip256"): "layer3.0.conv3",
        ("resnet50", "layer3.1.gate2"): "layer3.1.conv2",
        ("resnet18", "gate_skip256"): "layer3.0.conv2",
    }.get((name, gate), "layer1.0.conv1")
    if (name, gate) == ("resnet18", "gate_skip64"):
        assert left["conv1"] == 64  # read in front of the gate
    elif (name, gate) != ("resnet18", "layer3.1.gate2"):  # folded, it has no units of its own
        assert left[group] == 1


def test_factors_behind_a_batchnorm_are_folded_into_it() -> None:
    model = dense("resnet18")
    gates = random_gates(model, 4, 0.8)
    generator = torch.Generator().manual_seed(0)
    for name in gates:
        if name.endswith(("gate1.weight", "gate2.weight")):
            gates[name] *= torch.randn(len(gates[name]), generator=generator)
    same("resnet18", gates, model)


@pytest.mark.slow
def test_gates_of_a_densenet() -> None:
    """Behind the second BatchNorm of every layer, under the odd names of the research code."""
    model = lived_in(build_model("densenet121", num_classes=CLASSES)).double().eval()
    gates, hooks = {}, []
    rng = np.random.default_rng(0)
    for name, module in model.named_modules():
        if name.endswith(".norm2"):
            gate = torch.from_numpy((rng.random(module.num_features) < 0.5) * 1.0)  # type: ignore
            gates[name.replace("norm2", "gate2): (output_bn") + ".weight"] = gate
            hooks.append((module, gate))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    result, left = without_gates("densenet121", model, gates)
    for module, gate in hooks:
        module.register_forward_hook(lambda _, __, y, by=gate: y * by[None, :, None, None])
    with torch.no_grad():
        assert relative(result(images), model(images)) <= 1e-9
    first = next(iter(gates.values()))
    assert left["features.denseblock1.denselayer1.conv1"] == int(first.sum())


# Files


@pytest.mark.slow
def test_a_checkpoint_through_the_command_line(tmp_path: Path) -> None:
    model = dense("resnet18")
    gates = random_gates(model, 5, 0.5)
    path = saved(tmp_path, "checkpoint", {**model.state_dict(), **gates}, epoch=3, best_prec1=70.0)
    output = tmp_path / "new" / "r18.safetensors"
    document = imported("import", path, "--output", output, "--classes", CLASSES, "--json")
    inspected = json.loads(invoke("inspect", output, "--json").stdout)
    assert document == inspected
    assert document["architecture"] == "resnet18"
    assert (document["num_classes"], document["input_size"]) == (CLASSES, [3, 224, 224])
    assert document["now"]["channels"] < document["dense"]["channels"]
    assert 0 <= document["metrics"]["proof"] <= 1e-12
    about = {"file": "checkpoint.pth", "sha256": sha256_of(path), "gates": 20, "zeroed": 0}
    assert document["metrics"]["imported"] == about
    checkpoint = load_checkpoint(output)
    assert checkpoint.classes == ("0", "1", "2", "3", "4", "5")
    assert checkpoint.mean == (0.485, 0.456, 0.406)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = gated_forward(
            copy.deepcopy(model).float().double(),
            {k: v.float().double() for k, v in gates.items()},
            images,
        )
        assert relative(compress.load_model(output).double()(images), expected) <= 1e-9


def test_a_dense_state_dict_becomes_a_dense_file(tmp_path: Path) -> None:
    model = copy.deepcopy(dense("resnet18")).float()
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    path = import_checkpoint(saved(tmp_path, "old", state), tmp_path / "dense.safetensors")
    checkpoint = load_checkpoint(path)
    assert checkpoint.description.recipe == {}
    for name, tensor in checkpoint.model.state_dict().items():
        if name in state:
            assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("name", ["fc.bias", "layer2.0.bn1.running_mean", "conv1.weight"])
def test_weights_that_give_nan_are_not_imported(name: str, tmp_path: Path) -> None:
    state = copy.deepcopy(dense("resnet18")).float().state_dict()
    state[name].view(-1)[0] = torch.nan
    output = tmp_path / "dense.safetensors"
    with pytest.raises(ModelError, match="the network gives NaN on 1 of 1 images"):
        import_checkpoint(saved(tmp_path, "old", state), output)
    assert not output.exists()


def test_a_layer_that_is_called_a_gate_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "network_with_a_layer_called_gate.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, in_channels):\n"
        "    layers = {'gate': nn.Conv2d(in_channels, 4, 3), 'pool': nn.AdaptiveAvgPool2d(1)}\n"
        "    layers |= {'flat': nn.Flatten(), 'fc': nn.Linear(4, num_classes)}\n"
        "    net = nn.Sequential()\n"
        "    [net.add_module(name, layer) for name, layer in layers.items()]\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build_model("network_with_a_layer_called_gate:build", num_classes=10, in_channels=1)
    path = saved(tmp_path, "own", model.state_dict())
    digits = data_asked_for(None, ["data.dataset=digits"])
    output = tmp_path / "own.safetensors"
    import_checkpoint(
        path, output, model=ModelConfig(name="network_with_a_layer_called_gate:build"), data=digits
    )
    loaded = compress.load_model(output, "network_with_a_layer_called_gate:build")
    assert torch.equal(loaded.state_dict()["gate.weight"], model.state_dict()["gate.weight"])


@pytest.mark.slow
def test_classes_and_images_of_a_folder(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "elk", "fox"]
    for half in ("train", "val"):
        for number, label in enumerate(names):
            (tmp_path / "images" / half / label).mkdir(parents=True)
            image = Image.new("RGB", (40, 40), (40 * number, 200, 10))
            image.save(tmp_path / "images" / half / label / "1.png")
    model = dense("resnet18")
    path = saved(tmp_path, "r18", {**model.state_dict(), **random_gates(model, 6, 0.5)})
    output = tmp_path / "r18.safetensors"
    arguments = ("--data", tmp_path / "images", "--set", "data.image_size=32")
    imported("import", path, "--output", output, *arguments, "--json")
    checkpoint = load_checkpoint(output)
    assert (checkpoint.classes, checkpoint.input_size) == (tuple(names), (3, 32, 32))
    (tmp_path / "images" / "train" / "gnu").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "train" / "gnu" / "1.png")
    (tmp_path / "images" / "val" / "gnu").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "val" / "gnu" / "1.png")
    refused = invoke("import", path, "--output", tmp_path / "x.safetensors", *arguments)
    assert refused.exit_code == 1
    assert "has 6 classes and 7 are needed" in refused.stderr


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def imported(*arguments: object) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# Mistakes


@pytest.fixture(scope="module")
def gated_state() -> State:
    model = dense("resnet18")
    return {**model.state_dict(), **random_gates(model, 7, 0.5)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"layer1.0.gate1.weight": torch.ones(63)},
            r"'layer1.0.gate1.weight' is \[63\] there and \[",
        ),
        (
            {"gate_skip128.weight": torch.full((128,), 0.5)},
            "'gate_skip128' and 'layer2.0.gate' are o",
        ),
        (
            {n: torch.full((128,), 0.5) for n in ("gate_skip128.weight", "layer2.0.gate.weight")}
            | {"layer2.1.gate.weight": torch.full((128,), 0.5)},
            "the gate 'gate_skip128' holds 0.5, and behind an activation nothing but 0 and 1",
        ),
        (
            {"layer4.1.gate2.weight": torch.full((512,), torch.nan)},
            "'layer4.1.gate2' holds values t",
        ),
        (
            {"gate_skip1.weight": torch.ones(64)},
            "has a gate 'gate_skip1', which has no place in resn",
        ),
        (
            {"layer1.7.gate1.weight": torch.ones(64)},
            "has a gate 'layer1.7.gate1', which has no place",
        ),
        (
            {"layer1.0.gate3.weight": torch.ones(64)},
            "has a gate 'layer1.0.gate3', which has no place",
        ),
        (
            {"layer1.0.conv1.weight": torch.ones(64, 64, 1, 1)},
            "tensors of no architecture that is re",
        ),
    ],
)
def test_a_state_dict_that_contradicts_itself(
    changes: State, sentence: str, gated_state: State, tmp_path: Path
) -> None:
    path = saved(tmp_path, "bad", {**gated_state, **changes})
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
def test_gates_have_no_place_in_other_networks(gated_state: State, tmp_path: Path) -> None:
    path = saved(tmp_path, "r18", gated_state)
    with pytest.raises(CheckpointError, match="which has no place in resnext50_32x4d"):
        import_checkpoint(
            path, tmp_path / "x.safetensors", model=ModelConfig(name="resnext50_32x4d")
        )
    with pytest.raises(ConfigError, match="the normalisation of a resnet20 are not known: add"):
        import_checkpoint(path, tmp_path / "x.safetensors", model=ModelConfig(name="resnet20"))


def test_only_gates_are_gates() -> None:
    assert is_gate("gate_skip64.weight")
    assert is_gate("layer1.0.gate.weight")
    assert not is_gate("layer1.0.conv1.weight")
    assert not is_gate("gates.conv.weight")
    assert not is_gate("layer1.0.gate.bias")


def test_the_proof_finds_a_unit_that_was_removed_by_mistake(
    gated_state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(state: State, gates: Any, graph: Any, where: object) -> tuple[State, Any]:
        others = [g if g.stream else replace(g, units=np.roll(g.units, 1)) for g in gates]
        return ungated(state, others, graph, where)

    monkeypatch.setattr("compress.seed2019.importing.ungated", wrong)
    with pytest.raises(ModelError, match="without its gates the network differs by"):
        import_checkpoint(saved(tmp_path, "r18", gated_state), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.slow
def test_where_it_is_written_and_what_is_asked_for(gated_state: State, tmp_path: Path) -> None:
    path, output = saved(tmp_path, "r18", gated_state), tmp_path / "r18.safetensors"
    with pytest.raises(ConfigError, match=r"must be the name of a file ending in \.safetensors"):
        import_checkpoint(path, tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match="has 6 classes and --classes asks for 7"):
        import_checkpoint(path, output, classes=7)
    import_checkpoint(path, output)
    with pytest.raises(ConfigError, match="exists: use --overwrite to replace it"):
        import_checkpoint(path, output)
    before = output.read_bytes()
    assert import_checkpoint(path, output, overwrite=True).read_bytes() == before
    with pytest.raises(CheckpointError, match="is a file of this tool already"):
        import_checkpoint(output, tmp_path / "again.safetensors")


def test_only_settings_of_the_data_are_taken(tmp_path: Path) -> None:
    assert data_asked_for(None, []) is None
    found = data_asked_for(tmp_path, ["data.image_size=64"])
    assert found is not None
    assert (found.dataset, found.root, found.image_size) == ("imagefolder", tmp_path.resolve(), 64)
    digits = data_asked_for(None, ["data.dataset=digits"])
    assert digits is not None
    assert digits.dataset == "digits"
    with pytest.raises(ConfigError, match=r"--set train\.epochs=1: an import takes nothing but"):
        data_asked_for(None, ["train.epochs=1"])
    with pytest.raises(ConfigError, match=r"unknown key 'data\.size'"):
        data_asked_for(None, ["data.size=1"])
    with pytest.raises(ConfigError, match="would be ignored: data"):
        data_asked_for(tmp_path, ["data.dataset=digits"])
