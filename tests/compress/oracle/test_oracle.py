from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built, lived_in
from networks import NETWORKS, conv
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import cli
from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.config import ModelConfig
from compress.criteria.scoring import Context
from compress.errors import (
    CheckpointError,
    CompressError,
    ConfigError,
    InterruptedRunError,
    ModelError,
)
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.architectures import CifarResNet
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.networks.shrink import mask_, shrink
from compress.networks.trial import tried_graph
from compress.networks.walk import operator_name
from compress.oracle import replay as oracle_replay
from compress.oracle.captured import captured_for_any_count
from compress.oracle.changes import (
    ChangeLog,
    Job,
    Measured,
    images_at_once,
    measure,
    pair_groups,
    pair_jobs,
    single_jobs,
)
from compress.oracle.correlation import BY_CHANGE, BY_SQUARE, COEFFICIENTS, judge_pairs
from compress.oracle.network import unwritten
from compress.oracle.replay import DensePass, Replay
from compress.oracle.report import plot_oracle
from compress.oracle.request import OracleFiles, OracleRequest
from compress.oracle.run import run_oracle
from compress.oracle.scores import importance_of, row_names


class InPlace(nn.Module):
    """Every way to overwrite a value that something else reads before or after."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.a, self.b, self.c = conv(8, 8), conv(8, 8), conv(8, 6)
        self.early, self.head = conv(8, 8), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        early = self.early(x)  # of the x that is overwritten next
        y = self.a(self.relu(x))
        x = x + y + early  # of the overwritten x
        F.relu_(y)  # its result is not used, y is
        x += self.b(y)
        x.relu_()
        z = self.c(x)
        x.add_(1)  # after its only reader
        return self.head(F.silu(z, inplace=True).mean((2, 3)))


class EarlySize(nn.Module):
    """The number of images is asked before anything that is run again, and channels are split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 4), conv(4, 6), conv(3, 5), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.size(0)
        left, right = torch.chunk(self.b(F.relu(self.a(x))), 2, 1)
        x = F.adaptive_avg_pool2d(self.c(left * torch.sigmoid(right)), 2)
        return self.head(x.reshape(images, -1))


class Counting(nn.Module):
    """The number of images is in the sizes of new tensors, of views, and times something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(6, 5), conv(5, 6)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.a(x)))
        padded = torch.cat([x, torch.zeros(x.size(0), 2, *x.shape[2:], dtype=x.dtype)], 1)
        x = F.relu(self.b(padded))
        n, c, h, w = x.shape
        windows = x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(n * 2, c, h // 2, w)
        x = F.relu(self.c(windows)).view(n, 2, 6, h // 2, w).mean((1, 3, 4))
        return self.head(x)


class Tokens(nn.Module):
    """Channels last, in linear layers, a product of matrices and attention, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4)
        self.token, self.norm = nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.out = nn.Parameter(torch.randn(6, 8) / 3)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        attended = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + attended @ self.out
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


class ComputedWeights(nn.Module):
    """Weights that are computed from other tensors, before a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3, 4), conv(4, 5), nn.BatchNorm2d(5)
        self.scale, self.head = nn.Parameter(torch.rand(5, 1, 1, 1)), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        weight = self.b.weight * self.scale
        return self.head(F.relu(self.norm(F.conv2d(x, weight, padding=1))).mean((2, 3)))


class ImagesLast(nn.Module):
    """Tokens stand before the images while channels are read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(x).flatten(2).permute(2, 0, 1)
        return self.head(F.relu(self.up(tokens)).mean(0))


class ReadConstant(nn.Module):
    """What a layer reads does not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 4), nn.Linear(4, 4)
        self.query, self.up, self.down = nn.Parameter(torch.randn(1, 3)), *_two(3, 6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x).mean((2, 3)) * self.down(F.relu(self.up(self.query))))


def _two(first: int, second: int, third: int) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(first, second), nn.Linear(second, third)


class OnePass(nn.Module):
    """Another computation for many images than for few."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x) if len(x) < 4 else F.relu(self.a(x))
        return self.head(x.mean((2, 3)))


class Pyramid(nn.Module):
    """Two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.a(x)
        return self.head(x.mean((2, 3))), x


class Mixing(nn.Module):
    """An image's logits depend on the other images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head((x - x[:1]).mean((2, 3)))


class PartWritten(nn.Module):
    """Half of a value is overwritten, and the whole is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x[:, :, :3].relu_()
        return self.head(x.mean((2, 3)))


SMALL: dict[str, Callable[[], nn.Module]] = {
    **NETWORKS,
    "InPlace": InPlace,
    "EarlySize": EarlySize,
    "Counting": Counting,
    "Tokens": Tokens,
}


def small(name: str) -> tuple[nn.Module, ChannelGraph, torch.Tensor, torch.Tensor]:
    """Return a network in float64 with 5 images of 12x12, and their labels."""
    model = lived_in(SMALL[name]()).eval()
    graph = analyse(model, (3, 12, 12))
    images = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    return model.double(), graph, images, torch.arange(5) % 4


def naive(
    model: nn.Module,
    graph: ChannelGraph,
    images: torch.Tensor,
    labels: torch.Tensor,
    removals: Any,
) -> np.ndarray:
    """Return the change of the loss, one removal and one whole forward pass at a time."""

    def loss_without(units: list[int]) -> float:
        kept = graph.everything()
        kept[units] = False
        masked = copy.deepcopy(model)
        mask_(masked, graph, kept)
        with torch.no_grad():
            return float(F.cross_entropy(masked(images.clone()), labels))

    dense = loss_without([])
    return np.array([loss_without(list(units)) - dense for units in removals])


def measured(
    jobs: list[Job],
    replay: Replay,
    images: torch.Tensor,
    labels: torch.Tensor,
    path: Path,
    batch_size: int = 3,
    after_piece: Callable[[float], None] = lambda share: None,
) -> Measured:
    return measure(
        replay,
        jobs,
        images,
        labels,
        log=ChangeLog(path, {"of": "a test"}),
        batch_size=batch_size,
        after_piece=after_piece,
    )


@pytest.mark.parametrize("name", sorted(SMALL))
def test_changes_equal_a_naive_loop(name: str, tmp_path: Path) -> None:
    model, graph, images, labels = small(name)
    before = copy.deepcopy(model.state_dict())
    replay = Replay(model, graph, images[:2])
    found = measured(single_jobs(replay, graph), replay, images, labels, tmp_path / "log")
    expected = naive(model, graph, images, labels, found.removed.tolist())
    np.testing.assert_allclose(found.changes, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        dense = float(F.cross_entropy(model(images.clone()), labels))
    assert found.dense_loss == pytest.approx(dense, abs=1e-12)
    assert np.abs(found.changes).max() > 1e-3  # something was removed
    assert sorted(found.removed[:, 0]) == sorted(u for g in graph.prunable for u in g.units)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_changes_of_resnet20_equal_a_naive_loop_and_the_shrunk_network(tmp_path: Path) -> None:
    model, graph = built("resnet20")
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    replay = Replay(model, graph, images[:2])
    found = measured(single_jobs(replay, graph), replay, images, labels, tmp_path / "log")
    some = np.arange(0, len(found.removed), 9)
    expected = naive(model, graph, images, labels, found.removed[some].tolist())
    np.testing.assert_allclose(found.changes[some], expected, rtol=1e-4, atol=2e-6)
    for index in some[::6]:
        kept = graph.everything()
        kept[found.removed[index]] = False
        with torch.no_grad():
            loss = float(F.cross_entropy(shrink(model, graph, kept)(images), labels))
        assert loss - found.dense_loss == pytest.approx(found.changes[index], abs=2e-6)


@pytest.mark.parametrize(("batch_size", "limit", "piece"), [(1, 1, 1), (4, 1 << 14, 1), (5, 1, 0)])
def test_chunks_do_not_matter(
    batch_size: int, limit: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph, images, labels = small("Dense")
    replay = Replay(model, graph, images[:2])
    jobs = single_jobs(replay, graph)
    plain = measured(jobs, replay, images, labels, tmp_path / "plain")
    monkeypatch.setitem(oracle_replay.TENSOR_BYTES, "cpu", limit)
    if piece:
        monkeypatch.setattr("compress.oracle.changes.PIECE_MACS", piece)
    other = measured(jobs, replay, images, labels, tmp_path / "other", batch_size)
    np.testing.assert_allclose(other.changes, plain.changes, rtol=0, atol=1e-13)
    lines = (tmp_path / "other").read_text().count("\n")
    removals = sum(len(job.removed) for job in jobs) if piece else len(jobs)
    assert lines == 1 + -(-len(images) // batch_size) * (1 + removals)


def test_in_place_operations_would_corrupt_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the copy that overwrites nothing, the naive loop is missed by far."""
    model, graph, images, labels = small("InPlace")
    monkeypatch.setattr(
        "compress.oracle.replay.unwritten",
        lambda model, sample, memory_format: captured_for_any_count(copy.deepcopy(model), sample),
    )
    replay = Replay(model, graph, images[:2])
    found = measured(single_jobs(replay, graph), replay, images, labels, tmp_path / "log")
    expected = naive(model, graph, images, labels, found.removed.tolist())
    assert np.abs(found.changes - expected).max() > 1e-3


def test_the_copy_overwrites_nothing_and_computes_the_same() -> None:
    model, _, images, _ = small("InPlace")
    network = unwritten(model, images[:2]).module
    given = images.clone()
    torch.testing.assert_close(network(given), model(images.clone()), rtol=1e-12, atol=1e-12)
    assert torch.equal(given, images)
    assert model.relu.inplace  # the original is as it was


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Mixing, "depend on the other images"),
        (PartWritten, "overwrites part of a value"),
        (OnePass, "does not accept any number of images: it does something else for each at "),
        (Pyramid, "returns logits, one row per image"),
        (ComputedWeights, "a is read by b.weight in a computed form"),
        (ImagesLast, "has no row for each image"),
        (ReadConstant, "has no row for each image"),
    ],
)
def test_networks_that_cannot_be_measured(network: type[nn.Module], message: str) -> None:
    model = network().eval()
    graph = analyse(model, (3, 8, 8))
    with pytest.raises(ModelError, match=message):
        single_jobs(Replay(model, graph, torch.randn(2, 3, 8, 8)), graph)


def test_weights_made_of_others_are_computed_once_and_batchnorms_folded() -> None:
    model = lived_in(ComputedWeights()).eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        network = unwritten(model, images).module
        torch.testing.assert_close(network(images), model(images))
    left = [operator_name(n) for n in network.graph.nodes if n.op == "call_function"]
    assert left == ["conv2d", "relu", "conv2d", "relu", "mean", "linear"]


def test_only_what_follows_is_run_again() -> None:
    model, graph = built("resnet20")
    replay = Replay(model, graph, torch.randn(2, 3, 16, 16))
    group = next(g for g in graph.prunable if g.name == "layer3.2.conv1")
    plan = replay.plan(group.units)
    names = ["conv2d", "add", "relu", "adaptive_avg_pool2d", "flatten", "linear"]
    assert [operator_name(node) for node in plan.nodes] == names
    assert plan.macs == 64 * 64 * 9 * 4 * 4 + 64 * 7
    assert replay.total_macs == cost.macs(graph, graph.everything())


def test_kept_values_are_dropped_early() -> None:
    model, graph = built("resnet20")
    images = torch.randn(2, 3, 16, 16)
    replay = Replay(model, graph, images)
    plans = [job.plan for job in single_jobs(replay, graph)]
    dense, most = DensePass(replay, images, plans), 0
    with torch.no_grad():
        for plan in plans:
            values = dense.until(plan)
            assert plan.needed <= set(values)
            most = max(most, len(values))
            dense.done(plan)
    assert most <= 4  # of 60
    assert len(dense.values) <= 2


def test_batches_keep_every_value_small() -> None:
    model, graph = built("resnet20")
    jobs = single_jobs(Replay(model, graph, torch.randn(2, 3, 16, 16)), graph)
    limit = oracle_replay.TENSOR_BYTES["cpu"]
    assert images_at_once(jobs, 10**6, "cpu") == limit // (16 * 16 * 16 * 4)
    assert images_at_once(jobs, 7, "cpu") == 7


# Pairs


def test_pairs_equal_brute_force(tmp_path: Path) -> None:
    model, graph, images, labels = small("Dense")
    replay = Replay(model, graph, images[:2])
    found = measured(pair_jobs(replay, graph, "all"), replay, images, labels, tmp_path / "log")
    units = sorted(u for g in graph.prunable for u in g.units.tolist())
    every = sorted((a, b) for i, a in enumerate(units) for b in units[i + 1 :])
    assert sorted(tuple(sorted(pair)) for pair in found.removed.tolist()) == every
    expected = naive(model, graph, images, labels, found.removed.tolist())
    np.testing.assert_allclose(found.changes, expected, rtol=0, atol=1e-12)


def test_picks_by_hand() -> None:
    units = np.array([[3, 5], [3, 7], [5, 7]])
    changes = np.array([0.5, -0.2, 0.1])
    singles = np.zeros(8)
    singles[[3, 5, 7]] = [-0.3, 0.2, 0.1]
    weights = np.full(8, 9.0)
    weights[[3, 5, 7]] = [1, 2, 3]
    found = judge_pairs(units, changes, singles, {"weights": weights})
    assert (found.best.units, found.best.change, found.best.regret) == ((3, 7), -0.2, 0)
    picks = {pick.by: (pick.units, pick.rank, pytest.approx(pick.regret)) for pick in found.picks}
    assert picks == {
        BY_CHANGE: ((3, 7), 1, 0.0),
        BY_SQUARE: ((5, 7), 2, 0.3),
        "weights": ((3, 5), 3, 0.7),
    }
    sums = np.array([-0.1, -0.2, 0.3])
    assert found.sum_pearson == pytest.approx(np.corrcoef(sums, changes)[0, 1])
    assert found.sum_spearman == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("all", "--pairs all asks for 79,800 pairs of 400 units and at most 20,000"),
        ("layer1.0.conv3", "did you mean 'layer1.0.conv1'"),
    ],
)
def test_pairs_that_cannot_be_tried(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair_groups(built("resnet20")[1], wanted)


# Stopping and going on


@pytest.mark.parametrize("stop_after", [1, 4, 7])
@pytest.mark.parametrize("cut", [0, 9])
def test_resumed_equals_uninterrupted(
    stop_after: int, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.oracle.changes.PIECE_MACS", 10**6)
    model, graph, images, labels = small("PreActivation")
    replay = Replay(model, graph, images[:2])
    jobs = single_jobs(replay, graph)
    whole = measured(jobs, replay, images, labels, tmp_path / "whole")
    pieces = 0

    def stop(share: float) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == stop_after:
            raise InterruptedRunError("stopped")

    path = tmp_path / "parts"
    with pytest.raises(InterruptedRunError):
        measured(jobs, replay, images, labels, path, after_piece=stop)
    if cut:  # a kill in the middle of a line
        path.write_bytes(path.read_bytes()[:-cut])
    assert path.read_bytes() != (tmp_path / "whole").read_bytes()
    resumed = measured(jobs, replay, images, labels, path)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert resumed.changes.tolist() == whole.changes.tolist()
    assert resumed.dense_loss == whole.dense_loss


def test_what_is_logged_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, graph, images, labels = small("PreActivation")
    replay = Replay(model, graph, images[:2])
    jobs = single_jobs(replay, graph)
    whole = measured(jobs, replay, images, labels, tmp_path / "log")
    monkeypatch.setattr(Replay, "run_again", None)
    monkeypatch.setattr(Replay, "execute", None)
    again = measured(jobs, replay, images, labels, tmp_path / "log")
    assert again.changes.tolist() == whole.changes.tolist()


def test_a_log_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log"
    ChangeLog(path, {"--seed": 0, "checkpoint": "a" * 64})
    with pytest.raises(ConfigError, match="with --seed = 0 and now 1 is given"):
        ChangeLog(path, {"--seed": 1, "checkpoint": "a" * 64})
    with pytest.raises(ConfigError, match="checkpoint = aaaaaaaaaaaa and now bbbbbbbbbbbb"):
        ChangeLog(path, {"--seed": 0, "checkpoint": "b" * 64})
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(CheckpointError, match="damaged"):
        ChangeLog(path, {"--seed": 0, "checkpoint": "a" * 64})


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
    _, graph = built("resnet20")
    layers = {group.name: None for group in graph.prunable}
    empty = {"by_layer": layers, "layers": None, "all": None, "residual": None, "other": None}
    criteria = {"a": dict.fromkeys(COEFFICIENTS, empty)}
    zeros = np.zeros(graph.num_units)
    plot_oracle(tmp_path / "x.png", criteria, graph, zeros, {"a": zeros})
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# The whole command


OWN = "own_network_of_the_oracle:build"
SOURCE = """
import torch
from torch import nn
from compress.networks.models import CifarResNet

class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = torch.cumsum(self.b(torch.relu(self.a(x))), 1)
        return self.head(torch.relu(self.c(x)).mean((2, 3)))

def unknown(num_classes, in_channels):
    return Unknown()

def build(num_classes, in_channels):
    return CifarResNet(8, num_classes, in_channels)
"""


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_network_of_the_oracle.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A ResNet-8 for digits of 8x8 pixels."""
    path = tmp_path / "dense.safetensors"
    save_checkpoint(path, lived_in(CifarResNet(8, 10, 1)), description=describe())
    return path


@pytest.fixture
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else here together."""
    monkeypatch.setattr("compress.oracle.run.plot_oracle", lambda *arguments: None)


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
    sizes = ("data.image_size=8", "data.eval_batch_size=16", "data.batch_size=16")
    known: dict[str, Any] = {
        "settings": [*sizes, "device=cpu"],  # a GPU does not repeat every bit
        "images": 32,
        "model": OWN,
        "criteria": "weight-norm,taylor-gate,taylor-gate:block",
    }
    return OracleRequest(checkpoint=dense, output=output, **{**known, **options})


@pytest.mark.usefixtures("_no_picture")
def test_stopped_by_a_signal_and_resumed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_oracle(request(dense, tmp_path / "whole", pairs="layer1.0.conv1"))
    files = OracleFiles(tmp_path / "whole")
    assert json.loads(files.correlation.read_text())["criteria"].keys() == whole["criteria"].keys()
    assert len(files.units.read_text().splitlines()) == 1 + 176
    entry, calls = ChangeLog.entry, 0

    def interrupting(self: ChangeLog, *arguments: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls in (5, 20):  # among the units, then among the pairs
            signal.raise_signal(signal.SIGTERM if calls == 5 else signal.SIGINT)
        return entry(self, *arguments)

    monkeypatch.setattr(ChangeLog, "entry", interrupting)
    parts = request(dense, tmp_path / "parts", pairs="layer1.0.conv1")
    with pytest.raises(InterruptedRunError, match="--resume"):
        run_oracle(parts)
    for _ in range(2):
        resumed = request(dense, tmp_path / "parts", pairs="layer1.0.conv1", resume=True)
        try:
            document = run_oracle(resumed)
        except InterruptedRunError:
            continue
    assert calls > 20
    assert json.dumps(document) == json.dumps(whole)
    for name in ("oracle.jsonl", "pairs.jsonl", "units.csv", "correlation.json", "correlation.md"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = request(dense, tmp_path / "parts", resume=True, seed=1)
    with pytest.raises(ConfigError, match="--seed = 0 and now 1"):
        run_oracle(other)


@pytest.mark.usefixtures("_no_picture")
def test_a_criterion_equal_to_the_truth_has_a_spearman_of_one(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The importance is replaced by the squares read back from the table of units."""
    run_oracle(request(dense, tmp_path / "out", criteria="random"))
    lines = [row.split(",") for row in (tmp_path / "out/units.csv").read_text().splitlines()[1:]]
    graph = tried_graph(load_checkpoint(dense, ModelConfig(name=OWN)).model, (1, 8, 8))
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
    assert document["cost"]["units"] == 176
    assert document["cost"]["forward_passes"] < 100
    assert (tmp_path / "out" / "oracle.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(cli.app, arguments)
    assert again.exit_code == 2
    assert "use --resume to go on" in again.stderr
    monkeypatch.setattr("compress.oracle.run.plot_oracle", lambda *arguments: None)
    table = CliRunner().invoke(cli.app, [*arguments, "--resume"])
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
    own = OWN.replace(":build", ":unknown")
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
    model = CifarResNet(8, 10, 1)
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
