"""Verdicts: a report against budgets, decided by intervals and never by a lucky point.

A figure with an interval passes only when its one-sided bound at the report's confidence lies
within the budget, and fails only when the opposite bound lies beyond it; in between the measurement
cannot tell. So a network exactly on a budget is passed, or failed, with probability at most
1 - confidence each. What was not measured is SKIPPED, and SKIPPED never counts as passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from bench import units
from bench.budgets import Budgets, LatencyBudget, load_budgets, require_any
from bench.paired import PairedDrop, images_needed
from bench.schema import LatencyComparison, Report
from bench.stats import (
    FEWEST_ROUNDS,
    TAIL_CONFIDENCE,
    queries_needed,
)
from compress.config import BenchConfig
from compress.errors import ConfigError

__all__ = ["Budgets", "Status", "Verdict", "exit_code", "judge", "load_budgets"]

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "SKIPPED"]

EXIT_CODES: dict[Status, int] = {"FAIL": 3, "INCONCLUSIVE": 4, "SKIPPED": 5, "PASS": 0}
"""Exit code of each status; of several verdicts the first status in this order decides."""

_ADD_SIZE = "add the batch size to bench.batch_sizes"
_MEASURE_LONGER = "measure longer (bench.max_seconds) or on a quieter machine"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One budget, judged."""

    budget: str
    """Its key, as ``latency.max_ratio``."""
    batch_size: int | None
    limit: float
    measured: float | None
    interval: tuple[float, float] | None
    """The two one-sided bounds that decided; None for what is counted exactly."""
    status: Status
    sentence: str


def judge(report: Report, budgets: Budgets) -> list[Verdict]:
    """Return one verdict per budget, and per batch size where latency is judged.

    Raises:
        ConfigError: there is no budget to judge.
    """
    require_any(budgets)
    return [
        *_judge_accuracy(report, budgets.accuracy.max_drop_pp),
        *_judge_latency(report, budgets.latency),
        *_judge_ratio("macs", report.comparison.macs_ratio, budgets.macs.max_ratio),
        *_judge_ratio("params", report.comparison.params_ratio, budgets.params.max_ratio),
        *_judge_ratio("size", report.comparison.bytes_ratio, budgets.size.max_ratio),
        *_judge_parity(report, (budgets.parity.max_relative_error or {}).get(report.precision)),
    ]


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """Return 0 when all passed, else 3 (FAIL) before 4 (INCONCLUSIVE) before 5 (SKIPPED).

    Raises:
        ConfigError: there are no verdicts; nothing judged is nothing proved.
    """
    seen = {verdict.status for verdict in verdicts}
    if not seen:
        raise ConfigError("no budget was judged; name at least one")
    return next(code for status, code in EXIT_CODES.items() if status in seen)


def _judge_accuracy(report: Report, limit: float | None) -> Iterator[Verdict]:
    if limit is None:
        return
    figure = _Figure("accuracy.max_drop_pp", "the accuracy drop", limit)
    if report.comparison.accuracy is None:
        yield figure.skipped("was not measured")
        return
    drop = report.comparison.accuracy.drop
    bounds = (drop.at_least_pp, drop.at_most_pp)
    yield figure.decide(drop.drop_pp, bounds, drop.confidence, advice=_more_images(drop, limit))


def _more_images(drop: PairedDrop, limit: float) -> str:
    needed = images_needed(
        limit,
        worse=drop.flips_to_wrong,
        better=drop.flips_to_right,
        images=drop.images,
        confidence=drop.confidence,
    )
    if needed is None:
        return f"the drop of these {drop.images} images is the budget itself; change the budget"
    return (
        f"{drop.images} images are too few, about {units.about(needed)} would decide "
        "at this rate of flips"
    )


def _judge_latency(report: Report, budget: LatencyBudget) -> Iterator[Verdict]:
    measured = {comparison.batch_size: comparison for comparison in report.comparison.latency}
    for batch_size in budget.batch_sizes or tuple(measured) or (None,):
        comparison = measured.get(batch_size) if batch_size is not None else None
        doubt = _doubt(comparison, report.config) if comparison else None
        if budget.max_ratio is not None:
            figure = _Figure("latency.max_ratio", "the latency ratio", budget.max_ratio, batch_size)
            yield _judge_latency_ratio(figure, comparison, doubt)
        if budget.p99_ms is not None:
            figure = _Figure(
                "latency.p99_ms", "p99 of the pruned network", budget.p99_ms, batch_size
            )
            yield _judge_p99(figure, report, doubt)


def _judge_latency_ratio(
    figure: _Figure, comparison: LatencyComparison | None, doubt: str | None
) -> Verdict:
    if comparison is None:
        return figure.skipped("was not measured", _ADD_SIZE)
    ratio = comparison.ratio
    bounds = (ratio.at_least, ratio.at_most)
    if doubt:
        return figure.doubtful(ratio.ratio, bounds, doubt)
    return figure.decide(ratio.ratio, bounds, ratio.confidence, advice=_MEASURE_LONGER)


def _judge_p99(figure: _Figure, report: Report, doubt: str | None) -> Verdict:
    records = report.networks.pruned.latency
    found = [record.summary for record in records if record.batch_size == figure.batch_size]
    if not found:
        return figure.skipped("was not measured", _ADD_SIZE)
    summary = found[0]
    if summary.p99_at_least_ms is None or summary.p99_at_most_ms is None:
        needed = queries_needed(99)
        reason = f"{summary.calls} calls were timed and a bound on p99 needs {needed}"
        return figure.doubtful(summary.p99_ms, None, f"{reason}; raise bench.max_seconds")
    bounds = (summary.p99_at_least_ms, summary.p99_at_most_ms)
    if doubt:
        return figure.doubtful(summary.p99_ms, bounds, doubt)
    return figure.decide(summary.p99_ms, bounds, TAIL_CONFIDENCE, advice=_MEASURE_LONGER)


def _doubt(comparison: LatencyComparison, config: BenchConfig) -> str | None:
    """Return why no latency of this batch size can be judged, if so."""
    rounds, needed = comparison.ratio.rounds, max(config.min_blocks, FEWEST_ROUNDS)
    if rounds < needed:
        return (
            f"{rounds} rounds of the {needed} needed fitted into "
            f"bench.max_seconds = {config.max_seconds:g}; allow more time"
        )
    control, slack = comparison.control, config.ratio_precision
    if control.low > 1 + slack or control.high < 1 - slack:
        interval = f"[{units.ratio(control.low)}, {units.ratio(control.high)}]"
        return (
            f"the dense network against itself gave {units.ratio(control.ratio)} {interval}, "
            "so the machine is not steady enough; stop other work on it and measure again"
        )
    return None


def _judge_ratio(name: str, measured: float | None, limit: float | None) -> Iterator[Verdict]:
    if limit is None:
        return
    label = {"macs": "MACs", "params": "parameters", "size": "file sizes"}[name]
    figure = _Figure(f"{name}.max_ratio", f"the ratio of {label}", limit)
    yield figure.skipped("is not in the report") if measured is None else figure.exact(measured)


def _judge_parity(report: Report, limit: float | None) -> Iterator[Verdict]:
    if limit is None:
        return
    figure = _Figure("parity.max_relative_error", "the largest difference to torch", limit)
    networks = report.networks
    if not networks.reference.parity or not networks.pruned.parity:
        yield figure.skipped("is not in the report", "export both networks again")
        return
    errors = [found.relative_error for found in networks.reference.parity + networks.pruned.parity]
    yield figure.exact(max(errors))


@dataclass(frozen=True)
class _Figure:
    """What a budget is about, and how its verdict is worded."""

    budget: str
    subject: str
    limit: float
    batch_size: int | None = None

    def decide(
        self, measured: float, bounds: tuple[float, float], confidence: float, *, advice: str
    ) -> Verdict:
        at_least, at_most = bounds
        level = units.level(confidence)
        if at_most <= self.limit:
            said = f"at most {self._write(at_most)} with {level} confidence"
            return self._verdict("PASS", measured, bounds, f"is {self._write(measured)}, {said}")
        if at_least > self.limit:
            said = f"at least {self._write(at_least)} with {level} confidence"
            return self._verdict("FAIL", measured, bounds, f"is {self._write(measured)}, {said}")
        between = f"lies between {self._write(at_least)} and {self._write(at_most)}"
        return self._verdict("INCONCLUSIVE", measured, bounds, between, advice)

    def doubtful(self, measured: float, bounds: tuple[float, float] | None, reason: str) -> Verdict:
        return self._verdict(
            "INCONCLUSIVE", measured, bounds, f"came out as {self._write(measured)}", reason
        )

    def exact(self, measured: float) -> Verdict:
        status: Status = "PASS" if measured <= self.limit else "FAIL"
        return self._verdict(status, measured, None, f"is {self._write(measured)}")

    def skipped(self, said: str, advice: str = "") -> Verdict:
        return self._verdict("SKIPPED", None, None, said, advice)

    def _write(self, value: float) -> str:
        return units.budget(self.budget)(value)

    def _verdict(
        self,
        status: Status,
        measured: float | None,
        interval: tuple[float, float] | None,
        said: str,
        advice: str = "",
    ) -> Verdict:
        where = f" at batch size {self.batch_size}" if self.batch_size is not None else ""
        tail = f": {advice}" if advice else ""
        return Verdict(
            budget=self.budget,
            batch_size=self.batch_size,
            limit=self.limit,
            measured=measured,
            interval=interval,
            status=status,
            sentence=f"{self.subject}{where} {said}; the budget is {self._write(self.limit)}{tail}",
        )
