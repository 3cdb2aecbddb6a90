"""Planning to the end, block by block: against all masks of small networks, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from choice_quality import Trial, trial_of
from conftest import small_graph

from compress.errors import BudgetError
from compress.networks.groups import Mask
from compress.pruning.choice.planner import Planner
from compress.pruning.masking import weighed_by_depth


def limit_between(trial: Trial, share: float) -> float:
    times = [trial.milliseconds(mask) for mask in trial.masks(trial.graph.everything())]
    return min(times) + share * (max(times) - min(times))


def cheap_blocks(seed: int) -> Trial:
    """Return a small network whose blocks are worth less than the channels in them."""
    trial = trial_of(seed)
    scores = trial.scores.copy()
    for branch in trial.graph.removable:
        scores[branch.unit] = 0.2 * scores[branch.inner].sum()
    return replace(trial, scores=scores)


def best_of_all(trial: Trial, limit: float) -> Mask:
    """Take the least important block of the best mask, weigh those left anew, and so on."""
    mask, branches = trial.graph.everything(), [b.unit for b in trial.graph.removable]
    while trial.milliseconds(mask) > limit:
        worth = trial.scores.copy()
        left = [unit for unit in branches if mask[unit]]
        worth[left] *= {0: 3, 1: 3, 2: 1.5}.get(len(left), 1)
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


def test_the_end_is_that_of_the_same_rule_over_all_masks() -> None:
    other = 0
    for seed in range(24):
        trial = cheap_blocks(seed)
        limit, everything = limit_between(trial, 0.4), trial.graph.everything()
        planner = Planner(trial.graph, trial.times, trial.allowed)
        kept = planner.choose(trial.scores, everything, limit, end=limit, least=0.0)
        expected = best_of_all(trial, limit)
        assert trial.milliseconds(kept) <= limit
        assert trial.lost(everything, kept) == pytest.approx(
            trial.lost(everything, expected), rel=1e-9, abs=1e-12
        )
        plain = planner.chooser.choose(trial.scores, everything, limit).mask
        other += bool((plain != kept).any())
    assert other  # else the rule had nothing to say


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


@pytest.mark.parametrize(("left", "times"), [(0, 3), (1, 3), (2, 1.5), (3, 1), (9, 1)])
def test_the_last_three_blocks_count_for_three_together(left: int, times: float) -> None:
    graph = small_graph("resnet20")
    scores, kept = np.arange(1.0, graph.num_units + 1), graph.everything()
    blocks = [branch.unit for branch in graph.removable]
    kept[blocks[left:]] = False
    expected = scores.copy()
    expected[blocks] *= times
    assert (weighed_by_depth(scores, kept, graph) == expected).all()


def test_an_end_that_nothing_reaches_is_refused() -> None:
    trial = trial_of(0)
    everything = trial.graph.everything()
    planner = Planner(trial.graph, trial.times, trial.allowed)
    limit = planner.fastest() * 0.99
    with pytest.raises(BudgetError, match="cannot be reached"):
        planner.choose(trial.scores, everything, limit, end=limit, least=0.0)
