from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.config import Budget
from compress.sweep.plan import Search, misses, pareto_front, search_state


class TestParetoFront:
    points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)

    @given(points)
    def test_no_point_on_the_front_is_beaten_and_every_other_is(
        self, points: list[tuple[float, float]]
    ) -> None:
        for (cost, accuracy), on_front in zip(points, pareto_front(points), strict=True):
            better = [
                (c, a)
                for c, a in points
                if c <= cost and a >= accuracy and (c < cost or a > accuracy)
            ]
            assert on_front == (not better)

    @given(points)
    def test_along_the_front_more_cost_buys_more_accuracy(
        self, points: list[tuple[float, float]]
    ) -> None:
        flags = pareto_front(points)
        front = sorted({point for point, on in zip(points, flags, strict=True) if on})
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(front))
        assert bool(front) == bool(points)


def search(**options: Any) -> Search:
    return Search.model_validate({"max_drop": 1.0, **options})


def found(asked: Search, smallest: float) -> Any:
    """Search where every share from ``smallest`` on is enough."""
    within: dict[float, bool] = {}
    while (state := search_state(asked, within)).next:
        within |= {share: share >= smallest for share in state.next}
    return state


class TestSearch:
    def test_by_hand(self) -> None:
        # Of 0.2 to 1: 0.6 is enough, 0.4 is, 0.3 is not, and 0.4 - 0.3 is the tolerance.
        state = found(search(lowest=0.2, tolerance=0.1), 0.32)
        assert state.tried == (0.6, 0.4, 0.3)
        assert (state.failed, state.passed) == (0.3, 0.4)

    @given(
        st.floats(0.05, 0.5),
        st.floats(0.0, 1.0),
        st.sampled_from([0.001, 0.01, 0.02, 0.1]),
        st.integers(1, 9),
    )
    def test_it_finds_the_smallest_share_to_its_tolerance(
        self, lowest: float, smallest: float, tolerance: float, at_once: int
    ) -> None:
        asked = search(lowest=lowest, tolerance=tolerance, at_once=at_once)
        state = found(asked, smallest)
        assert state.passed - state.failed <= tolerance + 1e-9
        assert state.passed == 1 or state.passed >= smallest
        assert state.failed == lowest or state.failed < smallest
        assert len(set(state.tried)) == len(state.tried)
        assert all(lowest < share < 1 for share in state.tried)

    @pytest.mark.parametrize(("at_once", "rounds"), [(1, 6), (3, 3), (8, 2), (44, 1)])
    def test_the_rounds_are_as_many_as_logarithms_say(self, at_once: int, rounds: int) -> None:
        # 0.9 / 0.02 = 45 intervals: 2^6, 4^3, 9^2 and 45^1 are the first powers that reach it.
        asked, within, count = search(at_once=at_once), dict[float, bool](), 0
        while (state := search_state(asked, within)).next:
            within |= {share: share >= 0.777 for share in state.next}
            count += 1
        assert count == rounds

    @given(st.data(), st.integers(1, 5), st.integers(1, 12))
    def test_of_noise_it_takes_the_smallest_share_that_was_enough(
        self, data: Any, at_once: int, points: int
    ) -> None:
        asked, within = search(at_once=at_once, points=points), dict[float, bool]()
        while (state := search_state(asked, within)).next:
            within |= {share: data.draw(st.booleans()) for share in state.next}
        good = [share for share in state.tried if within[share]]
        assert len(state.tried) <= points
        assert state.passed == min(good, default=1.0)
        assert state.failed < state.passed

    @given(st.data(), st.integers(1, 6))
    def test_a_round_stays_the_same_whatever_of_it_is_finished(
        self, data: Any, at_once: int
    ) -> None:
        asked, within = search(at_once=at_once), dict[float, bool]()
        while (state := search_state(asked, within)).next:
            share = data.draw(st.sampled_from([s for s in state.next if s not in within]))
            within[share] = data.draw(st.booleans())
            unfinished = [s for s in state.next if s not in within]
            again = search_state(asked, dict(reversed(within.items())))
            assert again.next == state.next or not unfinished
            assert again.tried[: len(state.tried)] == state.tried

    def test_a_drop_that_is_just_allowed_survives_rounding(self) -> None:
        assert search(max_drop=0.1).within(98.4, 98.3)  # 98.4 - 98.3 = 0.10000000000000853
        assert not search(max_drop=0.1).within(98.4, 98.29)


@pytest.mark.parametrize(
    ("budget", "interval", "missed"),
    [
        ("latency=0.5", [0.48, 0.5], False),
        ("latency=0.5", [0.48, 0.50001], False),  # five digits are recorded
        ("latency=0.5", [0.48, 0.501], True),
        ("latency=2ms", [0.48, 0.5], False),  # of 4 ms
        ("latency=2ms", [0.48, 0.505], True),
        ("latency=1ms", [0.24, 0.252], True),
    ],
)
def test_the_upper_bound_of_what_was_measured_must_lie_within_a_budget_of_time(
    budget: str, interval: list[float], missed: bool
) -> None:
    share = sum(interval) / 2
    latency = {"measured_ms": 4 * share, "measured_share": share, "measured_interval": interval}
    assert misses(Budget.model_validate(budget), latency) is missed


def test_what_was_not_measured_misses_nothing() -> None:
    assert not misses(Budget.model_validate("macs=0.5"), None)
    assert not misses(Budget.model_validate("latency=0.5"), {"predicted_share": 0.6})
