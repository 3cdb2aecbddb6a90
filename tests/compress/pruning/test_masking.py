"""Which units go: against a greedy reference that removes one chunk after another."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import small_graph
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

import compress
from compress.config import Budget, PruneConfig
from compress.errors import BudgetError, ConfigError, ModelError
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import build_model
from compress.pruning.decision import decide, prunable, within_reach
from compress.pruning.goal import goal_for
from compress.pruning.masking import Candidate, CostFunction, Scores, candidates, prune_to, smallest

COSTS = {"macs": cost.macs, "params": cost.params, "channels": cost.channels}
NAMES = ("resnet20", "resnext50_32x4d", "Dense", "Grouped", "Separable", "Plain")


@cache
def graph_of(name: str) -> ChannelGraph:
    return analyse(NETWORKS[name](), (3, 12, 12)) if name in NETWORKS else small_graph(name)


def chunks_of(scores: Scores, kept: Mask, allowed: tuple[Candidate, ...]) -> list[np.ndarray]:
    """Return what may go, in order: plain Python on one group after another."""
    queue: list[tuple[float, int, np.ndarray]] = []
    for candidate in allowed:
        present = [u for u in candidate.group.units.tolist() if kept[u]]
        present.sort(key=lambda unit: scores[unit])
        while len(present) > candidate.floor:
            size = len(present) % candidate.chunk or candidate.chunk
            chunk, present = present[:size], present[size:]
            if len(present) < candidate.floor:
                break
            mean = math.fsum(scores[u] for u in chunk) / size
            queue.append((mean, len(queue), np.array(chunk)))
    return [chunk for *_, chunk in sorted(queue, key=lambda item: item[:2])]


def greedy(
    scores: Scores, kept: Mask, allowed: tuple[Candidate, ...], cost_of: CostFunction, limit: float
) -> tuple[Mask, Mask | None]:
    """Remove chunk after chunk; return the first mask that fits, and the one before it."""
    mask, before = kept.copy(), None
    for chunk in chunks_of(scores, kept, allowed):
        if cost_of(mask) <= limit:
            break
        before = mask.copy()
        mask[chunk] = False
    return mask, before


def give_back(
    mask: Mask,
    before: Mask,
    kept: Mask,
    scores: Scores,
    allowed: tuple[Candidate, ...],
    cost_of: CostFunction,
    limit: float,
) -> None:
    """Put back what the last chunk made needless, the most important first."""
    last = set(np.flatnonzero(before & ~mask).tolist())
    for chunk in reversed(chunks_of(scores, kept, allowed)):
        group = next(c.group for c in allowed if chunk[0] in c.group.units)
        if mask[chunk].all() or last & set(group.units.tolist()):
            continue
        mask[chunk] = True
        if cost_of(mask) > limit:
            mask[chunk] = False
            return


@st.composite
def limits(draw: st.DrawFn, graph: ChannelGraph) -> PruneConfig:
    names = [group.name for group in graph.prunable]
    dense = draw(st.lists(st.sampled_from(names), max_size=len(names) // 2, unique=True))
    return PruneConfig(
        channel_multiple=draw(st.sampled_from([1, 2, 3, 4, 8])),
        min_channels=draw(st.integers(1, 12)),
        min_share=draw(st.sampled_from([0.0, 0.1, 0.3, 0.5])),
        keep_dense=tuple(dense),
    )


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[ChannelGraph, PruneConfig, tuple[Candidate, ...], Scores, Mask, CostFunction, float]:
    """A network, limits, distinct scores, a mask half-way, a cost and a limit that it can reach."""
    graph = graph_of(draw(st.sampled_from(NAMES)))
    config = draw(limits(graph))
    allowed = candidates(graph, config)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = rng.random(graph.num_units) ** 4
    kept = graph.everything()
    gone = chunks_of(rng.random(graph.num_units), kept, allowed)
    for chunk in gone[: int(len(gone) * draw(st.sampled_from([0, 0.3])))]:
        kept[chunk] = False
    function = COSTS[draw(st.sampled_from(sorted(COSTS)))]
    dense, least = function(graph, graph.everything()), function(graph, smallest(graph, allowed))
    limit = least + draw(st.floats(0, 1)) * (dense - least)
    return graph, config, allowed, scores, kept, lambda mask: function(graph, mask), limit


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_prune_to_is_the_greedy_choice(
    case: tuple[
        ChannelGraph, PruneConfig, tuple[Candidate, ...], Scores, Mask, CostFunction, float
    ],
) -> None:
    graph, config, allowed, scores, kept, cost_of, limit = case
    result = prune_to(scores, kept, allowed, cost_of=cost_of, limit=limit)
    expected, before = greedy(scores, kept, allowed, cost_of, limit)
    if before is not None:
        give_back(expected, before, kept, scores, allowed, cost_of, limit)
    assert np.array_equal(result, expected)
    assert cost_of(result) <= limit
    assert before is None or cost_of(before) > limit  # one chunk less is too much
    assert not result[~kept].any()  # removed stays removed

    touched = {c.group.name for c in allowed}
    assert touched.isdisjoint(config.keep_dense)
    for group in graph.groups:
        if group.frozen or group.name in config.keep_dense:
            assert result[group.units].all()
    for candidate in allowed:
        group = candidate.group
        present = int(result[group.units].sum())
        channels = present * group.width
        assert present == group.size or channels >= config.min_channels
        assert present == group.size or present >= config.min_share * group.size - 1e-9
        assert present >= 1
        for width in group.widths:  # once it loses anything a width is a multiple
            ragged = present * width % config.channel_multiple
            assert not ragged or present == int(kept[group.units].sum())


def test_a_chunk_that_goes_far_below_the_limit_is_left_out_where_others_do() -> None:
    graph = small_graph("resnet20")
    allowed = candidates(graph, PruneConfig(channel_multiple=8))
    stream = next(g for g in graph.prunable if g.name == "conv1")
    scores = np.random.default_rng(0).random(graph.num_units)
    scores[stream.units] = 0.0
    kept, dense = graph.everything(), cost.macs(graph, graph.everything())

    def share(mask: Mask) -> float:
        return cost.macs(graph, mask) / dense

    far = prune_to(scores, kept, allowed, cost_of=share, limit=0.97)
    assert share(far) < 0.9
    assert far.sum() == len(far) - 8
    near = prune_to(scores, kept, allowed, cost_of=share, limit=0.97, least=0.95)
    assert 0.95 <= share(near) <= 0.97
    assert near[stream.units].all()
    only = tuple(c for c in allowed if c.group is stream)
    assert (prune_to(scores, kept, only, cost_of=share, limit=0.97, least=0.95) == far).all()


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "Dense", "Plain"]),
    seed=st.integers(0, 1000),
    share=st.floats(0.3, 1),
    ties=st.booleans(),
)
def test_the_least_important_go_first(name: str, seed: int, share: float, ties: bool) -> None:
    """Unit by unit, over all groups: nothing that went outranks what could have gone and stayed."""
    graph = graph_of(name)
    allowed = candidates(graph, PruneConfig(min_channels=2, min_share=0))
    scores = np.random.default_rng(seed).random(graph.num_units)
    scores = np.round(scores, 1) if ties else scores
    limit = share * cost.channels(graph, graph.everything())
    limit = max(limit, cost.channels(graph, smallest(graph, allowed)))
    kept = prune_to(
        scores,
        graph.everything(),
        allowed,
        cost_of=lambda mask: cost.channels(graph, mask),
        limit=limit,
    )
    most_important_gone = scores[~kept].max(initial=-1)
    for candidate in allowed:
        units = candidate.group.units
        here = kept[units]
        assert scores[units[~here]].max(initial=-1) <= scores[units[here]].min()
        if here.sum() > candidate.floor:
            assert scores[units[here]].min() >= most_important_gone
    assert cost.channels(graph, kept) == math.floor(limit)


@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 1e-30])
@pytest.mark.parametrize("ragged", [9, 11, 13, 14, 15])
def test_equal_scores_make_a_ragged_width_even_first(score: float, ragged: int) -> None:
    """The mean of three times 0.1 is more than 0.1: rounding must not decide."""
    model = nn.Sequential(
        nn.Conv2d(3, ragged + 16, 1), nn.Conv2d(ragged + 16, 4, 1), nn.Flatten(), nn.Linear(4, 2)
    )
    graph = analyse(model, (3, 1, 1))
    allowed = candidates(graph, PruneConfig(channel_multiple=8, keep_dense=("1",)))
    group = allowed[0].group
    kept = graph.everything()
    for expected in ((ragged + 16) // 8 * 8, (ragged + 16) // 8 * 8 - 8):
        cost_now = cost.channels(graph, kept)
        kept = prune_to(
            np.full(graph.num_units, score),
            kept,
            allowed,
            cost_of=lambda mask: cost.channels(graph, mask),
            limit=cost_now - 1,
        )
        assert kept[group.units].sum() == expected


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "resnext50_32x4d", "Grouped"]),
    multiple=st.sampled_from([2, 4, 8, 16, 32]),
    kind=st.sampled_from(["macs", "params"]),
    reach=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_widths_are_multiples_and_the_budget_still_holds(
    name: str, multiple: int, kind: str, reach: float, seed: int
) -> None:
    """Multiples are of channels, also where a unit is several channels wide."""
    graph = graph_of(name)
    allowed = candidates(graph, PruneConfig(channel_multiple=multiple))
    dense = COSTS[kind](graph, graph.everything())
    least = COSTS[kind](graph, smallest(graph, allowed))
    share = (least + reach * (dense - least)) / dense + 1e-9
    goal = goal_for(graph, Budget(kind=kind, value=min(share, 1)), allowed)  # type: ignore[arg-type]
    scores = np.random.default_rng(seed).random(graph.num_units)
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    assert goal.cost_of(kept) <= share * dense
    for axis in graph.axes:
        if axis.tensor.endswith(".weight") and axis.dim == 0:
            before, after = len(axis.units), int(kept[axis.units].sum())
            assert before % multiple or after % multiple == 0, axis.layer


def test_units_of_several_channels_go_in_chunks_that_keep_the_multiple() -> None:
    graph = graph_of("resnext50_32x4d")
    chunks = {
        c.group.name: (c.group.width, c.chunk, c.floor)
        for c in candidates(graph, PruneConfig(channel_multiple=16, min_channels=4, min_share=0.1))
    }
    # width in channels -> units: 4 units of 4 are 16; at least 10 % of 32 units are 4
    assert chunks["layer1.0.conv1"] == (4, 4, 4)
    assert chunks["layer2.0.conv1"] == (8, 2, 4)
    assert chunks["layer3.0.conv1"] == (16, 1, 4)
    assert chunks["layer4.0.conv1"] == (32, 1, 4)
    assert chunks["layer1.0.conv3"] == (1, 16, 32)  # 10 % of 256 are 26, rounded up


def test_floors_by_hand() -> None:
    graph = graph_of("resnet20")

    def floors(**limits: float) -> dict[str, int]:
        allowed = candidates(graph, PruneConfig(**limits))  # type: ignore[arg-type]
        return {c.group.name: c.floor for c in allowed}

    assert set(floors(min_channels=1, min_share=0).values()) == {1}
    assert floors(min_channels=5, min_share=0)["layer3.0.conv1"] == 5
    assert floors(min_channels=1, min_share=0.1)["layer3.0.conv1"] == 7  # 6.4, rounded up
    assert floors(min_channels=1, min_share=0.25)["layer3.0.conv1"] == 16  # exactly
    assert floors(min_channels=1, min_share=1)["layer3.0.conv1"] == 64
    assert floors(min_channels=99, min_share=0)["conv1"] == 16  # nothing can go


def test_keep_dense_takes_patterns_and_names_a_mistake() -> None:
    graph = graph_of("resnet20")
    allowed = candidates(graph, PruneConfig(keep_dense=("layer[12].*", "conv1")))
    assert {c.group.name for c in allowed} == {
        *("layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1", "layer3.2.conv1")
    }
    with pytest.raises(ConfigError, match=r"'layer1.0.conv9': did you mean 'layer1.0.conv1'"):
        candidates(graph, PruneConfig(keep_dense=("layer1.0.conv9",)))


# Budgets


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_shares_and_absolutes(name: str, kind: str) -> None:
    graph = graph_of(name)
    allowed = candidates(graph, PruneConfig(min_channels=1, min_share=0))
    dense = COSTS[kind](graph, graph.everything())
    share = goal_for(graph, Budget.model_validate(f"{kind}=0.75"), allowed)
    assert (share.dense, share.limit) == (dense, 0.75 * dense)
    absolute = goal_for(graph, Budget.model_validate(f"{kind}={dense - 1}"), allowed)
    assert absolute.limit == dense - 1
    kept = graph.everything()
    kept[graph.prunable[0].units[0]] = False
    assert share.cost_of(kept) == COSTS[kind](graph, kept)
    assert share.channels_of(kept) == cost.channels(graph, kept)


def test_removed_counts_channels() -> None:
    graph = graph_of("resnet20")
    allowed = candidates(graph, PruneConfig())
    goal = goal_for(graph, Budget.model_validate("removed=123"), allowed)
    scores = np.random.default_rng(0).random(graph.num_units)
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    assert np.count_nonzero(~kept) == 123


def test_a_share_means_the_number_that_people_compute() -> None:
    """0.29 x 100 is 28.999999999999996 in binary; 29 channels of 100 are meant."""
    model = nn.Sequential(nn.Conv2d(3, 100, 1), nn.Flatten(), nn.Linear(100, 2))
    graph = analyse(model, (3, 1, 1))
    allowed = candidates(graph, PruneConfig())
    goal = goal_for(graph, Budget(kind="channels", value=0.29), allowed)
    kept = prune_to(
        np.arange(graph.num_units, dtype=np.float64),
        graph.everything(),
        allowed,
        cost_of=goal.cost_of,
        limit=goal.limit,
    )
    assert cost.channels(graph, kept) == 29


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_closest_budget_named_is_reachable(data: st.DataObject) -> None:
    graph = graph_of(data.draw(st.sampled_from(NAMES)))
    config = data.draw(limits(graph))
    allowed = candidates(graph, config)
    kind = data.draw(st.sampled_from(["macs", "params", "channels", "removed"]))
    least = smallest(graph, allowed)
    if kind == "removed":
        function = cost.channels
        too_much = function(graph, graph.everything()) - function(graph, least) + 1
        asked = Budget(kind="removed", value=too_much)
    else:
        function = COSTS[kind]
        dense, closest = function(graph, graph.everything()), function(graph, least)
        share = data.draw(st.booleans())
        value = (closest - 0.9) / dense if share else closest - 1
        asked = Budget(kind=kind, value=max(value, 1e-6))  # type: ignore[arg-type]
    with pytest.raises(BudgetError) as caught:
        goal_for(graph, asked, allowed)
    named = re.search(r"the closest is (\w+=[\d.]+);", str(caught.value))
    assert named, str(caught.value)
    if named[1] == "removed=0":
        assert np.array_equal(least, graph.everything())
        return
    budget = Budget.model_validate(named[1])
    goal = goal_for(graph, budget, allowed)
    scores = np.random.default_rng(0).random(graph.num_units)
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    assert goal.cost_of(kept) <= goal.limit
    if budget.kind != "removed" and budget.value <= 1:  # it is close: four digits of a share
        assert goal.limit - function(graph, least) <= 1e-4 * goal.dense + 1


def test_a_budget_that_chunks_miss_by_far_is_told(caplog: pytest.LogCaptureFixture) -> None:
    graph = analyse(OneGroup(nn.ReLU()).eval(), (3, 12, 12))  # of eight channels
    scores = np.random.default_rng(0).random(graph.num_units)
    for multiple, left in ((1, 7), (4, 4)):
        settings = {"channel_multiple": multiple, "min_channels": 1, "budget": "macs=0.9"}
        kept = compress.choose(graph, scores, **settings)
        assert np.count_nonzero(kept[graph.prunable[0].units]) == left
    (told,) = [record.getMessage() for record in caplog.records if record.name == "compress"]
    assert told.startswith("macs=0.9 was asked for and 0.500 of the dense cost is left: multiples")


def test_a_multiple_gives_way_to_the_budget_where_it_may(caplog: pytest.LogCaptureFixture) -> None:
    graph = small_graph("resnet20")
    scores = np.random.default_rng(0).random(graph.num_units)
    settings = {"budget": "macs=0.06", "channel_multiple": 8, "min_share": 0}
    with pytest.raises(BudgetError, match=r"the closest is macs=0\.1\d+"):
        compress.choose(graph, scores, **settings)
    assert not caplog.text
    kept = compress.choose(graph, scores, relax_multiple=True, **settings)
    assert "macs=0.06 cannot be reached in multiples of 8 channels: widths are multiples of 4" in (
        caplog.text
    )
    assert 0.055 < cost.macs(graph, kept) / cost.macs(graph, graph.everything()) <= 0.06
    widths = [int(kept[group.units].sum()) for group in graph.prunable]
    assert {width % 4 for width in widths} == {0}
    assert any(width % 8 for width in widths)
    compress.choose(graph, scores, relax_multiple=True, **{**settings, "budget": "macs=0.2"})
    assert caplog.text.count("cannot be reached") == 1
    with pytest.raises(BudgetError, match="the closest is"):  # not even with single channels
        compress.choose(graph, scores, relax_multiple=True, **{**settings, "budget": "macs=0.001"})


def test_prune_to_says_what_it_cannot_reach() -> None:
    graph = graph_of("Plain")
    allowed = candidates(graph, PruneConfig(min_channels=4))
    with pytest.raises(BudgetError, match=r"cannot fall to 1: .* it is 12$"):
        prune_to(
            np.zeros(graph.num_units),
            graph.everything(),
            allowed,
            cost_of=lambda mask: cost.channels(graph, mask),
            limit=1,
        )


@settings(deadline=None)
@given(
    dense=st.integers(1, 10**11),
    share=st.floats(0, 1),
    steps=st.integers(1, 50),
)
def test_the_path_to_the_goal_is_a_straight_line(dense: int, share: float, steps: int) -> None:
    graph = graph_of("Plain")
    goal = goal_for(graph, Budget(kind="channels", value=1), candidates(graph, PruneConfig()))
    goal = replace(goal, dense=dense, limit=share * dense)
    limits = [goal.at(step, steps) for step in range(steps + 1)]
    assert limits[0] == dense
    assert limits[-1] == goal.limit  # exactly, or the run would never end
    assert goal.at(steps + 7, steps) == goal.limit
    assert all(a >= b for a, b in itertools.pairwise(limits))
    exact = [dense + (goal.limit - dense) * step / steps for step in range(steps + 1)]
    assert limits == pytest.approx(exact, abs=1e-15 * dense)  # a few roundings of the largest


# Pruning steps


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "Dense", "Plain"]),
    budget=st.sampled_from(["macs=0.5", "params=0.6", "channels=0.7", "removed=9"]),
    steps=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_steps_fall_linearly_and_never_overshoot(
    name: str, budget: str, steps: int, seed: int
) -> None:
    graph = graph_of(name)
    config = PruneConfig(budget=budget, steps=steps, min_channels=2)  # type: ignore[arg-type]
    allowed = candidates(graph, config)
    goal = goal_for(graph, config.budget, allowed)
    rng = np.random.default_rng(seed)
    kept = graph.everything()
    for step in range(1, steps + 1):
        before = kept
        scores = rng.random(graph.num_units)  # importance changes from step to step
        kept, _ = decide(scores, before, allowed, goal=goal, config=config, step=step)
        assert not kept[~before].any()
        assert goal.cost_of(kept) <= goal.at(step, steps)
        gone = np.flatnonzero(before & ~kept)
        if len(gone):
            back = kept.copy()
            back[gone[scores[gone].argmax()]] = True  # one unit less is not enough
            assert goal.cost_of(back) > goal.at(step, steps)
    assert goal.cost_of(kept) <= goal.limit


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "Grouped", "Plain"]),
    budget=st.sampled_from(["macs=0.5", "channels=0.7", "removed=7"]),
    step_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@example(name="Plain", budget="macs=0.5", step_size=9, seed=63)  # a step of few channels overshot
def test_steps_of_a_size(name: str, budget: str, step_size: int, seed: int) -> None:
    graph = graph_of(name)
    config = PruneConfig(budget=budget, step_size=step_size, min_channels=2)  # type: ignore[arg-type]
    allowed = candidates(graph, config)
    goal = goal_for(graph, config.budget, allowed)
    widest = max(c.group.width for c in allowed)
    rng = np.random.default_rng(seed)
    kept, step = graph.everything(), 0
    while goal.cost_of(kept) > goal.limit:
        step += 1
        before, scores = kept, rng.random(graph.num_units)
        kept, _ = decide(scores, before, allowed, goal=goal, config=config, step=step)
        assert not kept[~before].any()
        gone = goal.channels_of(before) - goal.channels_of(kept)
        assert 0 < gone < step_size + widest
        last = goal.cost_of(kept) <= goal.limit
        assert last or gone >= step_size
        if last:
            units = np.flatnonzero(before & ~kept)
            back = kept.copy()
            back[units[scores[units].argmax()]] = True
            assert goal.cost_of(back) > goal.limit
    assert step <= math.ceil(goal.channels_of(graph.everything()) / step_size)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["resnet20", "Plain", "Dense"]),
    budget=st.sampled_from(["macs=0.25", "macs=0.4", "params=0.3", "channels=0.5"]),
    multiple=st.sampled_from([1, 4, 8]),
    steps=st.integers(2, 20),
    streams=st.sampled_from([1.0, 50.0]),
    noise=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 1000),
)
def test_many_steps_take_no_more_than_one_does(
    name: str, budget: str, multiple: int, steps: int, streams: float, noise: float, seed: int
) -> None:
    """Also where importance changes, and where streams are too important to go while others can."""
    graph = graph_of(name)
    limits = {"channel_multiple": multiple, "min_channels": 2, "relax_multiple": True}
    wanted = PruneConfig(budget=budget, steps=steps, **limits)  # type: ignore[arg-type]
    config, allowed, goal = within_reach(graph, wanted, lambda c: candidates(graph, c), None)
    rng = np.random.default_rng(seed)
    scores = rng.lognormal(size=graph.num_units)
    for candidate in allowed:
        if len(candidate.group.readers) > 1:
            scores[candidate.group.units] *= streams
    kept, end, planned = graph.everything(), None, []
    for step in range(1, steps + 1):
        now = scores * rng.lognormal(sigma=noise, size=graph.num_units)
        kept, end = decide(now, kept, allowed, goal=goal, config=config, step=step, end=end)
        assert end is not None
        planned.append(goal.cost_of(end))
        assert kept[end].all()
    assert goal.limit >= goal.cost_of(kept) >= planned[-1] >= min(goal.least, planned[0])


def test_a_goal_that_holds_already_removes_nothing() -> None:
    graph = graph_of("resnet20")
    config = PruneConfig(budget="macs=1", steps=1)  # type: ignore[arg-type]
    allowed = candidates(graph, config)
    goal = goal_for(graph, config.budget, allowed)
    kept, _ = decide(
        np.zeros(graph.num_units), graph.everything(), allowed, goal=goal, config=config, step=1
    )
    assert kept.all()


# Nothing to prune


class OneGroup(nn.Module):
    """All channels that it has pass through one operation."""

    def __init__(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.operation = operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.operation(self.a(x)).mean((2, 3)))


def test_nothing_to_prune_names_what_stands_in_the_way() -> None:
    for operation, message in (
        (lambda x: torch.fft.fft(x, dim=1).abs(), r"unknown operations .*: fft_fft"),
        (lambda x: x.cumsum(1), r"every group must stay dense: cumsum over channels"),
    ):
        model: nn.Module = OneGroup(operation)
        with pytest.raises(ModelError, match=f"nothing to prune: {message}"):
            prunable(model, analyse(model, (3, 4, 4)), PruneConfig())
    model, graph = build_model("resnet20", num_classes=3), graph_of("resnet20")
    with pytest.raises(ModelError, match="no group is above its floor"):
        prunable(model, graph, PruneConfig(keep_dense=("*",)))
    with pytest.raises(ModelError, match="every layer that reads prunable channels is frozen"):
        prunable(model.requires_grad_(False), graph, PruneConfig())
