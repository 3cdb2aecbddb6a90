"""Budgets of time: planned with a table, measured by whoever serves, corrected by that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import lived_in, small_graph
from loops import Block, batch_of
from runs import DATA, config_of, graph_of, history, kept_in, start
from torch import nn
from torch.nn import functional as F

import compress
from compress.checkpoints.description import read_description
from compress.config import Budget, PruneConfig, RunConfig
from compress.errors import BudgetError, ConfigError, TableError
from compress.latency.stopwatch import Comparison, Size
from compress.latency.times import Times, network_milliseconds
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.layers import LayerShape
from compress.pruning.choice.widths import Chooser
from compress.pruning.goal import goal_for
from compress.pruning.masking import candidates
from compress.runs.prune import check_budget, prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session


class Stairs:
    """Multiply-adds in thousands, in steps of four channels, and a floor for every layer."""

    fixed = 0.25

    def milliseconds(self, shape: LayerShape, read: np.ndarray, written: np.ndarray) -> np.ndarray:
        each = math.prod(shape.kernel) * math.prod(shape.output_size) / 1000
        sides = (-(-np.asarray(side) // 4) * 4 for side in (read, written))
        first, second = sides
        return np.maximum(first * second * each / shape.groups, 1.0)


@dataclass
class Served(Stairs):
    """What is served takes other times than the table says; a ``Stopwatch``."""

    bias: Callable[[float], float]
    """From the share that the table predicts to the one that is measured."""
    width: float = 0.01
    """Of the interval, to either side."""
    seen: list[float] = field(default_factory=list)

    def table(self, model: nn.Module, graph: ChannelGraph, size: Size, folder: Path) -> Times:
        return Stairs()

    def compare(self, dense: nn.Module, pruned: nn.Module, size: Size) -> Comparison:
        first, second = (
            network_milliseconds(graph, Stairs(), graph.everything())
            for graph in (analyse(network, size) for network in (dense, pruned))
        )
        ratio = self.bias(second / first)
        self.seen.append(ratio)
        low, high = ratio * (1 - self.width), ratio * (1 + self.width)
        return Comparison(2 * first, 2 * first * ratio, ratio, low, high)


def run_of(path: Path, **settings: Any) -> tuple[RunDirectory, RunConfig]:
    config = config_of("resnet20", steps=6, interval=1, **{"budget": "latency=0.6", **settings})
    return start(path, config), config


@pytest.mark.parametrize(
    ("text", "value", "unit", "absolute"),
    [
        ("latency=0.5", 0.5, "", False),
        ("latency=4.2ms", 4.2, "ms", True),
        ("latency = .4 ms", 0.4, "ms", True),
    ],
)
def test_a_budget_of_time_is_a_share_or_milliseconds(
    text: str, value: float, unit: str, absolute: bool
) -> None:
    budget = Budget.model_validate(text)
    assert (budget.kind, budget.value, budget.unit, budget.absolute) == (
        "latency",
        value,
        unit,
        absolute,
    )
    assert Budget.model_validate(str(budget)) == budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "latency=4.2"}, "a share of the dense network's up to 1, or milliseconds"),
        ({"budget": "macs=5ms"}, "macs is not counted in ms"),
        ({"budget": "latency=0ms"}, "greater than 0"),
        ({"budget": "latency=0.5", "step_size": 4}, "step_size removes channels"),
        ({"budget": "latency=0.5"}, "needs a latency table: measure one with compress profile"),
        ({"budget": "latency=0.5", "latency_table": "none.json"}, "cannot read the latency table"),
        ({"budget": "latency=0.5", "latency_table": "v10"}, "no latency table is named 'v10': did"),
    ],
)
def test_what_no_budget_of_time_can_be(settings: dict[str, Any], message: str) -> None:
    graph = analyse(Block().eval(), (3, 8, 8))
    with pytest.raises((ConfigError, TableError), match=message):
        compress.choose(graph, np.ones(graph.num_units), **settings)


def test_a_share_of_the_time_is_met_and_not_ranked_for() -> None:
    """With one table the choice may not exceed the limit, and an exhaustive search agrees."""
    graph = analyse(Block().eval(), (3, 8, 8))
    scores = np.random.default_rng(0).random(graph.num_units)
    settings: dict[str, Any] = {"min_channels": 4, "channel_multiple": 4, "min_share": 0}
    dense = network_milliseconds(graph, Stairs(), graph.everything())
    allowed = candidates(graph, PruneConfig(budget="latency=0.55", **settings))
    chooser = Chooser(graph, Stairs(), allowed)
    kept = chooser.choose(scores, graph.everything(), 0.55 * dense).mask
    assert network_milliseconds(graph, Stairs(), kept) <= 0.55 * dense
    reached = [each for each in masks_of(graph, scores) if within(graph, each, 0.55 * dense)]
    best = min(lost_of(graph, scores, each) for each in reached)
    assert lost_of(graph, scores, kept) == pytest.approx(best)
    # What is chosen for a budget is as near to it as multiples of four allow.
    near = compress.choose(graph, scores, table=Stairs(), budget="latency=0.55", **settings)
    times = [network_milliseconds(graph, Stairs(), each) for each in reached]
    assert network_milliseconds(graph, Stairs(), near) == pytest.approx(max(times))
    with pytest.raises(BudgetError, match=r"the fastest choice takes .* which is latency=0\.\d+"):
        compress.choose(graph, scores, table=Stairs(), budget="latency=0.001", **settings)


def masks_of(graph: ChannelGraph, scores: np.ndarray) -> list[Mask]:
    """All masks in multiples of four: of the stream, and of what lies between."""
    masks = [graph.everything()]
    for group in graph.prunable:
        order = group.units[np.argsort(scores[group.units])]
        more = []
        for mask in masks:
            for gone in range(0, group.size - 3, 4):
                other = mask.copy()
                other[order[:gone]] = False
                more.append(other)
        masks = more
    return masks


def within(graph: ChannelGraph, kept: Mask, limit: float) -> bool:
    return network_milliseconds(graph, Stairs(), kept) <= limit


def lost_of(graph: ChannelGraph, scores: np.ndarray, kept: Mask) -> float:
    return float(scores[~kept].sum())


def test_every_step_is_on_the_way_to_the_end_and_blocks_go_first() -> None:
    graph = small_graph("resnet20")
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=graph.num_units)
    for branch in graph.removable:
        scores[branch.unit] = scores[branch.inner].sum() * rng.random()
    config = PruneConfig(budget="latency=0.4", channel_multiple=8, min_share=0)
    goal = goal_for(graph, config.budget, candidates(graph, config), Stairs())
    assert goal.planner is not None
    choose = partial(goal.planner.choose, end=goal.limit, least=goal.least)
    kept, masks = graph.everything(), []
    for step in range(1, 9):
        limit = goal.at(step, 8)
        kept = choose(scores, kept, limit)
        assert goal.cost_of(kept) <= limit
        masks.append(kept)
    assert 0.98 * goal.limit <= goal.cost_of(kept) <= goal.limit
    # With the same scores at every step the plan is the same: the choice for the end at once.
    at_once = choose(scores, graph.everything(), goal.limit)
    assert np.array_equal(kept, at_once)
    gone = [branch for branch in graph.removable if not at_once[branch.unit]]
    assert gone
    least = min(gone, key=lambda branch: scores[branch.unit])
    assert not masks[0][least.unit]
    others = np.setdiff1d(np.arange(graph.num_units), [least.unit, *least.inner])
    assert masks[0][others].all()  # one block was enough


def test_a_sum_over_layers_that_holds_near_a_network_only_is_taken_anew() -> None:
    class Local(Stairs):
        """Slower where the network is larger: a sum over layers near each network only."""

        def __init__(self, slower: float = 1.5) -> None:
            self.slower = slower

        def around(self, graph: ChannelGraph, kept: Mask) -> Local:
            return Local(1 + cost.macs(graph, kept) / cost.macs(graph, graph.everything()))

        def milliseconds(
            self, shape: LayerShape, read: np.ndarray, written: np.ndarray
        ) -> np.ndarray:
            return self.slower * super().milliseconds(shape, read, written)

    graph = analyse(Block().eval(), (3, 8, 8))
    config = PruneConfig(budget="latency=0.4", min_channels=1, min_share=0)
    goal = goal_for(graph, config.budget, candidates(graph, config), Local())
    assert goal.planner is not None
    scores, everything = np.ones(graph.num_units), graph.everything()
    kept = goal.planner.choose(scores, everything, goal.limit, end=goal.limit, least=goal.least)
    assert 0.8 * goal.limit < network_milliseconds(graph, Local(), kept) <= goal.limit


def test_the_pruner_plans_with_a_table_and_takes_a_corrected_limit() -> None:
    torch.manual_seed(0)
    model = lived_in(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings: dict[str, Any] = {"steps": 4, "interval": 1, "min_channels": 1, "min_share": 0}
    settings |= {"optimizer": optimizer, "table": Stairs(), "budget": "latency=0.7"}
    pruner = compress.Pruner(model, batch_of(2)[0], **settings)

    def train() -> bool:
        images, labels = batch_of(16)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        pruner.score()
        optimizer.step()
        return pruner.step()

    def predicted() -> float:
        graph = analyse(model, Example.of(batch_of(2)[0]))
        return network_milliseconds(graph, Stairs(), graph.everything())

    dense = predicted()
    while not train():
        pass
    assert predicted() <= 0.7 * dense
    pruner.limit(0.6 * dense)  # as if it had been measured to be slow
    assert not pruner.done
    while not train():
        pass
    assert predicted() <= 0.6 * dense
    other = lived_in(Block())
    again = compress.Pruner(other, batch_of(2)[0], **{**settings, "optimizer": None})
    again.load_state_dict(pruner.state_dict())
    assert again.done
    assert again.decisions.goal.limit == pytest.approx(0.6 * dense)


@pytest.mark.parametrize(
    "bias",
    [lambda share: 0.1 + 0.85 * share, lambda share: share, lambda share: 1.08 * share],
)
@pytest.mark.slow
def test_the_measured_time_ends_within_the_budget_and_not_far_below(
    tmp_path: Path, bias: Callable[[float], float]
) -> None:
    run, config = run_of(tmp_path / "run")
    served = Served(bias)
    prune(config, DATA, Session(run), served)
    events = history(run, "latency")
    assert [event["measured_share"] for event in events] == pytest.approx(served.seen, rel=1e-4)
    steps = [event["step"] for event in history(run, "prune_step")]
    assert events[0]["step"] == steps[4]  # 85 % of six, and 95 % too
    assert events[1]["step"] >= steps[5]
    last = events[-1]
    assert 0.55 < last["measured_interval"][1] <= 0.6
    description = read_description(run.pruned)
    assert description is not None
    assert description.metrics["latency"]["measured_share"] == last["measured_share"]
    # What is written is what was measured.
    graph = graph_of(run, config)
    assert last["predicted_share"] == pytest.approx(
        last["predicted_ms"] / network_milliseconds(graph, Stairs(), graph.everything()), rel=1e-3
    )


@pytest.mark.slow
def test_a_budget_that_is_missed_leaves_a_finished_run(tmp_path: Path) -> None:
    run, config = run_of(tmp_path / "run", latency_rounds=1)
    served = Served(lambda share: max(share, 0.65))  # nothing makes it faster
    with pytest.raises(BudgetError, match=r"is missed: .* 0\.650 .* after 1 corrections; it is"):
        prune(config, DATA, Session(run), served)
    assert run.pruned.is_file()
    assert history(run, "finetuned")


@pytest.mark.slow
def test_a_corrected_limit_that_nothing_can_hold_ends_pruning_where_it_is(tmp_path: Path) -> None:
    run, config = run_of(tmp_path / "run")
    served = Served(lambda share: 1000 * share)  # the corrected limit is below every floor
    with pytest.raises(BudgetError, match="is missed: the network takes"):
        prune(config, DATA, Session(run), served)
    steps = history(run, "prune_step")
    assert len(served.seen) == 2  # on the way, and at the end
    assert history(run, "finetuned")
    graph = graph_of(run, config)
    kept = kept_in(run, graph)
    widths = {group.name: int(kept[group.units].sum()) for group in graph.prunable}
    assert widths.items() <= steps[-1]["widths"].items()


def test_without_a_stopwatch_a_run_needs_a_table(tmp_path: Path) -> None:
    run, config = run_of(tmp_path / "run")
    check_budget(config, DATA)
    with pytest.raises(ConfigError, match=r"nothing measures one here: set prune\.latency_table"):
        prune(config, DATA, Session(run))
