"""What measures networks for budgets of time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from bench import stopwatch
from bench.measuring.latency import LatencyResult
from bench.measuring.records import Conditions, CpuConditions
from bench.statistics.latency_ratios import RatioInterval
from bench.stopwatch import ATTEMPTS, RuntimeStopwatch, steadiest
from compress.config import BenchConfig
from export.latency.serving import Serving


def measured(low: float, high: float, waited: float = 0.0) -> LatencyResult:
    interval = RatioInterval(
        ratio=0.5, low=low, high=high, at_least=low, at_most=high, confidence=0.95, rounds=20
    )
    return LatencyResult(
        batch_size=1,
        samples_ms={},
        stages_ms={},
        blocks_ms={},
        iterations={},
        warmup={},
        ratio=interval,
        control=interval,
        seconds=1.0,
        converged=False,
        conditions=Conditions(
            seconds=1.0,
            cpu=CpuConditions(
                **dict.fromkeys(CpuConditions.model_fields) | {"waited_share": waited}
            ),
            gpu=None,
        ),
    )


@pytest.mark.parametrize(
    ("bounds", "taken", "best"),
    [
        ([(0.499, 0.502), (0.5, 0.5)], 1, 0),
        ([(0.45, 0.64), (0.495, 0.505), (0.5, 0.5)], 2, 1),
        ([(0.45, 0.53), (0.48, 0.52), (0.4, 0.6), (0.5, 0.5)], ATTEMPTS, 1),
        ([(0.40, 0.51), (0.49, 0.64), (0.3, 0.6), (0.5, 0.5)], ATTEMPTS, 0),
    ],
)
def test_what_is_wide_is_measured_again(
    bounds: list[tuple[float, float]], taken: int, best: int
) -> None:
    results = [measured(*one) for one in bounds]
    left: Iterator[LatencyResult] = iter(results)
    assert steadiest(lambda: next(left)) is results[best]
    assert len(list(left)) == len(results) - taken


@pytest.mark.parametrize(
    ("results", "taken", "best", "warned"),
    [
        ([measured(0.5, 0.5, waited=0.09)], 1, 0, False),
        ([measured(0.5, 0.5, waited=0.4), measured(0.495, 0.505)], 2, 1, False),
        ([measured(0.5, 0.5, waited=0.4), measured(0.4, 0.6), measured(0.45, 0.55)], 3, 2, False),
        (
            [measured(0.495, 0.5, 0.4), measured(0.5, 0.5, 0.5), measured(0.49, 0.5, 0.2)],
            3,
            1,
            True,
        ),
    ],
)
def test_what_others_disturbed_is_measured_again(
    results: list[LatencyResult],
    taken: int,
    best: int,
    warned: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = iter(results)
    assert steadiest(lambda: next(left)) is results[best]
    assert len(list(left)) == len(results) - taken
    assert ("may not be that of a quiet machine" in capsys.readouterr().err) == warned


def test_reach_is_that_of_the_farther_bound() -> None:
    assert measured(0.4, 0.55).ratio.reach == pytest.approx(0.2)
    assert measured(0.49, 0.55).ratio.reach == pytest.approx(0.1)


def test_the_control_is_the_file_of_the_dense_network_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources: list[Any] = []
    really = stopwatch.opened

    def opened(source: Any, serving: Serving) -> Any:
        sources.append(source)
        return really(source, serving)

    monkeypatch.setattr(stopwatch, "opened", opened)
    dense, pruned = (
        nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for width in (8, 4)
    )
    bench = BenchConfig(block_ms=0.2, min_blocks=4, max_seconds=0.5, ratio_precision=1.0)
    watch = RuntimeStopwatch(Serving(), 1, bench)
    assert watch.compare(dense.eval(), pruned.eval(), (3, 8, 8)).dense_ms > 0
    reference, other, control = sources
    assert isinstance(reference, Path)
    assert reference == control != other
