"""The tables of a report as data: the terminal, the Markdown and the page print the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench import units
from bench.judging.verdicts import Verdict
from bench.pages import timing_sheets as timing
from bench.reports.schema import Change, NetworkRecord, Report
from bench.statistics.paired import PairedDrop
from bench.statistics.stats import RatioInterval
from compress.sheet import Row, Sheet

NOT_MEASURED = "not measured"


def comparison_sheet(report: Report) -> Sheet:
    """Return the main table: reference, pruned and the change, one figure a row."""
    networks, comparison = report.networks, report.comparison
    reference, pruned = networks.reference, networks.pruned
    rows = (
        (
            "top-1",
            _known(units.share, reference.top1),
            _known(units.share, pruned.top1),
            _gain(report),
        ),
        _cost_row("MACs", units.count, (reference.macs, pruned.macs), comparison.macs_ratio),
        _cost_row(
            "parameters", units.count, (reference.params, pruned.params), comparison.params_ratio
        ),
        _cost_row("file size", units.size, (reference.bytes, pruned.bytes), comparison.bytes_ratio),
        *_latency_rows(report),
    )
    return Sheet("Comparison", ("", reference_name(report), "pruned", "change"), rows)


def verdict_sheet(verdicts: Sequence[Verdict]) -> Sheet:
    """Return one row per verdict; what did not pass is explained under the table."""
    rows = []
    for verdict in verdicts:
        write = units.budget(verdict.budget)
        where = f", batch {verdict.batch_size}" if verdict.batch_size is not None else ""
        measured = _known(write, verdict.measured)
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
    if report.comparison.latency:
        yield from timing.latency_sheets(report, reference_name(report))
    yield from map(timing.layer_sheet, report.layers)
    if report.change is not None:
        yield _change_sheet(report, report.change)
    if report.networks.reference.parity or report.networks.pruned.parity:
        yield _parity_sheet(report)
    yield timing.environment_sheet(report.environment)


def headline(report: Report) -> str:
    """Return what the report is about, in a line."""
    precision = "" if report.precision == "fp32" else f", {report.precision}"
    name = reference_name(report)
    return f"{report.architecture} for {report.target}{precision}: pruned against {name}"


def reference_name(report: Report) -> str:
    """Return what the reference is called: the dense network, or another run."""
    return {"dense": "dense", "run": "other run"}[report.against]


def measured_on(report: Report) -> str:
    """Return when, where and on what it was measured, and what the marks in the tables mean."""
    validation = report.validation
    skipped = f" ({validation.skipped} unreadable)" if validation.skipped else ""
    return (
        f"Measured {report.created:%Y-%m-%d %H:%M} UTC in {report.runtime} on {validation.images} "
        f"validation images{skipped}; set {validation.identity[:12]}. "
        f"Intervals hold {units.level(report.config.confidence)}; those of verdicts are one-sided. "
        f"x is pruned over {reference_name(report)}; MB is 10^6 bytes; "
        "a multiply-add counts as one MAC."
    )


def both_networks(report: Report) -> tuple[tuple[str, NetworkRecord], tuple[str, NetworkRecord]]:
    """Return what is compared, by name."""
    networks = report.networks
    return (reference_name(report), networks.reference), ("pruned", networks.pruned)


def _drop(drop: PairedDrop) -> str:
    return f"{units.points(drop.drop_pp)} {units.interval(units.points, drop.low_pp, drop.high_pp)}"


def _gain(report: Report) -> str:
    accuracy = report.comparison.accuracy
    if accuracy is None:
        return NOT_MEASURED
    drop = accuracy.drop
    return f"{-drop.drop_pp:+.2f} pp [{-drop.high_pp:+.2f}, {-drop.low_pp:+.2f}]"


def _cost_row(
    name: str,
    write: Callable[[float], str],
    values: tuple[float | None, float | None],
    ratio: float | None,
) -> Row:
    reference, pruned = values
    return name, _known(write, reference), _known(write, pruned), _known(units.times, ratio)


def _latency_rows(report: Report) -> Iterator[Row]:
    reference, pruned = _medians(report.networks.reference), _medians(report.networks.pruned)
    for comparison in report.comparison.latency:
        size, ratio = comparison.batch_size, comparison.ratio
        yield (
            f"latency, batch {size}",
            units.milliseconds(reference[size]),
            units.milliseconds(pruned[size]),
            f"{units.times(ratio.ratio)} {units.interval(units.ratio, ratio.low, ratio.high)}",
        )
        faster = units.interval(units.speed_up, 1 / ratio.high, 1 / ratio.low)
        yield (f"speed-up, batch {size}", "", "", f"{units.speed_up(comparison.speed_up)} {faster}")


def _medians(network: NetworkRecord) -> dict[int, float]:
    return {record.batch_size: record.summary.median_ms for record in network.latency}


def _accuracy_sheet(report: Report) -> Sheet:
    accuracy = report.comparison.accuracy
    assert accuracy is not None
    drop, networks = accuracy.drop, report.networks
    rows = (
        (f"top-5, {reference_name(report)}", _known(units.share, networks.reference.top5)),
        ("top-5, pruned", _known(units.share, networks.pruned.top5)),
        ("top-1 drop", _drop(drop)),
        ("top-5 drop", _drop(accuracy.top5_drop)),
        ("images right to wrong", str(drop.flips_to_wrong)),
        ("images wrong to right", str(drop.flips_to_right)),
        ("exact McNemar p", f"{drop.mcnemar_p:.3g}"),
        ("same predicted class", units.share(accuracy.same_prediction)),
        ("smallest drop these images can rule out", units.points(drop.resolution_pp)),
    )
    return Sheet("Accuracy", ("", "value"), rows)


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


def _known(write: Callable[[float], str], value: float | None) -> str:
    return NOT_MEASURED if value is None else write(value)
