"""The files of a report: JSON for machines, Markdown and a page for people, JUnit for CI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.judging.junit import render_junit
from bench.judging.verdicts import Verdict
from bench.pages.page import render_page
from bench.pages.render import render_markdown
from bench.reports.report import save_report
from bench.reports.schema import Report
from compress.errors import writing
from compress.files.atomic import write_atomically

REPORT = "report.json"
"""The one file that the others are made of."""


def publish(
    report: Report, verdicts: Sequence[Verdict], folder: Path, *, others: Sequence[Report] = ()
) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html``, and ``report.xml`` of verdicts.

    Args:
        report: the report.
        verdicts: how it was judged, if it was.
        folder: where to; made if it is not there.
        others: reports whose networks the page shows beside these.

    Raises:
        OutputError: a file cannot be written; each is there whole or as it was before.
    """
    save_report(report, folder / REPORT)
    write_views(report, verdicts, folder, others=others)


def write_views(
    report: Report, verdicts: Sequence[Verdict], folder: Path, *, others: Sequence[Report] = ()
) -> None:
    """Write all of ``publish`` but the report itself; verdicts of an earlier one are removed."""
    write_atomically(folder / "report.md", render_markdown(report, verdicts))
    write_atomically(folder / "report.html", render_page(report, verdicts, others))
    junit = folder / "report.xml"
    if verdicts:
        write_atomically(junit, render_junit(report, verdicts))
    else:
        with writing(junit):
            junit.unlink(missing_ok=True)
