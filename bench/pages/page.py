"""The report as one HTML page: verdict, key figures, plots and every table.

The page holds all that it shows. It runs no script, loads nothing and so opens anywhere, for as
long as there are browsers. The same reports give the same bytes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources

from bench import units
from bench.judging.verdicts import EXIT_CODES, Status, Verdict
from bench.measuring.records import AgreementRecord
from bench.pages.figures import plots
from bench.pages.sheets import measured_on, sheets, verdict_sheet
from bench.pages.svg import Plot, default_style, inline_svg, plain
from bench.reports.schema import LatencyComparison, Report
from bench.reports.summary import NOT_MEASURED, headline, known, reference_name
from compress.terminal.sheet import Row, Sheet

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: nothing."""

_LONG = 12  # rows from which a table is folded
_NARROW = 4  # columns of a table that fits a phone when its cells wrap
_WITHIN_FIGURE = re.compile(r"(?<=\d) (?=[a-zA-Z%]{1,3}\b|%)|(?<=x) (?=\d)|(?<=\d,) (?=[-+\d])")
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
    "SKIPPED": "Not measured, so not passed",
}


def render_page(report: Report, verdicts: Sequence[Verdict], others: Sequence[Report] = ()) -> str:
    """Return the report as a whole HTML document.

    Args:
        report: what the page is about.
        verdicts: how it was judged; empty if it was not.
        others: reports whose networks join the plots of accuracy against cost: those on the same
            images, and for latency on the same machine.
    """
    title = headline(report)
    style = (resources.files("bench.pages") / "page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<main>",
            *_header(report, title),
            _banner(verdicts),
            *_tiles(report),
            *_judged(verdicts),
            *_plots(report, others),
            *_tables(report, verdicts),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


# The top


def _header(report: Report, title: str) -> Iterator[str]:
    facts = (
        *((f"target {report.target}",) if report.target else ()),
        *((report.precision,) if report.precision else ()),
        report.runtime,
        f"{report.created:%Y-%m-%d %H:%M} UTC",
    )
    yield f"<header><h1>{_text(title)}</h1>"
    yield f'<ul class="facts">{"".join(f"<li>{_text(fact)}</li>" for fact in facts)}</ul></header>'


def _banner(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return '<p class="card banner"><strong>NOT JUDGED</strong> No limits were named.</p>'
    counted = ["PASS" if verdict.allowed else verdict.status for verdict in verdicts]
    worst = next(status for status in EXIT_CODES if status in counted)
    allowed = sum(verdict.allowed for verdict in verdicts)
    skipped = f"; {allowed} skipped, which the limits allow" if allowed else ""
    found = counted.count(worst) - (allowed if worst == "PASS" else 0)
    return (
        f'<p class="card banner {worst.lower()}"><strong>{_status(worst)}</strong> '
        f"{_SUMMARIES[worst]}: {found} of {len(verdicts)} checks{skipped}.</p>"
    )


def _tiles(report: Report) -> Iterator[str]:
    yield '<dl class="tiles">'
    yield _accuracy_tile(report)
    if report.against != "file" or report.comparison.macs_ratio is not None:
        yield _macs_tile(report)
    for comparison in report.comparison.latency:
        yield _latency_tile(report, comparison)
    yield "</dl>"


def _accuracy_tile(report: Report) -> str:
    accuracy, networks = report.comparison.accuracy, report.networks
    if accuracy is None:
        return _agreement_tile(report.comparison.agreement)
    drop = accuracy.drop
    interval = units.interval("{:+.2f}".format, -drop.high_pp, -drop.low_pp)
    return _tile(
        "top-1",
        f"{-drop.drop_pp:+.2f} pp",
        f"{interval} at {units.level(drop.confidence)}",
        _change(units.share, networks.reference.top1, networks.pruned.top1),
    )


def _agreement_tile(agreement: AgreementRecord | None) -> str:
    if agreement is None:
        return _tile("top-1", NOT_MEASURED)
    share, inputs = agreement.same_top1, f"of {agreement.inputs} inputs"
    if share is None:
        return _tile("relative error", known(units.error, agreement.largest_error), inputs)
    interval = units.interval(units.share, share.low, share.high)
    below = f"{interval} at {units.level(share.confidence)}"
    return _tile("same top-1", units.share(share.share), below, inputs)


def _macs_tile(report: Report) -> str:
    networks, ratio = report.networks, report.comparison.macs_ratio
    if ratio is None:
        return _tile("MACs", NOT_MEASURED)
    change = _change(units.count, networks.reference.macs, networks.pruned.macs)
    return _tile("MACs", f"x {units.ratio(ratio)}", f"of {reference_name(report)}", change)


def _latency_tile(report: Report, comparison: LatencyComparison) -> str:
    size, ratio = comparison.batch_size, comparison.ratio
    medians = (
        next(found.summary.median_ms for found in network.latency if found.batch_size == size)
        for network in (report.networks.reference, report.networks.pruned)
    )
    faster = units.interval("{:.2f}".format, 1 / ratio.high, 1 / ratio.low)
    slower = units.interval(units.ratio, ratio.low, ratio.high)
    return _tile(
        f"speed-up, batch {size}",
        units.speed_up(comparison.speed_up),
        f"{faster} at {units.level(ratio.confidence)}",
        f"latency x {units.ratio(ratio.ratio)} {slower}",
        _change(units.milliseconds, *medians),
    )


def _tile(name: str, value: str, *more: str) -> str:
    below = "".join(f'<dd class="more">{_cell(line)}</dd>' for line in more)
    return f'<div><dt>{_text(name)}</dt><dd class="big">{_cell(value)}</dd>{below}</div>'


def _change(write: Callable[[float], str], before: float | None, after: float | None) -> str:
    return f" {_ARROW} ".join(NOT_MEASURED if v is None else write(v) for v in (before, after))


# Verdicts


def _judged(verdicts: Sequence[Verdict]) -> Iterator[str]:
    if not verdicts:
        return
    sheet = verdict_sheet(verdicts)
    header = "".join(f'<th scope="col">{_text(name)}</th>' for name in sheet.header[:-1])
    yield f'<section><h2>{_text(sheet.title)}</h2><div class="card"><table class="verdicts">'
    yield f"<thead><tr>{header}</tr></thead>"
    for row, verdict in zip(sheet.rows, verdicts, strict=True):
        yield _verdict(row, verdict)
    yield "</table></div></section>"


def _verdict(row: Row, verdict: Verdict) -> str:
    name, limit, measured, _ = map(_cell, row)
    allowed = ", which the limits allow" if verdict.allowed else ""
    name = _AFTER_WORD.sub(r"\g<0><wbr>", name)
    return (
        f'<tbody><tr><th scope="row">{name}</th><td>{limit}</td><td>{measured}</td></tr>'
        f'<tr class="said"><td colspan="3"><strong class="{verdict.status.lower()}">'
        f"{_status(verdict.status)}{allowed}:</strong> {_text(verdict.sentence)}.</td></tr></tbody>"
    )


def _status(status: Status) -> str:
    return f'<span aria-hidden="true">{_MARKS[status]}</span> {status}'


# Plots


def _plots(report: Report, others: Sequence[Report]) -> Iterator[str]:
    with default_style():
        drawn = [_figure(plot) for plot in plots(report, others)]
    if drawn:
        yield '<section><h2>Plots</h2><div class="figures">'
        yield from drawn
        yield "</div></section>"


def _figure(plot: Plot) -> str:
    label = f"{plot.title}. {plot.caption}"
    count = len(plot.figures)
    pictures = [
        inline_svg(
            figure,
            f"{plot.key}-{number}",
            label if count == 1 else f"{plot.title}, part {number} of {count}. {plot.caption}",
        )
        for number, figure in enumerate(plot.figures, start=1)
    ]
    names = _list("ol", plot.numbered) + _list("ul", plot.notes)
    return (
        f'<figure id="{plot.key}"{" class=wide" if count > 1 else ""}>'
        f"<h3>{_text(plot.title)}</h3><div>{''.join(pictures)}</div>"
        f"<figcaption><p>{_text(plot.caption)}</p>{names}</figcaption>"
        "</figure>"
    )


# Tables


def _tables(report: Report, verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "<section><h2>Tables</h2>"
    yield f'<p class="soft">{_text(measured_on(report))}</p>'
    shown = verdict_sheet(verdicts)
    yield from (_sheet(sheet) for sheet in sheets(report, verdicts) if sheet != shown)
    yield "</section>"


def _sheet(sheet: Sheet) -> str:
    title = f"<h3>{_text(sheet.title)}</h3>"
    body = _table(sheet) + _list("ul", sheet.notes)
    if len(sheet.rows) > _LONG:
        rows = f"{len(sheet.rows)} rows"
        summary = f'<summary>{title} <span class="soft">{rows}</span></summary>'
        return f'<details class="card sheet">{summary}{body}</details>'
    return f'<div class="card sheet">{title}{body}</div>'


def _table(sheet: Sheet) -> str:
    """Return a table that scrolls by itself where it is wider than the page."""
    header = "".join(
        f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in sheet.header
    )
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th>'
        f"{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in sheet.rows
    )
    kind = "narrow" if len(sheet.header) <= _NARROW else "wide"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(sheet.title)}">'
        f'<table class="{kind}"><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _list(tag: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<{tag}>{items}</{tag}>" if lines else ""


def _cell(text: str) -> str:
    """Return figures so that none is parted from its unit at the end of a line."""
    return _WITHIN_FIGURE.sub("\N{NO-BREAK SPACE}", _text(text))


def _text(text: str) -> str:
    return html.escape(plain(text))
