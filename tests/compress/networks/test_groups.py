"""Channel groups of known networks by hand, against Torch-Pruning, and of awkward networks."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch_pruning
from conftest import RESNETS, built, lived_in, random_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, conv
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compress.errors import ModelError
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Group
from compress.networks.models import build_model
from compress.networks.partition import components
from compress.networks.shrink import mask_, shrink


def group_of(graph: ChannelGraph, name: str) -> Group:
    return next(group for group in graph.groups if group.name == name)


def writing(graph: ChannelGraph, layer: str) -> Group:
    return next(group for group in graph.groups if layer in group.writers)


def as_json(graph: ChannelGraph) -> str:
    return json.dumps(dataclasses.asdict(graph), default=lambda array: array.tolist())


def shrinks_exactly(model: nn.Module, graph: ChannelGraph, size: int) -> None:
    """Assert masked == shrunk in float64 for random masks that really change the logits.

    1e-12 of the largest logit leaves room for sums in another order, and for nothing else.
    """
    model = model.double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    for seed in range(3):
        kept = random_mask(graph, seed)
        masked = copy.deepcopy(model)
        mask_(masked, graph, kept)
        with torch.no_grad():
            expected, before = masked(images), model(images)
            actual = shrink(model, graph, kept)(images)
        largest = expected.abs().max()
        assert (before - expected).abs().max() > 1e-6 * largest
        assert (actual - expected).abs().max() <= 1e-12 * largest


# Known networks


def test_resnet18_by_hand() -> None:
    _, graph = built("resnet18")
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
    assert found == expected
    frozen = {g.name: g.frozen for g in graph.groups if g.frozen}
    assert frozen == {"input": "network input", "fc": "network output"}
    assert {g.width for g in graph.groups} == {1}
    assert not graph.unknown


def test_resnet50_by_hand() -> None:
    _, graph = built("resnet50")
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    names = ["input", "conv1"]
    for stage, count in blocks.items():
        for block in range(count):
            names += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            names += [f"layer{stage}.0.conv3"] if block == 0 else []
    assert [g.name for g in graph.groups] == [*names, "fc"]
    assert [g.name for g in graph.groups if g.residual] == [f"layer{s}.0.conv3" for s in blocks]
    stem = group_of(graph, "conv1")
    assert stem.readers == ("layer1.0.conv1", "layer1.0.downsample.0")
    for stage, count in blocks.items():
        stream = group_of(graph, f"layer{stage}.0.conv3")
        inner = tuple(f"layer{stage}.{b}" for b in range(count))
        first, *rest = (f"{block}.conv3" for block in inner)
        assert stream.writers == (first, f"{inner[0]}.downsample.0", *rest)
        after = (f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0")
        readers = tuple(f"{block}.conv1" for block in inner[1:])
        assert stream.readers == (*readers, *(after if stage < 4 else ("fc",)))
        assert stream.size == 128 << stage


def test_resnet20_by_hand() -> None:
    """Shortcuts of option A: a stage's stream runs on in the middle of the next stage's."""
    _, graph = built("resnet20")
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
        assert stream.readers == (*readers, "fc")
    inner = [g for g in graph.prunable if not g.residual]
    assert [(g.name, g.size) for g in inner] == [
        (f"{block}.conv1", 8 << s) for s in stage for block in stage[s]
    ]
    layers = {layer.name: layer for layer in graph.layers}
    stream = layers["layer2.0.conv2"].outputs
    assert stream[8:24].tolist() == layers["conv1"].outputs.tolist()
    assert layers["layer3.2.conv2"].outputs[16:48].tolist() == stream.tolist()
    assert layers["layer3.0.shortcut"].inputs.tolist() == layers["fc"].inputs[:16].tolist()
    assert layers["layer3.0.shortcut"].outputs.tolist() == layers["fc"].inputs[48:].tolist()


def test_resnext50_by_hand() -> None:
    _, graph = built("resnext50_32x4d")
    for stage, blocks in {1: 3, 2: 4, 3: 6, 4: 3}.items():
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            group = group_of(graph, f"{name}.conv1")
            assert group.writers == (f"{name}.conv1", f"{name}.conv2")
            assert group.readers == (f"{name}.conv2", f"{name}.conv3")
            assert (group.size, set(group.widths)) == (32, {2 << stage})
        stream = group_of(graph, f"layer{stage}.0.conv3")
        assert (stream.size, stream.width, stream.residual) == (128 << stage, 1, True)
    layer = next(layer for layer in graph.layers if layer.name == "layer1.0.conv2")
    assert layer.inputs.reshape(32, 4).tolist() == layer.outputs.reshape(32, 4).tolist()
    assert len({*layer.inputs.tolist()}) == 32


@pytest.mark.parametrize(("name", "channels"), [("resnet50", 11_392), ("resnet101", 20_096)])
def test_as_many_channels_as_the_original_counts(name: str, channels: int) -> None:
    """The research code of Molchanov et al. gates every convolution but the stem."""
    with torch.device("meta"):
        graph = analyse(build_model(name, num_classes=5), (3, 32, 32))
    prunable = {g.name: g.size * g.width for g in graph.prunable}
    assert prunable.pop("conv1") == 64
    assert sum(prunable.values()) == channels


@pytest.mark.parametrize("name", RESNETS)
def test_every_resnet_is_understood(name: str) -> None:
    with torch.device("meta"):
        graph = analyse(build_model(name, num_classes=5), (3, 32, 32))
    assert not graph.unknown
    assert {g.name for g in graph.groups if g.frozen} == {"input", "fc"}
    assert len({g.name for g in graph.groups}) == len(graph.groups)
    units = np.concatenate([g.units for g in graph.groups])
    assert sorted(units.tolist()) == list(range(graph.num_units))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
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
        found = set()
        for layer in graph.layers:
            for side, units in (("in", layer.inputs), ("out", layer.outputs)):
                if np.isin(group.units, units).all():
                    found.add((layer.name, side))
        assert found == expected, group.name


# The topologies of networks.py


def analysed(name: str) -> ChannelGraph:
    return analyse(NETWORKS[name](), (3, 12, 12))


def facts(graph: ChannelGraph) -> list[tuple[str, int, tuple[str, ...], str | None]]:
    return [(g.name, g.size, g.readers, g.frozen) for g in graph.groups]


def test_plain() -> None:
    graph = analysed("Plain")
    assert facts(graph) == [
        ("input", 3, ("features.0",), "network input"),
        ("features.0", 6, ("features.3",), None),
        ("features.3", 8, ("hidden",), None),
        ("hidden", 10, ("head",), None),
        ("head", 4, (), "network output"),
    ]
    assert group_of(graph, "features.3").widths == (1, 9)  # 3x3 positions of each channel
    hidden = next(layer for layer in graph.layers if layer.name == "hidden")
    assert hidden.inputs.tolist() == np.repeat(group_of(graph, "features.3").units, 9).tolist()


def test_pre_activation() -> None:
    graph = analysed("PreActivation")
    assert facts(graph)[1:] == [
        ("stem", 8, ("conv1", "head"), None),
        ("conv1", 12, ("conv2",), None),
        ("head", 4, (), "network output"),
    ]
    assert group_of(graph, "stem").writers == ("stem", "conv2")
    assert group_of(graph, "stem").residual


def test_concatenation() -> None:
    graph = analysed("Dense")
    assert facts(graph)[1:] == [
        ("a", 5, ("b", "c", "head"), None),
        ("b", 4, ("c", "head"), None),
        ("c", 6, ("head",), None),
        ("head", 4, (), "network output"),
    ]
    head = next(layer for layer in graph.layers if layer.name == "head")
    parts = [group_of(graph, name).units for name in "abc"]
    assert head.inputs.tolist() == np.concatenate(parts).tolist()


def test_depthwise_and_squeeze_excitation() -> None:
    graph = analysed("Separable")
    assert facts(graph)[1:] == [
        ("expand", 12, ("squeeze", "project"), None),
        ("squeeze", 4, ("excite",), None),
        ("project", 8, ("head",), None),
        ("head", 4, (), "network output"),
    ]
    assert group_of(graph, "expand").writers == ("expand", "excite")
    assert not group_of(graph, "expand").residual  # a product is not a residual stream
    depthwise = next(layer for layer in graph.layers if layer.name == "depthwise")
    assert depthwise.kind == "depthwise"
    assert depthwise.outputs.tolist() == group_of(graph, "expand").units.tolist()


def test_grouped_convolutions_tie_coarser_and_coarser() -> None:
    """3 groups of 4 channels and 6 groups of 2 to 4: units are of 4 channels, and 8 behind."""
    graph = analysed("Grouped")
    stream = group_of(graph, "stem")
    assert (stream.size, stream.writers) == (3, ("stem", "grouped", "widen"))
    assert stream.readers == ("grouped", "widen", "head")
    by_layer = {layer.name: layer for layer in graph.layers}
    for name, channels in (("stem", 4), ("grouped", 4), ("widen", 8), ("head", 0)):
        outputs = by_layer[name].outputs
        if channels:
            assert outputs.tolist() == np.repeat(stream.units, channels).tolist()


def test_a_convolution_called_twice() -> None:
    graph = analysed("Shared")
    assert facts(graph)[1:] == [
        ("stem", 8, ("twice", "head"), None),
        ("head", 4, (), "network output"),
    ]


def test_an_unknown_operation_is_named() -> None:
    graph = analysed("Unknown")
    assert graph.unknown == ("cumsum",)
    assert facts(graph)[1:] == [
        ("a", 6, ("b",), None),
        ("b", 6, (), "unknown operation cumsum"),
        ("input#2", 6, ("c",), "unknown operation cumsum"),  # what no layer writes
        ("c", 5, ("head",), None),
        ("head", 4, (), "network output"),
    ]


# Awkward operations: what they touch is frozen, the rest shrinks exactly


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


AWKWARD: dict[str, tuple[Callable[[], Between], str]] = {
    "slice": (lambda: Between(lambda x: x[:, :4], 4), "getitem"),
    "ellipsis": (lambda: Between(lambda x: x[..., 1:]), "getitem"),
    "chunk": (lambda: Between(lambda x: x.chunk(2, 1)[0], 4), "chunk"),
    "split": (lambda: Between(lambda x: torch.split(x, 4, 1)[1], 4), "split"),
    "unbind": (lambda: Between(lambda x: torch.stack(x.unbind(1)[::-1], 1)), "unbind"),
    "tuple": (lambda: Between(lambda x: x.max(1, keepdim=True)[0], 1), "max"),
    "permute": (lambda: Between(lambda x: x.permute(0, 2, 1, 3), 12), "permute"),
    "roll": (lambda: Between(lambda x: x.roll(1, 1)), "roll"),
    "softmax": (lambda: Between(lambda x: x.softmax(1)), "softmax"),
    "sum": (lambda: Between(lambda x: x / (1 + x.sum(1, keepdim=True))), "sum"),
    "mean over channels": (lambda: Between(lambda x: x - x.mean(1, keepdim=True)), "mean"),
    "shuffle": (lambda: Between(shuffled), "view"),
    "number of channels": (lambda: Between(lambda x: x * x.size(1) ** -0.5), "mul"),
    "width in view": (lambda: Between(lambda x: x.view(-1, 8, 6, 24)), "view"),
    "width in reshape": (lambda: Between(lambda x: torch.reshape(x, (-1, 8, 6, 24))), "reshape"),
    "channels into space": (lambda: Between(lambda x: x.flatten(1).view(-1, 8, 12, 12)), "view"),
    "pooling without a batch": (
        lambda: Between(
            lambda x: F.avg_pool2d(x.flatten(2), 3, 1, 1).view(x.size(0), x.size(1), 12, 12)
        ),
        "avg_pool2d",
    ),
    "cat of a tuple": (lambda: Between(lambda x: torch.cat(x.split(2, 1), 1)), "split"),
    "parameter": (lambda: Between(Times(lambda p: p, 1, 8, 1, 1)), "mul"),
    "parameter without batch": (lambda: Between(Times(lambda p: p, 8, 1, 1)), "mul"),
    "function of a parameter": (
        lambda: Between(Times(torch.sigmoid, 1, 8, 1, 1)),
        "tensor operation.scale",
    ),
    "clamp": (lambda: Between(Clamp()), "clamp"),
    "LayerNorm": (lambda: Between(nn.LayerNorm([8, 12, 12])), "operation"),
    "GroupNorm": (lambda: Between(nn.GroupNorm(2, 8)), "operation"),
    "InstanceNorm": (lambda: Between(nn.InstanceNorm2d(8, affine=True)), "operation"),
    "LocalResponseNorm": (lambda: Between(nn.LocalResponseNorm(3)), "operation"),
    "ConvTranspose": (lambda: Between(nn.ConvTranspose2d(8, 8, 3, padding=1)), "operation"),
    "PixelShuffle": (lambda: Between(nn.PixelShuffle(2), 2), "operation"),
    "Softmax2d": (lambda: Between(nn.Softmax2d()), "operation"),
    "weight norm": (lambda: Between(parametrizations.weight_norm(conv(8, 8))), "operation"),
    "weight norm by hooks": (lambda: Between(old_weight_norm()), "operation"),
    "shared weight": (lambda: Between(Tied()), "operation.first"),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_what_an_awkward_operation_touches_is_frozen(name: str) -> None:
    make, operation = AWKWARD[name]
    model = lived_in(make())
    graph = analyse(model, (3, 12, 12))
    frozen = writing(graph, "a").frozen
    assert frozen
    assert frozen.removeprefix("unknown operation ") == operation
    assert [g.name for g in graph.prunable] == ["b"]
    shrinks_exactly(model, graph, 12)


@pytest.mark.parametrize("name", sorted(set(AWKWARD) - {"function of a parameter"}))
def test_an_awkward_operation_is_named_in_the_result(name: str) -> None:
    make, operation = AWKWARD[name]
    assert operation in analyse(make(), (3, 12, 12)).unknown


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
    assert writing(graph, "b").frozen == "unknown operation pool"
    shrinks_exactly(model, graph, 12)


def test_broadcast_over_channels_freezes_the_single_channel() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.one, self.head = conv(3, 8), conv(8, 1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.a(x))
            return self.head((x * torch.sigmoid(self.one(x))).mean((2, 3)))

    model = Attention()
    graph = analyse(model, (3, 12, 12))
    assert writing(graph, "one").frozen == "broadcast over channels"
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
        (Branching(), "Branching cannot be traced by torch.fx: "),
        (Raising(), "Raising cannot be traced by torch.fx: first line"),
    ],
)
def test_a_network_that_cannot_be_traced(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        analyse(model, (3, 8, 8))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(3, 13, 17), (4, 12, 12), (3, 1, 1)])
def test_images_that_do_not_fit(size: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="does not accept images of size") as caught:
        analyse(NETWORKS["Plain"](), size)
    assert "x".join(map(str, size)) in str(caught.value)
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


@pytest.mark.parametrize("make", [*NETWORKS.values(), Optional])
def test_analysis_changes_nothing(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    first = next(model.children()).eval()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    analyse(model, (3, 12, 12))
    assert not first.training
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnext50_32x4d"])
def test_the_meta_device_gives_the_same_graph(name: str) -> None:
    _, graph = built(name, num_classes=3)
    with torch.device("meta"):
        weightless = build_model(name, num_classes=3)
    size = 16 if name == "resnet20" else 32
    assert as_json(analyse(weightless, (3, size, size))) == as_json(graph)


def test_precision_and_mode_do_not_matter() -> None:
    model, graph = built("resnet20")
    assert as_json(analyse(model.half().train(), (3, 16, 16))) == as_json(graph)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnext50_32x4d"])
def test_the_graph_of_a_shrunk_network_is_the_shrunk_graph(name: str) -> None:
    model, graph = built(name)
    kept = random_mask(graph, 0)
    size = 16 if name == "resnet20" else 32
    again, removed = analyse(shrink(model, graph, kept), (3, size, size)), graph.removed(kept)
    for new, old in zip(again.layers, removed.layers, strict=True):
        assert (new.name, new.kind, new.kernel) == (old.name, old.kind, old.kernel)
        assert (len(new.inputs), len(new.outputs)) == (len(old.inputs), len(old.outputs))
        assert (new.positions, new.conv_groups) == (old.positions, old.conv_groups)
    assert [(g.name, g.size, g.writers) for g in again.groups] == [
        (g.name, g.size, g.writers) for g in removed.groups
    ]


# Units


@settings(deadline=None)
@given(
    num_atoms=st.integers(1, 30),
    pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40),
)
def test_components_against_repeated_relabelling(
    num_atoms: int, pairs: list[tuple[int, int]]
) -> None:
    pairs = [(a % num_atoms, b % num_atoms) for a, b in pairs]
    label = list(range(num_atoms))
    for a, b in pairs:
        old, new = max(label[a], label[b]), min(label[a], label[b])
        label = [new if x == old else x for x in label]
    numbers = {first: number for number, first in enumerate(sorted(set(label)))}
    ties = [(np.array([a]), np.array([b])) for a, b in pairs]
    assert components(num_atoms, ties).tolist() == [numbers[x] for x in label]
