"""Stairs and corrections find what synthetic times were made of."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import TableError
from export.latency.correction import Networks, fitted_correction
from export.latency.rounds import Effort, measured, require_quiet, summarised
from export.latency.stairs import fitted_stairs


def test_stairs_are_found_between_the_measured_widths() -> None:
    rng = np.random.default_rng(0)

    def true(read: np.ndarray, written: np.ndarray) -> np.ndarray:
        return 2e-3 + 1e-6 * read * (45 * np.ceil(written / 32) + 6.5 * np.ceil(written / 8))

    every = np.array([(r, w) for r in range(8, 129, 8) for w in range(8, 257, 8)])
    chosen = every[rng.permutation(len(every))[:40]]
    stairs = fitted_stairs(chosen, true(*chosen.T), 8)
    np.testing.assert_allclose(stairs.at(*every.T), true(*every.T), rtol=1e-3)


def test_a_correction_finds_the_factors_that_made_the_times() -> None:
    rng = np.random.default_rng(0)
    alone = rng.uniform(0.1, 1.0, (60, 3))
    written = rng.integers(1, 20, (60, 3)) * 8.0
    weights = rng.uniform(0, 30e6, 60)
    factor = np.array([1.02, 1.1, 1.06])
    times = 0.3 + alone @ factor + 1e-7 * np.maximum(0, weights - 8e6)
    found = fitted_correction(Networks(alone, written, weights), times)
    errors = np.abs(found.milliseconds(Networks(alone, written, weights)) / times - 1)
    assert errors.mean() < 3e-3
    assert errors.max() < 0.02  # smoothness rounds the bend off
    np.testing.assert_allclose(found.scale, factor, atol=0.03)
    assert found.fixed == pytest.approx(0.3, abs=0.05)
    assert found.curve.tangent(30e6)[0] == pytest.approx(2.2, abs=0.1)
    assert found.curve.tangent(4e6)[0] == pytest.approx(0.0, abs=0.05)
    assert (np.diff(found.curve.milliseconds) >= -1e-9).all()


def test_two_networks_give_a_factor_and_what_is_fixed() -> None:
    alone = np.array([[2.0, 1.0], [0.4, 0.2]])
    networks = Networks(alone, np.ones((2, 2)), np.array([1e5, 1e4]))
    found = fitted_correction(networks, [3.7, 0.94])  # 0.25 + 1.15 times 3.0 and 0.6
    assert found.fixed == pytest.approx(0.25, rel=1e-3)
    np.testing.assert_allclose(found.scale, 1.15, rtol=1e-3)


def test_what_slows_whole_rounds_is_taken_off() -> None:
    rng = np.random.default_rng(0)
    true = np.array([0.5, 1.0, 4.0, 20.0, 7.0])
    slowness = rng.uniform(1.0, 1.5, (12, 1))
    found = summarised(true * slowness * (1 + rng.uniform(0, 0.002, (12, 5))))
    ratios = np.array(found.ms) / found.ms[0]
    np.testing.assert_allclose(ratios, true / true[0], rtol=3e-3)
    assert found.spread < 3e-3


def test_rounds_go_on_until_their_halves_agree() -> None:
    def timers(noise: float) -> tuple[list[int], list]:
        rng, calls = np.random.default_rng(0), [0]

        def timer() -> float:
            calls[0] += 1
            return 5.0 * (1 + noise * rng.exponential())

        return calls, [timer, timer]

    effort = Effort(fewest=4, most=20, spread=0.01)
    calls, quiet = timers(0.0)
    assert measured(quiet, effort).ms == (5.0, 5.0)
    few = calls[0]
    calls, noisy = timers(0.5)
    assert measured(noisy, effort).spread > 0.01
    assert calls[0] > 3 * few


def test_noise_is_too_large_for_a_table() -> None:
    require_quiet(0.02)
    for spread in (0.2, float("inf"), float("nan")):
        with pytest.raises(TableError, match="too noisy for a latency table"):
            require_quiet(spread)
