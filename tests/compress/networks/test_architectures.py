"""VGG, DenseNet, PreAct-ResNet and LeNet: published figures, groups, exact shrinking, recognition.

Sources. torchvision documents parameters and multiply-adds of its networks. LeNet-5: LeCun et al.
1998, section II.B, with max-pooling that has no weights. DenseNet-BC: Huang et al. 2017, table 2.
VGG-16 on CIFAR-10: Li et al. 2017, "Pruning Filters for Efficient ConvNets", table 1.
"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning
from conftest import LARGE, RESNETS, as_published, lived_in, random_mask, some_slow
from torch import nn
from torch.nn import functional as F

from compress.checkpoints.checkpoint import identify, load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.criteria.taylor import FoldedGate
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.architectures import (
    CifarDenseNet,
    DenseLayer,
    FitTo,
    PreActBlock,
    PreActBottleneck,
)
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph
from compress.networks.models import BUILTIN_MODELS, SMALL_IMAGE_MODELS, build_model, ends_of
from compress.networks.shrink import mask_, shrink, shrink_

NEW = tuple(name for name in BUILTIN_MODELS if name not in RESNETS)
PREACT = {
    "preact_resnet18": (PreActBlock, (2, 2, 2, 2)),
    "preact_resnet50": (PreActBottleneck, (3, 4, 6, 3)),
    "preact_resnet101": (PreActBottleneck, (3, 4, 23, 3)),
    "preact_resnet152": (PreActBottleneck, (3, 8, 36, 3)),
}
VGG = {
    "vgg11": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "vgg16": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
}


DENSENET = "densenet of 22 layers"
"""Blocks of three layers each, where the 16 of densenet_cifar prove no more."""


@functools.cache
def lenet(size: int, channels: int = 1) -> ChannelGraph:
    with torch.device("meta"):
        model = build_model("lenet", num_classes=10, in_channels=channels)
    return analyse(model, (channels, size, size))


def dense_cost(graph: ChannelGraph) -> tuple[int, int]:
    return cost.macs(graph, graph.everything()), cost.params(graph, graph.everything())


def network(name: str, classes: int) -> nn.Module:
    if name == DENSENET:
        return CifarDenseNet(22, 12, num_classes=classes)
    return build_model(name, num_classes=classes, in_channels=channels_of(name))


def without_bias(module: nn.Module, operations: int) -> int:
    """Take off the operation that Torch-Pruning counts for the bias at every position."""
    weights = sum(p.numel() for name, p in module.named_parameters() if name == "weight")
    return operations * weights // sum(p.numel() for p in module.parameters())


def channels_of(name: str) -> int:
    return 1 if name == "lenet" else 3


def size_of(name: str) -> int:
    """Return the least size at which every layer has something to do."""
    return 16 if name in SMALL_IMAGE_MODELS or name == DENSENET else 32


def in_float64(name: str, classes: int = 4) -> nn.Module:
    """Return a network with BatchNorm as after training; weights are drawn once, in float64."""
    with torch.device("meta"):
        model = network(name, classes).double()
    model.to_empty(device="cpu")
    # A prime number of draws, so that no two rows of a matrix are alike: VGG takes long to draw.
    noise = torch.randn(1_000_003, dtype=torch.float64)
    for parameter in model.parameters():
        count = parameter.numel()
        scale = math.sqrt(2 / parameter[0].numel())
        drawn = noise[:count] if count <= len(noise) else noise.repeat(-(-count // len(noise)))
        parameter.data.view(-1).copy_(drawn[:count]).mul_(scale)
    return lived_in(model).eval()


def images_for(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels_of(name), size_of(name), size_of(name), dtype=torch.float64)


# Figures


def test_lenet_by_hand() -> None:
    convolutions = (1 * 25 + 1) * 6 + (6 * 25 + 1) * 16
    linear = (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10
    macs = 25 * 6 * 28**2 + 6 * 25 * 16 * 10**2 + 400 * 120 + 120 * 84 + 84 * 10
    assert convolutions + linear == 61_706
    for size in (16, 28, 32, 50):  # resized on entry
        assert dense_cost(lenet(size)) == (macs, 61_706)
    assert dense_cost(lenet(32, channels=3))[1] == 61_706 + 2 * 25 * 6


@pytest.mark.parametrize(
    ("name", "macs", "params"), [("vgg11", 1.53e8, 9.2e6), ("vgg16", 3.13e8, 1.5e7)]
)
def test_cifar_vgg_by_formula(name: str, macs: float, params: float) -> None:
    weights = pixels = norms = 0
    inputs = 3
    for number, stage in enumerate(VGG[name]):
        for width in stage:
            weights += inputs * width * 9
            pixels += inputs * width * 9 * (32 >> number) ** 2
            norms, inputs = norms + 2 * width, width
    found = dense_cost(as_published(f"{name}_bn_cifar")[1])
    assert found == (pixels + 5120, weights + norms + 5130)
    assert (round(found[0], -6), float(f"{found[1]:.1e}")) == (macs, params)


@pytest.mark.parametrize("name", some_slow(PREACT))
def test_preact_resnets_by_formula(name: str) -> None:
    """The convolutions of torchvision's network with a stem of 3x3; BatchNorm where they read."""
    block, counts = PREACT[name]
    wide = block.expansion
    weights, macs, norms, inputs = 3 * 64 * 9, 3 * 64 * 9 * 32**2, 0, 64
    for stage, count in enumerate(counts):
        inner, before, side = 64 << stage, (32 >> max(0, stage - 1)) ** 2, (32 >> stage) ** 2
        for number in range(count):
            if wide == 1:
                parts = [(inputs * inner * 9, side), (inner * inner * 9, side)]
            else:
                early = before if number == 0 else side
                parts = [(inputs * inner, early), (inner**2 * 9, side), (inner**2 * 4, side)]
            if inputs != wide * inner:
                parts.append((inputs * wide * inner, side))
            weights += sum(weight for weight, _ in parts)
            macs += sum(weight * positions for weight, positions in parts)
            norms += 2 * (inputs + inner * (1 if wide == 1 else 2))
            inputs = wide * inner
    expected = macs + inputs * 10, weights + norms + 2 * inputs + inputs * 10 + 10
    assert dense_cost(as_published(name)[1]) == expected
    if name == "preact_resnet18":
        assert round(expected[1] / 1e6, 2) == 11.17


@pytest.mark.parametrize(("depth", "growth", "millions"), [(100, 12, 0.8), (250, 24, 15.3)])
def test_cifar_densenet_by_the_table_of_huang_et_al(
    depth: int, growth: int, millions: float
) -> None:
    with torch.device("meta"):
        model = CifarDenseNet(depth, growth)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.slow
def test_densenet_cifar_by_formula() -> None:
    macs, params, width = 3 * 24 * 9 * 32**2, 3 * 24 * 9, 24
    for stage in range(3):
        side = (32 >> stage) ** 2
        for _ in range(16):
            macs += (width * 48 + 48 * 12 * 9) * side
            params += width * 48 + 48 * 12 * 9 + 2 * (width + 48)
            width += 12
        if stage < 2:
            macs, params = macs + width * (width // 2) * side, params + width * (width // 2 + 2)
            width //= 2
    assert (round(params / 1e6, 2), width) == (0.77, 342)
    expected = macs + width * 10, params + 2 * width + width * 10 + 10
    assert dense_cost(as_published("densenet_cifar")[1]) == expected


# What the layers compute


def norm_of(x: torch.Tensor, layer: nn.BatchNorm2d) -> torch.Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)


@pytest.mark.parametrize(("inputs", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_a_preact_block_by_its_formula(inputs: int, stride: int) -> None:
    block = lived_in(PreActBlock(inputs, 8, stride)).double().eval()
    x = torch.randn(2, inputs, 6, 6, dtype=torch.float64)
    before = x.clone()
    y = F.relu(norm_of(x, block.bn1))  # type: ignore
    shortcut = x
    if (inputs, stride) != (8, 1):
        shortcut = F.conv2d(y, block.shortcut.weight, stride=stride)  # type: ignore
    y = F.conv2d(y, block.conv1.weight, stride=stride, padding=1)  # type: ignore
    y = F.conv2d(F.relu(norm_of(y, block.bn2)), block.conv2.weight, padding=1)  # type: ignore
    torch.testing.assert_close(block(x), y + shortcut, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)  # the identity path is not activated in place


@pytest.mark.parametrize(("inputs", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_a_preact_bottleneck_by_its_formula(inputs: int, stride: int) -> None:
    block = lived_in(PreActBottleneck(inputs, 2, stride)).double().eval()
    x = torch.randn(2, inputs, 6, 6, dtype=torch.float64)
    y = F.relu(norm_of(x, block.bn1))  # type: ignore
    shortcut = x
    if (inputs, stride) != (8, 1):
        shortcut = F.conv2d(y, block.shortcut.weight, stride=stride)  # type: ignore
    y = F.relu(norm_of(F.conv2d(y, block.conv1.weight), block.bn2))  # type: ignore
    y = F.conv2d(y, block.conv2.weight, stride=stride, padding=1)  # type: ignore
    y = F.conv2d(F.relu(norm_of(y, block.bn3)), block.conv3.weight)  # type: ignore
    torch.testing.assert_close(block(x), y + shortcut, rtol=1e-12, atol=1e-12)


def test_a_dense_layer_by_its_formula() -> None:
    layer = lived_in(DenseLayer(5, 3)).double().eval()
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    y = F.conv2d(F.relu(norm_of(x, layer.bn1)), layer.conv1.weight)  # type: ignore
    y = F.conv2d(F.relu(norm_of(y, layer.bn2)), layer.conv2.weight, padding=1)  # type: ignore
    torch.testing.assert_close(layer(x), torch.cat([x, y], 1), rtol=1e-12, atol=1e-12)


def test_only_images_of_another_size_are_resized() -> None:
    x = torch.randn(2, 1, 32, 32)
    assert FitTo(32)(x) is x
    ramp = torch.arange(28.0).expand(1, 1, 28, 28)
    resized = FitTo(32)(ramp)
    # Pixel centres: position i of 32 lies at (i + 1/2) 28 / 32 - 1/2 of 28.
    expected = ((torch.arange(32) + 0.5) * 28 / 32 - 0.5).clamp(0, 27)
    torch.testing.assert_close(resized[0, 0, 5], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize(("size", "resizes"), [(32, False), (28, True)])
def test_a_recorded_lenet_resizes_only_where_it_must(size: int, resizes: bool) -> None:
    """Recording must not warn either; pytest makes an error of a warning."""
    model = build_model("lenet", num_classes=10, in_channels=1).eval()
    images = torch.randn(2, 1, size, size)
    recorded = torch.jit.trace(model, images)  # type: ignore[no-untyped-call]
    assert ("upsample" in str(recorded.inlined_graph)) == resizes
    torch.testing.assert_close(recorded(images), model(images))


@pytest.mark.parametrize("name", some_slow(n for n in SMALL_IMAGE_MODELS if n not in RESNETS))
def test_small_image_networks_take_any_images(name: str) -> None:
    for channels, size in ((1, 16), (2, 28), (3, 33)):
        with torch.device("meta"):
            model = build_model(name, num_classes=6, in_channels=channels).eval()
            shape = model(torch.empty(2, channels, size, size)).shape
        assert shape == (2, 6), (channels, size)


# Groups


@pytest.mark.parametrize("name", some_slow(NEW))
def test_every_network_is_understood(name: str) -> None:
    network, graph = as_published(name)
    classifier = ends_of(name)[1]
    assert not graph.unknown
    assert {g.name: g.frozen for g in graph.groups if g.frozen} == {
        "input": "network input",
        classifier: "network output",
    }
    units = np.concatenate([g.units for g in (*graph.groups, *graph.branches)])
    assert sorted(units.tolist()) == list(range(graph.num_units))
    # No layer escapes: whatever writes channels belongs to a group.
    writers = {site.weight.removesuffix(".weight") for site in graph.read_sites}
    assert {name for g in graph.groups for name in g.writers} >= writers
    weighted = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert writers == weighted


def test_lenet_has_four_groups() -> None:
    graph = lenet(28)
    found = [(g.name, g.size, g.readers, g.widths) for g in graph.prunable]
    assert found == [
        # Along the weight and bias of the writer, and the weight that reads.
        ("conv1", 6, ("conv2.weight",), (1, 1, 1)),
        ("conv2", 16, ("fc1.weight",), (1, 1, 25)),
        ("fc1", 120, ("fc2.weight",), (1, 1, 1)),
        ("fc2", 84, ("fc.weight",), (1, 1, 1)),
    ]


def test_preact_resnet18_by_hand() -> None:
    """A stream is read by the first convolutions behind it, and by the next stage's shortcut."""
    _, graph = as_published("preact_resnet18")
    streams = [(g.name, g.writers, g.readers) for g in graph.groups if g.residual]
    names = ["conv1", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    assert sorted(name for name, _, _ in streams) == sorted(names)
    for stage, (name, writers, readers) in enumerate(sorted(streams), 1):
        here, after = f"layer{stage}", f"layer{stage + 1}.0"
        assert set(writers) - {"conv1", f"{here}.0.shortcut"} == {
            f"{here}.0.conv2",
            f"{here}.1.conv2",
        }, name
        inner = {f"{here}.1.conv1"} | ({f"{here}.0.conv1"} if stage == 1 else set())
        assert {reader.removesuffix(".weight") for reader in readers} - inner == (
            {f"{after}.conv1", f"{after}.shortcut"} if stage < 4 else {"fc"}
        )


@pytest.mark.slow
def test_what_a_dense_layer_appends_is_read_to_the_end_of_the_block() -> None:
    _, graph = as_published("densenet_cifar")
    groups = {g.name: g for g in graph.groups}
    for number in (0, 7, 15):
        readers = groups[f"features.0.{number}.conv2"].readers
        assert readers == (
            *(f"features.0.{n}.conv1.weight" for n in range(number + 1, 16)),
            "features.1.2.weight",
        )
    parts = [groups["conv1"], *(groups[f"features.0.{n}.conv2"] for n in range(16))]
    expected = np.concatenate([part.units for part in parts])
    assert graph.by_tensor["features.1.2.weight", 1].units.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "every"),
    [
        pytest.param("vgg11_bn", -2, marks=pytest.mark.slow),
        pytest.param("densenet121", -9, marks=pytest.mark.slow),
        ("preact_resnet18", 1),
        (DENSENET, -2),
    ],
)
def test_coupled_and_counted_as_torch_pruning_does(name: str, every: int) -> None:
    """The same sets go together, and what it cuts out leaves the same tensors as a shrink."""
    model = network(name, 4).eval()
    images = torch.randn(1, 3, 32, 32)
    graph = analyse(model, (3, 32, 32))
    theirs = copy.deepcopy(model)
    dependencies = torch_pruning.DependencyGraph().build_dependency(theirs, images)
    names = {module: name for name, module in theirs.named_modules()}
    rng, kept = np.random.default_rng(0), graph.everything()
    for group in graph.prunable[::every]:
        writer = theirs.get_submodule(group.writers[0])
        cut = (
            torch_pruning.prune_linear_out_channels
            if isinstance(writer, nn.Linear)
            else torch_pruning.prune_conv_out_channels
        )
        indices = sorted(rng.choice(group.size, group.size // 3, replace=False).tolist())
        together = dependencies.get_pruning_group(writer, cut, indices)
        expected = {
            (names[dep.target.module], "in" if "in_channels" in dep.handler.__name__ else "out")
            for dep, _ in together
            if dep.target.module in names
        }
        found = {
            (axis.layer, "out" if axis.dim == 0 else "in")
            for axis in graph.axes
            if axis.tensor.endswith(".weight") and np.isin(group.units, axis.units).all()
        }
        assert found == expected, group.name
        together.prune()
        kept[group.units[indices]] = False
    smaller = shrink(model, graph, kept)
    for (key, expected_tensor), (other, actual) in zip(
        theirs.state_dict().items(), smaller.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(expected_tensor, actual), key
    assert cost.params(graph, kept) == sum(p.numel() for p in theirs.parameters())
    _, _, counts, _ = torch_pruning.utils.count_ops_and_params(theirs, images, layer_wise=True)
    weighted = {m: n for m, n in counts.items() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert cost.macs(graph, kept) == sum(without_bias(m, n) for m, n in weighted.items())


# Shrinking


SHRUNK_TWICE = ("lenet", "preact_resnet18", "densenet_cifar", DENSENET)


@pytest.mark.parametrize("name", some_slow((*NEW, DENSENET), {*LARGE, "vgg11_bn"}))
def test_masked_equals_shrunk_in_float64(name: str) -> None:
    model = in_float64(name)
    images = images_for(name)
    graph = analyse(model, images.shape[1:])
    for seed in (0, 1) if name in SHRUNK_TWICE else (0,):
        kept = random_mask(graph, seed, 0.3 + 0.3 * seed)
        smaller = copy.deepcopy(model) if name in SHRUNK_TWICE else model  # VGG takes a gigabyte
        with torch.no_grad():
            before = smaller(images)
            mask_(smaller, graph, kept)
            expected = smaller(images)
            shrink_(smaller, graph, kept)
            actual = smaller(images)
        largest = expected.abs().max()
        assert (before - expected).abs().max() > 1e-3 * largest  # the mask did something
        assert (actual - expected).abs().max() <= 1e-9 * largest
        assert sum(p.numel() for p in smaller.parameters()) == cost.params(graph, kept)


@pytest.mark.parametrize(
    "name",
    some_slow(
        ("lenet", "preact_resnet18", "preact_resnet50", "densenet_cifar", DENSENET),
        ("preact_resnet50", "densenet_cifar"),
    ),
)
def test_folded_gate_equals_explicit_gate(name: str) -> None:
    model = in_float64(name).train()
    images = images_for(name, 4)
    graph = analyse(model, images.shape[1:])
    gated = GatedNetwork(model, graph, "read")
    F.cross_entropy(gated(images), torch.arange(4)).backward()
    assert gated.gates.grad is not None
    folded, explicit = FoldedGate(model, graph)().numpy(), gated.gates.grad.numpy()
    for group in graph.prunable:
        scale = np.abs(explicit[group.units]).max()
        assert scale > 0
        assert np.abs(folded[group.units] - explicit[group.units]).max() <= 1e-10 * scale


# Files


@pytest.mark.parametrize("name", NEW)
def test_every_network_is_recognised(name: str) -> None:
    for channels in (3, 1) if name in SMALL_IMAGE_MODELS else (3,):
        with torch.device("meta"):
            state = build_model(name, num_classes=11, in_channels=channels).state_dict()
        assert identify(dict(sorted(state.items()))) == name  # as safetensors order them
        old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        assert identify(old) == name
        assert identify({**state, "more": torch.zeros(1)}) is None
        del state[f"{ends_of(name)[1]}.bias"]
        assert identify(state) is None


@pytest.mark.parametrize(
    "name",
    some_slow(
        ("lenet", "preact_resnet18", "vgg16_bn_cifar", "densenet_cifar"),
        {"preact_resnet18", "vgg16_bn_cifar", "densenet_cifar"},
    ),
)
def test_a_shrunk_network_survives_a_file(name: str, tmp_path: Path) -> None:
    size = (channels_of(name), 32, 32)
    model = lived_in(build_model(name, num_classes=4, in_channels=size[0])).eval()
    graph = analyse(model, size)
    kept = random_mask(graph, 2)
    smaller = shrink(model, graph, kept)
    about = Description(
        architecture=name,
        classes=tuple("abcd"),
        input_size=size,
        mean=(0.5,) * size[0],
        std=(0.5,) * size[0],
    )
    path = tmp_path / "pruned.safetensors"
    save_checkpoint(path, smaller, description=about, graph=graph, kept=kept)
    loaded = load_checkpoint(path)
    images = torch.randn(2, *size)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), smaller(images))
    assert loaded.costs["params"] == sum(p.numel() for p in smaller.parameters())
    assert loaded.costs == {key: cost.totals(graph, kept)[key] for key in ("macs", "params")}
