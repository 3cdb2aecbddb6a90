from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import pytest

from bench.measuring.device_timing import DeviceCalls
from bench.measuring.latency import Call, LatencyResult, measure_latency
from compress.config import BenchConfig
from compress.errors import DataError

FEEDS: dict[str, np.ndarray] = {}
USUAL: dict[str, Any] = {
    "block_ms": 50.0,
    "min_blocks": 20,
    "max_seconds": 15.0,
    "ratio_precision": 0.02,
    "confidence": 0.95,
}


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FakeRunner:
    """Takes as long as it is told, on a clock that nothing else moves."""

    def __init__(
        self, name: str, clock: Clock, cost_ms: Callable[[int], float], log: list[str] | None = None
    ) -> None:
        self.name, self.clock, self.cost_ms, self.log, self.calls = name, clock, cost_ms, log, 0
        self.collector_was_on: list[bool] = []

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert feeds == FEEDS
        self.clock.seconds += self.cost_ms(self.calls) / 1000
        self.calls += 1
        self.collector_was_on.append(gc.isenabled())
        if self.log is not None:
            self.log.append(self.name)
        return {}


def fed(runners: dict[str, FakeRunner]) -> dict[str, Call]:
    return {name: Call(runner, FEEDS) for name, runner in runners.items()}  # type: ignore[arg-type]


def measure(
    dense: Callable[[int], float],
    pruned: Callable[[int], float],
    log: list[str] | None = None,
    **settings: Any,
) -> LatencyResult:
    clock = Clock()
    runners = {
        "reference": FakeRunner("reference", clock, dense, log),
        "pruned": FakeRunner("pruned", clock, pruned, log),
    }
    rest = {name: settings.pop(name) for name in ("seed", "watch", "progress") if name in settings}
    config = BenchConfig(**{**USUAL, **settings})
    return measure_latency(fed(runners), batch_size=4, config=config, clock=clock, **rest)


def noisy(mean_ms: float, seed: int, spread: float = 0.03) -> Callable[[int], float]:
    draws = np.exp(np.random.default_rng(seed).normal(0, spread, 100_000))
    return lambda call: mean_ms * draws[call % len(draws)]


def test_a_known_ratio_is_recovered_exactly() -> None:
    found = measure(lambda call: 2.0, lambda call: 1.3)
    assert found.ratio.ratio == pytest.approx(0.65)
    assert found.control.ratio == pytest.approx(1.0)
    assert found.batch_size == 4
    assert found.converged


def test_a_known_ratio_is_recovered_from_noise() -> None:
    found = measure(noisy(2.0, 1), noisy(1.3, 2))
    assert found.ratio.low <= 0.65 <= found.ratio.high
    assert found.control.low <= 1.0 <= found.control.high


def test_blocks_hold_as_much_work_as_asked() -> None:
    found = measure(noisy(2.0, 1), noisy(0.9, 2), block_ms=40)
    for slot, samples in found.samples_ms.items():
        per_block = np.reshape(samples, (-1, found.iterations[slot]))
        assert per_block.sum(axis=1).min() >= 40
        np.testing.assert_allclose(np.median(per_block, axis=1), found.blocks_ms[slot])
    assert found.iterations["pruned"] > found.iterations["reference"] == found.iterations["control"]


def test_a_control_of_its_own_is_measured_as_such() -> None:
    clock = Clock()
    costs = {"reference": 2.0, "pruned": 1.0, "control": 2.2}
    runners = {name: FakeRunner(name, clock, lambda _, ms=ms: ms) for name, ms in costs.items()}
    found = measure_latency(
        fed(runners),
        batch_size=4,
        config=BenchConfig(**{**USUAL, "block_ms": 49.9, "min_blocks": 8}),
        clock=clock,
    )
    assert found.ratio.ratio == pytest.approx(0.5)
    assert found.control.ratio == pytest.approx(1.1)
    assert found.iterations == {"reference": 25, "pruned": 50, "control": 25}  # 49.9 ms of work


def test_it_stops_as_soon_as_it_is_precise_enough() -> None:
    steady = measure(lambda call: 2.0, lambda call: 1.0)
    rough = measure(noisy(2.0, 1, spread=0.5), noisy(1.0, 2, spread=0.5), ratio_precision=0.01)
    assert len(steady.blocks_ms["reference"]) == 20
    assert len(rough.blocks_ms["reference"]) > 20


def test_it_honours_its_time() -> None:
    found = measure(
        noisy(2.0, 1, spread=0.5), noisy(1.0, 2, spread=0.5), ratio_precision=1e-6, max_seconds=6
    )
    assert not found.converged
    assert 5 <= found.seconds <= 6.05


def test_a_slow_network_is_still_measured_twice() -> None:
    found = measure(lambda call: 30_000.0, lambda call: 10_000.0)
    assert len(found.blocks_ms["pruned"]) == 2
    assert not found.converged
    assert found.ratio.ratio == pytest.approx(1 / 3)


def test_every_round_holds_every_slot_in_changing_order() -> None:
    log: list[str] = []
    found = measure(lambda call: 10.0, lambda call: 10.0, log, block_ms=49.9, min_blocks=40)
    warm = len(log) - 40 * 3 * (1 + 5)
    assert warm == sum(warmup.calls for warmup in found.warmup.values())
    rounds = np.reshape(log[warm:], (-1, 3, 1 + 5))  # one untimed call, then five timed
    assert len(rounds) == 40
    orders = [tuple(block[0] for block in one) for one in rounds]
    assert all(sorted(order) == ["pruned", "reference", "reference"] for order in orders)
    assert set(orders) == {
        ("reference", "reference", "pruned"),
        ("reference", "pruned", "reference"),
        ("pruned", "reference", "reference"),
    }
    assert all(len(set(block)) == 1 for one in rounds for block in one)
    assert max(len(list(run)) for _, run in groupby(orders)) < 10


def test_same_seed_same_result() -> None:
    assert measure(noisy(2.0, 1), noisy(1.3, 2)) == measure(noisy(2.0, 1), noisy(1.3, 2))


def test_warm_up_waits_for_a_steady_network() -> None:
    found = measure(lambda call: 2.0 + 8.0 * 0.97**call, lambda call: 1.0)
    assert found.warmup["reference"].stationary
    assert found.warmup["reference"].calls > found.iterations["reference"]
    assert max(found.samples_ms["reference"]) < 2.2


def test_warm_up_that_never_settles_is_capped_and_said() -> None:
    found = measure(lambda call: max(0.5, 16.0 * 0.995**call), lambda call: 1.0)
    assert not found.warmup["reference"].stationary
    assert 1.5 <= found.warmup["reference"].seconds < 1.6


def test_the_first_call_of_a_block_is_not_a_sample() -> None:
    log: list[str] = []

    def cold(call: int) -> float:
        return 9.0 if len(log) < 2 or log[-1] != "pruned" else 1.0

    found = measure(lambda call: 2.0, cold, log)
    assert set(np.round(found.samples_ms["pruned"], 9)) == {1.0}


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_off_in_blocks_and_restored(enabled: bool) -> None:
    clock = Clock()
    runners = {name: FakeRunner(name, clock, lambda call: 10.0) for name in ("reference", "pruned")}

    def explode(images: np.ndarray) -> np.ndarray:
        raise MemoryError

    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        config = BenchConfig(
            block_ms=20, min_blocks=4, max_seconds=5, ratio_precision=0.1, confidence=0.9
        )
        settings: dict[str, Any] = {"batch_size": 4, "config": config, "clock": clock}
        found = measure_latency(fed(runners), **settings)
        warm = found.warmup["reference"].calls + found.warmup["control"].calls
        assert not any(runners["reference"].collector_was_on[warm:])
        assert gc.isenabled() is enabled
        runners["pruned"].run = explode  # type: ignore[method-assign]
        with pytest.raises(MemoryError):
            measure_latency(fed(runners), **settings)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_progress_rises_to_one() -> None:
    shares: list[float] = []
    measure(noisy(2.0, 1), noisy(1.0, 2), ratio_precision=1e-6, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_an_empty_batch_is_one_sentence() -> None:
    with pytest.raises(DataError, match="at least one input"):
        measure_latency(
            {},
            batch_size=0,
            config=BenchConfig(),
        )


STEPS_MS = {"h2d": 0.5, "compute": 2.0, "d2h": 0.25, "enqueue": 0.125}


class GpuRunner(FakeRunner):
    stages = object()


def test_on_a_gpu_the_latency_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_on_device(stages: object, iterations: int, *, clock: Clock) -> DeviceCalls:
        clock.seconds += iterations * 0.003
        return DeviceCalls(
            latency_ms=[2.75] * iterations,
            host_ms=[3.0] * iterations,
            stages_ms={name: [ms] * iterations for name, ms in STEPS_MS.items()},
        )

    monkeypatch.setattr("bench.measuring.latency.time_on_device", time_on_device)
    clock = Clock()
    runners = {
        "reference": GpuRunner("reference", clock, lambda call: 3.0),
        "pruned": FakeRunner("pruned", clock, lambda call: 1.375),
    }
    config = BenchConfig(min_blocks=8)
    found = measure_latency(fed(runners), batch_size=4, config=config, clock=clock)
    assert set(found.samples_ms["reference"]) == {2.75}
    assert found.ratio.ratio == pytest.approx(0.5)
    calls = len(found.samples_ms["reference"])
    expected = {**STEPS_MS, "host": 3.0}
    assert found.stages_ms["reference"] == {name: (ms,) * calls for name, ms in expected.items()}
    assert found.stages_ms["pruned"] == {}


def test_a_watch_looks_once_a_round() -> None:
    looks = []

    class Watched:
        def look(self) -> None:
            looks.append(1)

        def conditions(self) -> str:
            return "what it saw"

    found = measure(lambda call: 2.0, lambda call: 1.0, watch=Watched())
    assert len(looks) == found.ratio.rounds == 20
    assert found.conditions == "what it saw"  # type: ignore[comparison-overlap]
