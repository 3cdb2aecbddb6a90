from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bench.statistics.shares import exact_bounds, most_shown, share_of, trials_to_show

COUNTS = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(COUNTS, st.sampled_from([0.01, 0.025, 0.05]))
def test_each_bound_leaves_its_tail(counts: tuple[int, int], tail: float) -> None:
    """The definition: at the bound, what was seen or more extreme has that probability."""
    successes, count = counts
    low, high = exact_bounds(successes, count, tail=tail)
    assert low <= successes / count <= high
    if successes:
        assert binom.sf(successes - 1, count, low) == pytest.approx(tail, rel=1e-6)
    if successes < count:
        assert binom.cdf(successes, count, high) == pytest.approx(tail, rel=1e-6)


def test_where_all_succeed_the_bound_has_a_closed_form() -> None:
    found = share_of(300, 300, confidence=0.95)
    assert (found.share, found.high, found.at_most) == (1.0, 1.0, 1.0)
    assert found.at_least == pytest.approx(math.exp(math.log(0.05) / 300))
    assert found.low < found.at_least
    assert most_shown(300, confidence=0.95) == pytest.approx(found.at_least)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.999])
def test_the_fewest_trials_that_show_a_share(share: float) -> None:
    needed = trials_to_show(share, confidence=0.95)
    assert needed is not None
    assert share_of(needed, needed, confidence=0.95).at_least >= share
    assert share_of(needed - 1, needed - 1, confidence=0.95).at_least < share


def test_a_share_of_all_cannot_be_shown() -> None:
    assert trials_to_show(1.0, confidence=0.95) is None
    assert trials_to_show(0.0, confidence=0.95) == 1


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share(successes: int, count: int) -> None:
    with pytest.raises(ValueError, match="is no share"):
        share_of(successes, count, confidence=0.95)
