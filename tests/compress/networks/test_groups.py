"""Channel groups of known networks by hand, against Torch-Pruning, and of awkward networks."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from conftest import (
    LARGE,
    RESNETS,
    as_published,
    built,
    input_size_of,
    lived_in,
    random_mask,
    small_graph,
    some_slow,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Unknown, conv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compress.errors import ModelError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.copies import copied
from compress.networks.groups import ChannelGraph, Group
from compress.networks.models import build_model
from compress.networks.partition import components
from compress.networks.shrink import mask_, shrink
from compress.networks.trial import tried_graph


def group_of(graph: ChannelGraph, name: str) -> Group:
    return next(group for group in graph.groups if group.name == name)


def writing(graph: ChannelGraph, layer: str) -> Group:
    return next(group for group in graph.groups if layer in group.writers)


def weights(*layers: str) -> tuple[str, ...]:
    """Return the tensors with which layers read."""
    return tuple(f"{layer}.weight" for layer in layers)


def outputs(graph: ChannelGraph, layer: str) -> list[int]:
    """Return the unit of every channel that a layer returns."""
    return graph.by_tensor[f"{layer}.weight", 0].units.tolist()


def inputs(graph: ChannelGraph, layer: str) -> list[int]:
    """Return the unit of every channel that a convolution or linear layer reads."""
    (site,) = (site for site in graph.read_sites if site.weight == f"{layer}.weight")
    return site.units.tolist()


def coupled_sides(graph: ChannelGraph, group: Group) -> set[tuple[str, str]]:
    """Return the layers that a group runs through, and on which side."""
    return {
        (axis.layer, "out" if axis.dim == 0 else "in")
        for axis in graph.axes
        if axis.tensor.endswith(".weight") and np.isin(group.units, axis.units).all()
    }


def as_json(graph: ChannelGraph) -> str:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else value.tolist()

    return json.dumps(dataclasses.asdict(graph), default=plain)


def shrinks_exactly(model: nn.Module, graph: ChannelGraph, size: int) -> None:
    """Assert masked == shrunk in float64 for random masks that really change the logits.

    1e-12 of the largest logit leaves room for sums in another order, and for nothing else.
    """
    model = model.double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    for seed in range(3):
        kept = random_mask(graph, seed)
        masked = copied(model)
        mask_(masked, graph, kept)
        with torch.no_grad():
            expected, before = masked(images), model(images)
            actual = shrink(model, graph, kept)(images)
        largest = expected.abs().max()
        assert (before - expected).abs().max() > 1e-6 * largest
        assert (actual - expected).abs().max() <= 1e-12 * largest


# Known networks


def test_resnet18_by_hand() -> None:
    graph = small_graph("resnet18")
    expected = [
        ("input", 3, (), ("conv1",), False),
        (
            *("conv1", 64, ("conv1", "layer1.0.conv2", "layer1.1.conv2")),
            ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"),
            True,
        ),
        ("layer1.0.conv1", 64, ("layer1.0.conv1",), ("layer1.0.conv2",), False),
        ("layer1.1.conv1", 64, ("layer1.1.conv1",), ("layer1.1.conv2",), False),
    ]
    for stage, width in ((2, 128), (3, 256), (4, 512)):
        first, second, after = f"layer{stage}.0", f"layer{stage}.1", f"layer{stage + 1}.0"
        readers = (f"{after}.conv1", f"{after}.downsample.0") if stage < 4 else ("fc",)
        writers = (f"{first}.conv2", f"{first}.downsample.0", f"{second}.conv2")
        expected += [
            (f"{first}.conv1", width, (f"{first}.conv1",), (f"{first}.conv2",), False),
            (f"{first}.conv2", width, writers, (f"{second}.conv1", *readers), True),
            (f"{second}.conv1", width, (f"{second}.conv1",), (f"{second}.conv2",), False),
        ]
    expected.append(("fc", 7, ("fc",), (), False))
    found = [(g.name, g.size, g.writers, g.readers, g.residual) for g in graph.groups]
    assert found == [(*about, weights(*read), added) for *about, read, added in expected]
    frozen = {g.name: g.frozen for g in graph.groups if g.frozen}
    assert frozen == {"input": "network input", "fc": "network output"}
    assert {g.width for g in graph.groups} == {1}
    assert not graph.unknown


@pytest.mark.slow
def test_resnet50_by_hand() -> None:
    graph = small_graph("resnet50")
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    names = ["input", "conv1"]
    for stage, count in blocks.items():
        for block in range(count):
            names += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            names += [f"layer{stage}.0.conv3"] if block == 0 else []
    assert [g.name for g in graph.groups] == [*names, "fc"]
    assert [g.name for g in graph.groups if g.residual] == [f"layer{s}.0.conv3" for s in blocks]
    stem = group_of(graph, "conv1")
    assert stem.readers == weights("layer1.0.conv1", "layer1.0.downsample.0")
    for stage, count in blocks.items():
        stream = group_of(graph, f"layer{stage}.0.conv3")
        inner = tuple(f"layer{stage}.{b}" for b in range(count))
        first, *rest = (f"{block}.conv3" for block in inner)
        assert stream.writers == (first, f"{inner[0]}.downsample.0", *rest)
        after = (f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0")
        readers = tuple(f"{block}.conv1" for block in inner[1:])
        assert stream.readers == weights(*readers, *(after if stage < 4 else ("fc",)))
        assert stream.size == 128 << stage


def test_resnet20_by_hand() -> None:
    """Shortcuts of option A: a stage's stream runs on in the middle of the next stage's."""
    graph = small_graph("resnet20")
    stage = {s: tuple(f"layer{s}.{b}" for b in range(3)) for s in (1, 2, 3)}
    streams = {
        "conv1": (16, ("conv1", *(f"{b}.conv2" for s in (1, 2, 3) for b in stage[s]))),
        "layer2.0.conv2": (16, tuple(f"{b}.conv2" for s in (2, 3) for b in stage[s])),
        "layer3.0.conv2": (32, tuple(f"{b}.conv2" for b in stage[3])),
    }
    for number, (name, (size, writers)) in enumerate(streams.items(), 1):
        stream = group_of(graph, name)
        assert (stream.size, stream.writers, stream.residual) == (size, writers, True)
        later = [f"{b}.conv1" for s in range(number, 4) for b in stage[s]]
        readers = later if number == 1 else later[1:]  # padded in behind the first block
        assert stream.readers == weights(*readers, "fc")
    inner = [g for g in graph.prunable if not g.residual]
    assert [(g.name, g.size) for g in inner] == [
        (f"{block}.conv1", 8 << s) for s in stage for block in stage[s]
    ]
    stream = outputs(graph, "layer2.0.conv2")
    assert stream[8:24] == outputs(graph, "conv1")
    assert outputs(graph, "layer3.2.conv2")[16:48] == stream
    front, back = (graph.by_tensor[f"layer3.0.shortcut.{side}", 0] for side in ("front", "back"))
    assert front.units.tolist() == inputs(graph, "fc")[:16]
    assert back.units.tolist() == inputs(graph, "fc")[48:]


def test_resnext50_by_hand() -> None:
    graph = small_graph("resnext50_32x4d")
    for stage, blocks in {1: 3, 2: 4, 3: 6, 4: 3}.items():
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            group = group_of(graph, f"{name}.conv1")
            assert group.writers == (f"{name}.conv1", f"{name}.conv2")
            assert group.readers == weights(f"{name}.conv2", f"{name}.conv3")
            assert (group.size, set(group.widths)) == (32, {2 << stage})
        stream = group_of(graph, f"layer{stage}.0.conv3")
        assert (stream.size, stream.width, stream.residual) == (128 << stage, 1, True)
    read, written = inputs(graph, "layer1.0.conv2"), outputs(graph, "layer1.0.conv2")
    assert read == written == np.repeat(read[::4], 4).tolist()
    assert len(set(read)) == 32


ORIGINAL = {"resnet50": 11_392, "resnet101": 20_096}
"""Channels that the research code of Molchanov et al. gates: of all convolutions but the stem."""


@pytest.mark.parametrize("name", some_slow(RESNETS, {*LARGE, "resnet50", "resnext50_32x4d"}))
def test_every_resnet_is_understood(name: str) -> None:
    _, graph = as_published(name)
    assert not graph.unknown
    assert {g.name for g in graph.groups if g.frozen} == {"input", "fc"}
    assert len({g.name for g in graph.groups}) == len(graph.groups)
    units = np.concatenate([g.units for g in (*graph.groups, *graph.branches)])
    assert sorted(units.tolist()) == list(range(graph.num_units))
    if name in ORIGINAL:
        prunable = {g.name: g.size * g.width for g in graph.prunable}
        assert prunable.pop("conv1") == 64
        assert sum(prunable.values()) == ORIGINAL[name]


@pytest.mark.parametrize("name", some_slow(("resnet18", "resnet50"), {"resnet50"}))
def test_coupled_as_torch_pruning_couples(name: str) -> None:
    model, graph = built(name)
    dependencies = torch_pruning.DependencyGraph().build_dependency(
        model, torch.randn(1, 3, 32, 32)
    )
    names = {module: module_name for module_name, module in model.named_modules()}
    for group in graph.prunable:
        writer = model.get_submodule(group.writers[0])
        theirs = dependencies.get_pruning_group(
            writer, torch_pruning.prune_conv_out_channels, list(range(group.size))
        )
        expected = {
            (names[dep.target.module], "in" if "in_channels" in dep.handler.__name__ else "out")
            for dep, _ in theirs
            if dep.target.module in names
        }
        assert coupled_sides(graph, group) == expected, group.name


# The topologies of networks.py


def analysed(name: str) -> ChannelGraph:
    return analyse(NETWORKS[name](), (3, 12, 12))


def facts(graph: ChannelGraph) -> list[tuple[str, int, tuple[str, ...], str | None]]:
    return [(g.name, g.size, g.readers, g.frozen) for g in graph.groups]


def test_plain() -> None:
    graph = analysed("Plain")
    assert facts(graph) == [
        ("input", 3, weights("features.0"), "network input"),
        ("features.0", 6, weights("features.3"), None),
        ("features.3", 8, weights("hidden"), None),
        ("hidden", 10, weights("head"), None),
        ("head", 4, (), "network output"),
    ]
    # 3x3 positions of each channel; weight and bias of the writer, and what reads it
    assert group_of(graph, "features.3").widths == (1, 1, 9)
    positions = np.repeat(group_of(graph, "features.3").units, 9).tolist()
    assert inputs(graph, "hidden") == positions
    assert graph.by_tensor["hidden.weight", 1].units.tolist() == positions


def test_every_tensor_and_integer_of_a_width_is_an_axis() -> None:
    """By hand, for a convolution, a BatchNorm and a linear layer behind a flatten."""
    graph = analysed("Plain")
    about = [(a.tensor, a.dim, len(a.units), a.writes, a.reads) for a in graph.axes]
    written, read, neither = (True, False), (False, True), (False, False)
    expected = []
    for name, wide, narrow in (("features.0", 6, 3), ("features.3", 8, 6), ("hidden", 10, 72)):
        expected += [
            (f"{name}.weight", 0, wide, *written),
            (f"{name}.weight", 1, narrow, *read),
            (f"{name}.bias", 0, wide, *neither),
        ]
    buffers = ("weight", "bias", "running_mean", "running_var")
    expected += [(f"norm.{tensor}", 0, 10, *neither) for tensor in buffers]
    expected += [
        ("head.weight", 0, 4, *written),
        ("head.weight", 1, 10, *read),
        ("head.bias", 0, 4, *neither),
    ]
    integers = {
        "features.0.in_channels": 3,
        "features.0.out_channels": 6,
        "features.3.in_channels": 6,
        "features.3.out_channels": 8,
        "hidden.in_features": 72,
        "hidden.out_features": 10,
        "norm.num_features": 10,
        "head.in_features": 10,
        "head.out_features": 4,
    }
    expected += [(name, 0, size, *neither) for name, size in integers.items()]
    assert about == expected


def test_pre_activation() -> None:
    graph = analysed("PreActivation")
    assert facts(graph)[1:] == [
        ("stem", 8, weights("conv1", "head"), None),
        ("conv1", 12, weights("conv2"), None),
        ("head", 4, (), "network output"),
    ]
    assert group_of(graph, "stem").writers == ("stem", "conv2")
    assert group_of(graph, "stem").residual


def test_concatenation() -> None:
    graph = analysed("Dense")
    assert facts(graph)[1:] == [
        ("a", 5, weights("b", "c", "head"), None),
        ("b", 4, weights("c", "head"), None),
        ("c", 6, weights("head"), None),
        ("head", 4, (), "network output"),
    ]
    parts = [group_of(graph, name).units for name in "abc"]
    assert inputs(graph, "head") == np.concatenate(parts).tolist()


def test_depthwise_and_squeeze_excitation() -> None:
    graph = analysed("Separable")
    assert facts(graph)[1:] == [
        ("expand", 12, weights("squeeze", "project"), None),
        ("squeeze", 4, weights("excite"), None),
        ("project", 8, weights("head"), None),
        ("head", 4, (), "network output"),
    ]
    assert group_of(graph, "expand").writers == ("expand", "excite")
    assert not group_of(graph, "expand").residual  # a product is not a residual stream
    # A depthwise convolution neither writes nor reads: its channels pass through.
    depthwise = graph.by_tensor["depthwise.weight", 0]
    assert (depthwise.writes, depthwise.reads) == (False, False)
    assert outputs(graph, "depthwise") == group_of(graph, "expand").units.tolist()
    assert graph.by_tensor["depthwise.groups", 0].units.tolist() == outputs(graph, "depthwise")


def test_grouped_convolutions_tie_coarser_and_coarser() -> None:
    """4 groups of 4 channels and 8 groups of 2 to 4: units are of 4 channels, and 8 behind."""
    graph = analysed("Grouped")
    stream = group_of(graph, "stem")
    assert (stream.size, stream.writers) == (4, ("stem", "grouped", "widen"))
    assert stream.readers == weights("grouped", "widen", "head")
    for name, channels in (("stem", 4), ("grouped", 4), ("widen", 8)):
        assert outputs(graph, name) == np.repeat(stream.units, channels).tolist()
    for name, channels in (("grouped", 4), ("widen", 4), ("head", 8)):
        assert inputs(graph, name) == np.repeat(stream.units, channels).tolist()
    assert graph.by_tensor["grouped.groups", 0].units.tolist() == stream.units.tolist()
    assert graph.by_tensor["widen.groups", 0].units.tolist() == np.repeat(stream.units, 2).tolist()


def test_few_large_groups_lose_the_same_places() -> None:
    """2 groups of 8 channels to 12: a unit is one place in both, read or written."""
    graph = analysed("FewGroups")
    assert facts(graph)[1:] == [
        ("stem", 8, weights("grouped"), None),
        ("grouped", 12, weights("head"), None),
        ("head", 4, (), "network output"),
    ]
    stem, grouped = group_of(graph, "stem").units, group_of(graph, "grouped").units
    assert inputs(graph, "grouped") == outputs(graph, "stem") == np.tile(stem, 2).tolist()
    assert inputs(graph, "head") == outputs(graph, "grouped") == np.tile(grouped, 2).tolist()
    assert graph.by_tensor["grouped.weight", 1].units.tolist() == stem.tolist()
    assert ("grouped.groups", 0) not in graph.by_tensor  # there stay two


def test_whole_groups_on_request() -> None:
    """As format version 1 knows them: the two groups are the two units."""
    graph = analyse(NETWORKS["FewGroups"](), (3, 12, 12), whole_groups=True)
    assert facts(graph)[1:] == [
        ("stem", 2, weights("grouped", "head"), None),
        ("head", 4, (), "network output"),
    ]
    units = group_of(graph, "stem").units
    assert inputs(graph, "grouped") == np.repeat(units, 8).tolist()
    assert outputs(graph, "grouped") == np.repeat(units, 12).tolist()
    assert graph.by_tensor["grouped.groups", 0].units.tolist() == units.tolist()


def test_a_convolution_called_twice() -> None:
    graph = analysed("Shared")
    assert facts(graph)[1:] == [
        ("stem", 8, weights("twice", "head"), None),
        ("head", 4, (), "network output"),
    ]


def test_an_operation_that_mixes_channels() -> None:
    graph = analysed("Mixing")
    assert not graph.unknown
    assert facts(graph)[1:] == [
        ("a", 6, weights("b"), None),
        ("b", 6, weights("c"), "cumsum over channels"),
        ("c", 5, weights("head"), None),
        ("head", 4, (), "network output"),
    ]


def test_an_unknown_operation_is_named() -> None:
    model = lived_in(Unknown())
    graph = analyse(model, (3, 12, 12))
    assert graph.unknown == ("fft_fft",)
    assert facts(graph)[1:] == [
        ("a", 6, weights("b"), None),
        ("b", 6, (), "unknown operation fft_fft"),
        ("c", 5, weights("head"), None),
        ("c.inputs", 6, weights("c"), "conv2d of a fixed width"),  # what no layer writes
        ("head", 4, (), "network output"),
    ]
    shrinks_exactly(model, graph, 12)


# Awkward operations: what cannot shrink is frozen, and all else shrinks exactly


class Between(nn.Module):
    """An operation between a and b; c reads a as well, so only the operation can freeze a."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor], width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(width, 6), conv(8, 6)
        self.operation = operation
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        y = F.adaptive_avg_pool2d(self.b(self.operation(x)), 5)
        return self.head(torch.tanh(y + F.adaptive_avg_pool2d(self.c(x), 5)).mean((2, 3)))


class Times(nn.Module):
    """A parameter of the user's, multiplied in, after a function of it."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.rand(shape)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.function(self.scale)


class Clamp(nn.Module):
    """An elementwise function with a second tensor in it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x, max=self.largest)


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(8, 8), conv(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(x)))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        return nn.utils.weight_norm(conv(8, 8))


def shuffled(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)


def tried(model: nn.Module) -> ChannelGraph:
    return tried_graph(model, (3, 12, 12))


FROZEN: dict[str, tuple[Callable[[], Between], str]] = {
    "unbind": (lambda: Between(lambda x: torch.stack(x.unbind(1)[::-1], 1)), "this use of unbind"),
    "tuple": (lambda: Between(lambda x: x.max(1, keepdim=True)[0], 1), "max over channels"),
    "permute": (lambda: Between(lambda x: x.permute(0, 2, 1, 3), 12), "conv2d along it"),
    "roll": (lambda: Between(lambda x: x.roll(1, 1)), "roll along it"),
    "softmax": (lambda: Between(lambda x: x.softmax(1)), "softmax over channels"),
    "sum": (lambda: Between(lambda x: x / (1 + x.sum(1, keepdim=True))), "sum over channels"),
    "mean": (lambda: Between(lambda x: x - x.mean(1, keepdim=True)), "mean over channels"),
    "pooling without a batch": (
        lambda: Between(
            lambda x: F.avg_pool2d(x.flatten(2), 3, 1, 1).view(x.size(0), x.size(1), 12, 12)
        ),
        "avg_pool2d along it",
    ),
    "LayerNorm": (lambda: Between(nn.LayerNorm([8, 12, 12])), "layer_norm over channels"),
    "LocalResponseNorm": (lambda: Between(nn.LocalResponseNorm(3)), "avg_pool3d along it"),
    "Softmax2d": (lambda: Between(nn.Softmax2d()), "softmax over channels"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_an_awkward_operation_touches_is_frozen(name: str) -> None:
    make, reason = FROZEN[name]
    model = lived_in(make())
    graph = tried(model)
    assert writing(graph, "a").frozen == reason
    assert [g.name for g in graph.prunable] == ["b"]
    shrinks_exactly(model, graph, 12)


def test_a_use_that_is_not_understood_is_named_in_the_result() -> None:
    assert analyse(FROZEN["unbind"][0](), (3, 12, 12)).unknown == ("unbind",)
    assert not analyse(FROZEN["softmax"][0](), (3, 12, 12)).unknown


NUMBERED = "without some of them forward fails: "
"""A number that is written into forward."""
DIFFERENT = "without some of them the outputs differ by "
FOUND_OUT: dict[str, tuple[Callable[[], Between], str]] = {
    "slice": (lambda: Between(lambda x: x[:, :4], 4), f"{NUMBERED}RuntimeError: Given groups=1"),
    "split": (lambda: Between(lambda x: torch.split(x, 4, 1)[1], 4), f"{NUMBERED}IndexError"),
    "number of channels": (lambda: Between(lambda x: x * x.size(1) ** -0.5), DIFFERENT),
    "picked by number": (lambda: Between(lambda x: x * x[:, 1:2]), DIFFERENT),
    "width in view": (
        lambda: Between(lambda x: x.view(-1, 8, 6, 24)),
        f"{NUMBERED}RuntimeError: shape '[-1, 8, 6, 24]' is invalid",
    ),
    "width in reshape": (
        lambda: Between(lambda x: torch.reshape(x, (-1, 8, 6, 24))),
        f"{NUMBERED}RuntimeError: shape '[-1, 8, 6, 24]' is invalid",
    ),
    "channels into space": (
        lambda: Between(lambda x: x.flatten(1).view(-1, 8, 12, 12)),
        f"{NUMBERED}RuntimeError: shape '[-1, 8, 12, 12]' is invalid",
    ),
    "training alone": (lambda: Between(WideInTraining()), "in training mode the outputs"),
}


class WideInTraining(nn.Module):
    """A width that forward uses in training mode only, which no capture shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.size(1) if self.training else x


@pytest.mark.parametrize("name", FOUND_OUT)
def test_what_the_graph_does_not_show_is_found_out(name: str) -> None:
    make, reason = FOUND_OUT[name]
    model = lived_in(make())
    assert [g.name for g in analyse(model, (3, 12, 12)).prunable] == ["a", "b"]
    graph = tried(model)
    frozen = writing(graph, "a").frozen
    assert frozen
    assert frozen.startswith(reason)
    if reason.startswith(NUMBERED):  # it says where
        assert " at test_groups.py:" in frozen
    assert [g.name for g in graph.prunable] == ["b"]
    shrinks_exactly(model, graph, 12)


UNDERSTOOD: dict[str, tuple[Callable[[], Between], int, int]] = {
    # Units of the group that a writes, and channels of each.
    "ellipsis": (lambda: Between(lambda x: x[..., 1:]), 8, 1),
    "half": (lambda: Between(lambda x: x[:, : x.size(1) // 2], 4), 4, 2),
    "chunk": (lambda: Between(lambda x: x.chunk(2, 1)[0], 4), 4, 2),
    "shuffle": (lambda: Between(shuffled), 4, 2),
    "cat of a tuple": (lambda: Between(lambda x: torch.cat(x.split(2, 1), 1)), 2, 4),
    "parameter": (lambda: Between(Times(lambda p: p, 1, 8, 1, 1)), 8, 1),
    "parameter without batch": (lambda: Between(Times(lambda p: p, 8, 1, 1)), 8, 1),
    "function of a parameter": (lambda: Between(Times(torch.sigmoid, 1, 8, 1, 1)), 8, 1),
    "clamp": (lambda: Between(Clamp()), 8, 1),
    "GroupNorm": (lambda: Between(nn.GroupNorm(2, 8)), 2, 4),
    "InstanceNorm": (lambda: Between(nn.InstanceNorm2d(8, affine=True)), 8, 1),
    "PixelShuffle": (lambda: Between(nn.PixelShuffle(2), 2), 2, 4),
    "shared weight": (lambda: Between(Tied()), 8, 1),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_once_was_awkward_shrinks_exactly(name: str) -> None:
    make, size, width = UNDERSTOOD[name]
    model = lived_in(make())
    graph = tried(model)
    assert not graph.unknown
    group = writing(graph, "a")
    assert (group.size, group.width) == (size, width)
    assert [g.name for g in graph.prunable] == ["a", "b"]
    shrinks_exactly(model, graph, 12)


def test_a_transposed_convolution_has_a_group_of_its_own() -> None:
    model = lived_in(Between(nn.ConvTranspose2d(8, 8, 3, padding=1)))
    graph = tried(model)
    assert [(g.name, g.size) for g in graph.prunable] == [("a", 8), ("operation", 8), ("b", 6)]
    assert writing(graph, "a").readers == weights("operation", "c")
    assert [axis.dim for axis in graph.writers if axis.layer == "operation"] == [1]
    shrinks_exactly(model, graph, 12)


@pytest.mark.parametrize("hooks", [False, True])
def test_weight_norm_keeps_what_its_norms_are_taken_over(hooks: bool) -> None:
    operation = old_weight_norm() if hooks else parametrizations.weight_norm(conv(8, 8))
    model = lived_in(Between(operation))
    graph = analyse(model, (3, 12, 12))
    assert writing(graph, "a").frozen == "weight_norm takes norms over it"
    direction = "operation.weight_v" if hooks else "operation.parametrizations.weight.original1"
    assert [(g.name, g.size) for g in graph.prunable] == [(direction, 8), ("b", 6)]
    if hooks:  # whose weight is computed, and kept beside what it is computed from
        assert model.operation.weight.grad_fn is not None
    assert as_json(tried(model)) == as_json(graph)
    shrinks_exactly(model, graph, 12)


class PooledOverChannels(nn.Module):
    """AvgPool1d reads (N, C) as one image of N channels: it mixes neighbouring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)
        self.pool, self.head = nn.AvgPool1d(3, 1, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))))


def test_pooling_over_channels_is_not_pooling_over_space() -> None:
    model = PooledOverChannels()
    graph = analyse(model, (3, 12, 12))
    assert writing(graph, "b").frozen == "avg_pool1d along it"
    shrinks_exactly(model, graph, 12)


def test_a_single_channel_that_is_broadcast_is_no_group() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.one, self.head = conv(3, 8), conv(8, 1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.a(x))
            return self.head((x * torch.sigmoid(self.one(x))).mean((2, 3)))

    model = Attention()
    graph = analyse(model, (3, 12, 12))
    assert [g.name for g in graph.groups] == ["input", "a", "head"]
    assert [g.name for g in graph.prunable] == ["a"]
    assert not graph.unknown
    shrinks_exactly(model, graph, 12)


def squeezed(x: torch.Tensor) -> torch.Tensor:
    n, c, _, _ = x.shape
    return x * torch.sigmoid(x.mean((2, 3)).view(n, c)).view(n, c, 1, 1)


# Everyday operations must not freeze anything.
EVERYDAY: dict[str, Callable[[], Between]] = {
    "sizes unpacked": lambda: Between(squeezed),
    "flattened and back": lambda: Between(
        lambda x: x.view(x.size(0), x.size(1), -1).view(x.shape[0], x.shape[1], 12, 12)
    ),
    "numbers": lambda: Between(lambda x: 1 - 2 * x / 3 + 0.5),
    "scalar parameter": lambda: Between(Times(lambda p: p)),
    "one-element parameter": lambda: Between(Times(torch.sigmoid, 1)),
    "squared": lambda: Between(lambda x: x * x),
    "spatial slice": lambda: Between(lambda x: x[:, :, ::2, 1:]),
    "centred": lambda: Between(lambda x: x - x.mean((2, 3), keepdim=True)),
    "pooling": lambda: Between(lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2)),
    "resized": lambda: Between(lambda x: F.interpolate(x[:, :, 1:], size=x.shape[2:])),
    "padded": lambda: Between(lambda x: F.pad(x, (1, 1, 2, 0))),
    "cast": lambda: Between(lambda x: x.contiguous().clone().to(x.dtype)),
    "doubled": lambda: Between(lambda x: torch.cat([x, -x], dim=1), 16),
    "stacked in space": lambda: Between(lambda x: torch.cat([x, x.abs()], dim=-1)),
    "modules": lambda: Between(
        nn.Sequential(nn.ZeroPad2d(1), nn.Upsample(scale_factor=2), nn.GELU(), nn.MaxPool2d(2))
    ),
}


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_operations_freeze_nothing(name: str) -> None:
    model = EVERYDAY[name]()
    graph = analyse(model, (3, 12, 12))
    assert not graph.unknown
    assert [g.name for g in graph.prunable] == ["a", "b"]
    shrinks_exactly(model, graph, 12)


# Networks that cannot be analysed


class Branching(nn.Module):
    """Data-dependent control flow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Raising(nn.Module):
    """A forward with a message of several lines."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("first line\nsecond line")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Branching(),
            r"Branching cannot be captured: it takes a decision by the value of a tensor at "
            r"test_groups.py:\d+: return x if x.sum\(\) > 0 else -x",
        ),
        (
            Raising(),
            r"Raising cannot be captured with inputs of 2x3x8x8: ValueError: first line at "
            r"test_groups.py:\d+: raise ValueError\(.*\)",
        ),
    ],
)
def test_a_network_that_cannot_be_captured(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        analyse(model, (3, 8, 8))
    assert re.fullmatch(message, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(3, 13, 17), (4, 12, 12), (3, 1, 1)])
def test_images_that_do_not_fit(size: tuple[int, int, int]) -> None:
    shape = "x".join(map(str, (2, *size)))
    with pytest.raises(ModelError, match=f"Plain cannot be captured with inputs of {shape}: "):
        analyse(NETWORKS["Plain"](), size)


def test_the_place_in_forward_is_named() -> None:
    place = r" at networks\.py:\d+: x = self\.features\(x\)"
    with pytest.raises(ModelError, match=place) as caught:
        analyse(NETWORKS["Plain"](), (4, 12, 12))
    assert "\n" not in str(caught.value)


class Optional(nn.Module):
    """A second argument with a default, and tensors made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = conv(3, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        x = F.relu(self.a(x)) + torch.ones(1) + x.new_zeros(x.size(0), 1, 1, 1)
        return self.head(x.mean((2, 3)))


def test_arguments_with_defaults_and_tensors_made_in_forward() -> None:
    model = Optional()
    graph = analyse(model, (3, 12, 12))
    assert [g.name for g in graph.prunable] == ["a"]
    shrinks_exactly(model, graph, 12)


# What analysis leaves alone


@pytest.mark.parametrize("found", [analyse, tried_graph])
@pytest.mark.parametrize("make", [*NETWORKS.values(), Optional])
def test_analysis_changes_nothing(
    make: Callable[[], nn.Module], found: Callable[..., ChannelGraph]
) -> None:
    model = make().train()
    first = next(model.children()).eval()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    found(model, (3, 12, 12))
    assert not first.training
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name", some_slow(("resnet18", "resnet20", "resnext50_32x4d"), {"resnext50_32x4d"})
)
def test_the_meta_device_gives_the_same_graph(name: str) -> None:
    graph = analyse(build_model(name, num_classes=7), input_size_of(name))
    assert as_json(small_graph(name)) == as_json(graph)


def test_precision_and_mode_do_not_matter() -> None:
    model, graph = built("resnet20")
    assert as_json(analyse(model.half().train(), (3, 16, 16))) == as_json(graph)


@pytest.mark.parametrize(
    "name", some_slow(("resnet18", "resnet20", "resnext50_32x4d"), {"resnext50_32x4d"})
)
def test_the_graph_of_a_shrunk_network_is_the_shrunk_graph(name: str) -> None:
    model, graph = built(name)
    kept = random_mask(graph, 0)
    # Few groups that are left would shrink in another way: not one by one, but all alike.
    smaller, whole = shrink(model, graph, kept), name.startswith("resnext")
    again = analyse(smaller, input_size_of(name), whole_groups=whole)
    removed = graph.removed(kept)
    for new, old in zip(again.axes, removed.axes, strict=True):
        assert (new.tensor, new.dim, len(new.units)) == (old.tensor, old.dim, len(old.units))
        assert (new.writes, new.reads) == (old.writes, old.reads)
    for new, old in zip(again.read_sites, removed.read_sites, strict=True):
        assert (new.weight, new.dim, len(new.units)) == (old.weight, old.dim, len(old.units))
    for new, old in zip(again.additions, removed.additions, strict=True):
        assert (new.number, len(new.units)) == (old.number, len(old.units))
    everything = again.everything()
    assert cost.totals(again, everything) == cost.totals(graph, kept)
    assert cost.totals(removed, kept) == cost.totals(graph, kept)
    assert [(g.name, g.size, g.writers, g.readers, g.residual) for g in again.groups] == [
        (g.name, g.size, g.writers, g.readers, g.residual) for g in removed.groups
    ]


# Units


@settings(deadline=None)
@given(
    num_atoms=st.integers(1, 30),
    pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40),
    used=st.lists(st.integers(0, 29), max_size=20),
)
def test_components_against_repeated_relabelling(
    num_atoms: int, pairs: list[tuple[int, int]], used: list[int]
) -> None:
    """Those without a used atom have no number."""
    used = [atom % num_atoms for atom in used]
    pairs = [(a % num_atoms, b % num_atoms) for a, b in pairs]
    label = list(range(num_atoms))
    for a, b in pairs:
        old, new = max(label[a], label[b]), min(label[a], label[b])
        label = [new if x == old else x for x in label]
    counted = {label[atom] for atom in used}
    numbers = {first: number for number, first in enumerate(sorted(counted))}
    ties = [(np.array([a]), np.array([b])) for a, b in pairs]
    found = components(num_atoms, ties, np.array(used, np.int64))
    assert found.tolist() == [numbers.get(x, -1) for x in label]
