"""Milliseconds of many networks in one process, measured in turn.

A round visits every network once, in random order. What slows the machine for seconds slows a whole
round, and is taken off: every network says by how much the round was slower than others. Of what is
left the lower half counts, because disturbance only adds.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import TableError

if TYPE_CHECKING:
    from export.runners import Runner

Rounds = NDArray[np.float64]
"""(rounds, networks), milliseconds per call."""
Timer = Callable[[], float]
"""Makes one call and returns its milliseconds."""
Told = Callable[[float], None]
"""Told the share that is done."""

BLOCK_MS = 2.0
"""Least work in the timed calls of one visit."""
MOST_SPREAD = 0.1
"""Two halves of the rounds may differ by this share; beyond, the machine is too noisy."""


@dataclass(frozen=True)
class Effort:
    """How long measurements go on."""

    fewest: int = 6
    """Rounds."""
    most: int = 16
    """Rounds."""
    spread: float = 0.01
    """Share by which two halves of the rounds may differ at the end."""
    seconds: float = 60.0
    """No further round is begun after so long, once there are the fewest."""


@dataclass(frozen=True)
class Measured:
    """What rounds gave."""

    ms: tuple[float, ...]
    """Milliseconds per call of each network."""
    spread: float
    """Share by which two halves of the rounds differ; 90 % of the networks differ by less."""


def measured(
    timers: Sequence[Timer],
    effort: Effort | None = None,
    *,
    seed: int = 0,
    told: Told | None = None,
) -> Measured:
    """Time networks in turn.

    Args:
        timers: one for each.
        effort: how long it may take.
        seed: of the order within rounds.
        told: after each round, the share of the most rounds that is done.
    """
    effort = effort or Effort()
    rng, began = np.random.default_rng(seed), time.monotonic()
    counts = [_calls_for(timer) for timer in timers]
    rounds: list[list[float]] = []
    while len(rounds) < effort.most:
        found = [0.0] * len(timers)
        with collector_off():
            for index in rng.permutation(len(timers)):
                found[index] = _block(timers[index], counts[index])
        rounds.append(found)
        if told is not None:
            told(len(rounds) / effort.most)
        if len(rounds) < effort.fewest or len(rounds) % 2:
            continue
        late = time.monotonic() - began > effort.seconds
        if late or summarised(np.array(rounds)).spread <= effort.spread:
            break
    return summarised(np.array(rounds))


def summarised(rounds: Rounds) -> Measured:
    """Return the milliseconds of each network, without what slowed whole rounds."""
    steady = rounds / _slowness(rounds)[:, None]
    halves = [_lower(steady[start::2]) for start in (0, 1)] if len(rounds) > 1 else []
    spread = float(np.quantile(np.abs(halves[0] / halves[1] - 1), 0.9)) if halves else math.inf
    return Measured(tuple(map(float, _lower(steady))), spread)


def require_quiet(spread: float) -> None:
    """Refuse measurements that do not repeat.

    Raises:
        TableError: the machine is too noisy for a table.
    """
    if not spread <= MOST_SPREAD:
        raise TableError(
            f"this machine is too noisy for a latency table: two halves of the measurements differ "
            f"by {spread:.0%}, over {MOST_SPREAD:.0%}; nothing was written, measure when it is idle"
        )


def _slowness(rounds: Rounds) -> Rounds:
    """Return by which factor each round was slower than the usual one."""
    return np.median(rounds / np.median(rounds, axis=0), axis=1)


def _lower(rounds: Rounds) -> Rounds:
    """Return the median of the lower half."""
    return np.median(np.sort(rounds, axis=0)[: len(rounds) // 2 + 1], axis=0)


def _calls_for(timer: Timer) -> int:
    """Return how many calls fill a block; the first ones allocate and choose kernels."""
    timer(), timer()
    return max(2, math.ceil(BLOCK_MS / max(timer(), 1e-3)))


def _block(timer: Timer, count: int) -> float:
    timer()  # it pays for the caches that the other networks left cold
    return min(timer() for _ in range(count))  # disturbance only adds


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep Python's garbage collector out of a timed block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def timer_of(runner: Runner, feeds: Mapping[str, Any], *, threads: int) -> Timer:
    """Return what times one call of an entered runner.

    On a GPU that is H2D, compute and D2H, by its own events. On the CPU with one thread it is the
    time that the thread has run, so that a call is not charged for what other processes took.
    """
    from export.runners import stages_of

    stages = stages_of(runner)
    if stages is not None:
        stages.stage(feeds)

        start, end = stages.event(), stages.event()

        def on_device() -> float:
            with stages.on_stream():  # else every step would switch to it, between the two events
                stages.record(start)
                stages.upload()
                stages.enqueue()
                stages.download()
                stages.record(end)
                stages.synchronize()
            return float(start.elapsed_time(end))

        return on_device
    clock = time.thread_time if threads == 1 else time.perf_counter
    run = runner.run

    def on_host() -> float:
        start = clock()
        run(feeds)
        return 1000 * (clock() - start)

    return on_host
