"""The docs as a site: every page has a place, what is generated is true, nothing is fetched."""

from __future__ import annotations

import csv
import json
import re
import sys
from importlib import util
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import compress
from compress.config import RunConfig
from compress.networks.models import BUILTIN_MODELS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ROOT / ".ci" / "site_pages.py"
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def listed(part: Any) -> list[str]:
    """Return the pages of a part of the navigation, in order."""
    if isinstance(part, str):
        return [part]
    parts = part.values() if isinstance(part, dict) else part
    return [page for each in parts for page in listed(each)]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """Return the module that makes pages; it needs the extra docs."""
    pytest.importorskip("mkdocs")
    spec = util.spec_from_file_location("site_pages", PAGES)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_page_has_one_place_in_the_navigation() -> None:
    found = listed(SITE["nav"])
    assert len(found) == len(set(found))
    files = {path.name for path in DOCS.glob("*.md")}
    assert files <= set(found)


def test_the_navigation_leads_to_pages_that_are_there(pages: ModuleType) -> None:
    made = {path for path, _ in pages.generated_pages()}
    for page in listed(SITE["nav"]):
        assert page in made or (DOCS / page).is_file(), page
    assert all(path in listed(SITE["nav"]) or path.startswith("examples/") for path in made)


def test_built_in_networks_are_listed() -> None:
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    table = text.split("## Built in")[1].split("\n## ")[0]
    assert re.findall(r"`(\w+)`", table.split("|---|---|")[1]) == list(BUILTIN_MODELS)


def test_the_summary_of_the_busy_machine_is_that_of_its_rows() -> None:
    with (DOCS / "results" / "gate-on-a-busy-machine.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    networks = ("copy", "convolution more")
    parts = [[row for row in rows if row["network"] == network] for network in networks]
    spans = [sorted((row["ratio"] for row in part), key=float) for part in parts]
    shown = " | ".join(f"{span[0]} to {span[-1]}" for span in spans)
    assert f"| ratio, least to largest | {shown} |" in text
    for verdict in ("PASS", "INCONCLUSIVE", "FAIL"):
        counts = [sum(row["verdict"] == verdict for row in part) for part in parts]
        assert f"| {verdict} | {counts[0]} | {counts[1]} |" in text


def test_the_misses_of_the_v100_table_are_those_of_its_rows() -> None:
    with (DOCS / "results" / "v100-fit.csv").open(encoding="utf-8") as file:
        rows = {row["layers"]: row for row in csv.DictReader(file)}
    text = (DOCS / "v100.md").read_text(encoding="utf-8").split("## How far it misses")[1]
    assert f"All {len(rows)} rows" in text
    shown = re.findall(r"^\| (.+?) \| \d+ \|.*$", text.split("\n## ")[0], re.MULTILINE)
    assert 4 <= len(shown) <= 10
    for name in shown:
        row = rows[name]
        median, p90, bias = (100 * float(row[key]) for key in ("median_error", "p90_error", "bias"))
        line = f"| {name} | {row['rows']} | {median:.1f} % | {p90:.1f} % | {bias:+.1f} % |"
        assert line in text


def test_the_rows_of_the_v100_table_are_what_the_shipped_table_says_of_itself() -> None:
    with (DOCS / "results" / "v100-fit.csv").open(encoding="utf-8") as file:
        rows = {row["layers"]: row for row in csv.DictReader(file)}
    path = ROOT / "configs" / "latency" / "v100.json"
    held_out = json.loads(path.read_text(encoding="utf-8"))["held_out"]
    for name, row in rows.items():
        precision, *rest = name.split(", ")
        key = {
            "not levelled": f"shapes, not levelled: {precision}",
            "pairs of widths apart": f"pairs of widths: {precision}",
            "pairs of widths apart, not levelled": f"pairs of widths, not levelled: {precision}",
        }.get(", ".join(rest), name)
        said = held_out[key]
        assert int(row["rows"]) == said["rows"], name
        for column, figure in (("median_error", "median"), ("p90_error", "p90"), ("bias", "bias")):
            # Both are rounded, to three places and to four.
            assert float(row[column]) == pytest.approx(said[figure], abs=0.00056), (name, column)


def test_files_that_contributors_are_sent_to_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:compress|export|bench|tests|configs)/[\w/.]+)`", text)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_reference_pages_hold_what_the_code_has(pages: ModuleType) -> None:
    made = dict(pages.generated_pages())
    named = re.findall(r"^::: compress\.(\w+)$", made["reference/python.md"], re.MULTILINE)
    assert [*named, "__version__"] == sorted(compress.__all__, key="__version__".__eq__)
    keys = made["reference/configuration.md"]
    for section, field in RunConfig.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert f"\n| `{key}` |" in keys.split(f"\n## {section}\n")[1].split("\n## ")[0]
    assert '| `decoder` | `"pil"` | What decodes and resizes files:' in keys
    assert '| `budget` | `"macs=0.5"` |' in keys
    commands = made["reference/commands.md"].split("\n## compress sweep\n")[1].split("\n## ")[0]
    assert "| `--max-drop" in commands
    assert "| `--help`" in commands


def test_links_of_the_report_lead_to_its_parts(pages: ModuleType) -> None:
    text = dict(pages.generated_pages())["reference/report.md"]
    headings = {found.lower() for found in re.findall(r"^## (\w+)$", text, re.MULTILINE)}
    targets = set(re.findall(r"\]\(#(\w+)\)", text))
    assert targets
    assert targets <= headings


def test_signs_of_markup_in_a_cell_are_text(pages: ModuleType) -> None:
    assert pages.cell("a <b> | `c <d>`\n e") == "a &lt;b> \\| `c <d>` e"


def test_no_column_is_without_a_name() -> None:
    # The corner of a table of figures may be empty; a column of words may not.
    for path in [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for header, rule in pairwise(lines):
            if re.fullmatch(r"\|[-:| ]+\|", rule) and "---" in rule:
                assert all(cell.strip() for cell in header[1:-1].split("|")[1:]), (path, header)


def test_pages_are_named_by_links() -> None:
    for path in [*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        text = re.sub(
            r"```.*?```|^    .*?$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M
        )
        assert not re.findall(r"(?<![\[(`/])docs/\w+\.md", text), path


def test_short_names_in_code_stay_whole_and_long_ones_break_at_their_parts(
    pages: ModuleType,
) -> None:
    assert pages.readable("<code>compress run --set</code> a-b") == (
        '<code>compress run <span class="whole">--set</span></code> a-b'
    )
    name = "tests/test_site.py::test_no_column_is_without_a_name"
    found = pages.readable(f"<code>{name}</code>")
    assert found.replace("<wbr>", "") == f"<code>{name}</code>"
    assert found.split("<wbr>")[:3] == ["<code>tests/", "test_", "site."]


@pytest.mark.parametrize(
    ("letters", "mark"),
    [(12, ""), (13, ' class="words"'), (40, ' class="words"'), (41, ' class="prose"')],
)
def test_a_cell_is_given_a_width_by_its_text(pages: ModuleType, letters: int, mark: str) -> None:
    text = f"<b>{'&lt;' * (letters - 1)}</b>\n"
    assert pages.prose(f"<td>{text}</td>") == f"<td{mark}>{text}</td>"
    figures = f'<td style="text-align: right;">{text}</td>'
    assert pages.prose(figures) == figures


def test_a_page_of_the_repository_is_called_by_its_heading(
    pages: ModuleType, tmp_path: Path
) -> None:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(tmp_path), "site_dir": "unused"})
    config.validate()
    made = []
    for name, heading in (("data.md", "Your images"), ("reference/python.md", "Python")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {heading}\n\nMore.\n", encoding="utf-8")
        made.append(File(name, str(tmp_path), "unused", use_directory_urls=True))
    page = Page(None, made[1], config)
    html = "see <code>docs/data.md</code>, <a href='x'>data.md</a><pre>docs/data.md</pre>"
    assert pages.on_page_content(html, page, config, Files(made)) == (
        "see <a href=\"../../data/\">Your images</a>, <a href='x'>Your images</a>"
        "<pre>docs/data.md</pre>"
    )
    with pytest.raises(pages.PluginError, match=r"no page stands for gone\.md"):
        pages.on_page_content("docs/gone.md", page, config, Files(made))


def test_options_in_help_texts_are_code(pages: ModuleType) -> None:
    assert pages.coded("as --output, `--set` or a--b") == "as `--output`, `--set` or a--b"


def test_a_page_that_would_fetch_something_is_seen(pages: ModuleType) -> None:
    html = '<a href="https://a.org">x</a><script src="//b.org/c.js"></script><img src="d.svg">'
    assert pages.loaded(html) == ["//b.org/c.js", "d.svg"]
