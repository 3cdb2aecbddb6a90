from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import built, lived_in
from networks import NETWORKS, conv
from torch import nn
from torch.nn import functional as F

from compress.errors import (
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    ModelError,
)
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.architectures import CifarResNet
from compress.networks.groups import ChannelGraph
from compress.networks.shrink import mask_, shrink
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
from compress.oracle.network import unwritten
from compress.oracle.replay import DensePass, Replay


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


class Subject(NamedTuple):
    """A network and what is needed to measure it; no test changes any of it."""

    model: nn.Module
    graph: ChannelGraph
    images: torch.Tensor
    labels: torch.Tensor
    replay: Replay
    state: dict[str, torch.Tensor]
    """Of the network before anything was done with it."""

    def measured(self, jobs: list[Job], path: Path, **options: Any) -> Measured:
        return measured(jobs, self.replay, self.images, self.labels, path, **options)


def subject(model: nn.Module, graph: ChannelGraph, images: torch.Tensor) -> Subject:
    state = copy.deepcopy(model.state_dict())
    labels = torch.arange(len(images)) % 4
    return Subject(model, graph, images, labels, Replay(model, graph, images[:2]), state)


@cache
def small(name: str) -> Subject:
    """Return a network in float64 with 5 images of 12x12."""
    torch.manual_seed(0)
    model = lived_in(SMALL[name]()).eval()
    graph = analyse(model, (3, 12, 12))
    return subject(model.double(), graph, torch.randn(5, 3, 12, 12, dtype=torch.float64))


@cache
def resnet() -> Subject:
    """Return a ResNet-8 in float32 with 4 images of 16x16."""
    torch.manual_seed(0)
    model = lived_in(CifarResNet(8, num_classes=7, in_channels=3)).eval()
    return subject(model, analyse(model, (3, 16, 16)), torch.randn(4, 3, 16, 16))


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
    model, graph, images, labels, replay, state = on = small(name)
    found = on.measured(single_jobs(replay, graph), tmp_path / "log")
    expected = naive(model, graph, images, labels, found.removed.tolist())
    np.testing.assert_allclose(found.changes, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        dense = float(F.cross_entropy(model(images.clone()), labels))
    assert found.dense_loss == pytest.approx(dense, abs=1e-12)
    assert np.abs(found.changes).max() > 1e-3  # something was removed
    assert sorted(found.removed[:, 0]) == sorted(u for g in graph.prunable for u in g.units)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_changes_of_a_resnet_equal_a_naive_loop_and_the_shrunk_network(tmp_path: Path) -> None:
    model, graph, images, labels, replay, _ = on = resnet()
    found = on.measured(single_jobs(replay, graph), tmp_path / "log")
    some = np.arange(0, len(found.removed), 9)
    expected = naive(model, graph, images, labels, found.removed[some].tolist())
    np.testing.assert_allclose(found.changes[some], expected, rtol=1e-4, atol=2e-6)
    for index in some[::4]:
        kept = graph.everything()
        kept[found.removed[index]] = False
        with torch.no_grad():
            loss = float(F.cross_entropy(shrink(model, graph, kept)(images), labels))
        assert loss - found.dense_loss == pytest.approx(found.changes[index], abs=2e-6)


@pytest.mark.parametrize(("batch_size", "limit", "piece"), [(1, 1, 1), (4, 1 << 14, 1), (5, 1, 0)])
def test_chunks_do_not_matter(
    batch_size: int, limit: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = small("Dense")
    jobs = single_jobs(on.replay, on.graph)
    plain = on.measured(jobs, tmp_path / "plain")
    monkeypatch.setitem(oracle_replay.TENSOR_BYTES, "cpu", limit)
    if piece:
        monkeypatch.setattr("compress.oracle.changes.PIECE_MACS", piece)
    other = on.measured(jobs, tmp_path / "other", batch_size=batch_size)
    np.testing.assert_allclose(other.changes, plain.changes, rtol=0, atol=1e-13)
    lines = (tmp_path / "other").read_text().count("\n")
    removals = sum(len(job.removed) for job in jobs) if piece else len(jobs)
    assert lines == 1 + -(-len(on.images) // batch_size) * (1 + removals)


def test_in_place_operations_would_corrupt_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the copy that overwrites nothing, the naive loop is missed by far."""
    model, graph, images, labels, _, _ = small("InPlace")
    monkeypatch.setattr(
        "compress.oracle.replay.unwritten",
        lambda model, sample, memory_format: captured_for_any_count(copy.deepcopy(model), sample),
    )
    replay = Replay(model, graph, images[:2])
    found = measured(single_jobs(replay, graph), replay, images, labels, tmp_path / "log")
    expected = naive(model, graph, images, labels, found.removed.tolist())
    assert np.abs(found.changes - expected).max() > 1e-3


def test_the_copy_overwrites_nothing_and_computes_the_same() -> None:
    model, _, images, _, _, _ = small("InPlace")
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
    on = resnet()
    group = next(g for g in on.graph.prunable if g.name == "layer3.0.conv1")
    plan = on.replay.plan(group.units)
    names = ["conv2d", "add", "relu", "adaptive_avg_pool2d", "flatten", "linear"]
    assert [operator_name(node) for node in plan.nodes] == names
    assert plan.macs == 64 * 64 * 9 * 4 * 4 + 64 * 7
    assert on.replay.total_macs == cost.macs(on.graph, on.graph.everything())


def test_kept_values_are_dropped_early() -> None:
    on = resnet()
    plans = [job.plan for job in single_jobs(on.replay, on.graph)]
    dense, most = DensePass(on.replay, on.images, plans), 0
    with torch.no_grad():
        for plan in plans:
            values = dense.until(plan)
            assert plan.needed <= set(values)
            most = max(most, len(values))
            dense.done(plan)
    assert len(on.replay.nodes) > 24
    assert most <= 4
    assert len(dense.values) <= 2


def test_batches_keep_every_value_small() -> None:
    on = resnet()
    jobs = single_jobs(on.replay, on.graph)
    limit = oracle_replay.TENSOR_BYTES["cpu"]
    assert images_at_once(jobs, 10**6, "cpu") == limit // (16 * 16 * 16 * 4)
    assert images_at_once(jobs, 7, "cpu") == 7


# Pairs


def test_pairs_equal_brute_force(tmp_path: Path) -> None:
    model, graph, images, labels, replay, _ = on = small("Dense")
    found = on.measured(pair_jobs(replay, graph, "all"), tmp_path / "log")
    units = sorted(u for g in graph.prunable for u in g.units.tolist())
    every = sorted((a, b) for i, a in enumerate(units) for b in units[i + 1 :])
    assert sorted(tuple(sorted(pair)) for pair in found.removed.tolist()) == every
    expected = naive(model, graph, images, labels, found.removed.tolist())
    np.testing.assert_allclose(found.changes, expected, rtol=0, atol=1e-12)


def test_pairs_that_cannot_be_tried() -> None:
    graph = built("resnet20")[1]
    says = "--pairs all asks for 79,800 pairs of 400 units and at most 20,000"
    with pytest.raises(ConfigError, match=says):
        pair_groups(graph, "all")
    with pytest.raises(ConfigError, match=r"did you mean 'layer1\.0\.conv1'"):
        pair_groups(graph, "layer1.0.conv3")


# Stopping and going on


@pytest.mark.parametrize("stop_after", [1, 4, 7])
@pytest.mark.parametrize("cut", [0, 9])
def test_resumed_equals_uninterrupted(
    stop_after: int, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.oracle.changes.PIECE_MACS", 10**6)
    on = small("PreActivation")
    jobs = single_jobs(on.replay, on.graph)
    whole = on.measured(jobs, tmp_path / "whole")
    pieces = 0

    def stop(share: float) -> None:
        nonlocal pieces
        pieces += 1
        if pieces == stop_after:
            raise InterruptedRunError("stopped")

    path = tmp_path / "parts"
    with pytest.raises(InterruptedRunError):
        on.measured(jobs, path, after_piece=stop)
    if cut:  # a kill in the middle of a line
        path.write_bytes(path.read_bytes()[:-cut])
    assert path.read_bytes() != (tmp_path / "whole").read_bytes()
    resumed = on.measured(jobs, path)
    assert path.read_bytes() == (tmp_path / "whole").read_bytes()
    assert resumed.changes.tolist() == whole.changes.tolist()
    assert resumed.dense_loss == whole.dense_loss


def test_what_is_logged_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = small("PreActivation")
    jobs = single_jobs(on.replay, on.graph)
    whole = on.measured(jobs, tmp_path / "log")
    monkeypatch.setattr(Replay, "run_again", None)
    monkeypatch.setattr(Replay, "execute", None)
    again = on.measured(jobs, tmp_path / "log")
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
