"""MACs and parameters against closed forms, counting hooks, torchvision's and Torch-Pruning's."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_pruning
from conftest import (
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
from networks import NETWORKS
from torch import nn
from torchvision import models

from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph
from compress.networks.models import CIFAR_DEPTHS, TORCHVISION_MODELS
from compress.networks.shrink import shrink


@functools.cache
def analysed(name: str) -> tuple[nn.Module, ChannelGraph]:
    """Return a network of networks.py and its graph; read only, both."""
    model = lived_in(NETWORKS[name]()).eval()
    return model, analyse(model, (3, 12, 12))


def dense_cost(name: str) -> tuple[int, int]:
    _, graph = as_published(name)
    return cost.macs(graph, graph.everything()), cost.params(graph, graph.everything())


def counted_macs(model: nn.Module, images: torch.Tensor) -> int:
    """Count by forward hooks: outputs of one image times the weights that make one of them."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += output[0].numel() * weight[0].numel()

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return total


def counted_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Dense networks


PRINTED = {"resnet20": (40.6, 0.27), "resnet56": (125.5, 0.85), "resnet110": (253.0, 1.7)}
"""Millions of MACs, which the literature cites, and of parameters, in table 6 of He et al."""


@pytest.mark.parametrize("name", some_slow(CIFAR_DEPTHS))
def test_cifar_resnets_by_the_formula_of_he_et_al(name: str) -> None:
    """Section 4.2: 6n+2 layers of 3x3 on maps of 32, 16 and 8 pixels with 16, 32, 64 filters."""
    n = (CIFAR_DEPTHS[name] - 2) // 6
    stage = (16, 32**2), (32, 16**2), (64, 8**2)
    weights = [3 * 16 * 9, 2 * n * 16 * 16 * 9]
    for before, (width, _) in zip((16, 32), stage[1:], strict=True):
        weights.append((before * width + (2 * n - 1) * width * width) * 9)
    pixels = [32**2, *(pixels for _, pixels in stage)]
    norms = 2 * (16 + sum(2 * n * width for width, _ in stage))
    by_formula = sum(w * p for w, p in zip(weights, pixels, strict=True)) + 64 * 10
    macs, params = dense_cost(name)
    assert (macs, params) == (by_formula, sum(weights) + norms + 64 * 10 + 10)
    if name in PRINTED:
        macs_in_millions, params_in_millions = PRINTED[name]
        assert macs / 1e6 == pytest.approx(macs_in_millions, rel=0.005)  # printed to three digits
        assert params / 1e6 == pytest.approx(params_in_millions, rel=0.03)  # printed to two


def test_resnet18_by_a_table() -> None:
    """Layer by layer: inputs, outputs, kernel, output pixels along one side."""
    convolutions = [
        (3, 64, 7, 112),
        *[(64, 64, 3, 56)] * 4,
        *[(64, 128, 3, 28), (64, 128, 1, 28), *[(128, 128, 3, 28)] * 3],
        *[(128, 256, 3, 14), (128, 256, 1, 14), *[(256, 256, 3, 14)] * 3],
        *[(256, 512, 3, 7), (256, 512, 1, 7), *[(512, 512, 3, 7)] * 3],
    ]
    macs = sum(i * o * k * k * side * side for i, o, k, side in convolutions) + 512 * 1000
    params = sum(i * o * k * k + 2 * o for i, o, k, _ in convolutions) + 512 * 1000 + 1000
    assert (macs, params) == (1_814_073_344, 11_689_512)
    assert dense_cost("resnet18") == (macs, params)


BOTTLENECKS = {  # blocks, groups, width
    "resnet50": ((3, 4, 6, 3), 1, 64),
    "resnet101": ((3, 4, 23, 3), 1, 64),
    "resnet152": ((3, 8, 36, 3), 1, 64),
    "wide_resnet50_2": ((3, 4, 6, 3), 1, 128),
    "resnext50_32x4d": ((3, 4, 6, 3), 32, 128),
}


@pytest.mark.parametrize("name", some_slow(BOTTLENECKS))
def test_bottleneck_resnets_by_formula(name: str) -> None:
    blocks, conv_groups, width = BOTTLENECKS[name]
    macs, params = 3 * 64 * 49 * 112**2, 3 * 64 * 49 + 2 * 64
    inputs = 64
    for stage, count in enumerate(blocks):
        inner, outputs, side = width << stage, 256 << stage, 56 >> stage
        for block in range(count):
            first = block == 0
            before = side * 2 if first and stage else side  # the stride is in the 3x3
            weights = [inputs * inner, inner * inner * 9 // conv_groups, inner * outputs]
            pixels = [before**2, side**2, side**2]
            norms = 2 * (inner + inner + outputs)
            if first:
                weights.append(inputs * outputs)
                pixels.append(side**2)
                norms += 2 * outputs
            macs += sum(w * p for w, p in zip(weights, pixels, strict=True))
            params += sum(weights) + norms
            inputs = outputs
    macs, params = macs + 2048 * 1000, params + 2048 * 1000 + 1000
    found = dense_cost(name)
    assert found == (macs, params)
    # The figures that everybody knows.
    if name == "resnet50":
        assert (round(found[0] / 1e9, 3), found[1]) == (4.089, 25_557_032)
    if name == "resnet101":
        assert (round(found[0] / 1e9, 2), round(found[1] / 1e6, 1)) == (7.80, 44.5)


@pytest.mark.parametrize("name", some_slow(TORCHVISION_MODELS))
def test_torchvision_publishes_the_same(name: str) -> None:
    published = models.get_model_weights(name)["IMAGENET1K_V1"].meta
    macs, params = dense_cost(name)
    assert round(macs / 1e9, 3) == published["_ops"]
    assert params == published["num_params"]


@pytest.mark.parametrize("name", some_slow(RESNETS))
def test_params_are_those_that_torch_holds(name: str) -> None:
    model, graph = as_published(name)
    assert cost.params(graph, graph.everything()) == counted_params(model)


def test_parameters_that_no_layer_holds_count_and_stay() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)
            self.head, self.unused = nn.Linear(8, 2), nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.conv(x)).mean((2, 3)))

    model = Extra()
    graph = analyse(model, (3, 4, 4))
    assert cost.params(graph, graph.everything()) == counted_params(model)
    # Nothing of the parameters that no layer reads goes, and of the norm's two it does.
    kept = graph.everything()
    (group,) = graph.prunable
    assert (group.size, group.width) == (2, 4)
    kept[group.units[0]] = False
    assert cost.params(graph, kept) == 4 * (3 + 1) + 2 * 4 + (4 * 2 + 2) + 30


def test_a_layer_called_twice_computes_twice_and_is_stored_once() -> None:
    model = NETWORKS["Shared"]()
    graph = analyse(model, (3, 12, 12))
    one_call = 8 * 8 * 9 * 12 * 12
    expected = 3 * 8 * 9 * 12 * 12 + 2 * one_call + 8 * 4
    assert cost.macs(graph, graph.everything()) == expected
    assert cost.params(graph, graph.everything()) == counted_params(model)


# Masked networks


@pytest.mark.parametrize("name", sorted(NETWORKS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 0.95))
def test_a_mask_costs_what_the_shrunk_network_costs(name: str, seed: int, share: float) -> None:
    model, graph = analysed(name)
    kept = random_mask(graph, seed, share)
    smaller = shrink(model, graph, kept)
    assert cost.macs(graph, kept) == counted_macs(smaller, torch.randn(1, 3, 12, 12))
    assert cost.params(graph, kept) == counted_params(smaller)


@pytest.mark.parametrize(
    "name", some_slow(["resnet20", "resnet18", "resnext50_32x4d"], ["resnext50_32x4d"])
)
def test_a_masked_builtin_costs_what_the_shrunk_one_costs(name: str) -> None:
    model, graph = built(name)
    images = torch.randn(1, *input_size_of(name))
    for seed in range(2):
        kept = random_mask(graph, seed)
        smaller = shrink(model, graph, kept)
        assert cost.macs(graph, kept) == counted_macs(smaller, images)
        assert cost.params(graph, kept) == counted_params(smaller)
        # And the same when asked of the shrunk network's own graph.
        assert cost.macs(graph.removed(kept), kept) == cost.macs(graph, kept)
        assert cost.params(graph.removed(kept), kept) == cost.params(graph, kept)


def test_resnext_channels_by_hand() -> None:
    """Five of the 32 groups of layer1.0.conv2 go: 4 channels each of conv1, conv2 and conv3."""
    graph = small_graph("resnext50_32x4d")
    group = next(g for g in graph.groups if g.name == "layer1.0.conv1")
    kept = graph.everything()
    kept[group.units[[0, 3, 11, 20, 31]]] = False
    everything = graph.everything()
    gone = 5 * 4
    per_pixel = gone * (64 + 4 * 9 + 256)  # conv1 rows, conv2 rows of 4 inputs, conv3 columns
    assert cost.macs(graph, everything) - cost.macs(graph, kept) == per_pixel * 8 * 8
    assert cost.params(graph, everything) - cost.params(graph, kept) == per_pixel + 2 * 2 * gone
    assert cost.channels(graph, everything) - cost.channels(graph, kept) == gone


# Torch-Pruning


def torch_pruning_counts(model: nn.Module) -> tuple[dict[str, int], int]:
    """Return MACs of each conv and linear layer, and all parameters, as Torch-Pruning counts.

    It counts BatchNorm, ReLU and pooling as well, and one operation for each bias, so layers are
    compared one by one and the bias of a linear layer is taken off.
    """
    _, params, macs, _ = torch_pruning.utils.count_ops_and_params(
        model, torch.randn(1, 3, 32, 32), layer_wise=True
    )
    names = {module: name for name, module in model.named_modules()}
    layers = {
        names[module]: count - (module.out_features if isinstance(module, nn.Linear) else 0)
        for module, count in macs.items()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    return layers, params


# Torch-Pruning cuts a grouped convolution inside its groups and not by whole groups, so of ResNeXt
# only the residual streams can be compared.
PRUNED_BY_TORCH_PRUNING = {
    "resnet18": ["conv1", "layer1.0.conv1", "layer2.0.conv2", "layer4.1.conv1", "layer4.0.conv2"],
    "resnet50": ["conv1", "layer1.0.conv2", "layer1.1.conv3", "layer3.5.conv1", "layer4.0.conv3"],
    "resnext50_32x4d": ["conv1", "layer1.0.conv3", "layer3.2.conv3", "layer4.0.downsample.0"],
}


@pytest.mark.parametrize(
    "name", some_slow(PRUNED_BY_TORCH_PRUNING, {"resnet50", "resnext50_32x4d"})
)
def test_torch_pruning_counts_the_same(name: str) -> None:
    model, graph = built(name)
    theirs = copy.deepcopy(model)
    dependencies = torch_pruning.DependencyGraph().build_dependency(
        theirs, torch.randn(1, 3, 32, 32)
    )
    kept = graph.everything()
    rng = np.random.default_rng(0)
    for writer in PRUNED_BY_TORCH_PRUNING[name]:
        conv = theirs.get_submodule(writer)
        width = int(conv.out_channels)  # type: ignore[arg-type]
        indices = sorted(rng.choice(width, width // 3, replace=False).tolist())
        kept[graph.by_tensor[f"{writer}.weight", 0].units[indices]] = False
        dependencies.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, indices).prune()
    their_macs, their_params = torch_pruning_counts(theirs)
    # In these networks every layer reads with one weight, in the order of the terms.
    names = [site.weight.removesuffix(".weight") for site in graph.read_sites]
    alone = {
        name: cost.macs(replace(graph, macs=(term,)), kept)
        for name, term in zip(names, graph.macs, strict=True)
    }
    assert alone == their_macs
    assert cost.macs(graph, kept) == sum(their_macs.values())
    assert cost.params(graph, kept) == their_params
    # The two networks do not only count alike, they are the same one.
    smaller = shrink(model, graph, kept)
    for (key, expected), (other, actual) in zip(
        theirs.state_dict().items(), smaller.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(expected, actual), key
