from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from compress.oracle.correlation import (
    BY_CHANGE,
    BY_SQUARE,
    COEFFICIENTS,
    Coefficient,
    Span,
    agreement,
    correlation,
    judge_pairs,
)

FUNCTIONS = {
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
    "pearson": stats.pearsonr,
}


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    # Ranks 1 2 3 4 against 1 3 2 4: sum of squared differences 2, one discordant pair of six.
    [("spearman", 1 - 6 * 2 / (4 * 15)), ("kendall", (5 - 1) / 6), ("pearson", 0.8)],
)
def test_values_by_hand(coefficient: Coefficient, expected: float) -> None:
    first, second = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert correlation(first, second, coefficient) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_equals_scipy_on_random_data(coefficient: Coefficient) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=200).round(1)  # with ties
    second = first + rng.normal(size=200)
    expected = FUNCTIONS[coefficient](first, second)[0]
    assert correlation(first, second, coefficient) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_constant_short_and_infinite_vectors(coefficient: Coefficient) -> None:
    rising = np.arange(4.0)
    assert correlation(rising, np.ones(4), coefficient) is None
    assert correlation(np.zeros(4), rising, coefficient) is None
    assert correlation(rising[:2], rising[:2], coefficient) is None
    assert correlation(np.zeros(0), np.zeros(0), coefficient) is None
    broken = np.array([0.0, np.nan, np.inf, 3.0])
    assert correlation(broken, rising, coefficient) is None  # two pairs are left
    longer, holed = np.arange(5.0), np.array([0.0, np.nan, 2.0, 3.0, 4.0])
    assert correlation(holed, longer, coefficient) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=3, max_size=30), st.integers(0, 2**32 - 1))
def test_rank_correlations_do_not_see_monotone_transforms(values: list[float], seed: int) -> None:
    first = np.unique(np.round(values, 3))
    second = np.random.default_rng(seed).normal(size=len(first))
    for coefficient in ("spearman", "kendall"):
        plain = correlation(first, second, coefficient)
        bent = correlation(np.exp(first / 50), second, coefficient)
        assert plain == bent or plain == pytest.approx(bent, abs=1e-12)


def spans() -> list[Span]:
    return [
        Span("stem", np.array([0, 1, 2, 3]), residual=True),
        Span("inner", np.array([4, 5, 6, 7])),
        Span("last", np.array([9, 8, 10])),
    ]


def test_scopes_by_hand() -> None:
    """Perfect in one layer, reversed in another; one constant layer; unit 11 counts nowhere."""
    changes = np.array([-1.0, 2, -3, 4, 1, 2, 3, 4, 5, 6, 7, 100])
    importance = np.array([1.0, 4, 9, 16, 4, 3, 2, 1, 5, 5, 5, -100])
    found = agreement(importance, changes, spans(), "spearman")
    assert found.by_layer == {
        "stem": pytest.approx(1),
        "inner": pytest.approx(-1),
        "last": None,
    }
    assert found.undefined == 1
    assert found.layers == pytest.approx(0)
    assert found.residual == pytest.approx(1)
    others = stats.spearmanr(importance[4:11], changes[4:11] ** 2)[0]
    assert found.other == pytest.approx(others)
    together = stats.spearmanr(importance[:11], changes[:11] ** 2)[0]
    assert found.all == pytest.approx(together)


def test_pearson_is_of_the_squared_change() -> None:
    changes = np.array([-1.0, 2, -3, 4, 1, -2, 3, 4, 5, 6, 7, 0])
    assert agreement(changes**2, changes, spans(), "pearson").all == pytest.approx(1)
    assert agreement(np.abs(changes), changes, spans(), "pearson").all != pytest.approx(1, abs=1e-3)
    assert agreement(np.abs(changes), changes, spans(), "kendall").all == pytest.approx(1)


def test_a_network_without_residual_streams() -> None:
    changes, plain = np.arange(11.0), [s for s in spans() if not s.residual]
    found = agreement(changes, changes, plain, "spearman")
    assert found.residual is None
    assert found.other == found.all == pytest.approx(1)
    assert agreement(changes, changes, [], "spearman").layers is None


def test_picks_by_hand() -> None:
    units = np.array([[3, 5], [3, 7], [5, 7]])
    changes = np.array([0.5, -0.2, 0.1])
    singles = np.zeros(8)
    singles[[3, 5, 7]] = [-0.3, 0.2, 0.1]
    weights = np.full(8, 9.0)
    weights[[3, 5, 7]] = [1, 2, 3]
    found = judge_pairs(units, changes, singles, {"weights": weights})
    assert (found.best.units, found.best.change, found.best.regret) == ((3, 7), -0.2, 0)
    picks = {pick.by: (pick.units, pick.rank, pytest.approx(pick.regret)) for pick in found.picks}
    assert picks == {
        BY_CHANGE: ((3, 7), 1, 0.0),
        BY_SQUARE: ((5, 7), 2, 0.3),
        "weights": ((3, 5), 3, 0.7),
    }
    sums = np.array([-0.1, -0.2, 0.3])
    assert found.sum_pearson == pytest.approx(np.corrcoef(sums, changes)[0, 1])
    assert found.sum_spearman == pytest.approx(0.5)
