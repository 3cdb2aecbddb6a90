"""Verdicts on latency: against the reference, against a baseline, and in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import units
from bench.budgets import LatencyBudget
from bench.judging.verdicts import Figure, Verdict
from bench.measuring.conditions import throttled
from bench.reports.schema import LatencyComparison, Report
from bench.statistics.stats import (
    FEWEST_ROUNDS,
    TAIL_CONFIDENCE,
    LatencySummary,
    RatioInterval,
    median_interval,
    queries_needed,
)
from compress.config import BenchConfig

STEADY = 0.02
"""Share by which a network may differ from itself, unless the precision asked for is less."""

_ADD_SIZE = "add the batch size to bench.batch_sizes"
_MEASURE_LONGER = "measure longer (bench.max_seconds) or on a quieter machine"
_OTHER_BASELINE = "name a baseline that holds the batch size"
_SUBJECTS = {
    "max_ratio": "the latency ratio",
    "max_regression": "the latency ratio now over that of the baseline",
    "max_median_regression": "the median of the pruned network now over that of the baseline",
    "median_ms": "the median of the pruned network",
    "p99_ms": "p99 of the pruned network",
}
_MOST_NAMED = 3  # differences between machines that one sentence lists


def unfit(comparison: LatencyComparison, config: BenchConfig) -> str | None:
    """Return why the machine was not fit to measure this batch size, as the rest of a sentence."""
    if comparison.conditions is not None and (reason := throttled(comparison.conditions)):
        return reason
    control, slack = comparison.control, max(STEADY, config.ratio_precision)
    if control.low > 1 + slack or control.high < 1 - slack:
        interval = f"[{units.ratio(control.low)}, {units.ratio(control.high)}]"
        return (
            f"the reference against itself gave {units.ratio(control.ratio)} {interval}, "
            "so the machine is not steady enough; stop other work on it and measure again"
        )
    return None


def judge_latency(report: Report, budget: LatencyBudget) -> Iterator[Verdict]:
    """Yield a verdict for every limit at every batch size that is judged."""
    measured = {comparison.batch_size: comparison for comparison in report.comparison.latency}
    for batch_size in budget.batch_sizes or tuple(measured) or (None,):
        comparison = measured.get(batch_size) if batch_size is not None else None
        why_unfit = unfit(comparison, report.config) if comparison else None
        for key, limit in budget.limits.items():
            figure = Figure(
                budget=f"latency.{key}",
                subject=_SUBJECTS[key],
                limit=limit,
                batch_size=batch_size,
                allow_skipped=budget.allow_skipped,
            )
            if comparison is None:
                yield figure.skipped("was not measured", _ADD_SIZE)
            elif why_unfit:
                yield figure.unfit(why_unfit)
            else:
                yield _judge(figure, key, report, comparison)


def _judge(figure: Figure, key: str, report: Report, comparison: LatencyComparison) -> Verdict:
    """Judge what was measured on a machine that was fit for it."""
    if key == "max_ratio":
        return _decide(figure, comparison.ratio, report.config)
    if key in ("max_regression", "max_median_regression"):
        return _judge_change(figure, key, report)
    record = next(
        found for found in report.networks.pruned.latency if found.batch_size == figure.batch_size
    )
    if key == "p99_ms":
        return _judge_p99(figure, record.summary, report.config, comparison.ratio.rounds)
    level = median_interval(record.block_medians_ms, confidence=report.config.confidence)
    return _decide(figure, level, report.config)


def _judge_change(figure: Figure, key: str, report: Report) -> Verdict:
    assert report.change is not None, "the quality gate asks for a baseline first"
    change = report.change
    found = next((one for one in change.latency if one.batch_size == figure.batch_size), None)
    if found is None:
        return figure.skipped("has no fit measurement in the baseline", _OTHER_BASELINE)
    if key == "max_regression":
        return _decide(figure, found.ratio, report.config)
    if found.median is None:
        return figure.skipped("cannot be compared", _elsewhere(change.differences))
    return _decide(figure, found.median, report.config)


def _elsewhere(differences: Sequence[str]) -> str:
    named, more = differences[:_MOST_NAMED], len(differences) - _MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    return f"the baseline is of another machine or software ({', '.join(named)}{rest})"


def _judge_p99(
    figure: Figure, summary: LatencySummary, config: BenchConfig, rounds: int
) -> Verdict:
    if summary.p99_at_least_ms is None or summary.p99_at_most_ms is None:
        needed = queries_needed(99)
        reason = f"{summary.calls} calls were timed and a bound on p99 needs {needed}"
        return figure.doubtful(summary.p99_ms, None, f"{reason}; raise bench.max_seconds")
    bounds = (summary.p99_at_least_ms, summary.p99_at_most_ms)
    if doubt := _too_few(rounds, config):
        return figure.doubtful(summary.p99_ms, bounds, doubt)
    return figure.decide(summary.p99_ms, bounds, TAIL_CONFIDENCE, advice=_MEASURE_LONGER)


def _decide(figure: Figure, interval: RatioInterval, config: BenchConfig) -> Verdict:
    bounds = (interval.at_least, interval.at_most)
    if doubt := _too_few(interval.rounds, config):
        return figure.doubtful(interval.ratio, bounds, doubt)
    return figure.decide(interval.ratio, bounds, interval.confidence, advice=_MEASURE_LONGER)


def _too_few(rounds: int, config: BenchConfig) -> str | None:
    needed = max(config.min_blocks, FEWEST_ROUNDS)
    if rounds >= needed:
        return None
    return (
        f"{rounds} rounds of the {needed} needed fitted into "
        f"bench.max_seconds = {config.max_seconds:g}; allow more time"
    )
