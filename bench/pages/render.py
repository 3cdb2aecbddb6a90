"""The report for people: its sheets as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from bench.judging.verdicts import Status, Verdict
from bench.measuring.layers import explain
from bench.pages.sheets import measured_on, sheets, verdict_sheet
from bench.reports.schema import Report
from bench.reports.summary import comparison_sheet, headline
from compress.terminal.sheet import Sheet, fill, markdown_lines

if TYPE_CHECKING:
    from rich.table import Table

_STYLES: dict[Status, str] = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "SKIPPED": "yellow",
}


def render_table(report: Report, verdicts: Sequence[Verdict]) -> Table:
    """Return the main table and the verdicts for the terminal."""
    from rich.table import Table
    from rich.text import Text

    sheet, judged = comparison_sheet(report), verdict_sheet(verdicts)
    layers = (f"Batch {times.batch_size}: {explain(times)}" for times in report.layers)
    notes = "\n".join((*sheet.notes, *judged.notes, *layers))
    table = Table(
        title=headline(report),
        caption=Text(notes) if notes else None,
        caption_justify="left",
    )
    fill(table, sheet)
    if judged.rows:
        table.add_section()
        table.add_row(*(Text(name, style="bold") for name in judged.header))
        for *cells, status in judged.rows:
            style = next(style for name, style in _STYLES.items() if name == status)
            table.add_row(*map(Text, cells), Text(status, style=style))
    return table


def render_markdown(report: Report, verdicts: Sequence[Verdict]) -> str:
    """Return the whole report as a page: figures, verdicts, details, environment."""
    parts = [f"# {headline(report)}", "", measured_on(report), ""]
    for sheet in sheets(report, verdicts):
        parts += [*_markdown(sheet), ""]
    return "\n".join(parts)


def _markdown(sheet: Sheet) -> Iterator[str]:
    yield from markdown_lines(sheet)
    if sheet.notes:
        yield ""
        yield from (f"- {note}" for note in sheet.notes)
