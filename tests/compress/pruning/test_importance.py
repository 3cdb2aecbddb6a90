"""What is ranked: normalisation within groups, regard to MACs, and the figures of a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_mask, small_graph, some_slow
from networks import NETWORKS

from compress.config import PruneConfig
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.importance import Importance, ranked, summary
from compress.pruning.masking import Candidate, Scores, candidates

PLAIN = PruneConfig(min_channels=1, min_share=0.0)


def settings(**keys: object) -> PruneConfig:
    return PruneConfig.model_validate({"min_channels": 1, "min_share": 0.0, **keys})


def example() -> tuple[ChannelGraph, Mask, tuple[Candidate, ...], Scores]:
    graph = small_graph("resnet20")
    kept = random_mask(graph, seed=3, share=0.3)
    scores = np.random.default_rng(0).random(graph.num_units) ** 4
    return graph, kept, candidates(graph, PLAIN), scores


def test_l2_makes_every_group_a_unit_vector_of_what_is_left() -> None:
    graph, kept, allowed, scores = example()
    before = scores.copy()
    found = ranked(scores, kept, allowed, graph=graph, config=settings(normalize="l2"))
    assert np.array_equal(scores, before)
    for candidate in allowed:
        units = candidate.group.units[kept[candidate.group.units]]
        assert np.linalg.norm(found[units]) == pytest.approx(1)
        assert np.array_equal(np.argsort(found[units]), np.argsort(scores[units]))


def test_l2_of_a_group_without_importance_is_zero() -> None:
    graph, kept, allowed, scores = example()
    scores[allowed[0].group.units] = 0
    found = ranked(scores, kept, allowed, graph=graph, config=settings(normalize="l2"))
    assert not found[allowed[0].group.units].any()


def macs_by_difference(graph: ChannelGraph, kept: Mask, unit: int) -> int:
    """The multiply-adds that one removal saves, by counting twice."""
    without = kept.copy()
    without[unit] = False
    return cost.macs(graph, kept) - cost.macs(graph, without)


@pytest.mark.parametrize(
    "name",
    some_slow(
        [*sorted(NETWORKS), "resnet20", "resnet50", "resnext50_32x4d"],
        {"resnet50", "resnext50_32x4d"},
    ),
)
def test_macs_saved_equals_the_difference_of_two_counts(name: str) -> None:
    graph = analyse(NETWORKS[name](), (3, 12, 12)) if name in NETWORKS else small_graph(name)
    kept = random_mask(graph, seed=1, share=0.4)
    saved = cost.macs_saved(graph, kept)
    for group in graph.prunable:
        for unit in group.units[:3].tolist():
            expected = macs_by_difference(graph, kept, unit) if kept[unit] else 0
            assert saved[unit] == expected, (group.name, unit)


def test_flops_regularization_takes_its_share_off_for_every_mac() -> None:
    graph, kept, allowed, scores = example()
    found = ranked(scores, kept, allowed, graph=graph, config=settings(flops_regularization=1e-7))
    for unit in allowed[2].group.units[:4].tolist():
        expected = scores[unit] - 1e-7 * (
            macs_by_difference(graph, kept, unit) if kept[unit] else 0
        )
        assert found[unit] == pytest.approx(expected, rel=1e-12)


def test_importance_per_mac_is_the_ratio() -> None:
    graph, kept, allowed, scores = example()
    found = ranked(scores, kept, allowed, graph=graph, config=settings(rank="importance-per-mac"))
    unit = int(allowed[1].group.units[kept[allowed[1].group.units]][0])
    assert found[unit] == pytest.approx(scores[unit] / macs_by_difference(graph, kept, unit))


def test_summary_looks_at_what_may_still_go() -> None:
    _, kept, allowed, scores = example()
    scores[~kept] = -1.0  # what is gone must not be among them
    left = np.concatenate([c.group.units[kept[c.group.units]] for c in allowed])
    found = summary(scores, kept, allowed)
    assert found == {
        "min": scores[left].min(),
        "median": np.median(scores[left]),
        "max": scores[left].max(),
    }


def test_a_score_that_is_not_finite_counts_as_zero() -> None:
    importance = Importance(3, momentum=0.0)
    importance.add(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    importance.add(torch.tensor([1.0, 2.0, 4.0]))
    assert importance.close_interval().tolist() == [0.5, 1.0, 2.0]
