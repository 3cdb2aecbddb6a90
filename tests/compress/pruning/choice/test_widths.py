"""Widths and branches under a limit: against all masks of networks small enough to try them all."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from choice_quality import RandomTimes, Trial, qualities, trial_of
from conftest import small_graph
from networks import NETWORKS
from tables import MultiplyAdds, Written

from compress.config import PruneConfig
from compress.errors import BudgetError, TableError
from compress.latency.remembered import Remembered
from compress.latency.times import network_milliseconds
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.groups import Branch, ChannelGraph, Mask
from compress.networks.layers import LayerShape
from compress.pruning.choice import lagrange, widths
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import Candidate, candidates, prune_to


def captured(name: str, seed: int) -> Trial:
    rng = np.random.default_rng(seed)
    graph = analyse(NETWORKS[name](), (3, 12, 12))
    widest = max(n for layer in graph.layers for n in layer.widths(graph.everything()))
    times = RandomTimes(rng, list(dict.fromkeys(layer.shape for layer in graph.layers)), widest)
    return Trial(
        graph,
        times,
        rng.exponential(size=graph.num_units),
        candidates(graph, PruneConfig(blocks=False)),
    )


def resnet(multiple: int) -> tuple[ChannelGraph, tuple[Candidate, ...], np.ndarray]:
    graph = small_graph("resnet20")
    allowed = candidates(graph, PruneConfig(channel_multiple=multiple, blocks=False))
    scores = np.random.default_rng(0).exponential(size=graph.num_units)
    return graph, allowed, scores


def best_of(trial: Trial, kept: Mask, limit: float) -> float:
    masks = trial.masks(kept)
    return min(trial.lost(kept, m) for m in masks if trial.milliseconds(m) <= limit)


@pytest.mark.parametrize("seed", range(32))
def test_no_mask_within_the_limit_loses_less(seed: int) -> None:
    for quality in qualities(seed):
        assert quality.milliseconds <= quality.limit
        assert quality.lost == pytest.approx(quality.best, rel=1e-9, abs=1e-12)
        assert quality.bound <= quality.best * (1 + 1e-9) + 1e-12
        assert quality.proven


@pytest.mark.slow
def test_of_hundreds_of_networks_none_loses_a_hundredth_more_than_it_must() -> None:
    found = [quality for seed in range(32, 800) for quality in qualities(seed)]
    assert all(quality.milliseconds <= quality.limit for quality in found)
    assert max(quality.gap for quality in found) <= 0.01


def test_a_choice_that_is_not_far_below_the_limit_is_found_and_loses_the_least_of_those() -> None:
    """Against all masks: where one lies in the window, nearly always one of the best of them."""
    found, regrets = [], []
    for seed in range(48):
        trial = trial_of(seed)
        kept = trial.graph.everything()
        times, lost = np.array(
            [(trial.milliseconds(mask), trial.lost(kept, mask)) for mask in trial.masks(kept)]
        ).T
        limit = times.min() + 0.5 * (times.max() - times.min())
        within = (times >= 0.97 * limit) & (times <= limit)
        chooser = Chooser(trial.graph, trial.times, trial.allowed)
        chosen = chooser.choose(trial.scores, kept, limit, least=0.97 * limit)
        assert chosen.milliseconds <= limit * (1 + 1e-9)
        if within.any():
            found.append(chosen.milliseconds >= 0.97 * limit)
            if found[-1]:
                regrets.append(trial.lost(kept, chosen.mask) / lost[within].min())
    assert len(found) > 20
    assert np.mean(found) > 0.9
    assert np.mean(np.array(regrets) <= 1.01) > 0.9


def test_what_takes_too_much_time_in_one_piece_goes_where_nothing_else_can() -> None:
    graph, allowed, scores = resnet(8)
    stream = next(g for g in graph.prunable if g.name == "conv1")
    scores[stream.units] = 0.0  # as if half of it were worth nothing
    chooser, kept = Chooser(graph, MultiplyAdds(), allowed), graph.everything()
    dense = network_milliseconds(graph, MultiplyAdds(), kept)
    far = chooser.choose(scores, kept, 0.97 * dense)
    assert not far.mask[stream.units].all()
    assert far.milliseconds < 0.9 * dense
    near = chooser.choose(scores, kept, 0.97 * dense, least=0.94 * dense)
    assert near.mask[stream.units].all()
    assert 0.94 * dense <= near.milliseconds <= 0.97 * dense
    alone = [c for c in allowed if c.group is stream]
    only = Chooser(graph, MultiplyAdds(), alone)
    forced = only.choose(scores, kept, 0.97 * dense, least=0.94 * dense)
    assert forced.mask.tolist() == far.mask.tolist()


@pytest.mark.parametrize("name", ["Dense", "Separable"])
def test_captured_networks_lose_the_least_as_well(name: str) -> None:
    for seed in range(2):
        trial = captured(name, seed)
        kept = trial.graph.everything()
        fastest = min(map(trial.milliseconds, trial.masks(kept)))
        limit = (fastest + trial.milliseconds(kept)) / 2
        mask = (
            Chooser(trial.graph, trial.times, trial.allowed).choose(trial.scores, kept, limit).mask
        )
        assert trial.milliseconds(mask) <= limit
        assert trial.lost(kept, mask) == pytest.approx(best_of(trial, kept, limit))


@pytest.mark.parametrize("seed", range(8))
def test_what_is_gone_stays_gone_in_chunks_and_not_below_the_floor(seed: int) -> None:
    trial = trial_of(seed)
    chooser = Chooser(trial.graph, trial.times, trial.allowed)
    kept = trial.graph.everything()
    fastest, dense = chooser.fastest(kept, trial.scores), trial.milliseconds(kept)
    rng = np.random.default_rng(seed)
    for share in (0.7, 0.4, 0.0):
        # Towards the end, what went before may stand in the way of the fastest.
        limit = max(chooser.fastest(kept, trial.scores), fastest + share * (dense - fastest))
        mask = chooser.choose(trial.scores, kept, limit).mask
        assert not np.any(mask & ~kept)
        gone = np.zeros(trial.graph.num_units, bool)
        for branch in trial.branches:
            if not mask[branch.unit]:
                gone[branch.inner] = True
        assert not mask[gone].any()
        for candidate in trial.allowed:
            if isinstance(candidate.group, Branch):
                continue
            units = candidate.group.units
            if gone[units].any():
                continue
            left, before = int(mask[units].sum()), int(kept[units].sum())
            assert left >= candidate.floor
            assert left == before or left % candidate.chunk == 0
            removed = trial.scores[units[kept[units] & ~mask[units]]]
            assert removed.max(initial=0) <= trial.scores[units[mask[units]]].min()
        kept = mask
        trial.scores[:] = trial.scores * rng.uniform(0.5, 2, trial.graph.num_units)


@pytest.mark.parametrize("seed", range(8))
def test_a_limit_below_the_fastest_names_the_fastest(seed: int) -> None:
    trial = trial_of(seed)
    kept = trial.graph.everything()
    fastest = min(map(trial.milliseconds, trial.masks(kept)))
    chooser = Chooser(trial.graph, trial.times, trial.allowed)
    assert chooser.fastest(kept, trial.scores) == pytest.approx(fastest)
    with pytest.raises(BudgetError, match="the fastest choice found takes") as raised:
        chooser.choose(trial.scores, kept, fastest * 0.99)
    named = float(re.findall(r"takes ([\d.]+) ms", str(raised.value))[0])
    assert fastest <= named <= fastest + 1e-4
    assert trial.milliseconds(chooser.choose(trial.scores, kept, named).mask) <= named


def test_within_the_limit_nothing_goes() -> None:
    trial = trial_of(0)
    kept = trial.graph.everything()
    limit = trial.milliseconds(kept)
    chosen = Chooser(trial.graph, trial.times, trial.allowed).choose(trial.scores, kept, limit)
    assert chosen.mask.all()
    assert (chosen.lost, chosen.milliseconds) == (0, limit)


@pytest.mark.parametrize("multiple", [1, 8])
def test_where_all_chunks_cost_the_same_the_least_important_go(multiple: int) -> None:
    graph, allowed, scores = resnet(multiple)
    plain = [layer for layer in graph.layers if "add" not in layer.shape.then]
    graph = replace(graph, layers=tuple(plain))  # each group has one writer
    inner = [candidate for candidate in allowed if not candidate.group.residual]
    kept = graph.everything()

    def channels(mask: Mask) -> float:
        return network_milliseconds(graph, Written(), mask)

    for share in (0.9, 0.7, 0.5):
        limit = share * channels(kept)
        expected = prune_to(scores, kept, inner, cost_of=channels, limit=limit)
        found = Chooser(graph, Written(), inner).choose(scores, kept, limit).mask
        assert scores[~found].sum() == pytest.approx(scores[~expected].sum())
        np.testing.assert_array_equal(found, expected)


def test_multiply_adds_are_a_cost_like_milliseconds() -> None:
    graph, allowed, scores = resnet(8)
    kept = graph.everything()
    limit = 0.4 * cost.macs(graph, kept)
    found = Chooser(graph, MultiplyAdds(), allowed).choose(scores, kept, limit).mask
    assert cost.macs(graph, found) <= limit
    greedy = prune_to(
        scores, kept, allowed, cost_of=lambda m: float(cost.macs(graph, m)), limit=limit
    )
    assert scores[~found].sum() < scores[~greedy].sum()


def test_widths_between_those_tried_at_first_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, allowed, scores = resnet(1)
    chooser = Chooser(graph, MultiplyAdds(), allowed)
    kept = graph.everything()
    limit = 0.5 * network_milliseconds(graph, MultiplyAdds(), kept)
    every = chooser.choose(scores, kept, limit)
    monkeypatch.setattr(widths, "RESOLUTIONS", (8,))
    some = chooser.choose(scores, kept, limit)
    assert every.bound <= every.lost <= some.lost <= 1.05 * every.bound
    assert some.milliseconds <= limit
    assert (some.bound, some.proven) == (-math.inf, False)
    assert any(int(some.mask[g.units].sum()) % 8 for g in graph.prunable)


def test_where_not_all_can_be_chosen_at_once_the_limit_holds_and_most_are_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widths, "MOST_WORK", 0)
    for name in ("MOST_JOINT", "HELD_JOINT"):
        monkeypatch.setattr(lagrange, name, 40)
    found = []
    for seed in range(1, 33, 4):  # networks of four groups
        trial = trial_of(seed)
        kept = trial.graph.everything()
        chooser = Chooser(trial.graph, trial.times, trial.allowed)
        fastest = chooser.fastest(kept, trial.scores)
        limit = (fastest + trial.milliseconds(kept)) / 2
        chosen = chooser.choose(trial.scores, kept, limit)
        assert chosen.milliseconds <= limit
        found.append(trial.lost(kept, chosen.mask) / best_of(trial, kept, limit))
    assert min(found) >= 1 - 1e-9
    assert np.median(found) == pytest.approx(1)
    assert max(found) < 2


def test_an_answer_is_asked_for_once() -> None:
    asked: list[int] = []

    class Counting(MultiplyAdds):
        def milliseconds(
            self, shape: LayerShape, read: np.ndarray, written: np.ndarray
        ) -> np.ndarray:
            asked.append(read.size)
            return super().milliseconds(shape, read, written)

    shape = LayerShape("conv2d", (3, 3), output_size=(4, 4))
    times = Remembered(Counting())
    read, written = np.arange(6)[:, None], np.arange(0, 9, 2)
    expected = MultiplyAdds().milliseconds(shape, read, written)
    for _ in range(2):
        np.testing.assert_array_equal(times.milliseconds(shape, read, written), expected)
    assert times.milliseconds(shape, np.array(7), np.array(3)) == 144 * 21
    assert times.milliseconds(shape, np.array(0), np.array(3)) == 0
    assert asked == [5 * 4, 1]


def test_a_table_that_does_not_cover_a_layer_is_said_so() -> None:
    class Small(MultiplyAdds):
        def milliseconds(
            self, shape: LayerShape, read: np.ndarray, written: np.ndarray
        ) -> np.ndarray:
            if np.max(read) > 32:
                raise TableError("the table ends at 32 channels")
            return super().milliseconds(shape, read, written)

    graph, _, scores = resnet(8)
    with pytest.raises(TableError, match="32 channels"):
        Chooser(graph, Small(), ()).choose(scores, graph.everything(), 1.0)


def test_a_branch_takes_what_is_in_it_and_counts_alone() -> None:
    trial = trial_of(0)
    kept = trial.graph.everything()
    scores = trial.scores.copy()
    branch = trial.branches[0]
    scores[:] = 1e3
    scores[branch.unit] = 1.0
    without = kept.copy()
    without[[branch.unit, *branch.inner]] = False
    limit = trial.milliseconds(without)
    assert limit < trial.milliseconds(kept)
    chosen = Chooser(trial.graph, trial.times, trial.allowed).choose(scores, kept, limit)
    np.testing.assert_array_equal(chosen.mask, without)
    assert chosen.lost == 1.0


def test_a_branch_that_may_not_go_stays() -> None:
    trial = trial_of(1)
    kept = trial.graph.everything()
    first = trial.branches[0]
    chooser = Chooser(trial.graph, trial.times, [c for c in trial.allowed if c.group is not first])
    mask = chooser.choose(trial.scores, kept, chooser.fastest(kept, trial.scores)).mask
    assert mask[first.unit]
