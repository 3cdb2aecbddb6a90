"""What the research code scores, from gates that are written out, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built, some_slow
from torch import nn
from torch.nn import functional as F

from compress.criteria import bind
from compress.criteria.scoring import Context
from compress.networks.groups import ChannelGraph, Group

LABELS = torch.arange(4)


def images() -> torch.Tensor:
    return torch.randn(
        4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def published(
    criterion: str, model: nn.Module, graph: ChannelGraph, *, gate: str = "block"
) -> np.ndarray:
    model.zero_grad()
    scoring = bind(criterion, Context(model, graph, residual_gate=gate, as_published=True))
    F.cross_entropy((scoring.network or model)(images()), LABELS).backward()
    return scoring.score(1.0).detach().numpy()


def gate_gradients(model: nn.Module, modules: list[str]) -> torch.Tensor:
    """Return the gradient of one gate that multiplies what all of these modules return."""
    reference = copy.deepcopy(model)
    named = dict(reference.named_modules())
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        kept = output.clone()  # what follows may work in place
        kept.retain_grad()
        outputs.append(kept)
        return kept.clone()

    for name in modules:
        named[name].register_forward_hook(keep)
    F.cross_entropy(reference(images()), LABELS).backward()
    parts = [(a * a.grad).sum((0, 2, 3)) for a in outputs if a.grad is not None]
    assert len(parts) == len(modules)
    return torch.stack(parts).sum(0).detach()


def group_of(graph: ChannelGraph, writer: str) -> Group:
    return next(group for group in graph.groups if writer in group.writers)


@pytest.mark.parametrize("criterion", ["weight-norm", "weight-abs", "bn-scale"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_magnitudes_of_stream_gates_are_one(name: str, criterion: str) -> None:
    """2, 3 and 30 find no layer before the gate of a stream, whose weight is 1."""
    model, graph = built(name)
    scores = published(criterion, model.double().train(), graph)
    own = bind(criterion, Context(model, graph)).score(1.0).detach().numpy()
    for group in graph.prunable:
        by_gate = group.residual or (name == "resnet18" and group.name.endswith("conv1"))
        expected = np.ones(group.size) if by_gate else own[group.units]
        np.testing.assert_array_equal(scores[group.units], expected)


@pytest.mark.parametrize("criterion", ["taylor-weight", "bn-taylor"])
@pytest.mark.parametrize("name", some_slow(["resnet18", "resnet50"], ["resnet50"]))
def test_gradients_of_stream_gates_are_squared(name: str, criterion: str) -> None:
    """0 and 31, without the divisors of 22."""
    model, graph = built(name)
    scores = published(criterion, model.double().train(), graph)
    deepest = "conv2" if name == "resnet18" else "conv3"
    for stage in (2, 3):
        blocks = [f"layer{stage}.{n}" for n in range(len(getattr(model, f"layer{stage}")))]
        expected = gate_gradients(model, blocks).square()
        group = group_of(graph, f"layer{stage}.0.{deepest}")
        np.testing.assert_allclose(scores[group.units], expected.numpy(), rtol=1e-9)


@pytest.mark.parametrize("gate", ["read", "block"])
@pytest.mark.parametrize("criterion", ["taylor-weight", "bn-taylor"])
def test_the_first_gate_of_a_basic_block_is_scored_itself(criterion: str, gate: str) -> None:
    """ReLU lies between its BatchNorm and it, so beta counts under 31 after all."""
    model, graph = built("resnet18")
    scores = published(criterion, model.double().train(), graph, gate=gate)
    expected = gate_gradients(model, ["layer2.1.bn1"]).square()
    group = group_of(graph, "layer2.1.conv1")
    np.testing.assert_allclose(scores[group.units], expected.numpy(), rtol=1e-8)
    norm: Any = model.layer2[1].bn1  # type: ignore[union-attr,index]
    with_beta = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).square().detach()
    np.testing.assert_allclose(with_beta.numpy(), expected.numpy(), rtol=1e-8)


def test_bottlenecks_drop_beta_and_score_filters() -> None:
    model, graph = built("resnet50")
    model.double().train()
    group = group_of(graph, "layer2.1.conv2")
    block: Any = model.layer2[1]  # type: ignore[union-attr,index]
    found = published("bn-taylor", model, graph)[group.units]
    expected = (block.bn2.weight * block.bn2.weight.grad).square().detach()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)
    found = published("taylor-weight", model, graph)[group.units]
    expected = (block.conv2.weight * block.conv2.weight.grad).square().sum((1, 2, 3)).detach()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_method_2_removes_every_stream_channel_first() -> None:
    """Filters of real size weigh more than the 1 of a gate: the original's trial lost all 224."""
    model, graph = built("resnet50")
    model.double()
    with torch.no_grad():
        for group in graph.prunable:
            if not group.residual:
                model.get_parameter(f"{group.writers[0]}.weight").mul_(100)
    scores = published("weight-norm", model, graph)
    streams = np.concatenate([g.units for g in graph.prunable if g.residual])
    others = np.concatenate([g.units for g in graph.prunable if not g.residual])
    assert scores[streams].max() == 1.0 < scores[others].min()


def test_per_example_squares_are_added_up() -> None:
    """23 lacks 1/N: with the gradient of the mean loss, the sum over N is the average by N."""
    model, graph = built("resnet18")
    model.double().eval()
    found = published("taylor-gate-fg", model, graph)
    group = group_of(graph, "layer2.1.conv1")
    total = torch.zeros(group.size, dtype=torch.float64)
    norm: Any = model.layer2[1].bn1  # type: ignore[union-attr,index]
    for image, label in zip(images(), LABELS, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        gradient = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        total += (gradient.detach() / len(LABELS)).square()
    np.testing.assert_allclose(found[group.units], total.numpy(), rtol=1e-9)


def test_nothing_of_it_happens_by_default() -> None:
    model, graph = built("resnet18")
    scores = bind("weight-norm", Context(model, graph, residual_gate="block")).score(1.0)
    streams = np.concatenate([g.units for g in graph.prunable if g.residual])
    assert not (scores.detach().numpy()[streams] == 1.0).any()
