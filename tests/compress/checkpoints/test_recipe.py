"""Recipes: cuts by tensor, and by channel group as format version 1 wrote them."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

from compress.checkpoints.recipe import cuts_from_recipe, mask_from_groups, recipe_from
from compress.errors import CheckpointError
from compress.networks.analysis import analyse
from compress.networks.cuts import Cut, apply_cuts_, cuts_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import build_model
from compress.networks.shrink import shrink

GRAPHS = ("resnet20", "lenet", *sorted(NETWORKS))
"""With a flatten (repeated indices), zero padding, and grouped convolutions of both kinds."""


@cache
def graph_of(name: str) -> ChannelGraph:
    return analyse(NETWORKS[name](), (3, 12, 12)) if name in NETWORKS else built(name)[1]


@cache
def dense(name: str) -> nn.Module:
    """Return a network without memory: a recipe is checked against names and shapes."""
    with torch.device("meta"):
        return NETWORKS[name]() if name in NETWORKS else build_model(name, num_classes=7)


@st.composite
def masks(draw: st.DrawFn) -> tuple[str, Mask]:
    """Any mask that leaves every prunable group a unit."""
    name = draw(st.sampled_from(GRAPHS))
    graph = graph_of(name)
    kept = graph.everything()
    for group in graph.prunable:
        if draw(st.booleans()):
            bits = draw(st.integers(1, 2**group.size - 1))
            kept[group.units] = [bool(bits >> i & 1) for i in range(group.size)]
    return name, kept


def without(graph: ChannelGraph, group: str, places: list[int]) -> Mask:
    """Return the mask that removes some units of a group."""
    kept = graph.everything()
    (found,) = (g for g in graph.groups if g.name == group)
    kept[found.units[places]] = False
    return kept


def as_table(cuts: tuple[Cut, ...]) -> dict[tuple[str, int], tuple[int, list[int]]]:
    table = {(cut.tensor, cut.dim): (cut.size, cut.kept.tolist()) for cut in cuts}
    assert len(table) == len(cuts)
    return table


# Version 2


# The first draw of a network builds it.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(masks())
def test_cuts_survive_json(case: tuple[str, Mask]) -> None:
    name, kept = case
    cuts = cuts_of(graph_of(name), kept)
    recipe = json.loads(json.dumps(recipe_from(cuts, {})))
    assert as_table(cuts_from_recipe(dense(name), recipe)) == as_table(cuts)


@settings(deadline=None, max_examples=20)
@given(masks())
def test_what_a_recipe_cuts_has_the_shapes_of_the_shrunk_network(case: tuple[str, Mask]) -> None:
    name, kept = case
    graph, network = graph_of(name), copy.deepcopy(dense(name))
    apply_cuts_(network, cuts_from_recipe(network, recipe_from(cuts_of(graph, kept), {})))
    smaller = shrink(dense(name), graph, kept)
    shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (network, smaller))
    assert shapes == expected
    for module, other in zip(network.modules(), smaller.modules(), strict=True):
        integers, those = (
            {k: v for k, v in vars(m).items() if type(v) is int} for m in (module, other)
        )
        assert integers == those


def test_a_recipe_by_hand() -> None:
    """Channels 0, 2 and 5 of eight; the flatten behind has nine positions of each."""
    graph = graph_of("Plain")
    recipe = recipe_from(cuts_of(graph, without(graph, "features.3", [0, 2, 5])), {})
    positions = [9 * channel + position for channel in (1, 3, 4, 6, 7) for position in range(9)]
    assert recipe == {
        "kept": {
            "0": {"size": 8, "indices": [1, 3, 4, 6, 7]},
            "1": {"size": 72, "indices": positions},
        },
        "cuts": {
            "features.3.weight": {"0": "0"},
            "features.3.bias": {"0": "0"},
            "hidden.weight": {"1": "1"},
            "features.3.out_channels": {"0": "0"},
            "hidden.in_features": {"0": "1"},
        },
    }
    assert recipe_from(cuts_of(graph, graph.everything()), {}) == {}
    assert cuts_from_recipe(dense("Plain"), {}) == ()


def test_whole_groups_by_hand() -> None:
    """Two of the four groups go, and two of the eight behind for each."""
    graph = graph_of("Grouped")
    recipe = recipe_from(cuts_of(graph, without(graph, "stem", [1, 3])), {})
    kept, cuts = recipe["kept"], recipe["cuts"]
    assert kept[cuts["grouped.groups"]["0"]] == {"size": 4, "indices": [0, 2]}
    assert kept[cuts["widen.groups"]["0"]] == {"size": 8, "indices": [0, 1, 4, 5]}
    rows = {"size": 16, "indices": [0, 1, 2, 3, 8, 9, 10, 11]}
    assert cuts["grouped.weight"].keys() == {"0"}  # each group reads what it read
    assert kept[cuts["grouped.weight"]["0"]] == kept[cuts["stem.out_channels"]["0"]] == rows
    network = NETWORKS["Grouped"]()
    apply_cuts_(network, cuts_from_recipe(network, recipe))
    grouped = network.get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 8, 8)
    assert network(torch.randn(2, 3, 12, 12)).shape == (2, 4)


def test_places_within_groups_by_hand() -> None:
    """Two groups of eight lose their places 1 and 6: the weight has six inputs left."""
    graph = graph_of("FewGroups")
    recipe = recipe_from(cuts_of(graph, without(graph, "stem", [1, 6])), {})
    kept, cuts = recipe["kept"], recipe["cuts"]
    assert cuts["grouped.weight"].keys() == {"1"}
    assert kept[cuts["grouped.weight"]["1"]] == {"size": 8, "indices": [0, 2, 3, 4, 5, 7]}
    both = [0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 15]
    assert kept[cuts["stem.weight"]["0"]] == {"size": 16, "indices": both}
    assert "grouped.groups" not in cuts


@pytest.mark.parametrize(
    ("gone", "front", "back"),
    [
        ([0, 3, 12], [1, 2, 4, 5, 6, 7], [0, 1, 2, 3, 5, 6, 7]),
        (range(8), [], list(range(8))),
        (range(1, 16), [0], []),
    ],
)
def test_zero_padding_by_hand(gone: list[int], front: list[int], back: list[int]) -> None:
    """Of the 16 channels that resnet20 pads in at its second stage, eight lie in front.

    A side of which nothing is left is no tensor, so it may be empty.
    """
    graph = graph_of("resnet20")
    recipe = recipe_from(cuts_of(graph, without(graph, "layer2.0.conv2", list(gone))), {})
    kept, cuts = recipe["kept"], recipe["cuts"]
    for side, left in (("front", front), ("back", back)):
        place = cuts.get(f"layer2.0.shortcut.{side}")
        found = kept[place["0"]] if place else {"size": 8, "indices": list(range(8))}
        assert found == {"size": 8, "indices": left}
    network = build_model("resnet20", num_classes=7).eval()
    apply_cuts_(network, cuts_from_recipe(network, json.loads(json.dumps(recipe))))
    pad = network.get_submodule("layer2.0.shortcut")
    assert (pad.front, pad.back) == (len(front), len(back))
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def recipe_of(cuts: Any, **kept: Any) -> dict[str, Any]:
    return {"kept": kept, "cuts": cuts}


def one(indices: Any, size: Any = 8) -> dict[str, Any]:
    return recipe_of({"features.3.weight": {"0": "a"}}, a={"size": size, "indices": indices})


@settings(deadline=None)
@given(indices=st.lists(st.integers(-2, 9), max_size=10), sort=st.booleans())
def test_only_ascending_indices_in_range_are_accepted(indices: list[int], sort: bool) -> None:
    indices = sorted(indices) if sort else indices
    good = bool(indices) and sorted(set(indices)) == indices and set(indices) <= set(range(8))
    if good:
        (cut,) = cuts_from_recipe(dense("Plain"), one(indices))
        assert (cut.tensor, cut.dim, cut.size) == ("features.3.weight", 0, 8)
        assert cut.kept.tolist() == indices
        assert cut.kept.dtype == np.int64
    else:
        with pytest.raises(CheckpointError):
            cuts_from_recipe(dense("Plain"), one(indices))


class Huge(list[int]):
    """A list that says it is long; who looks inside pays for it."""

    def __len__(self) -> int:
        return 10**12

    def __iter__(self) -> Any:
        raise AssertionError("the length was not checked first")


BAD_INDICES: tuple[Any, ...] = (
    *([8], [-1], [1, 1], [2, 1], [False, True], [0, 1.0], ["0"], [None], [10**30], [[0]]),
    *({"0": 1}, "01", 5, None, True, Huge()),
)
BAD_SIZES: tuple[Any, ...] = (8.0, True, None, "8", -8, 0, [8])


@pytest.mark.parametrize("indices", BAD_INDICES, ids=lambda i: type(i).__name__)
def test_what_are_no_indices(indices: Any) -> None:
    with pytest.raises(CheckpointError, match="kept channels of entry 'a' are not ascending ind"):
        cuts_from_recipe(dense("Plain"), one(indices))
    recipe = {"features.3": {"size": 8, "kept": indices}}
    with pytest.raises(CheckpointError, match=r"'features.3' are not ascending indices"):
        mask_from_groups(graph_of("Plain"), recipe)


@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(CheckpointError, match="are not ascending indices"):
        cuts_from_recipe(dense("Plain"), one([0], size))
    with pytest.raises(CheckpointError, match="are not ascending indices"):
        mask_from_groups(graph_of("Plain"), {"features.3": {"size": size, "kept": [0]}})


ENTRY = {"size": 8, "indices": [0]}
NOTHING = "which this network does not have"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        # No recipe at all
        ({"kept": {}}, "the recipe has no cuts"),
        ({"cuts": {}}, "the recipe has no cuts"),
        ({"conv1": {"size": 8, "kept": [0]}}, "the recipe has no cuts"),
        ({"kept": [], "cuts": {}}, "the recipe has no cuts"),
        ({"kept": {}, "cuts": [["features.3.weight", 0]]}, "the recipe has no cuts"),
        # Entries
        (recipe_of({}, a=None), "not ascending indices"),
        (recipe_of({}, a=[0]), "not ascending indices"),
        (recipe_of({}, a={"size": 8}), "not ascending indices"),
        (recipe_of({}, a={"indices": [0]}), "not ascending indices"),
        (one([0], 9), "'features.3.weight' a width of 9 and this network has 8"),
        (one([0], 10**12), "a width of 1000000000000 and this network has 8"),
        (one([]), "features.3.weight|ascending"),
        # Names
        (recipe_of({"features.9.weight": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.wait": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"weight": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({".": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.weight.data": {"0": "a"}}, a=ENTRY), NOTHING),
        # What is neither a tensor nor a width
        (recipe_of({"features.3._version": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.__class__": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3._parameters": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.forward": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.training": {"0": "a"}}, a={"size": 1, "indices": [0]}), NOTHING),
        (recipe_of({"features.3.kernel_size": {"0": "a"}}, a=ENTRY), NOTHING),
        (recipe_of({"features.3.padding_mode": {"0": "a"}}, a=ENTRY), NOTHING),
        # Dimensions
        (recipe_of({"features.3.weight": {"4": "a"}}, a=ENTRY), "dimension '4' of"),
        (recipe_of({"features.3.weight": {"-1": "a"}}, a=ENTRY), "dimension '-1' of"),
        (recipe_of({"features.3.weight": {"00": "a"}}, a=ENTRY), "dimension '00' of"),
        (recipe_of({"features.3.weight": {"": "a"}}, a=ENTRY), "dimension '' of"),
        (recipe_of({"features.3.weight": {"x": "a"}}, a=ENTRY), "dimension 'x' of"),
        (recipe_of({"features.3.out_channels": {"1": "a"}}, a=ENTRY), "dimension '1' of"),
        (recipe_of({"norm.num_batches_tracked": {"0": "a"}}, a=ENTRY), "dimension '0' of"),
        (recipe_of({"features.3.weight": {"0": "b"}}, a=ENTRY), "in no way"),
        (recipe_of({"features.3.weight": {"0": ["a"]}}, a=ENTRY), "in no way"),
        (recipe_of({"features.3.weight": {"0": None}}, a=ENTRY), "in no way"),
        (recipe_of({"features.3.weight": {"1": "a"}}, a=ENTRY), "of 8 and this network has 6"),
        (recipe_of({"features.3.weight": {"2": "a"}}, a=ENTRY), "of 8 and this network has 3"),
    ],
)
def test_a_recipe_that_does_not_fit(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        cuts_from_recipe(dense("Plain"), recipe)


def test_an_integer_that_underlines_say_is_private_is_not_cut() -> None:
    network = NETWORKS["Plain"]()
    network._secret, network.flag, network.open = 8, True, 8  # type: ignore[assignment]
    for name in ("_secret", "flag"):
        size = 8 if name == "_secret" else 1
        entry = {"size": size, "indices": [0]}
        with pytest.raises(CheckpointError, match=f"'{name}', {NOTHING}"):
            cuts_from_recipe(network, recipe_of({name: {"0": "a"}}, a=entry))
    (cut,) = cuts_from_recipe(network, recipe_of({"open": {"0": "a"}}, a=ENTRY))
    apply_cuts_(network, [cut])
    assert network.open == 1


def test_nothing_is_cut_by_a_recipe_that_does_not_fit() -> None:
    network = NETWORKS["Plain"]()
    before = copy.deepcopy(network.state_dict())
    cuts = {"features.0.weight": {"0": "a"}, "features.3.weight": {"0": "a"}}
    with pytest.raises(CheckpointError, match=r"'features.3.weight' a width of 6 and this net"):
        cuts_from_recipe(network, recipe_of(cuts, a={"size": 6, "indices": [0, 1]}))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# Version 1


def by_groups(graph: ChannelGraph, kept: Mask) -> dict[str, Any]:
    """Return the recipe that version 1 wrote."""
    return {
        group.name: {"size": group.size, "kept": np.flatnonzero(kept[group.units]).tolist()}
        for group in graph.groups
        if not kept[group.units].all()
    }


@settings(deadline=None)
@given(masks())
def test_a_mask_survives_as_version_1(case: tuple[str, Mask]) -> None:
    name, kept = case
    recipe = json.loads(json.dumps(by_groups(graph_of(name), kept)))
    assert np.array_equal(mask_from_groups(graph_of(name), recipe), kept)


def test_a_recipe_of_version_1_by_hand() -> None:
    graph = graph_of("Plain")
    recipe = {"features.3": {"size": 8, "kept": [1, 3, 4, 6, 7]}}
    assert np.array_equal(mask_from_groups(graph, recipe), without(graph, "features.3", [0, 2, 5]))
    assert mask_from_groups(graph, {}).all()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"features.9": {"size": 8, "kept": [0]}}, "'features.9', which this network does not"),
        ({"head": {"size": 4, "kept": [0]}}, "'head', which this network does not"),
        ({"input": {"size": 3, "kept": [0]}}, "'input', which this network does not"),
        ({"features.3": {"size": 9, "kept": [0]}}, "another width than this network's 8"),
        ({"features.3": {"kept": [0]}}, "not ascending indices"),
        ({"features.3": [0]}, "not ascending indices"),
        ({"features.3": None}, "not ascending indices"),
        ({"features.3": {"size": 8}}, "not ascending indices"),
        ({"features.3": {"size": 8, "kept": []}}, "not ascending indices"),
    ],
)
def test_a_recipe_of_version_1_that_does_not_fit(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        mask_from_groups(graph_of("Plain"), recipe)
