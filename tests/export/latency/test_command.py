"""compress profile: the table, where it lies, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import document, files_in, invoke, refused

import export.latency.building as building
import export.latency.command as command
import export.latency.rounds as rounds
from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description
from compress.config import load_config
from compress.errors import ModelError
from compress.latency.table import read_table, write_table
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.runs.rundirectory import RunDirectory
from export.latency.building import Plan
from export.latency.rounds import Effort, Measured, Told
from export.latency.serving import Network, Serving, measure_ms
from export.latency.widths import smallest_mask

LENET = ("profile", "--config", "mnist-lenet", "--channel-multiple", "8")
SIZE = (1, 32, 32)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of seconds, however noisy the machine is."""
    effort = Effort(fewest=2, most=2, spread=1.0)
    monkeypatch.setattr(command, "Plan", partial(Plan, networks=2, held_out=2, effort=effort))
    for module in (building, rounds):
        monkeypatch.setattr(module, "MOST_SPREAD", 1e9)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many networks each part measured; nothing is really run."""
    found: list[int] = []

    def stand_in(
        networks: Sequence[Network], serving: Serving, effort: Effort, told: Told
    ) -> Measured:
        found.append(len(networks))
        sizes = [sum(p.numel() for p in network.model.parameters()) for network in networks]
        return Measured(tuple(0.01 + 1e-6 * size for size in sizes), 0.0)

    monkeypatch.setattr(building, "measure_ms", stand_in)
    return found


def weights(path: Path, *, pruned: bool = False) -> Path:
    torch.manual_seed(0)
    model = build_model("lenet", num_classes=10, in_channels=1).eval()
    about = Description(
        architecture="lenet",
        classes=tuple("0123456789"),
        input_size=SIZE,
        mean=(0.0,),
        std=(1.0,),
    )
    graph = analyse(model, SIZE) if pruned else None
    kept = smallest_mask(graph, 8) if graph else None
    if graph is not None and kept is not None:
        model = shrink(model, graph, kept)
    save_checkpoint(path, model, description=about, graph=graph, kept=kept)
    return path


def test_a_table_is_measured_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    made = invoke(*LENET, "--output", path)
    assert made.exit_code == 0, made.stderr
    assert files_in(tmp_path) == {"t.json"}
    for said in ("conv2d 5x5", "linear at 1", "error on 2 whole networks", "dense network"):
        assert said in made.stdout
    table = read_table(path)
    assert table.fingerprint.runtime == "onnxruntime-cpu"
    assert len(table.error.pairs) == 2
    assert min(min(pair) for pair in table.error.pairs) > 0
    before = path.read_bytes()
    again = invoke(*LENET, "--output", path, "--json")
    assert document(again) == json.loads(before)
    assert "was measured before and holds" in again.stderr
    assert path.read_bytes() == before


def test_a_table_of_a_run_lies_beside_it(tmp_path: Path, parts: list[int]) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(load_config("mnist-lenet"))
    weights(run.dense)
    before = files_in(run.path)
    for batch in (1, 4):
        assert invoke("profile", run.path, "--batch", str(batch)).exit_code == 0
    assert files_in(run.path) - before == {
        f"latency/onnxruntime-cpu-fp32-b{batch}-t1.json" for batch in (1, 4)
    }
    count = len(parts)
    assert invoke("profile", run.path).exit_code == 0
    assert len(parts) == count
    assert invoke("profile", run.path, "--overwrite").exit_code == 0
    assert len(parts) == 3 * count // 2


def test_what_lies_there_of_something_else_is_measured_again(
    tmp_path: Path, parts: list[int]
) -> None:
    file = weights(tmp_path / "dense.safetensors")
    assert invoke("profile", file).exit_code == 0
    (path,) = (tmp_path / "latency").iterdir()
    table = read_table(path)
    other = replace(table, fingerprint=replace(table.fingerprint, machine="another"))
    write_table(other, path)
    again = invoke("profile", file)
    assert again.exit_code == 0
    assert "measuring again" in again.stderr
    assert "was measured for machine another" in again.stderr
    assert read_table(path).fingerprint == table.fingerprint
    for multiple, said in ((16, "before and holds"), (4, "multiples of 8 and 4 is asked for")):
        assert said in invoke("profile", file, "--channel-multiple", str(multiple)).stderr
    assert read_table(path).multiple == 4


def test_a_stopped_profile_says_how_to_go_on(
    tmp_path: Path, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, path = building.measure_ms, tmp_path / "t.json"

    def stopped(*arguments: Any, **more: Any) -> Measured:
        if len(parts) == 2:
            raise KeyboardInterrupt
        return stand_in(*arguments, **more)

    monkeypatch.setattr(building, "measure_ms", stopped)
    refused(*LENET, "--output", path, code=130, says="t.partial.json, and the same command goes on")
    assert files_in(tmp_path) == {"t.partial.json"}
    monkeypatch.setattr(building, "measure_ms", stand_in)
    assert invoke(*LENET, "--output", path).exit_code == 0
    assert files_in(tmp_path) == {"t.json"}
    first = list(parts)
    parts.clear()
    assert invoke(*LENET, "--output", path, "--overwrite").exit_code == 0
    assert first == parts


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "measures one network"),
        (("run", "--config", "mnist-lenet"), 2, "measures one network"),
        (("--config", "mnist-lenet"), 2, "needs --output FILE.json"),
        (("missing.safetensors",), 1, "missing.safetensors"),
        ((*LENET[1:], "--precision", "fp16"), 2, "fp16 was asked of onnxruntime-cpu"),
        ((*LENET[1:], "--precision", "int8"), 2, "measured in fp32 and fp16, not int8"),
        ((*LENET[1:], "--runtime", "onnxruntime-gpu"), 2, "did you mean"),
        ((*LENET[1:], "--runtime", "onnxruntime-tensorrt"), 2, "no latency table is measured in"),
        ((*LENET[1:], "--batch", "0"), 2, "batch = 0 is none"),
        ((*LENET[1:], "--threads", "0"), 2, "threads = 0 is none"),
        ((*LENET[1:], "--channel-multiple", "0"), 2, "channel_multiple = 0 is none"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    refused("profile", *arguments, code=code, says=says)


def test_a_pruned_network_is_refused(tmp_path: Path) -> None:
    file = weights(tmp_path / "pruned.safetensors", pruned=True)
    refused("profile", file, code=1, says="is pruned already")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed(tmp_path: Path) -> None:
    arguments = (*LENET, "--runtime", "torch-cuda", "--output", tmp_path / "t.json")
    refused(*arguments, code=5, says="there is no GPU here")
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "torch-cpu"])
def test_networks_are_measured_against_each_other(runtime: Any) -> None:
    torch.manual_seed(0)
    model = build_model("lenet", num_classes=10, in_channels=1).eval()
    larger = torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 9, padding=4) for _ in range(60)), model)
    found = measure_ms(
        [Network(model, SIZE), Network(larger.eval(), SIZE)],
        Serving(runtime=runtime, batch=2),
        Effort(fewest=4, most=4),
    )
    assert 0 < found.ms[0] < found.ms[1]
    refusing = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError):
        measure_ms([Network(refusing, SIZE)], Serving(runtime=runtime), Effort(fewest=2, most=2))
