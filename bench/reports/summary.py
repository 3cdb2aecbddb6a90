"""The figures of a report that come first, as a table: printed, on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import units
from bench.reports.schema import NetworkRecord, Report
from bench.statistics.paired import PairedDrop
from bench.statistics.shares import Share
from compress.terminal.sheet import Row, Sheet, text_lines

NOT_MEASURED = "not measured"

_Both = tuple[float | None, float | None]
"""A figure of the reference and of the pruned network."""


def headline(report: Report) -> str:
    """Return what the report is about, in a line."""
    name, other = reference_name(report), pruned_name(report)
    precision = f", {report.precision}" if report.precision not in (None, "fp32") else ""
    if report.against == "file":
        networks = report.networks
        return (
            f"{networks.pruned.file or other} against {networks.reference.file or name}{precision}"
        )
    return f"{report.architecture} for {report.target}{precision}: {other} against {name}"


def reference_name(report: Report) -> str:
    """Return what the reference is called: the dense network, another run, or just that."""
    return {"dense": "dense", "run": "other run", "file": "reference"}[report.against]


def pruned_name(report: Report) -> str:
    """Return what the network that is compared with it is called."""
    return "candidate" if report.against == "file" else "pruned"


def comparison_sheet(report: Report) -> Sheet:
    """Return the main table: reference, pruned and the change, one figure a row."""
    rows = (
        *_answer_rows(report),
        *_cost_rows(report),
        *_latency_rows(report),
    )
    names = (reference_name(report), pruned_name(report))
    return Sheet("Comparison", ("", *names, "change"), rows, report.notes)


def summary_text(report: Report) -> str:
    """Return the main table and its notes as plain lines."""
    sheet = comparison_sheet(report)
    return "\n".join((headline(report), *text_lines(sheet), *sheet.notes))


def told_share(found: Share) -> str:
    """Return a share with its interval."""
    return f"{units.share(found.share)} {units.interval(units.share, found.low, found.high)}"


def known(write: Callable[[float], str], value: float | None) -> str:
    """Return a figure, or that it was not measured."""
    return NOT_MEASURED if value is None else write(value)


def _answer_rows(report: Report) -> Iterator[Row]:
    """Yield accuracy where there are labels, else how far the two networks agree."""
    networks, agreement = report.networks, report.comparison.agreement
    accuracy = report.comparison.accuracy
    if accuracy is not None or agreement is None:
        tops = (known(units.share, each.top1) for each in (networks.reference, networks.pruned))
        yield ("top-1", *tops, _gain(accuracy.drop) if accuracy else NOT_MEASURED)
        return
    if agreement.same_top1 is not None:
        yield ("same top-1", "", "", told_share(agreement.same_top1))
    yield ("relative error", "", "", known(units.error, agreement.largest_error))


def _gain(drop: PairedDrop) -> str:
    return f"{-drop.drop_pp:+.2f} pp [{-drop.high_pp:+.2f}, {-drop.low_pp:+.2f}]"


def _cost_rows(report: Report) -> Iterator[Row]:
    """Yield what is counted; of any two files, what is known of one at least."""
    networks, comparison = report.networks, report.comparison
    one, other = networks.reference, networks.pruned
    costs: tuple[tuple[str, Callable[[float], str], _Both, float | None], ...] = (
        ("MACs", units.count, (one.macs, other.macs), comparison.macs_ratio),
        ("parameters", units.count, (one.params, other.params), comparison.params_ratio),
        ("file size", units.size, (one.bytes, other.bytes), comparison.bytes_ratio),
    )
    for name, write, values, ratio in costs:
        if report.against != "file" or any(value is not None for value in values):
            yield _cost_row(name, write, values, ratio)


def _cost_row(
    name: str,
    write: Callable[[float], str],
    values: _Both,
    ratio: float | None,
) -> Row:
    reference, pruned = values
    return name, known(write, reference), known(write, pruned), known(units.times, ratio)


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
