"""The tables of a report as data: the terminal, the Markdown and the page print the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import units
from bench.judging.verdicts import Verdict
from bench.measuring.agreement import AgreementRecord
from bench.pages import timing_sheets as timing
from bench.reports.schema import Change, NetworkRecord, Report
from bench.reports.summary import (
    NOT_MEASURED,
    comparison_sheet,
    known,
    pruned_name,
    reference_name,
    told_share,
)
from bench.statistics.paired import PairedDrop
from bench.statistics.stats import RatioInterval
from compress.terminal.sheet import Row, Sheet


def verdict_sheet(verdicts: Sequence[Verdict]) -> Sheet:
    """Return one row per verdict; what did not pass is explained under the table."""
    rows = []
    for verdict in verdicts:
        write = units.budget(verdict.budget)
        where = f", batch {verdict.batch_size}" if verdict.batch_size is not None else ""
        measured = known(write, verdict.measured)
        if verdict.interval is not None:
            measured += f" {units.interval(write, *verdict.interval)}"
        rows.append((verdict.budget + where, write(verdict.limit), measured, verdict.status))
    notes = tuple(f"{v.status}: {v.sentence}." for v in verdicts if v.status != "PASS")
    return Sheet("Verdicts", ("budget", "limit", "measured", "verdict"), tuple(rows), notes)


def sheets(report: Report, verdicts: Sequence[Verdict]) -> Iterator[Sheet]:
    """Yield every table of a report, the most important first."""
    yield comparison_sheet(report)
    if verdicts:
        yield verdict_sheet(verdicts)
    if report.comparison.accuracy is not None:
        yield _accuracy_sheet(report)
    if report.comparison.agreement is not None:
        yield _agreement_sheet(report, report.comparison.agreement)
    if report.comparison.latency:
        names = (reference_name(report), pruned_name(report))
        yield from timing.latency_sheets(report, names)
    yield from map(timing.layer_sheet, report.layers)
    if report.change is not None:
        yield _change_sheet(report, report.change)
    if report.networks.reference.parity or report.networks.pruned.parity:
        yield _parity_sheet(report)
    yield timing.environment_sheet(report.environment)


def measured_on(report: Report) -> str:
    """Return when, where and on what it was measured, and what the marks in the tables mean."""
    validation = report.validation
    skipped = f" ({validation.skipped} unreadable)" if validation.skipped else ""
    kind = {
        "labelled": "validation images" if report.against != "file" else "labelled inputs",
        "images": "images without labels",
        "arrays": "inputs without labels",
        "random": "random inputs",
    }[validation.kind]
    return (
        f"Measured {report.created:%Y-%m-%d %H:%M} UTC in {report.runtime} on {validation.images} "
        f"{kind}{skipped}; set {validation.identity[:12]}. "
        f"Intervals hold {units.level(report.config.confidence)}; those of verdicts are one-sided. "
        f"x is {pruned_name(report)} over {reference_name(report)}; MB is 10^6 bytes; "
        "a multiply-add counts as one MAC."
    )


def both_networks(report: Report) -> tuple[tuple[str, NetworkRecord], tuple[str, NetworkRecord]]:
    """Return what is compared, by name."""
    networks = report.networks
    return (reference_name(report), networks.reference), (pruned_name(report), networks.pruned)


def _drop(drop: PairedDrop) -> str:
    return f"{units.points(drop.drop_pp)} {units.interval(units.points, drop.low_pp, drop.high_pp)}"


def _accuracy_sheet(report: Report) -> Sheet:
    accuracy = report.comparison.accuracy
    assert accuracy is not None
    drop, networks = accuracy.drop, report.networks
    rows = (
        (f"top-5, {reference_name(report)}", known(units.share, networks.reference.top5)),
        (f"top-5, {pruned_name(report)}", known(units.share, networks.pruned.top5)),
        ("top-1 drop", _drop(drop)),
        ("top-5 drop", _drop(accuracy.top5_drop)),
        ("images right to wrong", str(drop.flips_to_wrong)),
        ("images wrong to right", str(drop.flips_to_right)),
        ("exact McNemar p", f"{drop.mcnemar_p:.3g}"),
        ("same predicted class", units.share(accuracy.same_prediction)),
        ("smallest drop these images can rule out", units.points(drop.resolution_pp)),
    )
    return Sheet("Accuracy", ("", "value"), rows)


def _agreement_sheet(report: Report, agreement: AgreementRecord) -> Sheet:
    rows = tuple(
        (
            output.name,
            known(units.error, output.relative_error),
            f"{output.cosine:.6f}",
            told_share(output.same_top1) if output.same_top1 else "",
        )
        for output in agreement.outputs
    )
    title = f"Agreement of {pruned_name(report)} with {reference_name(report)}"
    return Sheet(title, ("output", "relative error", "cosine", "same top-1"), rows)


def _parity_sheet(report: Report) -> Sheet:
    rows = tuple(
        (
            f"{name}, batch {found.batch_size}",
            units.error(found.relative_error),
            f"{found.cosine:.6f}",
            units.share(found.top1_agreement),
        )
        for name, network in both_networks(report)
        for found in network.parity
    )
    return Sheet("Agreement with torch", ("", "relative error", "cosine", "same top-1"), rows)


def _change_sheet(report: Report, change: Change) -> Sheet:
    rows: list[Row] = []
    for found in change.latency:
        size = found.batch_size
        rows.append((f"latency ratio, batch {size}", _factor(found.ratio)))
        if found.median is not None:
            rows.append((f"median of the pruned network, batch {size}", _factor(found.median)))
    drop = change.accuracy
    rows.append(("top-1 drop", NOT_MEASURED if drop is None else _drop(drop)))
    notes = [
        f"Now over then: above x 1 is slower. The stored report is of {change.created:%Y-%m-%d}."
    ]
    if change.differences:
        differ = ", ".join(change.differences)
        notes.append(f"Absolute latencies do not compare, for these differ: {differ}.")
    if change.no_accuracy:
        notes.append(f"No drop: {change.no_accuracy}.")
    return Sheet("Against the stored report", ("", "change"), tuple(rows), tuple(notes))


def _factor(found: RatioInterval) -> str:
    return f"{units.times(found.ratio)} {units.interval(units.ratio, found.low, found.high)}"
