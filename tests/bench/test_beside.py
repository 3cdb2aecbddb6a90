"""Several reports side by side: each has a name, and a row of its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.pages.beside import names_of, reports_sheet
from bench.pages.publish import render_markdown
from bench.reports.schema import Report

ReportFactory = Callable[..., Report]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("/runs/a/report.json", "/runs/b/report.json"), ("a", "b")),
        (("/one/r50/report.json", "/two/r50/report.json"), ("one/r50", "two/r50")),
        (("/one/r50/report.json", "/two/r50/report.json", "/c/report.json"),
         ("one/r50", "two/r50", "c")),
        (("/runs/a/report.json", "/runs/baseline.json"), ("a", "baseline.json")),
        (("/a/b/report.json", "/b/report.json"), ("a/b", "//b")),
    ],
)  # fmt: skip
def test_a_report_is_called_as_its_folder_or_file(
    paths: tuple[str, ...], names: tuple[str, ...]
) -> None:
    assert names_of([Path(path) for path in paths]) == names


PATHS = st.lists(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(
        lambda parts: Path("/", *parts, "report.json")
    ),
    min_size=1,
    unique=True,
)


@given(PATHS)
def test_no_two_reports_have_one_name(paths: list[Path]) -> None:
    found = names_of(paths)
    assert len({*found}) == len(paths)
    for name, path in zip(found, paths, strict=True):
        assert str(path.parent).endswith(name.removeprefix("/"))


def test_a_row_has_the_figures_against_its_own_reference(sample_report: ReportFactory) -> None:
    reports = {"one": sample_report(), "two": sample_report(worse=40, ratio=0.5)}
    sheet = reports_sheet(reports)
    assert sheet.header == ("", "top-1", "change", "MACs", "latency, batch 1", "latency, batch 8")
    for (name, report), row in zip(reports.items(), sheet.rows, strict=True):
        latency = [found.ratio for found in report.comparison.latency]
        drop = report.comparison.accuracy.drop
        assert row == (
            name,
            f"{100 * report.networks.pruned.top1:.2f} %",
            f"{-drop.drop_pp:+.2f} pp [{-drop.high_pp:+.2f}, {-drop.low_pp:+.2f}]",
            f"x {report.comparison.macs_ratio:.3f}",
            *(f"x {r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in latency),
        )
    assert f"## {sheet.title}" in render_markdown(reports["one"], [], reports)


def test_what_differs_and_what_does_not_compare_is_said(sample_report: ReportFactory) -> None:
    report = sample_report()
    elsewhere = report.environment.model_copy(update={"cpu": "Example CPU 4000"})
    seen = report.validation.model_copy(update={"identity": "f" * 64})
    other = report.model_copy(
        update={"precision": "int8", "environment": elsewhere, "validation": seen}
    )
    sheet = reports_sheet({"one": report, "two": other})
    assert [row[-1] for row in sheet.rows] == [report.precision, "int8"]
    notes = " ".join(sheet.notes)
    assert "two saw other images than one" in notes
    assert "two was measured on another machine than one" in notes


def test_what_was_not_measured_is_said(sample_report: ReportFactory) -> None:
    report = sample_report()
    bare = report.comparison.model_copy(
        update={"latency": (), "accuracy": None, "macs_ratio": None}
    )
    rows = reports_sheet({"a": report, "b": report.model_copy(update={"comparison": bare})}).rows
    assert rows[1][2:] == ("not measured",) * 4
