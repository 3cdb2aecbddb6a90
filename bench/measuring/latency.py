"""Latency of two networks against each other, in alternating blocks of one process.

A round times every slot once, in random order: ``reference``, ``pruned`` and ``control``, which
is the reference loaded once more. The reference is the dense network, or that of another run. What
slows the machine for seconds slows a whole round and cancels in the ratio; the control shows what
the method reports when there is no difference at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bench.measuring.conditions import Watch
from bench.measuring.device_timing import time_on_device
from bench.measuring.records import Conditions
from bench.statistics.latency_ratios import RatioInterval, median, median_ratio_interval
from compress.config import BenchConfig
from compress.errors import DataError
from export.latency.rounds import collector_off

if TYPE_CHECKING:
    from export.runners import Feeds, Runner

Images = npt.NDArray[np.float32]
Clock = Callable[[], float]

HOST = "host"
"""Beside the steps of a call on a GPU: the whole call by the host's clock."""
SLOTS = ("reference", "pruned", "control")

_WARMUP_SHARE = 0.1  # of max_seconds, per network: most that warming up may take
_STATIONARY = 0.01  # a window no more than this share faster than the last ends warming up
_INSTANT_MS = 1e-6  # no call is faster; keeps a clock that stood still from dividing by zero
_LOOK_EVERY = 4  # rounds between two looks at the interval


@dataclass(frozen=True)
class Call:
    """What is timed: a network with what it is fed."""

    runner: Runner
    feeds: Feeds

    def __call__(self) -> None:
        """Make the call, and drop what it returns."""
        self.runner.run(self.feeds)


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Calls before the first timed one."""

    calls: int
    seconds: float
    stationary: bool
    """Whether the last window was no faster than the one before; else the time was used up."""


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """What one batch size gave; latencies are milliseconds per call."""

    batch_size: int
    samples_ms: dict[str, tuple[float, ...]]
    """Every timed call of each slot: wall clock, or on a GPU H2D + compute + D2H."""
    stages_ms: dict[str, dict[str, tuple[float, ...]]]
    """On a GPU, each timed call of each slot by its steps, and ``host``; empty on the CPU."""
    blocks_ms: dict[str, tuple[float, ...]]
    """Median call of each block; entry i of every slot belongs to round i."""
    iterations: dict[str, int]
    """Timed calls per block of each slot."""
    warmup: dict[str, Warmup]
    ratio: RatioInterval
    control: RatioInterval
    """The reference against itself."""
    seconds: float
    converged: bool
    """Whether the ratio became as precise as asked before the time was up."""
    conditions: Conditions | None = None
    """What the machine did meanwhile, if it was watched."""


def measure_latency(
    calls: Mapping[str, Call],
    *,
    batch_size: int,
    config: BenchConfig,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
    progress: Callable[[float], None] | None = None,
) -> LatencyResult:
    """Time ``calls["pruned"]`` against ``calls["reference"]``, each on one batch.

    ``calls["control"]`` is the reference loaded once more, so that going to it costs what going to
    the pruned one costs; without it the call of the reference serves twice.

    Rounds go on until there are ``min_blocks`` of them and both bounds of the ratio's interval lie
    within ``ratio_precision`` (a share) of the ratio, or until another round would not fit into
    ``max_seconds``. Two rounds are measured whatever they take, since one has no interval.

    Args:
        calls: what is timed, by the names of ``SLOTS``.
        batch_size: inputs of a call.
        config: how long and how precisely.
        seed: of the order within rounds.
        clock: tells seconds.
        watch: looks once a round.
        progress: told the share done, 0 to 1.

    Raises:
        DataError: an empty batch.
        KeyError: no call is named reference or pruned.
    """
    import scipy.stats  # noqa: F401  # takes long, so not between two rounds

    if batch_size < 1:
        raise DataError("latency needs at least one input, and the batch is empty")
    slots = {"control": calls["reference"], **calls}
    stopwatch = _Stopwatch(clock)
    start = clock()
    warm = {
        name: stopwatch.warm_up(slots[name], config.block_ms, _WARMUP_SHARE * config.max_seconds)
        for name in SLOTS
    }
    # The control does exactly what the reference does.
    counts = {
        name: warm["pruned" if name == "pruned" else "reference"].iterations for name in SLOTS
    }
    timings = {name: _Timings(counts[name]) for name in SLOTS}

    def interval(slot: str) -> RatioInterval:
        blocks = timings["reference"].blocks, timings[slot].blocks
        return median_ratio_interval(*blocks, confidence=config.confidence)

    rng = np.random.default_rng(seed)
    converged, longest, rounds = False, 0.0, 0
    while not converged and (rounds < 2 or clock() - start + longest <= config.max_seconds):
        began = clock()
        for index in rng.permutation(len(SLOTS)):
            name = SLOTS[index]
            timings[name].add(stopwatch.block(slots[name], timings[name].iterations))
        if watch is not None:
            watch.look()
        rounds += 1
        longest = max(longest, clock() - began)
        if rounds >= config.min_blocks and (rounds - config.min_blocks) % _LOOK_EVERY == 0:
            converged = interval("pruned").reach <= config.ratio_precision
        if progress is not None:
            progress(min(1.0, (clock() - start) / config.max_seconds))
    if progress is not None:
        progress(1.0)
    return LatencyResult(
        batch_size=batch_size,
        samples_ms={name: tuple(timings[name].samples) for name in SLOTS},
        stages_ms={name: timings[name].steps() for name in SLOTS},
        blocks_ms={name: tuple(timings[name].blocks) for name in SLOTS},
        iterations=counts,
        warmup={name: found.warmup for name, found in warm.items()},
        ratio=interval("pruned"),
        control=interval("control"),
        seconds=clock() - start,
        converged=converged,
        conditions=None if watch is None else watch.conditions(),
    )


@dataclass(frozen=True)
class _Calls:
    """Timed calls in a row, in milliseconds."""

    latency: list[float]
    stages: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass
class _Timings:
    iterations: int
    samples: list[float] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)

    def add(self, block: _Calls) -> None:
        self.samples += block.latency
        self.blocks.append(median(block.latency))
        for name, times in block.stages.items():
            self.stages.setdefault(name, []).extend(times)

    def steps(self) -> dict[str, tuple[float, ...]]:
        return {name: tuple(times) for name, times in self.stages.items()}


@dataclass(frozen=True)
class _Calibration:
    warmup: Warmup
    iterations: int


@dataclass(frozen=True)
class _Stopwatch:
    clock: Clock

    def block(self, call: Call, iterations: int) -> _Calls:
        """Time calls one by one."""
        with collector_off():
            # Not timed: it pays for the caches that the other network left cold.
            call()
            return self._time(call, iterations)

    def warm_up(self, call: Call, block_ms: float, most_seconds: float) -> _Calibration:
        """Run windows of ``block_ms`` until one is no faster than the last, or time is up."""
        start, calls, iterations = self.clock(), 1, 1
        previous = fastest = math.inf
        call()  # the first call allocates and picks kernels
        while True:
            window = self._time(call, iterations).latency
            calls += len(window)
            fastest = min(fastest, *window)
            full = sum(window) >= block_ms
            stationary = full and median(window) >= (1 - _STATIONARY) * previous
            seconds = self.clock() - start
            if stationary or seconds >= most_seconds:
                break
            previous = median(window) if full else previous
            iterations *= 1 if full else 2
        # By the fastest call: a block holds block_ms of work even when nothing disturbs it.
        needed = max(1, math.ceil(block_ms / max(fastest, _INSTANT_MS)))
        warmup = Warmup(calls=calls, seconds=seconds, stationary=stationary)
        return _Calibration(warmup, needed)

    def _time(self, call: Call, iterations: int) -> _Calls:
        from export.runners import stages_of

        stages = stages_of(call.runner)
        if stages is not None:  # on a GPU; what is fed was staged by the call before
            found = time_on_device(stages, iterations, clock=self.clock)
            return _Calls(found.latency_ms, {**found.stages_ms, HOST: found.host_ms})
        run, feeds, clock = call.runner.run, call.feeds, self.clock
        times = []
        for _ in range(iterations):
            start = clock()
            run(feeds)
            times.append(1000 * (clock() - start))
        return _Calls(times)
