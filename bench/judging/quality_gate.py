"""Verdicts: a report against budgets, decided by intervals and never by a lucky point.

A figure with an interval passes only when its one-sided bound at the report's confidence lies
within the budget, and fails only when the opposite bound lies beyond it; in between the measurement
cannot tell. So a network exactly on a budget is passed, or failed, with probability at most
1 - confidence each. What could not be measured here is SKIPPED, and counts as passed only where the
budgets say so; never when the machine was not fit for measuring.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import units
from bench.budgets import (
    AccuracyBudget,
    AgreementBudget,
    Limits,
    ParityBudget,
    RatioBudget,
    budgets_of,
    check_agreeable,
    check_resolvable,
    require_any,
    require_baseline,
)
from bench.judging.latency_verdicts import judge_latency
from bench.judging.verdicts import Figure, Verdict
from bench.reports.schema import Report
from bench.statistics.paired import PairedDrop, images_needed

_FIRST_TF32 = 8  # major CUDA compute capability from which TensorRT computes FP32 in TF32


def judge(report: Report, limits: Limits) -> list[Verdict]:
    """Return one verdict per budget, and per batch size where latency is judged.

    Args:
        report: what was measured.
        limits: budgets; or sections by name, as ``{"latency": {"max_ratio": 0.9}}``; or the name or
            path of a budget file.

    Raises:
        ConfigError: there is no budget to judge, one needs a baseline and the report was compared
            with none, or one is smaller than what the images of the report can show.
    """
    budgets = budgets_of(limits)
    require_any(budgets)
    require_baseline(budgets, present=report.change is not None)
    ratios = report.comparison
    return [
        *_judge_accuracy(report, budgets.accuracy),
        *_judge_agreement(report, budgets.agreement),
        *judge_latency(report, budgets.latency),
        *_judge_ratio("macs", ratios.macs_ratio, budgets.macs),
        *_judge_ratio("params", ratios.params_ratio, budgets.params),
        *_judge_ratio("size", ratios.bytes_ratio, budgets.size),
        *_judge_parity(report, budgets.parity),
    ]


def _judge_accuracy(report: Report, budget: AccuracyBudget) -> Iterator[Verdict]:
    against, change = report.comparison.accuracy, report.change
    found = {
        "max_drop_pp": ("the accuracy drop", against.drop if against else None),
        "max_top5_drop_pp": ("the top-5 accuracy drop", against.top5_drop if against else None),
        "max_regression_pp": (
            "the accuracy drop from the baseline",
            change.accuracy if change else None,
        ),
    }
    for key, limit in budget.limits.items():
        subject, drop = found[key]
        figure = Figure(
            budget=f"accuracy.{key}",
            subject=subject,
            limit=limit,
            allow_skipped=budget.allow_skipped,
        )
        if drop is None:
            reason = change.no_accuracy if change and key == "max_regression_pp" else None
            unlabelled = "" if report.validation.kind == "labelled" else "the inputs have no labels"
            yield figure.skipped("was not measured", reason or unlabelled)
            continue
        check_resolvable(figure.budget, limit, drop.images, drop.confidence)
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


def _judge_agreement(report: Report, budget: AgreementBudget) -> Iterator[Verdict]:
    found, allowed = report.comparison.agreement, budget.allow_skipped
    if budget.min_same_top1 is not None:
        figure = Figure(
            budget="agreement.min_same_top1",
            subject="the share of inputs with the same top-1",
            limit=budget.min_same_top1,
            allow_skipped=allowed,
            least=True,
        )
        share = found.same_top1 if found else None
        if share is None:
            yield figure.skipped("was not measured", "no output of both is (N, classes)")
        else:
            check_agreeable(figure.limit, share.count, share.confidence)
            bounds = (share.at_least, share.at_most)
            advice = f"{share.count} inputs are too few, compare on more"
            yield figure.decide(share.share, bounds, share.confidence, advice=advice)
    if budget.max_relative_error is not None:
        figure = Figure(
            budget="agreement.max_relative_error",
            subject="the largest difference of the two networks",
            limit=budget.max_relative_error,
            allow_skipped=allowed,
        )
        error = found.largest_error if found else None
        if error is None:
            why = "the reference answers nothing but zeros" if found else ""
            yield figure.skipped("was not measured", why)
        else:
            yield figure.exact(error)


def _judge_ratio(name: str, measured: float | None, budget: RatioBudget) -> Iterator[Verdict]:
    if budget.max_ratio is None:
        return
    label = {"macs": "MACs", "params": "parameters", "size": "file sizes"}[name]
    figure = Figure(
        budget=f"{name}.max_ratio",
        subject=f"the ratio of {label}",
        limit=budget.max_ratio,
        allow_skipped=budget.allow_skipped,
    )
    yield figure.skipped("is not in the report") if measured is None else figure.exact(measured)


def _judge_parity(report: Report, budget: ParityBudget) -> Iterator[Verdict]:
    limits, note = budget.max_relative_error or {}, ""
    # Where nothing tells the precision there is no parity either, and any limit is skipped.
    limit = limits.get(report.precision) if report.precision else min(limits.values(), default=None)
    if "fp16" in limits and _computes_in_tf32(report):
        limit = limits["fp16"]
        note = f"that of fp16, since an fp32 engine computes in TF32 on SM {_sm(report)}"
    if limit is None:
        return
    figure = Figure(
        budget="parity.max_relative_error",
        subject="the largest difference to torch",
        limit=limit,
        allow_skipped=budget.allow_skipped,
    )
    networks = report.networks
    if not networks.reference.parity or not networks.pruned.parity:
        missing = not (networks.reference.params and networks.pruned.params)
        advice = "no sidecar tells it" if missing else "export both networks again"
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
