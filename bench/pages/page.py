"""The report as one HTML page: verdict, key figures, plots and every table.

The page holds all that it shows. It runs no script, loads nothing and so opens anywhere, for as
long as there are browsers. The same reports give the same bytes. ``page.html.j2`` is its shape,
where jinja2 escapes whatever a report says, and ``page.css`` its style: light, dark and on paper,
from a phone to a desktop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bench import units
from bench.judging.verdicts import EXIT_CODES, Status, Verdict
from bench.measuring.records import AgreementRecord
from bench.pages.beside import reports_sheet
from bench.pages.figures import plots
from bench.pages.sheets import measured_on, sheets, verdict_sheet
from bench.pages.svg import Plot, default_style, inline_svg
from bench.reports.schema import LatencyComparison, Report
from bench.reports.summary import NOT_MEASURED, headline, known, reference_name
from compress.terminal.text import NO_BREAK, plain, together

if TYPE_CHECKING:
    from jinja2 import Template

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing."""

_LONG = 12  # rows from which a table is folded
_NARROW = 5  # columns of a table that fits a phone when its cells wrap
_AFTER_WORD = re.compile(r"[._]")
_ARROW = "\N{RIGHTWARDS ARROW}"

_MARKS: dict[Status, str] = {
    "PASS": "\N{CHECK MARK}",
    "FAIL": "\N{MULTIPLICATION X}",
    "INCONCLUSIVE": "?",
    "SKIPPED": "\N{EN DASH}",
}
_SUMMARIES: dict[Status, str] = {
    "PASS": "Every limit holds",
    "FAIL": "Beyond the limit",
    "INCONCLUSIVE": "This measurement cannot tell",
    "SKIPPED": "Not judged, so not passed",
}


class Tile(NamedTuple):
    """One key figure."""

    name: str
    value: str
    more: tuple[str, ...] = ()
    """Lines below it, smaller."""


class Banner(NamedTuple):
    """The verdict of all verdicts."""

    status: Status
    text: str


def render_page(
    report: Report, verdicts: Sequence[Verdict], reports: Mapping[str, Report] | None = None
) -> str:
    """Return the report as a whole HTML document.

    Args:
        report: what the page is about.
        verdicts: how it was judged; empty if it was not.
        reports: it and others that it is compared with, by name, itself first; None for it alone.
            Plots show those on the same images, and for latency on the same machine.
    """
    judged = verdict_sheet(verdicts)
    beside = [reports_sheet(reports)] if reports else []
    return _template().render(
        policy=POLICY,
        title=headline(report),
        facts=_facts(report),
        banner=_banner(verdicts) if verdicts else None,
        tiles=tuple(_tiles(report)),
        judged=judged,
        verdicts=tuple(zip(judged.rows, verdicts, strict=True)),
        drawn=_drawn(report, reports),
        measured_on=measured_on(report),
        sheets=[*beside, *(sheet for sheet in sheets(report, verdicts) if sheet != judged)],
    )


def _template() -> Template:
    """Return the shape of the page; jinja2 takes long to import, so not before it is needed."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        return Markup(_AFTER_WORD.sub(r"\g<0><wbr>", str(escape(_legal(text)))))

    shapes = Environment(
        loader=PackageLoader("bench.pages", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_legal,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shapes.filters |= {"cell": _cell, "breakable": breakable}
    shapes.globals |= {"marks": _MARKS, "long": _LONG, "narrow": _NARROW}
    return shapes.get_template("page.html.j2")


def _legal(value: Any) -> Any:
    """Return what is printed with everything spelt out that is not printable; markup is ours."""
    return NO_BREAK.join(map(plain, value.split(NO_BREAK))) if type(value) is str else value


def _cell(text: str) -> str:
    """Return figures so that none is parted from its unit at the end of a line."""
    return together(plain(text))


def _facts(report: Report) -> tuple[str, ...]:
    return (
        *((f"target {report.target}",) if report.target else ()),
        *((report.precision,) if report.precision else ()),
        report.runtime,
        f"{report.created:%Y-%m-%d %H:%M} UTC",
    )


def _banner(verdicts: Sequence[Verdict]) -> Banner:
    counted = ["PASS" if verdict.allowed else verdict.status for verdict in verdicts]
    worst = next(status for status in EXIT_CODES if status in counted)
    allowed = sum(verdict.allowed for verdict in verdicts)
    skipped = f"; {allowed} skipped, which the limits allow" if allowed else ""
    found = counted.count(worst) - (allowed if worst == "PASS" else 0)
    text = f"{_SUMMARIES[worst]}: {found} of {len(verdicts)} checks{skipped}."
    return Banner(worst, text)


def _drawn(report: Report, reports: Mapping[str, Report] | None) -> list[tuple[Plot, list[str]]]:
    """Return every plot with its pictures, each of which says what it shows."""
    with default_style():
        return [(plot, list(_pictures(plot))) for plot in plots(report, reports)]


def _pictures(plot: Plot) -> Iterator[str]:
    count = len(plot.figures)
    for number, figure in enumerate(plot.figures, start=1):
        part = f", part {number} of {count}" if count > 1 else ""
        yield inline_svg(figure, f"{plot.key}-{number}", f"{plot.title}{part}. {plot.caption}")


# The key figures


def _tiles(report: Report) -> Iterator[Tile]:
    yield _accuracy_tile(report)
    if report.against != "file" or report.comparison.macs_ratio is not None:
        yield _macs_tile(report)
    for comparison in report.comparison.latency:
        yield _latency_tile(report, comparison)


def _accuracy_tile(report: Report) -> Tile:
    accuracy, networks = report.comparison.accuracy, report.networks
    if accuracy is None:
        return _agreement_tile(report.comparison.agreement)
    drop = accuracy.drop
    interval = units.interval("{:+.2f}".format, -drop.high_pp, -drop.low_pp)
    change = _change(units.share, networks.reference.top1, networks.pruned.top1)
    below = (f"{interval} at {units.level(drop.confidence)}", change)
    return Tile("top-1", f"{-drop.drop_pp:+.2f} pp", below)


def _agreement_tile(agreement: AgreementRecord | None) -> Tile:
    if agreement is None:
        return Tile("top-1", NOT_MEASURED)
    share, inputs = agreement.same_top1, f"of {agreement.inputs} inputs"
    if share is None:
        error = known(units.error, agreement.largest_error)
        return Tile("relative error", error, (inputs,))
    interval = units.interval(units.share, share.low, share.high)
    below = f"{interval} at {units.level(share.confidence)}"
    return Tile("same top-1", units.share(share.share), (below, inputs))


def _macs_tile(report: Report) -> Tile:
    networks, ratio = report.networks, report.comparison.macs_ratio
    if ratio is None:
        return Tile("MACs", NOT_MEASURED)
    change = _change(units.count, networks.reference.macs, networks.pruned.macs)
    return Tile("MACs", units.times(ratio), (f"of {reference_name(report)}", change))


def _latency_tile(report: Report, comparison: LatencyComparison) -> Tile:
    size, ratio = comparison.batch_size, comparison.ratio
    medians = (
        next(found.summary.median_ms for found in network.latency if found.batch_size == size)
        for network in (report.networks.reference, report.networks.pruned)
    )
    faster = units.interval("{:.2f}".format, 1 / ratio.high, 1 / ratio.low)
    slower = units.interval(units.ratio, ratio.low, ratio.high)
    below = (
        f"{faster} at {units.level(ratio.confidence)}",
        f"latency {units.times(ratio.ratio)} {slower}",
        _change(units.milliseconds, *medians),
    )
    return Tile(f"speed-up, batch {size}", units.speed_up(comparison.speed_up), below)


def _change(write: Callable[[float], str], before: float | None, after: float | None) -> str:
    return f" {_ARROW} ".join(NOT_MEASURED if v is None else write(v) for v in (before, after))
