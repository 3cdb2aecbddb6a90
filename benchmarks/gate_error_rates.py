"""How often the quality gate errs: false alarms, power and coverage under simulated noise.

    python benchmarks/gate_error_rates.py [--runs 500] [--ratio-precision X] [--max-seconds X]
    python benchmarks/gate_error_rates.py --smoke

Networks that only move a clock are measured by ``measure_latency`` with the settings of
``compress bench``, reported and judged. The reference takes 4 ms a call. Of every noise there are
``--runs`` baselines, as many measurements of a network that did not change (so it lies exactly on
the limits, 1.00) and as many of one that is 5 % slower.

Of accuracy, outcomes of a reference and a pruned network are drawn image by image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count

import numpy as np
import numpy.typing as npt
from smoke import parsed

from bench.judging.baseline import change_against
from bench.judging.quality_gate import judge
from bench.limits import Limits
from bench.measuring.answers import Predictions, compare_predictions
from bench.measuring.latency import SLOTS, Call, LatencyResult, measure_latency
from bench.measuring.records import Artefact, Environment, ValidationSet
from bench.measuring.session import Measured
from bench.measuring.subject import About
from bench.reports.report import build_report
from bench.reports.schema import Report
from bench.statistics.latency_ratios import RatioInterval
from bench.statistics.shares import PairedDrop, paired_drop
from compress.config import BenchConfig

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator

SLOWER = 1.05
CALL_MS = 4.0
CONFIDENCE = 0.95

_TICK = 0.01  # seconds between two points at which the machine may change
_TICKS = 6000
_CALLS = 2**14  # after so many the factors of the calls repeat


@dataclass(frozen=True)
class Noise:
    """What makes calls take longer than they should."""

    calls: Callable[[Rng, int], Floats]
    """Factors of single calls."""
    machine: Callable[[Rng], Floats] = lambda rng: np.ones(_TICKS)
    """Factor of everything that runs, by tick."""
    network: Callable[[Rng], Floats] = lambda rng: np.ones(_TICKS)
    """Factor of one network and not of the others, by tick; drawn for each."""


def lognormal(spread: float) -> Callable[[Rng, int], Floats]:
    """Every call on its own."""
    return lambda rng, calls: np.exp(rng.normal(0, spread, calls))


def spikes(rng: Rng, calls: int) -> Floats:
    """One call in ten takes longer by a Pareto variable without a variance."""
    struck = rng.random(calls) < 0.1
    return lognormal(0.05)(rng, calls) + struck * 0.5 * rng.pareto(1.5, calls)


def ramp(rng: Rng) -> Floats:
    """The clock falls evenly for twelve seconds, until calls take 30 % longer."""
    return 1 + 0.3 * np.minimum(np.arange(_TICKS) * _TICK / 12, 1)


def walk(rng: Rng) -> Floats:
    """The log of the speed is a random walk of 5 % a second."""
    return np.exp(np.cumsum(rng.normal(0, 0.05 * _TICK**0.5, _TICKS)))


def modes(slower: float, seconds: float) -> Callable[[Rng], Floats]:
    """Two speeds; each lasts so many seconds on average."""

    def drawn(rng: Rng) -> Floats:
        found, tick, slow = np.ones(_TICKS), 0, rng.random() < 0.5
        while tick < _TICKS:
            end = tick + max(1, round(rng.exponential(seconds) / _TICK))
            found[tick:end] = slower if slow else 1.0
            tick, slow = end, not slow
        return found

    return drawn


NOISES = {
    "log-normal, 5 % a call": Noise(lognormal(0.05)),
    "log-normal, 10 % a call": Noise(lognormal(0.10)),
    "heavy-tailed": Noise(spikes),
    "drift: a ramp": Noise(lognormal(0.05), ramp),
    "drift: a random walk": Noise(lognormal(0.05), walk),
    "two speeds": Noise(lognormal(0.05), modes(1.4, 1.5)),
    "busy: half the speed for 0.2 s": Noise(lognormal(0.05), modes(2.0, 0.2)),
}
"""Noise that does not ask which network runs."""
NEIGHBOURS = {
    "each network on its own, 10 % for 1 s": Noise(lognormal(0.05), network=modes(1.1, 1.0)),
    "each network on its own, 5 % for 3 s": Noise(lognormal(0.05), network=modes(1.05, 3.0)),
}
"""Noise that does, which no order of the blocks cancels."""


class Machine:
    """A clock that only calls move, and how slow the machine is by it."""

    def __init__(self, noise: Noise, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.seconds, self.calls = 0.0, count()
        self.factors = noise.calls(rng, _CALLS).tolist()
        self.machine = noise.machine(rng).tolist()
        self.networks = {slot: noise.network(rng).tolist() for slot in SLOTS}

    def clock(self) -> float:
        """Return the seconds that all calls took."""
        return self.seconds


class Network:
    """A runner that only takes time."""

    name = "simulated"

    def __init__(self, machine: Machine, slot: str, milliseconds: float) -> None:
        self.machine, self.own, self.cost = machine, machine.networks[slot], milliseconds / 1000

    def run(self, feeds: object) -> None:
        """Let the clock go on."""
        machine = self.machine
        tick = min(int(machine.seconds / _TICK), _TICKS - 1)
        factor = machine.factors[next(machine.calls) % _CALLS]
        machine.seconds += self.cost * factor * machine.machine[tick] * self.own[tick]


def simulate(noise: Noise, ratio: float, seed: int, config: BenchConfig) -> LatencyResult:
    """Measure a network that takes so many times what its reference takes."""
    machine = Machine(noise, seed)
    costs = {slot: CALL_MS * (ratio if slot == "pruned" else 1) for slot in SLOTS}
    calls = {slot: Call(Network(machine, slot, costs[slot]), {}) for slot in SLOTS}  # type: ignore[arg-type]
    return measure_latency(
        calls,
        batch_size=1,
        config=config,
        seed=seed,
        clock=machine.clock,
    )


def reported(result: LatencyResult, config: BenchConfig) -> Report:
    """Put a measurement into a report in which everything else is the same."""
    right = np.ones(1, dtype=bool)
    zero = np.zeros(1, dtype=np.int64)
    seen = Predictions(top1=zero, correct=right, top5_correct=right, labels=zero, skipped=0)
    artefact = Artefact(onnx_sha256="0" * 64, weights_sha256="0" * 64, bytes=1)
    machine = Environment(
        cpu=None,
        physical_cores=None,
        logical_cores=None,
        affinity=(0,),
        cpu_quota=None,
        threads=1,
        load_average=None,
        governor=None,
        platform="simulated",
        python="",
        packages={},
        gpu=None,
    )
    measured = Measured(
        runtime="simulated",
        validation=ValidationSet(identity="0" * 64, images=1, skipped=0),
        environment=machine,
        config=config,
        latency=[result],
        predictions=(seen, seen),
        accuracy=compare_predictions(seen, seen, config.confidence),
    )
    about = About(architecture="simulated", target="cpu", artefacts=(artefact, artefact))
    return build_report(about, measured, created=datetime(2000, 1, 1, tzinfo=timezone.utc))


@dataclass
class Rates:
    """How one kind of verdict came out, and whether its interval held the truth."""

    passed: int = 0
    failed: int = 0
    caught: int = 0
    """FAIL of the slower network, at a limit of 1.00."""
    caught_beyond: int = 0
    """FAIL of the slower network, at a limit of 1.03."""
    held: int = 0
    runs: int = 0


@dataclass
class NoiseRates:
    """Against the reference and, as ratio and as median, against a baseline."""

    ratio: Rates
    regression: Rates
    median: Rates
    seconds: float
    """Median time of one measurement."""
    unfit: int = 0
    """Verdicts that were not given."""


def latency_rates(noise: Noise, runs: int, config: BenchConfig) -> NoiseRates:
    """Judge a network that did not change and one that is slower."""
    found, seconds = NoiseRates(Rates(), Rates(), Rates(), 0.0), []
    for seed in range(runs):
        then, same, slower = (
            simulate(noise, ratio, 3 * seed + part, config)
            for part, ratio in enumerate((1.0, 1.0, SLOWER))
        )
        seconds.append(same.seconds)
        baseline = reported(then, config)
        for result in (same, slower):
            report = reported(result, config)
            report = report.model_copy(update={"change": change_against(report, baseline)})
            _count(found, report, changed=result is slower)
    found.seconds = float(np.median(seconds))
    return found


def _count(found: NoiseRates, report: Report, *, changed: bool) -> None:
    assert report.change is not None
    (change,), (comparison,) = report.change.latency, report.comparison.latency
    kinds: dict[str, tuple[Rates, RatioInterval | None]] = {
        "max_ratio": (found.ratio, comparison.ratio),
        "max_regression": (found.regression, change.ratio),
        "max_median_regression": (found.median, change.median),
    }
    for limit in (1.0, 1.03):
        limits = Limits.model_validate({"latency": dict.fromkeys(kinds, limit)})
        for verdict in judge(report, limits):
            rates, interval = kinds[verdict.name.partition(".")[2]]
            assert interval is not None
            if changed:
                name = "caught" if limit == 1.0 else "caught_beyond"
                setattr(rates, name, getattr(rates, name) + (verdict.status == "FAIL"))
            elif limit == 1.0:
                rates.runs += 1
                rates.passed += verdict.status == "PASS"
                rates.failed += verdict.status == "FAIL"
                rates.held += interval.low <= 1.0 <= interval.high
                found.unfit += verdict.status == "SKIPPED"


def accuracy_rates(
    drop: float, flips: float, images: int, limit: float, runs: int, seed: int = 0
) -> tuple[float, float, float]:
    """Return the shares of PASS and FAIL at a limit, and of intervals that hold the drop.

    ``drop``, ``flips`` and ``limit`` are shares of the images.
    """
    worse, better = (flips + drop) / 2, (flips - drop) / 2
    rng = np.random.default_rng(seed)
    passed = failed = held = 0
    for lost, won, _ in rng.multinomial(images, [worse, better, 1 - flips], size=runs).tolist():
        found = outcome(lost, won, images)
        passed += found.at_most_pp <= 100 * limit
        failed += found.at_least_pp > 100 * limit
        held += found.low_pp <= 100 * drop <= found.high_pp
    return passed / runs, failed / runs, held / runs


def outcome(lost: int, won: int, images: int) -> PairedDrop:
    """Compare two networks of which so many images are right in one only."""
    reference, pruned = np.ones(images, dtype=bool), np.ones(images, dtype=bool)
    pruned[:lost] = False
    reference[lost : lost + won] = False
    return paired_drop(reference, pruned, confidence=CONFIDENCE)


def _latency_tables(runs: int, config: BenchConfig) -> Iterator[str]:
    found = {}
    for name, noise in {**NOISES, **NEIGHBOURS}.items():
        found[name] = latency_rates(noise, runs, config)
        print(f"{name}: done", file=sys.stderr)
    for title, kind in (
        ("against the reference", "ratio"),
        ("ratio against a baseline", "regression"),
        ("median against a baseline", "median"),
    ):
        yield f"\nLatency, {title}:\n"
        header = ("noise", "FAIL", "PASS", "interval holds", "5 % slower: FAIL", "FAIL at 1.03")
        rows = []
        for name, rates in found.items():
            one: Rates = getattr(rates, kind)
            counts = (one.failed, one.passed, one.held, one.caught, one.caught_beyond)
            rows.append((name, *(f"{100 * number / one.runs:.1f} %" for number in counts)))
        yield from _table(header, rows)
    yield "\nTime of a measurement, and verdicts that were not given:\n"
    rows = [(n, f"{r.seconds:.1f} s", f"{r.unfit / (3 * runs):.1%}") for n, r in found.items()]
    yield from _table(("noise", "median time", "SKIPPED"), rows)


def _accuracy_table(runs: int) -> Iterator[str]:
    yield "\nAccuracy (limit 1 pp):\n"
    header = ("images", "flips", "FAIL", "PASS", "interval holds", "no drop: PASS", "2 pp: FAIL")
    rows = []
    for images in (1000, 10_000, 50_000):
        for flips in (0.02, 0.06, 0.10):
            on = accuracy_rates(0.01, flips, images, 0.01, runs)
            none = accuracy_rates(0.0, flips, images, 0.01, runs)
            two = accuracy_rates(0.02, flips, images, 0.01, runs)
            shares = (on[1], on[0], on[2], none[0], two[1])
            rows.append(
                (f"{images}", f"{100 * flips:.0f} %", *(f"{100 * share:.1f} %" for share in shares))
            )
    yield from _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--ratio-precision", type=float)
    parser.add_argument("--max-seconds", type=float)
    return parsed(parser, arguments, runs=1, max_seconds=3.0)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    changed = {
        name: getattr(options, name)
        for name in ("ratio_precision", "max_seconds")
        if getattr(options, name) is not None
    }
    for line in _latency_tables(options.runs, BenchConfig(**changed)):
        print(line, flush=True)
    for line in _accuracy_table(4 * options.runs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
