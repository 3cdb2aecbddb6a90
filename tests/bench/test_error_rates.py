"""The error rates that docs/measuring.md states, on fewer runs than benchmarks/ has for them.

Every run has a seed of its own and a clock that only simulated calls move, so the counts are the
same on any machine.
"""

from __future__ import annotations

from functools import cache

import pytest
from conftest import some_slow
from scipy.stats import binom

from bench.statistics.latency_ratios import FEWEST_ROUNDS
from benchmarks.gate_error_rates import (
    NEIGHBOURS,
    NOISES,
    NoiseRates,
    accuracy_rates,
    latency_rates,
    simulate,
)
from compress.config import BenchConfig

RUNS = 30
ALPHA = 1 - BenchConfig().confidence
CONFIG = BenchConfig()
SHARED = ("log-normal, 5 % a call", "heavy-tailed", "drift: a ramp", "two speeds")
# Here a slower network is not told from one that was slowed, so only false verdicts are counted.
OF_ITS_OWN = "each network on its own, 10 % for 1 s"


def most(share: float, runs: int = RUNS) -> float:
    """Return the count that a method with this error rate exceeds once in a thousand tests."""
    return float(binom.ppf(0.999, runs, share))


@cache
def rates(noise: str) -> NoiseRates:
    return latency_rates({**NOISES, **NEIGHBOURS}[noise], RUNS, CONFIG)


@pytest.mark.parametrize("noise", some_slow([*SHARED, OF_ITS_OWN], [*SHARED[1:], OF_ITS_OWN]))
def test_a_network_on_its_limit_is_seldom_failed_or_passed(noise: str) -> None:
    found = rates(noise)
    for one in (found.ratio, found.regression):
        assert one.runs == RUNS
        assert one.failed <= most(ALPHA)
        assert one.passed <= most(ALPHA)


@pytest.mark.parametrize("noise", some_slow([*SHARED, OF_ITS_OWN], [*SHARED[1:], OF_ITS_OWN]))
def test_intervals_hold_the_truth(noise: str) -> None:
    found = rates(noise)
    for one in (found.ratio, found.regression):
        assert one.runs - one.held <= most(ALPHA)


@pytest.mark.parametrize("noise", SHARED)
def test_a_network_5_percent_slower_is_failed(noise: str) -> None:
    found, missed = rates(noise), most(0.1)
    for one in (found.ratio, found.regression):
        assert RUNS - one.caught <= missed
        assert RUNS - one.caught_beyond <= missed


@pytest.mark.parametrize("noise", [*SHARED, OF_ITS_OWN])
def test_within_its_time_and_with_a_verdict(noise: str) -> None:
    found = rates(noise)
    assert found.seconds <= CONFIG.max_seconds
    assert found.unfit <= most(0.1, 3 * RUNS)


def test_the_same_seed_gives_the_same_measurement() -> None:
    noise = NOISES["two speeds"]
    first, again, other = (simulate(noise, 1.0, seed, CONFIG) for seed in (1, 1, 2))
    assert first == again != other
    assert first.ratio.rounds >= FEWEST_ROUNDS


@pytest.mark.parametrize("images", [1000, 10_000])
@pytest.mark.parametrize("flips", [0.02, 0.06, 0.10])
def test_error_rates_of_the_accuracy_limit(images: int, flips: float) -> None:
    runs = 300
    passed, failed, held = accuracy_rates(0.01, flips, images, 0.01, runs, seed=2)
    # Counts of images are whole, so the rate of a score interval swings about its level.
    allowed = most(ALPHA + 0.01, runs)
    assert max(passed, failed, 1 - held) * runs <= allowed


def test_power_of_the_accuracy_limit() -> None:
    assert accuracy_rates(0.0, 0.06, 10_000, 0.01, 200)[0] >= 0.9
    assert accuracy_rates(0.02, 0.06, 10_000, 0.01, 200)[1] >= 0.9
    # A tenth of the images cannot decide: neither wrongly nor rightly.
    assert accuracy_rates(0.0, 0.06, 1000, 0.01, 200)[1] <= most(ALPHA, 200) / 200
    assert accuracy_rates(0.02, 0.06, 1000, 0.01, 200)[0] <= most(ALPHA, 200) / 200
