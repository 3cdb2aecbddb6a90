from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import built, input_size_of, lived_in, some_slow
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F

from compress.criteria import bind
from compress.criteria.scoring import Context
from compress.criteria.taylor import FoldedGate
from compress.errors import ConfigError
from compress.networks.analysis import analyse
from compress.networks.gates import GatedNetwork
from compress.networks.groups import ChannelGraph
from compress.networks.models import BUILTIN_MODELS
from compress.pruning.importance import Importance


def gradients(
    model: nn.Module, graph: ChannelGraph, images: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gate gradients of one minibatch: folded, and by explicit gates."""
    labels = torch.arange(len(images)) % 4
    model.train()
    gated = GatedNetwork(model, graph, "read")
    F.cross_entropy(gated(images), labels).backward()
    assert gated.gates.grad is not None
    return FoldedGate(model, graph)().numpy(), gated.gates.grad.numpy()


def largest_error(folded: np.ndarray, explicit: np.ndarray, graph: ChannelGraph) -> float:
    """Return the largest error, relative to the largest score of its group."""
    return max(
        np.abs(folded[g.units] - explicit[g.units]).max() / np.abs(explicit[g.units]).max()
        for g in graph.prunable
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "name",
    some_slow(
        ["resnet20", "resnet18", "resnet50", "resnext50_32x4d"], ["resnet50", "resnext50_32x4d"]
    ),
)
def test_folded_gate_equals_explicit_gate(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, graph = built(name)
    images = torch.randn(4, *input_size_of(name), dtype=dtype)
    folded, explicit = gradients(model.to(dtype), graph, images)
    assert largest_error(folded, explicit, graph) <= tolerance


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_folded_gate_equals_explicit_gate_on_every_topology(name: str) -> None:
    model = lived_in(NETWORKS[name]()).double()
    graph = analyse(model, (3, 12, 12))
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    torch.manual_seed(1)
    folded, explicit = gradients(model, graph, images)
    assert largest_error(folded, explicit, graph) <= 1e-10


@pytest.mark.parametrize("name", [*sorted(set(NETWORKS) - {"Plain"}), "resnet20"])
def test_gate_gradient_equals_a_central_finite_difference(name: str) -> None:
    if name in BUILTIN_MODELS:
        model, graph = built(name)
        model, size = model.double(), input_size_of(name)
    else:
        model, size = lived_in(NETWORKS[name]()).double(), (3, 12, 12)
        graph = analyse(model, size)
    model.eval()
    torch.manual_seed(1)
    images, labels = torch.randn(3, *size, dtype=torch.float64), torch.tensor([0, 1, 2])
    gated = GatedNetwork(model, graph, "read")
    F.cross_entropy(model(images), labels).backward()
    folded = FoldedGate(model, graph)().numpy()

    def loss_at(unit: int, z: float) -> float:
        with torch.no_grad():
            gated.gates.fill_(1.0)
            gated.gates[unit] = z
            return float(F.cross_entropy(gated(images), labels))

    step = 1e-7  # small, so that no ReLU changes its side between the two losses
    for group in graph.prunable:
        for unit in group.units[:: max(1, group.size // 3)].tolist():
            numeric = (loss_at(unit, 1 + step) - loss_at(unit, 1 - step)) / (2 * step)
            scale = np.abs(folded[group.units]).max()
            # 1e-8 is the rounding of a loss of order 1 divided by the step
            assert abs(numeric - folded[unit]) <= 1e-5 * scale + 1e-8


def test_folded_gate_equals_the_batchnorm_form_for_one_writer() -> None:
    """gamma dL/dgamma + beta dL/dbeta of the BatchNorm before a ReLU (Molchanov et al. 2019)."""
    model, graph = built("resnet18")
    model.double().train()
    F.cross_entropy(
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64)), torch.arange(4)
    ).backward()
    folded = FoldedGate(model, graph)()
    group = next(g for g in graph.groups if g.name == "layer2.0.conv1")
    norm = model.layer2[0].bn1  # type: ignore
    expected = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    torch.testing.assert_close(folded[group.units], expected.detach(), rtol=1e-9, atol=1e-15)


def test_gated_network_with_all_ones_is_the_network() -> None:
    model, graph = built("resnet20")
    images = torch.randn(2, 3, 16, 16)
    for sites in ("read", "residual", "block"):
        assert torch.equal(GatedNetwork(model, graph, sites)(images), model(images))


def test_weight_norm_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten()
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2, 2], [0, 3, 4]]).view(2, 3, 1, 1))  # type: ignore
    graph = analyse(model, (3, 1, 1))
    scores = bind("weight-norm", Context(model, graph)).score(1.0)
    assert scores[graph.groups[1].units].tolist() == [9.0, 25.0]


def test_weight_norm_of_a_residual_group_is_the_mean_over_its_writers() -> None:
    model, graph = built("resnet18")
    group = next(g for g in graph.groups if g.name == "layer4.0.conv2")
    scores = bind("weight-norm", Context(model, graph)).score(1.0)
    expected = torch.stack(
        [model.get_parameter(f"{w}.weight").square().sum((1, 2, 3)) for w in group.writers]
    ).mean(0)
    torch.testing.assert_close(scores[group.units], expected)


def test_random_is_seeded() -> None:
    model, graph = built("resnet20")
    first, second, third = (
        bind("random", Context(model, graph, seed=s)).score(1.0) for s in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_unknown_criterion_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'taylor-gate'"):
        bind("tailor-gate", Context(*built("resnet20")))


def test_importance_averages_minibatches_then_intervals() -> None:
    importance = Importance(2, momentum=0.75)
    importance.add(torch.tensor([1.0, 2.0]))
    importance.add(torch.tensor([3.0, 6.0]))
    assert importance.close_interval().tolist() == [2.0, 4.0]
    importance.add(torch.tensor([4.0, 0.0]))
    assert importance.close_interval().tolist() == [2.5, 3.0]


def test_scores_do_not_change_the_network() -> None:
    model, graph = built("resnet20")
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    for name in ("taylor-gate", "weight-norm", "random"):
        bind(name, Context(model, graph)).score(1.0)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_block_gate_of_a_residual_stream_by_hooks() -> None:
    """The squared sum over blocks of <dL/da, a>, divided by the blocks, from retained gradients."""
    model, graph = built("resnet18")
    model = model.double().train()
    scoring = bind("taylor-gate", Context(model, graph, residual_gate="block"))
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4)
    assert scoring.network is not None
    F.cross_entropy(scoring.network(images), labels).backward()
    scores = scoring.score(1.0)

    outputs: list[torch.Tensor] = []
    reference = copy.deepcopy(model)
    for block in reference.layer3:  # type: ignore

        def keep(module: nn.Module, args: object, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs.append(output)

        block.register_forward_hook(keep)
    F.cross_entropy(reference(images), labels).backward()
    gate = sum((a * a.grad).sum((0, 2, 3)) for a in outputs if a.grad is not None)
    assert isinstance(gate, torch.Tensor)
    group = next(g for g in graph.groups if g.name == "layer3.0.conv2")
    torch.testing.assert_close(scores[group.units], (gate**2 / 2).detach(), rtol=1e-8, atol=0)
    inner = next(g for g in graph.groups if g.name == "layer3.0.conv1")
    torch.testing.assert_close(
        scores[inner.units], FoldedGate(model, graph)().square()[inner.units]
    )
