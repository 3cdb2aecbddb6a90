"""Verdicts: a report against limits, decided by intervals and not by the estimate alone.

A figure with an interval passes only when its one-sided bound at the report's confidence lies
within the limit, and fails only when the opposite bound lies beyond it; in between the measurement
cannot tell. So a network exactly on a limit is passed, or failed, with probability at most
1 - confidence each. What could not be measured here is SKIPPED, and counts as passed only where the
limits say so; never when the machine was not fit for measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import units
from bench.judging.verdicts import Figure, Verdict
from bench.limits import (
    AccuracyLimits,
    AgreementLimits,
    AnyLimits,
    LatencyLimits,
    ParityLimits,
    RatioLimits,
    check_agreeable,
    check_resolvable,
    limits_of,
    require_any,
    require_baseline,
)
from bench.measuring.conditions import disturbed
from bench.reports.schema import LatencyComparison, Report
from bench.statistics.latency_ratios import (
    FEWEST_ROUNDS,
    TAIL_CONFIDENCE,
    LatencySummary,
    RatioInterval,
    median_interval,
    queries_needed,
)
from bench.statistics.shares import PairedDrop, images_needed
from compress.config import BenchConfig

_FIRST_TF32 = 8  # major CUDA compute capability from which TensorRT computes FP32 in TF32

STEADY = 0.02
"""Share by which a network may differ from itself, unless the precision asked for is less."""

_ADD_SIZE = "add the batch size to bench.batch_sizes"
MEASURE_LONGER = "measure longer (bench.max_seconds) or on a quieter machine"
_PREDICTED = "predicted_max_ratio"
_NO_PREDICTION = "only a run whose target comes with a latency table has predictions, as v100 does"
_OTHER_BASELINE = "name a baseline that holds the batch size"
_SUBJECTS = {
    "max_ratio": "the latency ratio",
    "max_regression": "the latency ratio now over that of the baseline",
    "max_median_regression": "the median of the pruned network now over that of the baseline",
    "median_ms": "the median of the pruned network",
    "p99_ms": "p99 of the pruned network",
}
_MOST_NAMED = 3  # differences between machines that one sentence lists


def judge(report: Report, limits: AnyLimits) -> list[Verdict]:
    """Return one verdict per limit, and per batch size where latency is judged.

    Args:
        report: what was measured.
        limits: sections by name, as ``{"latency": {"max_ratio": 0.9}}``; or the name or path of a
            file of them.

    Raises:
        ConfigError: there is no limit to judge by, one needs a baseline and the report was compared
            with none, or one is smaller than what the images of the report can show.
    """
    known = limits_of(limits)
    require_any(known)
    require_baseline(known, present=report.change is not None)
    ratios = report.comparison
    return [
        *_judge_accuracy(report, known.accuracy),
        *_judge_agreement(report, known.agreement),
        *_judge_latency(report, known.latency),
        *_judge_predicted(report, known.latency),
        *_judge_ratio("macs", ratios.macs_ratio, known.macs),
        *_judge_ratio("params", ratios.params_ratio, known.params),
        *_judge_ratio("size", ratios.bytes_ratio, known.size),
        *_judge_parity(report, known.parity),
    ]


def unfit(comparison: LatencyComparison, config: BenchConfig) -> str | None:
    """Return why the machine was not fit to measure this batch size, as the rest of a sentence."""
    if reason := disturbed(comparison.conditions):
        return reason
    control, slack = comparison.control, max(STEADY, config.ratio_precision)
    if control.low > 1 + slack or control.high < 1 - slack:
        interval = f"[{units.ratio(control.low)}, {units.ratio(control.high)}]"
        return (
            f"the reference against itself gave {units.ratio(control.ratio)} {interval}, "
            "so the machine is not steady enough; stop other work on it and measure again"
        )
    return None


# Accuracy and agreement


def _judge_accuracy(report: Report, allowed: AccuracyLimits) -> Iterator[Verdict]:
    against, change = report.comparison.accuracy, report.change
    found = {
        "max_drop_pp": ("the accuracy drop", against.drop if against else None),
        "max_top5_drop_pp": ("the top-5 accuracy drop", against.top5_drop if against else None),
        "max_regression_pp": (
            "the accuracy drop from the baseline",
            change.accuracy if change else None,
        ),
    }
    for key, limit in allowed.given.items():
        subject, drop = found[key]
        figure = Figure(
            name=f"accuracy.{key}",
            subject=subject,
            limit=limit,
            allow_skipped=allowed.allow_skipped,
        )
        if report.validation.unread:
            yield figure.unfit(report.validation.unread)
            continue
        if drop is None:
            reason = change.no_accuracy if change and key == "max_regression_pp" else None
            unlabelled = "" if report.validation.kind == "labelled" else "the inputs have no labels"
            yield figure.skipped("was not measured", reason or unlabelled)
            continue
        check_resolvable(figure.name, limit, drop.images, drop.confidence)
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
        return f"the drop of these {drop.images} images is the limit itself; change the limit"
    return (
        f"{drop.images} images are too few, about {units.about(needed)} would decide "
        "at this rate of flips"
    )


def _judge_agreement(report: Report, allowed: AgreementLimits) -> Iterator[Verdict]:
    found, skippable = report.comparison.agreement, allowed.allow_skipped
    if allowed.min_same_top1 is not None:
        figure = Figure(
            name="agreement.min_same_top1",
            subject="the share of inputs with the same top-1",
            limit=allowed.min_same_top1,
            allow_skipped=skippable,
            least=True,
        )
        share = found.same_top1 if found else None
        if report.validation.unread:
            yield figure.unfit(report.validation.unread)
        elif share is None:
            yield figure.skipped("was not measured", "no output of both is (N, classes)")
        else:
            check_agreeable(figure.limit, share.count, share.confidence)
            bounds = (share.at_least, share.at_most)
            advice = f"{share.count} inputs are too few, compare on more"
            yield figure.decide(share.share, bounds, share.confidence, advice=advice)
    if allowed.max_relative_error is not None:
        figure = Figure(
            name="agreement.max_relative_error",
            subject="the largest difference of the two networks",
            limit=allowed.max_relative_error,
            allow_skipped=skippable,
        )
        error = found.largest_error if found else None
        if report.validation.unread:
            yield figure.unfit(report.validation.unread)
        elif error is None:
            why = "the reference answers nothing but zeros" if found else ""
            yield figure.skipped("was not measured", why)
        else:
            yield figure.exact(error)


# Latency


def _judge_latency(report: Report, allowed: LatencyLimits) -> Iterator[Verdict]:
    """Yield a verdict for every limit at every batch size that is judged."""
    measured = {comparison.batch_size: comparison for comparison in report.comparison.latency}
    given = {key: limit for key, limit in allowed.given.items() if key != _PREDICTED}
    for batch_size in allowed.batch_sizes or tuple(measured) or (None,):
        comparison = measured.get(batch_size) if batch_size is not None else None
        why_unfit = unfit(comparison, report.config) if comparison else None
        for key, limit in given.items():
            figure = Figure(
                name=f"latency.{key}",
                subject=_SUBJECTS[key],
                limit=limit,
                batch_size=batch_size,
                allow_skipped=allowed.allow_skipped,
            )
            if comparison is None:
                yield figure.skipped("was not measured", _ADD_SIZE)
            elif why_unfit:
                yield figure.unfit(why_unfit)
            else:
                yield _judge_figure(figure, key, report, comparison)


def _judge_predicted(report: Report, allowed: LatencyLimits) -> Iterator[Verdict]:
    """Yield a verdict for every batch size that is judged, by predictions and by nothing else."""
    if allowed.predicted_max_ratio is None:
        return
    prediction = report.prediction
    predicted = {found.batch_size: found for found in prediction.latency} if prediction else {}
    for batch_size in allowed.batch_sizes or tuple(predicted) or (None,):
        figure = Figure(
            name=f"latency.{_PREDICTED}",
            subject="the latency ratio predicted on the target",
            limit=allowed.predicted_max_ratio,
            batch_size=batch_size,
            allow_skipped=allowed.allow_skipped,
        )
        found = predicted.get(batch_size) if batch_size is not None else None
        if found is None:
            yield figure.skipped("is not in the report", _NO_PREDICTION)
        else:
            assert prediction is not None
            yield figure.exact(found.ratio, f"a prediction for {prediction.device}, not measured")


def _judge_figure(
    figure: Figure, key: str, report: Report, comparison: LatencyComparison
) -> Verdict:
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
    interval = found.ratio if key == "max_regression" else found.median
    if interval is None:
        return figure.skipped("cannot be compared", _elsewhere(change.differences))
    return _decide(figure, interval, report.config, _what_would_tell(found.reference))


def _what_would_tell(reference: float | None) -> str:
    """Return what to do where a change is open; the reference took that much of its time then."""
    if reference is None or reference == 1:
        return MEASURE_LONGER
    return (
        f"the reference itself took x {units.ratio(reference)} of its time in the baseline, so the "
        "machine was in another state; measure under the same load, or keep a baseline of today"
    )


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
    if doubt := too_few(rounds, config):
        return figure.doubtful(summary.p99_ms, bounds, doubt)
    return figure.decide(summary.p99_ms, bounds, TAIL_CONFIDENCE, advice=MEASURE_LONGER)


def _decide(
    figure: Figure,
    interval: RatioInterval,
    config: BenchConfig,
    advice: str = MEASURE_LONGER,
) -> Verdict:
    bounds = (interval.at_least, interval.at_most)
    if doubt := too_few(interval.rounds, config):
        return figure.doubtful(interval.ratio, bounds, doubt)
    return figure.decide(interval.ratio, bounds, interval.confidence, advice=advice)


def too_few(rounds: int, config: BenchConfig) -> str | None:
    """Return why so few rounds decide nothing, as the rest of a sentence; None if they may."""
    needed = max(config.min_blocks, FEWEST_ROUNDS)
    if rounds >= needed:
        return None
    return (
        f"{rounds} rounds of the {needed} needed fitted into "
        f"bench.max_seconds = {config.max_seconds:g}; allow more time"
    )


# What is counted


def _judge_ratio(name: str, measured: float | None, allowed: RatioLimits) -> Iterator[Verdict]:
    if allowed.max_ratio is None:
        return
    label = {"macs": "MACs", "params": "parameters", "size": "file sizes"}[name]
    figure = Figure(
        name=f"{name}.max_ratio",
        subject=f"the ratio of {label}",
        limit=allowed.max_ratio,
        allow_skipped=allowed.allow_skipped,
    )
    if measured is None:
        yield figure.skipped("is not in the report", _no_sidecar(name, allowed))
    else:
        yield figure.exact(measured)


def _no_sidecar(section: str, allowed: RatioLimits | ParityLimits) -> str:
    told = "no sidecar tells it"
    return told if allowed.allow_skipped else f"{told}; {section}.allow_skipped = true may skip it"


def _judge_parity(report: Report, allowed: ParityLimits) -> Iterator[Verdict]:
    limits, note = allowed.max_relative_error or {}, ""
    # Where nothing tells the precision there is no parity either, and any limit is skipped.
    limit = limits.get(report.precision) if report.precision else min(limits.values(), default=None)
    if "fp16" in limits and _computes_in_tf32(report):
        limit = limits["fp16"]
        note = f"that of fp16, since an fp32 engine computes in TF32 on SM {_sm(report)}"
    if limit is None:
        return
    figure = Figure(
        name="parity.max_relative_error",
        subject="the largest difference to torch",
        limit=limit,
        allow_skipped=allowed.allow_skipped,
    )
    networks = report.networks
    if not networks.reference.parity or not networks.pruned.parity:
        missing = not (networks.reference.params and networks.pruned.params)
        advice = _no_sidecar("parity", allowed) if missing else "export both networks again"
        yield figure.skipped("is not in the report", advice)
        return
    errors = [found.relative_error for found in networks.reference.parity + networks.pruned.parity]
    yield figure.exact(max(errors), note)


def _computes_in_tf32(report: Report) -> bool:
    """Tell whether TensorRT rounded the inputs of an fp32 engine to the mantissa of fp16."""
    major = _sm(report).partition(".")[0]
    fp32_engine = report.config.runtime == "tensorrt" and report.precision == "fp32"
    return fp32_engine and major.isdecimal() and int(major) >= _FIRST_TF32


def _sm(report: Report) -> str:
    """Return the CUDA compute capability of the GPU, '' without one."""
    return (report.environment.gpu or {}).get("sm", "")
