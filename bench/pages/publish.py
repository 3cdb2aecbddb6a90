"""A report on the terminal and as files: JSON, Markdown and a page, and JUnit XML of its verdicts.

CI systems show JUnit beside their tests, one case for each verdict. There is no standard; the
document keeps to what the schema of Jenkins' xUnit plugin (junit-10.xsd) allows, and tells neither
host nor path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timezone
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from bench.judging.verdicts import Status, Verdict
from bench.pages.beside import reports_sheet
from bench.pages.sheets import change_sheet, measured_on, sheets, verdict_sheet
from bench.reports.report import REPORT, save_report
from bench.reports.schema import Report
from bench.reports.summary import comparison_sheet, explain_layers, headline
from compress.errors import writing
from compress.files.atomic import write_atomically
from compress.terminal.sheet import Sheet, fill, markdown_lines
from compress.terminal.text import markdown, plain

if TYPE_CHECKING:
    from compress.terminal.table import TextTable

_STYLES: dict[Status, str] = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "SKIPPED": "yellow",
}


def publish(report: Report, verdicts: Sequence[Verdict], folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, and ``report.xml`` of verdicts.

    Args:
        report: the report.
        verdicts: how it was judged, if it was.
        folder: where to; made if it is not there.

    Raises:
        OutputError: a file cannot be written; each is there whole or as it was before.
    """
    save_report(report, folder / REPORT)
    write_views(report, verdicts, folder)


def write_views(
    report: Report,
    verdicts: Sequence[Verdict],
    folder: Path,
    *,
    reports: Mapping[str, Report] | None = None,
) -> None:
    """Write all of ``publish`` but the report itself; verdicts of an earlier one are removed.

    Args:
        report: the report.
        verdicts: how it was judged, if it was.
        folder: where to; made if it is not there.
        reports: it and others that are compared with it, by name, itself first; None for it alone.

    Raises:
        OutputError: as that of ``publish``.
    """
    from bench.pages.page import render_page

    write_atomically(folder / "report.md", render_markdown(report, verdicts, reports))
    write_atomically(folder / "report.html", render_page(report, verdicts, reports))
    junit = folder / "report.xml"
    if verdicts:
        write_atomically(junit, render_junit(report, verdicts))
    else:
        with writing(junit):
            junit.unlink(missing_ok=True)


def render_table(report: Report, verdicts: Sequence[Verdict]) -> TextTable:
    """Return the main table, the change since a stored report and the verdicts for the terminal."""
    from rich.text import Text

    from compress.terminal.table import TextTable, Words

    sheet, judged = comparison_sheet(report), verdict_sheet(verdicts)
    changed = change_sheet(report.change) if report.change is not None else None
    layers = (
        f"Batch {times.batch_size}: {explain_layers(report, times)}" for times in report.layers
    )
    since = changed.notes if changed else ()
    notes = "\n".join(map(plain, (*sheet.notes, *since, *judged.notes, *layers)))
    table = TextTable(
        title=Text(plain(headline(report))),
        caption=Text(notes) if notes else None,
        caption_justify="left",
    )
    fill(table, sheet)
    if changed:
        table.add_section()
        table.add(changed.title.lower(), "", "", "", style="bold")
        for name, change in changed.rows:
            table.add(name, "", "", change)
    if judged.rows:
        table.add_section()
        table.add(*judged.header, style="bold")
        for *cells, status in judged.rows:
            style = next(style for name, style in _STYLES.items() if name == status)
            table.add_row(*map(Words, cells), Words(status, style))
    return table


def render_reports(reports: Mapping[str, Report]) -> TextTable:
    """Return the table that sets several reports side by side, for the terminal."""
    from rich.text import Text

    from compress.terminal.table import TextTable

    sheet = reports_sheet(reports)
    notes = Text("\n".join(map(plain, sheet.notes)))
    table = TextTable(title=sheet.title, caption=notes, caption_justify="left")
    fill(table, sheet)
    return table


def render_markdown(
    report: Report, verdicts: Sequence[Verdict], reports: Mapping[str, Report] | None = None
) -> str:
    """Return the whole report as a page: figures, verdicts, details, environment."""
    parts = [f"# {markdown(headline(report))}", "", markdown(measured_on(report)), ""]
    beside = [reports_sheet(reports)] if reports else []
    for sheet in (*beside, *sheets(report, verdicts)):
        parts += [*_markdown(sheet), ""]
    return "\n".join(parts)


def render_junit(report: Report, verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as an XML document; what did not pass carries its sentence.

    FAIL is a failure. INCONCLUSIVE, and SKIPPED where the limits do not allow it, are errors: the
    check could not be made. SKIPPED where they do is a skipped case.
    """
    cases = [_case(verdict) for verdict in verdicts]
    counts = {"tests": len(cases)}
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[name] = sum(case.find(tag) is not None for case in cases)
    attributes = {name: str(count) for name, count in counts.items()}
    suite = _element(
        "testsuite",
        name="compress quality gate",
        **attributes,
        time="0",
        timestamp=f"{report.created.astimezone(timezone.utc):%Y-%m-%dT%H:%M:%S}",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        properties.append(_element("property", name=name, value=value))
    suite.extend(cases)
    root = _element("testsuites", name="compress", tests=attributes["tests"])
    root.append(suite)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _markdown(sheet: Sheet) -> Iterator[str]:
    yield from markdown_lines(sheet)
    if sheet.notes:
        yield ""
        yield from (f"- {markdown(note)}" for note in sheet.notes)


def _properties(report: Report) -> dict[str, str]:
    return {
        "architecture": report.architecture or "unknown",
        "target": report.target or "unknown",
        "runtime": report.runtime,
        "precision": report.precision or "unknown",
        "against": report.against,
        "created": report.created.astimezone(timezone.utc).isoformat(),
    }


def _case(verdict: Verdict) -> ET.Element:
    section, _, key = verdict.name.partition(".")
    where = f", batch size {verdict.batch_size}" if verdict.batch_size is not None else ""
    case = _element("testcase", classname=f"quality_gate.{section}", name=key + where, time="0")
    case.append(_outcome(verdict))
    return case


def _outcome(verdict: Verdict) -> ET.Element:
    if verdict.status == "PASS":
        found = ET.Element("system-out")
    elif verdict.allowed:
        found = _element("skipped", message=verdict.sentence)
    else:
        tag = "failure" if verdict.status == "FAIL" else "error"
        found = _element(tag, message=verdict.sentence, type=verdict.status)
    found.text = plain(verdict.sentence)
    return found


def _element(tag: str, **attributes: str) -> ET.Element:
    return ET.Element(tag, {name: plain(value) for name, value in attributes.items()})
