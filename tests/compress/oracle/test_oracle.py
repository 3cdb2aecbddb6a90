from __future__ import annotations

import copy
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import built, lived_in
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import cli
from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.checkpoints.permission import Permission
from compress.config import ModelConfig
from compress.criteria.scoring import Context
from compress.errors import CheckpointError, CompressError, ConfigError, InterruptedRunError
from compress.networks.analysis import analyse
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.networks.trial import tried_graph
from compress.oracle.changes import ChangeLog
from compress.oracle.correlation import COEFFICIENTS
from compress.oracle.report import plot_oracle
from compress.oracle.request import OracleFiles
from compress.oracle.run import run_oracle
from compress.oracle.scores import importance_of, row_names
from compress.runs.request import OracleRequest


def small(name: str) -> tuple[nn.Module, ChannelGraph, torch.Tensor, torch.Tensor]:
    """Return a network in float64 with 5 images of 12x12, and their labels."""
    model = lived_in(NETWORKS[name]()).eval()
    graph = analyse(model, (3, 12, 12))
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    return model.double(), graph, images, torch.arange(5) % 4


# Scores


def test_scores_are_means_over_full_minibatches_in_evaluation_mode() -> None:
    model, graph, images, labels = small("PreActivation")
    before = copy.deepcopy(model.state_dict())
    gated = GatedNetwork(copy.deepcopy(model), graph, "read")
    squares = []
    for part in (slice(0, 2), slice(2, 4)):  # the fifth image fills no minibatch
        gated.gates.grad = None
        F.cross_entropy(gated(images[part]), labels[part]).backward()
        assert gated.gates.grad is not None
        squares.append(gated.gates.grad.square().numpy())
    found = importance_of("taylor-gate", Context(model, graph), images, labels, batch_size=2)
    for group in graph.prunable:
        np.testing.assert_allclose(
            found[group.units], np.mean(squares, 0)[group.units], rtol=1e-5, atol=1e-12
        )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_minibatch_larger_than_the_images_is_all_of_them() -> None:
    model, graph, images, labels = small("PreActivation")
    sizes = [
        importance_of("taylor-gate", Context(model, graph), images, labels, batch_size=size)
        for size in (5, 99)
    ]
    np.testing.assert_array_equal(*sizes)
    assert sizes[0].any()


def test_rows() -> None:
    model, graph = built("resnet20")
    names = row_names(Context(model, graph), None)
    assert {"taylor-gate", "taylor-gate:block", "weight-norm", "random"} <= set(names)
    assert row_names(Context(model, graph), "random, obd,random") == ["random", "obd"]
    with pytest.raises(ConfigError, match="random has no gates"):
        row_names(Context(model, graph), "random:block")
    plain, plain_graph, _, _ = small("Plain")
    assert "taylor-gate:block" not in row_names(Context(plain, plain_graph), None)
    with pytest.raises(ConfigError, match="no residual blocks"):
        row_names(Context(plain, plain_graph), "taylor-gate:block")
    with pytest.raises(ConfigError, match="bn-scale cannot score this network"):
        row_names(Context(plain, plain_graph), "bn-scale")


def test_the_picture_bears_what_is_not_defined(tmp_path: Path) -> None:
    _, graph, _, _ = small("PreActivation")
    layers = {group.name: None for group in graph.prunable}
    empty = {"by_layer": layers, "layers": None, "all": None, "residual": None, "other": None}
    criteria = {"a": dict.fromkeys(COEFFICIENTS, empty)}
    zeros = np.zeros(graph.num_units)
    plot_oracle(tmp_path / "x.png", criteria, graph, zeros, {"a": zeros})
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# The whole command


OWN = "own_network_of_the_oracle:Tiny"
UNITS = {"stem": 6, "conv1": 5}
SOURCE = """
import torch
from torch import nn

class Unknown(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = torch.cumsum(self.b(torch.relu(self.a(x))), 1)
        return self.head(torch.relu(self.c(x)).mean((2, 3)))

class Tiny(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(x + self.norm2(self.conv2(y))).mean((2, 3)))
"""


@pytest.fixture(scope="module", autouse=True)
def _importable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_network_of_the_oracle.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(build_model(OWN, num_classes=10, in_channels=1))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with one residual block for digits of 8x8 pixels; read only."""
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_checkpoint(path, tiny(), description=describe())
    return path


@pytest.fixture
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else here together."""
    monkeypatch.setattr("compress.oracle.run.plot_oracle", lambda *arguments: None)


class Whole(NamedTuple):
    """A measurement that nothing has stopped; read only."""

    files: OracleFiles
    document: dict[str, Any]


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.oracle.run.plot_oracle", lambda *arguments: None)
        return Whole(OracleFiles(folder), run_oracle(request(dense, folder, pairs="conv1")))


def describe(**changes: Any) -> Description:
    known: dict[str, Any] = {
        "architecture": OWN,
        "classes": tuple("0123456789"),
        "input_size": (1, 8, 8),
        "mean": (0.3,),
        "std": (0.3,),
    }
    return Description(**{**known, **changes})


def request(dense: Path, output: Path, **options: Any) -> OracleRequest:
    sizes = ("data.image_size=8", "data.eval_batch_size=8", "data.batch_size=16")
    known: dict[str, Any] = {
        "settings": [*sizes, "device=cpu"],  # a GPU does not repeat every bit
        "images": 32,
        "model": OWN,
        "criteria": "weight-norm,taylor-gate,taylor-gate:block",
    }
    return OracleRequest(checkpoint=dense, output=output, **{**known, **options})


def test_files_hold_what_was_measured(whole: Whole) -> None:
    written = json.loads(whole.files.correlation.read_text())
    assert written["criteria"].keys() == whole.document["criteria"].keys()
    assert {group["name"]: group["units"] for group in written["groups"]} == UNITS
    assert len(whole.files.units.read_text().splitlines()) == 1 + sum(UNITS.values())


@pytest.mark.usefixtures("_no_picture")
def test_stopped_by_a_signal_and_resumed(
    dense: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 batches: 12 lines of the log for the units, 8 for the pairs."""
    entry, calls = ChangeLog.entry, 0

    def interrupting(self: ChangeLog, *arguments: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls in (5, 20):  # among the units, then among the pairs
            signal.raise_signal(signal.SIGTERM if calls == 5 else signal.SIGINT)
        return entry(self, *arguments)

    monkeypatch.setattr(ChangeLog, "entry", interrupting)
    parts = request(dense, tmp_path / "parts", pairs="conv1")
    with pytest.raises(InterruptedRunError, match="--resume"):
        run_oracle(parts)
    for _ in range(2):
        resumed = request(dense, tmp_path / "parts", pairs="conv1", resume=True)
        try:
            document = run_oracle(resumed)
        except InterruptedRunError:
            continue
    assert calls > 20
    assert json.dumps(document) == json.dumps(whole.document)
    for name in ("oracle.jsonl", "pairs.jsonl", "units.csv", "correlation.json", "correlation.md"):
        assert (tmp_path / "parts" / name).read_bytes() == (whole.files.path / name).read_bytes()
    other = request(dense, tmp_path / "parts", resume=True, seed=1)
    with pytest.raises(ConfigError, match="--seed = 0 and now 1"):
        run_oracle(other)


@pytest.mark.usefixtures("_no_picture")
def test_a_criterion_equal_to_the_truth_has_a_spearman_of_one(
    dense: Path, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importance is replaced by the squares read back from the table of units."""
    shutil.copytree(whole.files.path, tmp_path / "out")
    lines = [row.split(",") for row in (tmp_path / "out/units.csv").read_text().splitlines()[1:]]
    graph = tried_graph(load_checkpoint(dense, Permission(ModelConfig(name=OWN))).model, (1, 8, 8))
    truth = np.zeros(graph.num_units)
    units = np.concatenate([group.units for group in graph.prunable])
    truth[units] = [float(row[3]) ** 2 for row in lines]
    monkeypatch.setattr("compress.oracle.run.importance_of", lambda *a, **k: truth)
    document = run_oracle(request(dense, tmp_path / "out", criteria="random", resume=True))
    for coefficient in COEFFICIENTS:
        found = document["criteria"]["random"][coefficient]
        for scope in ("layers", "all", "residual", "other"):
            assert found[scope] == pytest.approx(1, abs=1e-6)


def test_command(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["oracle", "--checkpoint", str(dense), "--output", str(tmp_path / "out")]
    arguments += ["--model", OWN]
    arguments += ["--images", "4", "--split", "val", "--criteria", "random,weight-norm"]
    arguments += ["--set", "data.image_size=8"]
    result = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["images"]["count"] == 4
    assert document["cost"]["units"] == sum(UNITS.values())
    assert document["cost"]["forward_passes"] < sum(UNITS.values())
    assert (tmp_path / "out" / "oracle.png").read_bytes().startswith(b"\x89PNG")
    other = CliRunner().invoke(cli.app, [*arguments, "--images", "5"])
    assert other.exit_code == 2
    assert "give the same, or start anew with --overwrite" in other.stderr
    monkeypatch.setattr("compress.oracle.run.plot_oracle", lambda *arguments: None)
    (tmp_path / "out" / ".oracle.1.jsonl").touch()  # of a process that was killed
    for more in ([], ["--resume"]):
        table = CliRunner().invoke(cli.app, [*arguments, *more])
        assert "Spearman" in table.stdout
        assert "weight-norm" in table.stdout


@pytest.mark.usefixtures("_no_picture")
def test_a_run_directory_brings_its_configuration(dense: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "dense.safetensors").write_bytes(dense.read_bytes())
    (run / "config.toml").write_text("seed = 3\n[data]\nimage_size = 8\n")
    options: dict[str, Any] = {"settings": [], "images": 4, "criteria": "random"}
    document = run_oracle(request(run, tmp_path / "out", **options))
    assert document["images"]["seed"] == 3
    with pytest.raises(ConfigError, match="brings its own configuration"):
        run_oracle(request(run, tmp_path / "o2", **options, config="digits-resnet20"))


@pytest.mark.usefixtures("_no_picture")
def test_groups_that_stay_dense_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = OWN.replace(":Tiny", ":Unknown")
    path = tmp_path / "unknown.safetensors"
    model = build_model(own, num_classes=10, in_channels=1)
    save_checkpoint(path, model, description=describe(architecture=own))
    document = run_oracle(request(path, tmp_path / "out", model=own, criteria="random", images=4))
    assert [group["name"] for group in document["groups"]] == ["a", "c"]
    assert "channel groups that stay dense: b (cumsum" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": 0}, ConfigError, "--images 0"),
        ({"batch_size": 0}, ConfigError, "--batch-size 0"),
        ({"split": "test"}, ConfigError, "--split test"),
        ({"criteria": "tailor-gate"}, ConfigError, "did you mean 'taylor-gate'"),
        ({"pairs": "layer9"}, ConfigError, "no group that may be pruned is named 'layer9'"),
        ({"resume": True}, ConfigError, "nothing to resume"),
        ({"resume": True, "overwrite": True}, ConfigError, "exclude each other"),
        (
            {"data": Path("x"), "config": "digits-resnet20"},
            ConfigError,
            "--data x would be ignored",
        ),
        ({"settings": []}, CheckpointError, "takes images of 1x8x8 and the data gives 1x32x32"),
    ],
)
def test_bad_input(
    options: dict[str, Any],
    error: type[CompressError],
    message: str,
    dense: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        run_oracle(request(dense, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_bad_files(dense: Path, tmp_path: Path) -> None:
    model = tiny()
    graph = analyse(model, (1, 8, 8))
    kept = graph.everything()
    kept[graph.prunable[1].units[0]] = False
    pruned = tmp_path / "pruned.safetensors"
    save_checkpoint(
        pruned,
        shrink(model, graph, kept),
        description=describe(),
        graph=graph,
        kept=kept,
    )
    with pytest.raises(CheckpointError, match="is pruned already: measure its dense parent"):
        run_oracle(request(pruned, tmp_path / "out"))
    letters = tmp_path / "letters.safetensors"
    save_checkpoint(letters, model, description=describe(classes=tuple("abcdefghij")))
    with pytest.raises(CheckpointError, match="or other ones"):
        run_oracle(request(letters, tmp_path / "out"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("")
    with pytest.raises(ConfigError, match="not empty: use --resume"):
        run_oracle(request(dense, full))
    with pytest.raises(ConfigError, match="--overwrite leaves it alone"):
        run_oracle(request(dense, full, overwrite=True))
    assert [*full.iterdir()] == [full / "precious"]
