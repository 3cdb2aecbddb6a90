"""Planning to the end, block by block: against all masks of small networks, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from choice_quality import Trial, trial_of
from conftest import small_graph
from tables import MultiplyAdds

from compress.config import PruneConfig
from compress.errors import BudgetError
from compress.latency.times import network_milliseconds
from compress.networks.groups import Mask
from compress.pruning.choice.planner import Planner
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import candidates, weighed_by_depth


def limit_between(trial: Trial, share: float) -> float:
    times = [trial.milliseconds(mask) for mask in trial.masks(trial.graph.everything())]
    return min(times) + share * (max(times) - min(times))


def best_of_all(trial: Trial, limit: float) -> Mask:
    """Take the least important block of the best mask, weigh those left anew, and so on."""
    mask, branches = trial.graph.everything(), [b.unit for b in trial.graph.removable]
    while trial.milliseconds(mask) > limit:
        worth = trial.scores.copy()
        left = [unit for unit in branches if mask[unit]]
        worth[left] *= len(branches) / max(1, len(left))
        weighed = replace(trial, scores=worth)
        within = [m for m in trial.masks(mask) if trial.milliseconds(m) <= limit]
        best = min(within, key=lambda m: weighed.lost(mask, m))
        going = [unit for unit in left if not best[unit]]
        if not going:
            return best
        mask = mask.copy()
        mask[min(going, key=lambda unit: trial.scores[unit])] = False
        mask = trial.graph.closed(mask)
    return mask


@pytest.mark.parametrize("seed", range(24))
def test_the_end_is_that_of_the_same_rule_over_all_masks(seed: int) -> None:
    trial = trial_of(seed)
    limit = limit_between(trial, 0.4)
    planner = Planner(trial.graph, trial.times, trial.allowed)
    kept = planner.choose(trial.scores, trial.graph.everything(), limit, end=limit, least=0.0)
    expected = best_of_all(trial, limit)
    assert trial.milliseconds(kept) <= limit
    assert trial.lost(trial.graph.everything(), kept) == pytest.approx(
        trial.lost(trial.graph.everything(), expected), rel=1e-9, abs=1e-12
    )


def test_steps_take_nothing_that_need_not_go_in_the_end_and_blocks_before_channels() -> None:
    taken = 0
    for seed in range(24):
        trial = trial_of(seed)
        everything = trial.graph.everything()
        end = limit_between(trial, 0.3)
        planner = Planner(trial.graph, trial.times, trial.allowed)
        last = planner.choose(trial.scores, everything, end, end=end, least=0.0)
        half = planner.choose(
            trial.scores, everything, (end + planner.cost_of(everything)) / 2, end=end, least=0.0
        )
        blocks = [b.unit for b in trial.graph.removable]
        assert not (half[blocks] < last[blocks]).any()
        # By the end of a step that had to take channels every block of the plan was gone.
        channels = np.flatnonzero(~half & everything)
        inner = {int(u) for b in trial.graph.removable if not half[b.unit] for u in b.inner}
        if set(map(int, channels)) - inner - set(blocks):
            taken += 1
            again = planner.choose(trial.scores, half, end, end=end, least=0.0)
            assert (again[blocks] <= half[blocks]).all()
    assert taken


def test_the_last_blocks_are_worth_more() -> None:
    """Among equal blocks the plain choice takes more than the one that weighs what is left."""
    graph = small_graph("resnet20")
    scores = np.ones(graph.num_units)
    for branch in graph.removable:
        scores[branch.unit] = 15
    times, everything = MultiplyAdds(), graph.everything()
    allowed = candidates(graph, PruneConfig(channel_multiple=8, blocks=True))
    limit = 0.2 * network_milliseconds(graph, times, everything)
    plain = Chooser(graph, times, allowed).choose(scores, everything, limit).mask
    kept = Planner(graph, times, allowed).choose(scores, everything, limit, end=limit, least=0.0)
    blocks = [branch.unit for branch in graph.removable]
    gone = [np.count_nonzero(~mask[blocks]) for mask in (plain, kept)]
    assert 1 < gone[1] < gone[0]


def test_a_block_counts_for_all_blocks_by_those_left() -> None:
    trial = next(t for t in map(trial_of, range(100)) if len(t.graph.removable) == 2)
    one, other = (branch.unit for branch in trial.graph.removable)
    kept = trial.graph.everything()
    assert (weighed_by_depth(trial.scores, kept, trial.graph) == trial.scores).all()
    kept[one] = False
    expected = trial.scores.copy()
    expected[[one, other]] *= 2
    assert (weighed_by_depth(trial.scores, kept, trial.graph) == expected).all()


def test_an_end_that_nothing_reaches_is_refused() -> None:
    trial = trial_of(0)
    everything = trial.graph.everything()
    planner = Planner(trial.graph, trial.times, trial.allowed)
    limit = planner.fastest() * 0.99
    with pytest.raises(BudgetError, match="cannot be reached"):
        planner.choose(trial.scores, everything, limit, end=limit, least=0.0)
