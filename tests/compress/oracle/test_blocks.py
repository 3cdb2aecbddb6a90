"""What blocks are worth: against networks from which they are really gone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import lived_in
from torch.nn import functional as F

from compress.criteria.scoring import Context
from compress.criteria.taylor import BranchGate
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.oracle.blocks import (
    ESTIMATES,
    block_changes,
    block_estimates,
    blocks_document,
    half_changes,
    scale_of,
)

IMAGES, LABELS = (
    torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    torch.arange(12) % 5,
)


@pytest.fixture(scope="module")
def context() -> Context:
    torch.manual_seed(0)
    model = lived_in(build_model("resnet20", num_classes=5, in_channels=3)).eval()
    return Context(model, analyse(model, (3, 16, 16)))


@torch.no_grad()
def loss(model: torch.nn.Module) -> float:
    return float(F.cross_entropy(model(IMAGES), LABELS))


def test_the_change_is_that_of_the_network_without_the_block(context: Context) -> None:
    changes = block_changes(context, IMAGES, LABELS, batch_size=5)
    for branch, change in zip(context.graph.removable, changes, strict=True):
        kept = context.graph.everything()
        kept[branch.unit] = False
        smaller = shrink(context.model, context.graph, context.graph.closed(kept))
        assert change == pytest.approx(loss(smaller) - loss(context.model), abs=1e-5)


def test_estimates_are_those_of_the_definition(context: Context) -> None:
    found = block_estimates(context, IMAGES, LABELS, batch_size=6)
    assert found.keys() == ESTIMATES.keys()
    gates, summed, absolute = [], [], []
    for part in (slice(0, 6), slice(6, 12)):
        model = copy.deepcopy(context.model)
        F.cross_entropy(model(IMAGES[part]), LABELS[part]).backward()
        gates.append([float(BranchGate(model, b)()) ** 2 for b in context.graph.removable])
        norms = [model.get_submodule(b.module).bn2 for b in context.graph.removable]
        parts = [(n.weight * n.weight.grad + n.bias * n.bias.grad).detach() for n in norms]
        summed.append([float(part.square().sum()) for part in parts])
        absolute.append([float(part.abs().sum()) for part in parts])
    np.testing.assert_allclose(found["gate"], np.mean(gates, 0), rtol=1e-4)
    np.testing.assert_allclose(found["summed"], np.mean(summed, 0), rtol=1e-4)
    np.testing.assert_allclose(found["parts"], np.mean(absolute, 0) ** 2, rtol=1e-4)
    assert (found["inner"] > 0).all()


def test_half_of_a_group_goes_at_once(context: Context) -> None:
    importance = np.random.default_rng(0).random(context.graph.num_units)
    sums, changes = half_changes(context, importance, IMAGES, LABELS, batch_size=12)
    for place, group in enumerate(context.graph.prunable):
        least = sorted(group.units, key=lambda unit: importance[unit])[: group.size // 2]
        kept = context.graph.everything()
        kept[least] = False
        smaller = shrink(context.model, context.graph, kept)
        assert changes[place] == pytest.approx(loss(smaller) - loss(context.model), abs=1e-5)
        assert sums[place] == pytest.approx(importance[least].sum())


def test_the_scale_is_the_median_of_squares_over_estimates(context: Context) -> None:
    assert scale_of(np.array([1.0, 2.0, 0.0, 4.0]), np.array([2.0, 2.0, 9.0, 2.0])) == 2.0
    assert scale_of(np.zeros(2), np.ones(2)) is None
    changes = np.arange(1.0, 10.0)
    estimates = dict.fromkeys(ESTIMATES, changes**2 / 4)
    document = blocks_document(context.graph, changes, estimates, {"channels": 1.0, "halves": 3.0})
    assert document is not None
    assert document["estimates"]["gate"] == {"spearman": pytest.approx(1.0), "scale": 4.0}
    assert document["blocks"][0]["name"] == "layer1.0"
    assert document["blocks"][0]["macs"] == 2 * 16 * 16 * 9 * 16 * 16
