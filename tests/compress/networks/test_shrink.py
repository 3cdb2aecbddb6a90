from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
import pytest
import torch
from conftest import LARGE, RESNETS, built, input_size_of, lived_in, random_mask, some_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

from compress.errors import ModelError
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.cuts import apply_cuts_, cuts_of
from compress.networks.groups import ChannelGraph
from compress.networks.models import build_model
from compress.networks.shrink import mask_, precision_for, proof, shrink, shrink_


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@lru_cache(maxsize=1)
def in_float64(name: str) -> tuple[nn.Module, ChannelGraph]:
    model, graph = built(name)
    return model.double(), graph


@cache
def graph_of(name: str) -> ChannelGraph:
    """Return the graph of a network of networks.py; read only."""
    return analyse(NETWORKS[name](), (3, 12, 12))


@pytest.mark.parametrize(
    "name", some_slow(RESNETS, {*LARGE, "resnet18", "resnet50", "resnext50_32x4d"})
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.2, 0.8))
def test_masked_equals_shrunk_in_float64(name: str, seed: int, share: float) -> None:
    model, graph = in_float64(name)
    images = torch.randn(2, *input_size_of(name), dtype=torch.float64)
    kept = random_mask(graph, seed, share)
    masked = copy.deepcopy(model)
    mask_(masked, graph, kept)
    with torch.no_grad():
        expected, before = masked(images), model(images)
        actual = shrink(model, graph, kept)(images)
    assert relative(before, expected) > 1e-3  # the mask did something
    assert relative(actual, expected) <= 1e-9


@pytest.mark.parametrize("name", sorted(NETWORKS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 0.95))
def test_any_mask_of_any_topology_shrinks_exactly(name: str, seed: int, share: float) -> None:
    model, graph = lived_in(NETWORKS[name](), seed).double().eval(), graph_of(name)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    kept = random_mask(graph, seed, share)
    masked = copy.deepcopy(model)
    mask_(masked, graph, kept)
    with torch.no_grad():
        assert relative(shrink(model, graph, kept)(images), masked(images)) <= 1e-9


def test_zeroing_the_activation_is_what_the_mask_means() -> None:
    """An independent derivation: hooks that zero what conv2 and fc read, instead of weights."""
    model, graph = built("resnet18")
    model = model.double()
    group = next(g for g in graph.groups if g.name == "layer1.0.conv1")
    kept = graph.everything()
    kept[group.units[[3, 17, 40]]] = False
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def zero(module: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        x = inputs[0].clone()
        x[:, [3, 17, 40]] = 0
        return x

    handle = model.layer1[0].conv2.register_forward_pre_hook(zero)  # type: ignore
    with torch.no_grad():
        expected = model(images)
        handle.remove()
        assert relative(shrink(model, graph, kept)(images), expected) <= 1e-12


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnext50_32x4d"])
def test_keep_all_is_the_identity(name: str) -> None:
    model, graph = built(name)
    same = shrink(model, graph, graph.everything())
    for (key, expected), (other, actual) in zip(
        model.state_dict().items(), same.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(expected, actual)


def test_shrinking_in_two_steps_is_shrinking_at_once() -> None:
    model, graph = built("resnet20")
    first, second = random_mask(graph, 1, 0.3), random_mask(graph, 2, 0.3)
    for group in graph.prunable:
        if not (first & second)[group.units].any():
            second[group.units] = True
    stepwise = copy.deepcopy(model)
    between = shrink_(stepwise, graph, first)
    shrink_(stepwise, between, first & second)
    at_once = shrink(model, graph, first & second)
    for expected, actual in zip(at_once.parameters(), stepwise.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_modules_say_their_true_sizes() -> None:
    model, graph = built("resnext50_32x4d")
    smaller = shrink(model, graph, random_mask(graph, 3))
    for module in smaller.modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == (module.num_features,)
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


def test_optimizer_state_is_cut_with_the_parameters() -> None:
    model = build_model("resnet20", num_classes=5)
    graph = analyse(model, (3, 16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    kept = random_mask(graph, 4)
    shrink_(model, graph, kept, [optimizer])
    outputs, inputs = (graph.by_tensor["layer2.0.conv2.weight", dim].units for dim in (0, 1))
    rows, columns = np.flatnonzero(kept[outputs]), np.flatnonzero(kept[inputs])
    parameter = model.get_parameter("layer2.0.conv2.weight")
    expected = before["layer2.0.conv2.weight"][rows][:, columns]
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected)
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    model(torch.randn(4, 3, 16, 16)).sum().backward()
    optimizer.step()  # and training goes on


def test_proof_measures_and_does_not_change_the_network() -> None:
    model, graph = built("resnet20")
    before = copy.deepcopy(model.state_dict())
    error = proof(model, graph, random_mask(graph, 5), Example.images((3, 16, 16), count=3))
    assert 0 <= error <= 1e-9
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_proof_fails_when_the_analysis_is_wrong() -> None:
    model, graph = built("resnet20")

    # Claim that fc reads the channels in another order than it does.
    axes = tuple(
        replace(axis, units=np.roll(axis.units, 1)) if (axis.layer, axis.dim) == ("fc", 1) else axis
        for axis in graph.axes
    )
    wrong = replace(graph, axes=axes)
    with pytest.raises(ModelError, match="differs from the masked one"):
        proof(model, wrong, random_mask(graph, 6), Example.images((3, 16, 16)))


def test_cuts_name_tensors_and_the_integers_of_their_modules() -> None:
    model, graph = built("resnet20")
    group = next(g for g in graph.groups if g.name == "layer2.1.conv1")
    kept = graph.everything()
    kept[group.units[[0, 5]]] = False
    left = [i for i in range(32) if i not in (0, 5)]
    found = {(cut.tensor, cut.dim): (cut.size, cut.kept.tolist()) for cut in cuts_of(graph, kept)}
    norm = ("weight", "bias", "running_mean", "running_var", "num_features")
    expected = {("layer2.1.conv1.weight", 0), ("layer2.1.conv1.out_channels", 0)}
    expected |= {("layer2.1.conv2.weight", 1), ("layer2.1.conv2.in_channels", 0)}
    expected |= {(f"layer2.1.bn1.{name}", 0) for name in norm}
    assert found == dict.fromkeys(expected, (32, left))
    smaller = copy.deepcopy(model)
    apply_cuts_(smaller, cuts_of(graph, kept))
    for expected_tensor, tensor in zip(
        shrink(model, graph, kept).state_dict().values(), smaller.state_dict().values(), strict=True
    ):
        assert torch.equal(expected_tensor, tensor)


def test_a_network_of_float32_alone_is_proved_in_float32() -> None:
    """A constant of forward is of another precision than float64."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixing = torch.eye(3, dtype=torch.float32)
            x = torch.einsum("nchw,cd->ndhw", x, mixing)
            return self.head(torch.relu(self.a(x)).mean((2, 3)))

    model, example = Constant().eval(), Example.images((3, 6, 6))
    graph = analyse(model, example)
    assert precision_for(model, example) == torch.float32
    assert precision_for(NETWORKS["Plain"](), Example.images((3, 12, 12))) == torch.float64
    assert 0 <= proof(model, graph, random_mask(graph, 1), example) <= 1e-5
