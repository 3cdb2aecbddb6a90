from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS

from compress.checkpoints.recipe import mask_from_recipe, recipe_from_mask
from compress.errors import CheckpointError
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask

GRAPHS = ("resnet20", "resnext50_32x4d", *sorted(NETWORKS))


@cache
def graph_of(name: str) -> ChannelGraph:
    return analyse(NETWORKS[name](), (3, 12, 12)) if name in NETWORKS else built(name)[1]


@st.composite
def masks(draw: st.DrawFn) -> tuple[ChannelGraph, Mask]:
    """Any mask that leaves every prunable group a unit."""
    graph = graph_of(draw(st.sampled_from(GRAPHS)))
    kept = graph.everything()
    for group in graph.prunable:
        if draw(st.booleans()):
            bits = draw(st.integers(1, 2**group.size - 1))
            kept[group.units] = [bool(bits >> i & 1) for i in range(group.size)]
    return graph, kept


# The first draw of a network builds it.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(masks())
def test_a_mask_survives_json(case: tuple[ChannelGraph, Mask]) -> None:
    graph, kept = case
    text = json.dumps(recipe_from_mask(graph, kept))
    assert np.array_equal(mask_from_recipe(graph, json.loads(text)), kept)


def test_a_recipe_by_hand() -> None:
    graph = graph_of("Plain")
    kept = graph.everything()
    group = next(g for g in graph.groups if g.name == "features.3")
    kept[group.units[[0, 2, 5]]] = False
    assert recipe_from_mask(graph, kept) == {"features.3": {"size": 8, "kept": [1, 3, 4, 6, 7]}}
    assert recipe_from_mask(graph, graph.everything()) == {}
    assert mask_from_recipe(graph, {}).all()


@settings(deadline=None)
@given(
    indices=st.lists(st.integers(-2, 9), max_size=10),
    sort=st.booleans(),
)
def test_only_ascending_indices_in_range_are_accepted(indices: list[int], sort: bool) -> None:
    graph = graph_of("Plain")
    indices = sorted(indices) if sort else indices
    recipe = {"features.3": {"size": 8, "kept": indices}}
    good = bool(indices) and sorted(set(indices)) == indices and set(indices) <= set(range(8))
    if good:
        group = next(g for g in graph.groups if g.name == "features.3")
        kept = mask_from_recipe(graph, recipe)
        assert np.flatnonzero(kept[group.units]).tolist() == indices
        assert np.count_nonzero(~kept) == 8 - len(indices)
    else:
        with pytest.raises(CheckpointError, match="are not ascending indices"):
            mask_from_recipe(graph, recipe)


class Huge(list[int]):
    """A list that says it is long; who looks inside pays for it."""

    def __len__(self) -> int:
        return 10**12

    def __iter__(self) -> Any:
        raise AssertionError("the length was not checked first")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"features.9": {"size": 8, "kept": [0]}}, "'features.9', which this network does not"),
        ({"head": {"size": 4, "kept": [0]}}, "'head', which this network does not"),
        ({"input": {"size": 3, "kept": [0]}}, "'input', which this network does not"),
        ({"features.3": {"size": 9, "kept": [0]}}, "another width than this network's 8"),
        ({"features.3": {"size": 8.0, "kept": [0]}}, "another width"),
        ({"features.3": {"size": True, "kept": [0]}}, "another width"),
        ({"features.3": {"kept": [0]}}, "another width"),
        ({"features.3": [0]}, "another width"),
        ({"features.3": None}, "another width"),
        ({"features.3": {"size": 8}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": []}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [8]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [-1]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [1, 1]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [2, 1]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [False, True]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [0, 1.0]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": ["0"]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [None]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": {"0": 1}}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": "01"}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": 5}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": [10**30]}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": Huge()}}, "not ascending indices"),
    ],
)
def test_a_recipe_that_does_not_fit(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mask_from_recipe(graph_of("Plain"), recipe)
