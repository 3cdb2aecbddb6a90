"""Baselines: a report that was kept on purpose, for later ones to be judged against."""

from __future__ import annotations

from pathlib import Path

from bench.judging.change import change_against
from bench.judging.latency_verdicts import unfit
from bench.reports.report import load_report, save_report
from bench.reports.schema import Report
from compress.errors import EnvironmentUnfitError, OutputError


def load_compared(path: Path, baseline: Path | None) -> Report:
    """Read a report, and compare it with a baseline if one is named.

    Raises:
        CheckpointError: a file cannot be read, or the baseline is of another model.
    """
    report = load_report(path)
    if baseline is None:
        return report
    return report.model_copy(update={"change": change_against(report, load_report(baseline))})


def keep_baseline(report: Path, baseline: Path, *, overwrite: bool = False) -> Report:
    """Keep a report as the baseline, and return it with its change against the one it replaces.

    Raises:
        CheckpointError: a file cannot be read, or the baseline that is there is of another model.
        EnvironmentUnfitError: the machine of the report was not fit to measure latency.
        OutputError: there is a baseline and it is not to be replaced, or it cannot be written.
    """
    found = load_report(report)
    for comparison in found.comparison.latency:
        reason = unfit(comparison, found.config)
        if reason:
            raise EnvironmentUnfitError(
                f"{report} is no baseline, at batch size {comparison.batch_size} {reason}"
            )
    # What it was once compared with and judged by does not belong to a baseline.
    kept = found.model_copy(update={"change": None, "budgets": None})
    replaced = load_report(baseline) if baseline.exists() else None
    if replaced is not None and not overwrite:
        raise OutputError(
            f"{baseline} holds a baseline of {replaced.created:%Y-%m-%d}; "
            "replace it with --overwrite"
        )
    change = change_against(kept, replaced) if replaced is not None else None
    save_report(kept, baseline)
    return kept.model_copy(update={"change": change})
