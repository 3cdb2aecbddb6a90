"""Files and runs of format version 1, which named channel groups where version 2 names tensors.

The fixtures in tests/fixtures/v1 were made once, with the last release that wrote version 1.
resnet20 (digits at 16x16) and lenet (digits at 16x16) were trained for four epochs, pruned to
``macs=0.12`` and ``params=0.15`` in six steps and finetuned for one epoch; what is kept is the
pruned file. ``groups`` is ``networks:FewGroups`` with random weights, one of its two groups
removed: there, whole groups were the units of every grouped convolution. ``run`` is a run of lenet
on digits at 8x8 that was stopped in its 18th pruning step of training, between two shrinks, where
179 of 237 units were physically there and 145 kept. ``expected.json`` holds what that release
computed of each file for the images of ``images_for``, and what its ``compress inspect --json``
said of costs and groups.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import document, invoke
from runs import DATA, assert_sound, config_of, history, start
from safetensors import safe_open

from compress.checkpoints.checkpoint import load_checkpoint, load_model, save_checkpoint
from compress.checkpoints.description import METADATA_KEY, read_description
from compress.checkpoints.permission import Permission
from compress.checkpoints.summary import inspect_checkpoint
from compress.config import ModelConfig
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.cuts import tensor_of
from compress.networks.models import build_model
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session

pytestmark = pytest.mark.usefixtures("unpainted")
FIXTURES = Path(__file__).parents[2] / "fixtures" / "v1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
NAMES = {"resnet20": None, "lenet": None, "groups": "networks:FewGroups"}
"""The files, and what --model must name."""


def file_of(name: str) -> Path:
    return FIXTURES / f"{name}.safetensors"


def typed(name: str) -> Permission:
    return Permission(ModelConfig(name=NAMES[name] or name))


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[METADATA_KEY])


def images_for(name: str) -> torch.Tensor:
    """Return two images that any machine computes alike."""
    channels, rows, columns = EXPECTED[name]["inspect"]["input_size"]
    numbers = torch.arange(2 * channels * rows * columns).float()
    return (numbers * 0.37).sin().view(2, channels, rows, columns)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_computes_what_it_computed(name: str) -> None:
    header = header_of(file_of(name))
    assert header["format_version"] == 1
    assert header["recipe"]
    model = load_model(file_of(name), NAMES[name])
    with torch.no_grad():
        logits = model(images_for(name))
    torch.testing.assert_close(logits, torch.tensor(EXPECTED[name]["logits"]), rtol=1e-6, atol=1e-6)


def require_shown(name: str, shown: dict[str, Any]) -> None:
    """Require what the old release showed; a single channel of grey images is no group now."""
    expected = dict(EXPECTED[name]["inspect"])
    expected["groups"] = [
        group
        for group in expected["groups"]
        if (group["frozen"], group["dense"]) != ("network input", 1)
    ]
    assert {key: shown[key] for key in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_file_shows_the_groups_that_it_showed(name: str) -> None:
    asked = [] if NAMES[name] is None else ["--model", NAMES[name]]
    shown = document(invoke("inspect", file_of(name), *asked, "--json"))
    require_shown(name, shown)
    checkpoint = load_checkpoint(file_of(name), typed(name))
    now = EXPECTED[name]["inspect"]["now"]
    assert checkpoint.costs == {"macs": now["macs"], "params": now["params"]}
    assert checkpoint.structure is not None
    assert checkpoint.structure.now == now


def test_whole_groups_were_the_units() -> None:
    (shown,) = (g for g in EXPECTED["groups"]["inspect"]["groups"] if g["name"] == "stem")
    assert (shown["dense"], shown["kept"], shown["channels_per_unit"]) == (16, 8, 8)
    grouped = load_model(file_of("groups"), NAMES["groups"]).get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (1, 8, 12)


@pytest.mark.parametrize("name", NAMES)
def test_saving_again_writes_version_2(tmp_path: Path, name: str) -> None:
    """With the graph and mask that the file's recipe means, as the pruner has them."""
    old = load_checkpoint(file_of(name), typed(name))
    architecture, channels = NAMES[name] or name, old.input_size[0]
    network = build_model(architecture, num_classes=old.num_classes, in_channels=channels)
    graph = analyse(network, old.input_size, whole_groups=True)
    kept = graph.everything()
    groups = {group.name: group for group in graph.groups}
    for group, entry in header_of(file_of(name))["recipe"].items():
        kept[np.delete(groups[group].units, entry["kept"])] = False
    path = tmp_path / "again.safetensors"
    save_checkpoint(path, old.model, description=old.description, graph=graph, kept=kept)
    header = header_of(path)
    assert header["format_version"] == 2
    assert header["recipe"].keys() == {"kept", "cuts"}
    assert header["structure"]["now"] == cost.totals(graph, kept)
    new = load_checkpoint(path, typed(name))
    before, after = old.model.state_dict(), new.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(new.model(images_for(name)), old.model(images_for(name)))
    require_shown(name, json.loads(json.dumps(inspect_checkpoint(path, typed(name)))))
    about = {"format_version", "recipe", "structure", "tools"}
    assert new.description.model_dump(exclude=about) == old.description.model_dump(exclude=about)


@pytest.fixture
def stopped(tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(FIXTURES / "run", tmp_path / "run")))


def widths_of(run: RunDirectory) -> dict[str, int]:
    """Return what is left of each layer of the LeNet."""
    model = load_model(run.pruned)
    return {n: len(tensor_of(model, f"{n}.weight")) for n in ("conv1", "conv2", "fc1", "fc2")}


def test_a_stopped_run_goes_on_to_its_end(stopped: RunDirectory) -> None:
    before = history(stopped)
    with safe_open(stopped.state, framework="pt") as state:
        kept, shrunk = state.get_tensor("kept"), state.get_tensor("shrunk")
    assert int(kept.sum()) < int(shrunk.sum()) < len(kept)
    result = invoke("prune", "--resume", "--output", stopped.path)
    assert result.exit_code == 0, result.stderr
    after = history(stopped)
    assert after[: len(before)] == before
    steps = history(stopped, "prune_step")
    assert [line["pruning_step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["difference"] <= 1e-9 for line in history(stopped, "shrink"))
    # No channel that was gone came back, and the budget of a tenth of the parameters holds.
    assert steps[-1]["widths"] == widths_of(stopped)
    assert all(steps[-1]["widths"][name] <= width for name, width in before[-1]["widths"].items())
    description = read_description(stopped.pruned)
    assert description is not None
    assert description.format_version == 2
    metrics = description.metrics
    parameters = sum(p.numel() for p in load_model(stopped.pruned).parameters())
    assert metrics["finetuned"]["params"] == parameters <= 0.1 * metrics["dense"]["params"]
    assert metrics["dense"]["params"] == 61_706
    assert load_checkpoint(stopped.pruned).costs["macs"] == metrics["finetuned"]["macs"]
    assert metrics["finetuned"]["top1"] >= 50  # chance is 10; the old release came to some 60
    assert not stopped.state.exists()


def test_a_dense_file_of_version_1_is_pruned_by_whole_groups(tmp_path: Path) -> None:
    """A run that was begun then goes on with the units that its state counts."""
    config = config_of("networks:FewGroups", budget="params=0.7", steps=1)
    run = start(tmp_path, config)
    header = header_of(run.dense)
    header["format_version"] = 1
    tensors = safetensors.torch.load_file(run.dense)
    safetensors.torch.save_file(tensors, run.dense, {METADATA_KEY: json.dumps(header)})
    prune(config, DATA, Session(run))
    (step,) = history(run, "prune_step")
    assert step["widths"] == {"stem": 1}
    grouped = load_model(run.pruned, config.model.name).get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (1, 8, 12)


def test_a_dense_file_of_version_2_is_pruned_within_groups(tmp_path: Path) -> None:
    config = config_of("networks:FewGroups", budget="params=0.5", steps=2)
    run = start(tmp_path, config)
    prune(config, DATA, Session(run))
    assert_sound(run, config)
    grouped = load_model(run.pruned, config.model.name).get_submodule("grouped")
    assert grouped.groups == 2
    assert 2 < grouped.in_channels < 16
