from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.judging.quality_gate import judge
from bench.judging.verdicts import Status, Verdict
from bench.limits import load_limits
from bench.measuring.records import GroupRecord, LayerFigures, LayerRecord, LayerTimes
from bench.pages.page import POLICY, render_page
from bench.pages.sheets import sheets, verdict_sheet
from bench.reports.report import save_report
from bench.reports.schema import Report
from bench.reports.summary import headline

ReportFactory = Callable[..., Report]
VOID = {"meta", "br", "wbr"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """A page taken apart; an element that is not closed where it should be is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1], data.replace("\N{NO-BREAK SPACE}", " ")))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def text(self, tag: str = "") -> str:
        return "\n".join(words for within, words in self.words if tag in ("", within))


def with_details(report: Report, *, groups: int = 3, layers: int = 2) -> Report:
    """Return a report with groups, and with layers at every batch size."""
    names = [f"layer{i % 4 + 1}.{i // 12}.conv{i % 3 + 1}" for i in range(max(groups, layers))]
    figures = [
        LayerFigures(macs=10**8 // (i + 1), milliseconds=1 / (i + 1), channels=64)
        for i in range(layers)
    ]
    rows = tuple(
        LayerRecord(name=n, kind="Conv", reference=f, pruned=f, misses_multiple=len(n) % 2 == 0)
        for n, f in zip(names, figures, strict=False)
    )
    total = sum(found.milliseconds for found in figures) or 1
    return report.model_copy(
        update={
            "groups": tuple(
                GroupRecord(name=name, dense=512, kept=1 + 7 * i, residual=i % 4 == 0)
                for i, name in enumerate(names[:groups])
            ),
            "layers": tuple(
                LayerTimes(
                    batch_size=found.batch_size,
                    calls=20,
                    multiple=8,
                    reference_ms=total,
                    pruned_ms=total,
                    layers=rows,
                )
                for found in report.comparison.latency
            ),
        }
    )


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    """Return a report of a network as large as a ResNet-50."""
    return with_details(sample_report(rounds=60), groups=53, layers=54)


@pytest.fixture(scope="module")
def verdicts(report: Report) -> list[Verdict]:
    return judge(report, load_limits("default"))


@pytest.fixture(scope="module")
def html(report: Report, verdicts: list[Verdict], sample_report: ReportFactory) -> str:
    reports = {"own": report, "runs/other": sample_report(worse=40, ratio=0.5)}
    return render_page(report, verdicts, reports)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def bare(sample_report: ReportFactory) -> Report:
    """Return a report without anything to draw, of which a page is made at once."""
    found = sample_report(batch_sizes=())
    networks = found.networks
    return found.model_copy(
        update={
            "networks": networks.model_copy(
                update={
                    name: getattr(networks, name).model_copy(
                        update={"top1": None, "top5": None, "outcomes": None, "macs": None}
                    )
                    for name in ("reference", "pruned")
                }
            ),
            "comparison": found.comparison.model_copy(
                update={"accuracy": None, "macs_ratio": None}
            ),
        }
    )


def verdict(status: Status, **changes: Any) -> Verdict:
    facts = {
        "name": "macs.max_ratio",
        "batch_size": None,
        "limit": 0.6,
        "measured": None if status == "SKIPPED" else 0.5,
        "interval": None,
        "status": status,
        "sentence": f"a sentence of {status}",
        **changes,
    }
    return Verdict(**facts)  # type: ignore[arg-type]


# A document


def test_every_element_is_closed_and_every_id_is_there_once(page: Page) -> None:
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) > 10
    assert len(ids) == len({*ids})


def test_what_refers_within_the_page_finds_its_goal(page: Page, html: str) -> None:
    ids = {found["id"] for _, found in page.elements if "id" in found}
    goals = {found["href"] for _, found in page.elements if "href" in found}
    assert goals
    assert goals | {*re.findall(r"url\((#[^)]*)\)", html)} <= {f"#{name}" for name in ids}


def test_the_page_has_a_language_a_title_a_viewport_and_one_first_heading(
    page: Page, report: Report
) -> None:
    assert page.all("html") == [{"lang": "en"}]
    assert page.text("title") == page.text("h1") == headline(report)
    assert len(page.all("h1")) == 1
    metas = {
        found.get("name"): found["content"] for found in page.all("meta") if "content" in found
    }
    assert metas["viewport"] == "width=device-width, initial-scale=1"


def test_no_heading_leaves_out_a_level(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_header_cells_say_what_they_head(page: Page) -> None:
    assert page.all("th")
    assert {found.get("scope") for found in page.all("th")} == {"col", "row"}


def test_every_picture_says_what_it_shows(page: Page) -> None:
    pictures = page.all("svg")
    assert len(pictures) == 8
    assert all(found["role"] == "img" for found in pictures)
    labels = [found["aria-label"] or "" for found in pictures]
    assert len({*labels}) == 8
    assert all(len(label) > 80 for label in labels)


def test_the_page_loads_and_runs_nothing(page: Page, html: str) -> None:
    assert not page.all("script", "link", "img", "iframe", "object", "embed", "base", "form")
    for _, found in page.elements:
        assert not {"src", "srcset", "action", "background", "xlink:href"} & {*found}
        assert not [name for name in found if name.startswith("on")]
        assert (found.get("href") or "#").startswith("#")
    assert not re.search(r"https?:|@import|@font-face|javascript:|url\((?!#)", html)
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in page.all("meta")
    assert "default-src 'none'" in POLICY


@pytest.mark.slow
def test_the_same_report_makes_the_same_bytes_in_another_process(
    tmp_path: Path, sample_report: ReportFactory
) -> None:
    report = with_details(sample_report(batch_sizes=()))  # a plot of curves, and one of rows
    save_report(report, tmp_path / "report.json")
    program = (
        "import sys; from pathlib import Path; from bench.pages.page import render_page; "
        "from bench.reports.report import load_report; "
        "sys.stdout.buffer.write(render_page(load_report(Path(sys.argv[1])), []).encode())"
    )
    written = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "report.json")],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    ).stdout
    assert written.decode() == render_page(report, [])


def test_a_page_of_a_large_network_is_not_large(html: str) -> None:
    assert 100_000 < len(html.encode()) < 600_000


# What it says


def test_tiles_have_the_figures_of_the_report(page: Page, report: Report) -> None:
    networks, drop = report.networks, report.comparison.accuracy.drop
    lost = networks.reference.outcomes.read_correct().mean() - (
        networks.pruned.outcomes.read_correct().mean()
    )
    told = page.text("dd").split("\n")
    assert f"{-100 * lost:+.2f} pp" in told
    assert f"[{-drop.high_pp:+.2f}, {-drop.low_pp:+.2f}] at 95 %" in told
    assert f"x {20_325_376 / 40_813_184:.3f}" in told
    assert "40.8 M \N{RIGHTWARDS ARROW} 20.3 M" in told
    for found in report.comparison.latency:
        ratio = found.ratio
        assert f"{1 / ratio.ratio:.2f}x" in told
        assert f"[{1 / ratio.high:.2f}, {1 / ratio.low:.2f}] at 95 %" in told
        assert f"latency x {ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" in told
    assert page.text("dt").split("\n") == [
        "top-1",
        "MACs",
        "speed-up, batch 1",
        "speed-up, batch 8",
    ]


def test_every_cell_of_every_table_is_on_the_page(
    page: Page, report: Report, verdicts: list[Verdict]
) -> None:
    shown = page.text()
    for sheet in sheets(report, verdicts):
        for row in sheet.rows if sheet != verdict_sheet(verdicts) else ():
            assert all(cell in shown for cell in row)
        assert sheet.title in page.text("h2") + page.text("h3")
    assert page.text().count(verdict_sheet(verdicts).title) == 1


def test_every_report_is_named_in_the_plots_and_in_a_table(page: Page) -> None:
    names = page.text("text").split("\n")
    assert names.count("own") == names.count("runs/other") == 3  # two batch sizes, and MACs
    assert {"own", "runs/other"} <= {*page.text("th").split("\n")}


def test_every_verdict_is_told_with_its_sentence_once(page: Page, verdicts: list[Verdict]) -> None:
    shown = page.text("td")
    assert len(verdicts) == 4
    for found in verdicts:
        assert shown.count(f"{found.sentence}.") == 1
    told = re.findall("PASS|FAIL|INCONCLUSIVE|SKIPPED", page.text("strong"))
    assert told[1:] == [found.status for found in verdicts]


def test_names_of_limits_can_be_broken_and_are_whole(page: Page, verdicts: list[Verdict]) -> None:
    whole = "".join(words for tag, words in page.words if tag == "th")
    assert all(found.name in whole for found in verdicts)
    assert len(page.all("wbr")) == sum(len(re.findall("[._]", found.name)) for found in verdicts)


def test_blanks_that_hold_a_figure_together_are_not_spelt_out(html: str) -> None:
    assert "batch\N{NO-BREAK SPACE}1" in html
    assert r"\xa0" not in html


@pytest.mark.parametrize(
    ("statuses", "word", "said"),
    [
        (["PASS", "PASS"], "PASS", "Every limit holds: 2 of 2 checks."),
        (["PASS", "SKIPPED"], "SKIPPED", "Not judged, so not passed: 1 of 2 checks."),
        (
            ["SKIPPED", "INCONCLUSIVE", "PASS"],
            "INCONCLUSIVE",
            "This measurement cannot tell: 1 of 3 checks.",
        ),
        (["SKIPPED", "INCONCLUSIVE", "FAIL", "FAIL"], "FAIL", "Beyond the limit: 2 of 4 checks."),
        ([], "NOT JUDGED", "No limits were named."),
    ],
)
def test_the_banner_says_in_words_how_it_ended(
    bare: Report, statuses: list[Status], word: str, said: str
) -> None:
    page = Page(render_page(bare, [verdict(status) for status in statuses]))
    banner = next(i for i, (tag, _) in enumerate(page.words) if tag == "strong")
    assert word in page.words[banner][1]
    assert page.words[banner + 1] == ("p", f" {said}")
    assert [e["class"] for e in page.all("p") if "banner" in (e.get("class") or "")] == [
        f"card banner {word.lower()}" if statuses else "card banner"
    ]


def test_what_the_limits_allow_to_be_skipped_counts_as_passed(bare: Report) -> None:
    found = [verdict("PASS"), verdict("SKIPPED", allowed=True)]
    text = Page(render_page(bare, found)).text()
    assert "Every limit holds: 1 of 2 checks; 1 skipped, which the limits allow." in text
    assert "SKIPPED, which the limits allow:" in text


def test_what_was_not_measured_is_said_and_nothing_is_drawn(bare: Report) -> None:
    page = Page(render_page(bare, []))
    assert not page.all("svg", "figure")
    assert "Plots" not in page.text("h2")
    assert "Verdicts" not in page.text("h2")
    assert page.text("dd").split("\n") == ["not measured", "not measured"]


def test_long_tables_are_folded_and_short_ones_are_not(sample_report: ReportFactory) -> None:
    report = with_details(sample_report(batch_sizes=(1,)), groups=0, layers=40)
    page = Page(render_page(report, []))
    rows = {sheet.title: len(sheet.rows) for sheet in sheets(report, [])}
    folded = {title for title, count in rows.items() if count > 12}
    assert folded
    assert len(page.all("details")) == len(folded)
    assert page.text("span").count(" rows") == len(folded)


# What others wrote


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.text(max_size=30), min_size=3, max_size=3))
def test_names_are_text_whatever_they_hold(bare: Report, names: list[str]) -> None:
    architecture, target, sentence = names
    changes = {"architecture": f"<script>{architecture}", "target": f"\"'><b onload=x>{target}"}
    found = [verdict("FAIL", sentence=f"</td></table>{sentence}<img src=x>")]
    written = render_page(bare.model_copy(update=changes), found)
    written.encode()
    page = Page(written)
    assert not page.all("script", "b", "img")
    assert len(page.all("h1")) == 1
    assert page.text("title").startswith("<script>")


def test_characters_that_no_document_can_hold_are_spelt_out(bare: Report) -> None:
    written = render_page(bare.model_copy(update={"architecture": "a\x00b\ud800c"}), [])
    assert Page(written.encode().decode()).text("h1").startswith(r"a\x00b\ud800c for cpu")


def test_names_in_plots_are_text_as_well(sample_report: ReportFactory) -> None:
    report = with_details(sample_report(batch_sizes=(1,)))
    nasty = "</text></svg><script>alert(1)</script>"
    (times,) = report.layers
    rows = [layer.model_copy(update={"name": "<img src=x onerror=y>"}) for layer in times.layers]
    changes = {
        "groups": (GroupRecord(name=nasty, dense=8, kept=4),),
        "layers": (times.model_copy(update={"layers": tuple(rows)}),),
    }
    page = Page(render_page(report.model_copy(update=changes), []))
    assert not page.all("script", "img")
    assert nasty[-20:] in page.text("text")
    assert "<img src=x onerror=y>" in page.text("text")


# In a browser


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Open a page in a headless browser and return what it writes."""
    if CHROMIUM is None:
        pytest.skip("needs chromium or google-chrome")
    folder = tmp_path_factory.mktemp("browser")

    def run(page: str, *options: str) -> str:
        path = folder / "page.html"
        path.write_text(page, encoding="utf-8")
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", *options),
        ]
        return subprocess.run(
            [*command, path.as_uri()], capture_output=True, check=True, text=True, timeout=120
        ).stdout

    try:
        run("<p>", "--dump-dom")
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{CHROMIUM} does not work here: {error}")
    return run


PROBE = """<script>
const root = document.documentElement;
const over = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg")
  && e.getBoundingClientRect().right > root.clientWidth + 0.5).map(e => e.tagName + e.className);
const sizes = [...document.querySelectorAll("svg text")].map(
  e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a);
const figures = [...document.querySelectorAll("figure")].map(e => e.getBoundingClientRect());
const said = {inner: innerWidth, wide: root.scrollWidth, over, smallest: Math.min(...sizes),
  columns: new Set(figures.map(e => Math.round(e.left))).size,
  paper: getComputedStyle(document.querySelector("figure")).backgroundColor,
  ink: getComputedStyle(document.querySelector("svg text")).fill};
parent.document.body.dataset.said = JSON.stringify(said);
</script>"""


def measured(
    browse: Callable[..., str], html: str, *options: str, width: int = 1280
) -> dict[str, Any]:
    """Return what a script finds out about a copy of the page that lets it run.

    The copy stands in a frame, since no window is narrower than 500 pixels.
    """
    copy = html.replace(POLICY, "script-src 'unsafe-inline'").replace("</body>", f"{PROBE}</body>")
    frame = f'<iframe srcdoc="{escape(copy)}" style="width:{width}px;height:900px;border:0">'
    written = browse(f"<!DOCTYPE html><body>{frame}</iframe></body>", "--dump-dom", *options)
    found = re.search(r'<body data-said="([^"]*)"', written)
    assert found is not None
    return json.loads(unescape(found[1]))


def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    browse: Callable[..., str], html: str
) -> None:
    found = measured(browse, html, width=360)
    assert found["inner"] == 360
    assert found["wide"] <= 360
    assert found["over"] == []
    assert found["columns"] == 1
    assert found["smallest"] >= 8


def test_a_desktop_has_two_columns_of_plots(browse: Callable[..., str], html: str) -> None:
    found = measured(browse, html)
    assert found["wide"] <= 1280
    assert found["over"] == []
    assert found["columns"] == 2


def luminance(colour: str) -> float:
    """Return the relative luminance of rgb(r, g, b), by WCAG 2."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_plots_are_readable_in_light_and_dark(browse: Callable[..., str], html: str) -> None:
    papers = []
    for scheme in (1, 0):
        found = measured(browse, html, f"--blink-settings=preferredColorScheme={scheme}")
        dark, light = sorted((luminance(found["ink"]), luminance(found["paper"])))
        assert (light + 0.05) / (dark + 0.05) > 7
        papers.append(luminance(found["paper"]))
    assert papers[0] > 0.9
    assert papers[1] < 0.1


def test_the_policy_of_the_page_stops_scripts(browse: Callable[..., str], bare: Report) -> None:
    html = render_page(bare, []).replace("</body>", "<script>document.title = 1</script></body>")
    title = f"<title>{headline(bare)}</title>"
    assert title in browse(html, "--dump-dom")
    assert title not in browse(html.replace(POLICY, ""), "--dump-dom")


def test_the_page_prints(browse: Callable[..., str], html: str, tmp_path: Path) -> None:
    browse(html, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    written = (tmp_path / "page.pdf").read_bytes()
    assert written.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", written)) <= 12
