"""A table from measurements whose truth is known, without a clock."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import TableError
from compress.latency.table import document_of
from compress.latency.times import network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.shrink import shrink
from export.latency.alone import Alone
from export.latency.building import Plan, Profile, build_table
from export.latency.rounds import Measured, Told
from export.latency.serving import Network, Serving
from export.latency.widths import random_mask, smallest_mask, spans_of

SIZE = (3, 12, 12)


class Tiny(nn.Module):
    """A stem, a residual block, a depthwise convolution with a stride, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.inner = nn.Conv2d(32, 48, 3, padding=1)
        self.outer = nn.Conv2d(48, 32, 3, padding=1)
        self.apart = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.outer(torch.relu(self.inner(x))) + x)
        return self.head(torch.relu(self.apart(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> ChannelGraph:
    return analyse(model, SIZE)


def true_ms(network: Network) -> float:
    """Milliseconds of a machine with sets of 32 channels, on which a call takes 0.05."""
    total = 0.05

    def add(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            places = math.prod(output.shape[2:]) * math.prod(module.kernel_size)
            sets = math.ceil(module.out_channels / 32)
            total += 1e-6 * places * module.in_channels / module.groups * (3 * sets + 1) + 1e-3
        else:
            total += 1e-3

    model = network.model
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model(torch.zeros(1, *network.input_size))
    for hook in hooks:
        hook.remove()
    return total


class Clock:
    """A stand-in for measuring; it is interrupted after some parts, and counts."""

    def __init__(self, parts: float = math.inf, noise: float = 0.0) -> None:
        self.parts, self.noise, self.networks = parts, noise, 0

    def __call__(self, networks: Sequence[Network], told: Told) -> Measured:
        told(0.5)
        if self.parts == 0:
            raise KeyboardInterrupt
        self.parts -= 1
        self.networks += len(networks) - 1
        return Measured(tuple(map(true_ms, networks)), self.noise)


PLAN = Plan(networks=12, held_out=6)


def test_whole_networks_are_predicted_from_their_layers(
    model: nn.Module, graph: ChannelGraph
) -> None:
    table = build_table(Profile(model, graph, SIZE, PLAN), Serving(), measure=Clock())
    assert table.error.largest < 0.01
    assert len(table.error.pairs) == 6
    rng = np.random.default_rng(7)
    for mask in (graph.everything(), *(random_mask(graph, 8, rng) for _ in range(5))):
        expected = true_ms(Network(shrink(model, graph, mask), SIZE))
        assert network_milliseconds(graph, table, mask) == pytest.approx(expected, rel=0.01)


def test_a_profile_goes_on_where_it_was_stopped(
    model: nn.Module, graph: ChannelGraph, tmp_path: Path
) -> None:
    partial = tmp_path / "t.partial.json"
    whole = Clock()
    expected = build_table(Profile(model, graph, SIZE, PLAN), Serving(), measure=whole)
    before = Clock(parts=2)
    with pytest.raises(KeyboardInterrupt):
        build_table(Profile(model, graph, SIZE, PLAN), Serving(), partial=partial, measure=before)
    assert 0 < len(json.loads(partial.read_text())["ms"]) == before.networks
    after = Clock()
    shares: list[float] = []
    found = build_table(
        Profile(model, graph, SIZE, PLAN),
        Serving(),
        partial=partial,
        measure=after,
        progress=lambda step, share: shares.append(share),
    )
    assert document_of(found) == document_of(expected)
    assert before.networks + after.networks == whole.networks
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    again = Clock()
    build_table(Profile(model, graph, SIZE, PLAN), Serving(), partial=partial, measure=again)
    assert again.networks == 0
    other = Clock(parts=1)
    with pytest.raises(KeyboardInterrupt):
        build_table(
            Profile(model, graph, SIZE, PLAN), Serving(batch=2), partial=partial, measure=other
        )
    assert other.networks > 0  # what was measured for another batch is of no use


def test_a_damaged_partial_file_costs_only_time(
    model: nn.Module, graph: ChannelGraph, tmp_path: Path
) -> None:
    partial = tmp_path / "t.partial.json"
    for text in ("", "[]", '{"schema_version": 1}'):
        partial.write_text(text)
        clock = Clock(parts=1)
        with pytest.raises(KeyboardInterrupt):
            build_table(
                Profile(model, graph, SIZE, PLAN), Serving(), partial=partial, measure=clock
            )
        assert clock.networks > 0


def test_a_noisy_part_is_measured_once_more_and_then_refused(
    model: nn.Module, graph: ChannelGraph
) -> None:
    clock = Clock(noise=0.5)
    with pytest.raises(TableError, match="differ by 50%, over 10%"):
        build_table(Profile(model, graph, SIZE, PLAN), Serving(), measure=clock)
    single = Clock(parts=1)
    with pytest.raises(KeyboardInterrupt):
        build_table(Profile(model, graph, SIZE, PLAN), Serving(), measure=single)
    assert clock.networks == 2 * single.networks


def test_grids_hold_what_pruning_may_reach(graph: ChannelGraph) -> None:
    spans = {str(shape): found for shape, found in spans_of(graph, 8).items()}
    (outer,) = spans["conv2d 3x3 at 12x12 + add + relu"]
    assert outer.read.tolist() == [8, 16, 24, 32, 40, 48]
    assert outer.written.tolist() == [8, 16, 24, 32]
    stem, inner = spans["conv2d 3x3 at 12x12 + relu"]
    assert (stem.read.tolist(), stem.written.tolist()) == ([3], [8, 16, 24, 32])
    assert (inner.read.tolist(), inner.written[-1]) == ([8, 16, 24, 32], 48)
    (apart,) = spans["conv2d 3x3 stride 2x2 depthwise at 6x6 + relu"]
    assert apart.paired
    assert apart.read.tolist() == apart.written.tolist() == [8, 16, 24, 32]
    (head,) = spans["linear at 1"]
    assert (head.read.tolist(), head.written.tolist()) == ([8, 16, 24, 32], [10])


def test_random_networks_are_of_multiples_and_of_many_sizes(graph: ChannelGraph) -> None:
    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for _ in range(60):
        mask = random_mask(graph, 8, rng)
        for group in graph.prunable:
            left = int(mask[group.units].sum())
            assert left % 8 == 0
            assert left >= 8
            counts[left] += group.size == 48
    assert set(counts) - {0} >= {8, 16, 24, 32, 40, 48}
    small = smallest_mask(graph, 8)
    assert all(small[group.units].sum() == 8 for group in graph.prunable)


def test_a_layer_alone_is_the_layer_of_the_network(graph: ChannelGraph) -> None:
    for layer in graph.layers:
        read, written = layer.widths(graph.everything())
        network = Alone(layer.shape, read, written, 3)
        assert len(network.layers) == 3
        sizes = []
        network.layers[0].register_forward_hook(
            lambda module, inputs, output, sizes=sizes: sizes.append(
                (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))
            )
        )
        network(torch.zeros(2, *network.input_size))
        if layer.shape.kernel:
            expected = (read, *layer.shape.input_size), (written, *layer.shape.output_size)
            assert sizes == [expected]
        else:
            assert sizes == [((read,), (written,))]
