"""Text that others wrote steers no terminal and changes no page, wherever in a document it is."""

from __future__ import annotations

import ast
import copy
import html
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from whole_report import DOCUMENT, written

from bench.judging.quality_gate import judge
from bench.pages.page import render_page
from bench.pages.publish import render_junit, render_markdown, render_table
from bench.reports.report import load_report
from compress.checkpoints.summary import render_summary
from compress.errors import CheckpointError, ConfigError
from compress.terminal.console import print_table, print_text, say, say_error
from compress.terminal.text import markdown, plain

EVIL = (
    "\x1b[2J\x1b]0;owned\x07 \x00\x9b31m\r",
    "\u202eSSAP\u202c \u2066x\u2069 \u200f\u061c\ufeff\u2028",
    "x\n\n# All limits hold\n\n| judged | verdict |\n|---|---|\n| all | PASS |\n",
    "# PASS",
    "| PASS | PASS |",
    "![x](https://evil.example/x.png) [a](https://evil.example) https://evil.example www.evil.org",
    "[x]: https://evil.example",
    "<img src=x onerror=alert(1)><script>alert(1)</script><!-- ]]>",
    "**PASS** _x_ ~~y~~ `z` $w$ &lt;b&gt; \\",
    "[red]PASS[/red] [/] [link=https://evil.example]x[/link] :warning:",
    "$\\frac{",
)
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HARMLESS = {"text", "text_special"}


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every text in a document."""
    if isinstance(value, str):
        yield place
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from leaves(part, (*place, key))


def changed(document: Any, place: tuple[Any, ...], text: str) -> Any:
    found = copy.deepcopy(document)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = text
    return found


def structure(page: str) -> Counter[str]:
    """Return what a reader of Markdown finds besides text."""
    tokens = PARSER.parse(page)
    inner = [child for token in tokens for child in token.children or ()]
    assert not any(token.type in ("image", "link_open", "html_inline") for token in inner)
    assert not any(token.type == "html_block" for token in tokens)
    return Counter(token.type for token in (*tokens, *inner) if token.type not in HARMLESS)


class Tags(HTMLParser):
    """Counts the tags and the attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.update([tag, *(f"{tag} {name}" for name, _ in attrs)])

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def assert_printable(text: str) -> None:
    assert [c for c in text if not (c.isprintable() or c in "\n\N{NO-BREAK SPACE}")] == []


def on_terminal(renderable: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    print_table(renderable)
    return capsys.readouterr().out


PLACES = [place for place in leaves(DOCUMENT) if place != ("sha256",)]


def test_every_text_of_a_report_is_shown_as_text_in_every_medium(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = 0
    for number, place in enumerate(PLACES):
        results = {}
        for text in (f"harmless{number}", EVIL[number % len(EVIL)], EVIL[(number + 2) % len(EVIL)]):
            path = written(tmp_path / "report.json", changed(DOCUMENT, place, text))
            try:
                report = load_report(path)
                verdicts = judge(report, report.limits) if report.limits else []
            except (CheckpointError, ConfigError) as error:
                assert_printable(str(error))
                continue
            accepted += 1
            screen = on_terminal(render_table(report, verdicts), capsys)
            page, junit = render_markdown(report, verdicts), render_junit(report, verdicts)
            for shown in (screen, page, junit, str(report)):
                assert_printable(shown)
            ElementTree.fromstring(junit.encode())
            results[text] = structure(page), junit.count("<")
        assert len(set(map(repr, results.values()))) <= 1, (place, results)
    assert accepted >= 40


def test_a_page_whose_every_text_is_hostile(tmp_path: Path) -> None:
    free = [("architecture",), ("target",), ("notes",), ("environment", "cpu"), ("groups", "name")]
    free += [("layers", "layers", "name"), ("runtime",), ("environment", "governor")]
    document = {**copy.deepcopy(DOCUMENT), "notes": ["a note"]}
    for evil in EVIL:
        pages = []
        for text in ("harmless", evil):
            bad = document
            for place in leaves(document):
                if tuple(key for key in place if isinstance(key, str)) in free:
                    bad = changed(bad, place, text)
            report = load_report(written(tmp_path / "report.json", bad))
            pages.append(render_page(report, []))
        assert_printable(html.unescape(pages[1]))
        assert Tags(pages[0]).found == Tags(pages[1]).found


def test_every_text_of_a_file_of_weights_is_shown_as_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    group = {"name": "a", "dense": 8, "kept": 4, "readers": 1, "frozen": "why", "residual": False}
    costs = {"macs": 100, "params": 50, "channels": 8}
    named = {
        "architecture": "net",
        "num_classes": 3,
        "input_size": [1, 8, 8],
        "dense": costs,
        "now": costs,
        "groups": [group],
        "branches": [{"name": "b", "kept": True, "frozen": "why"}],
        "unknown_operations": ["op"],
        "sha256": "0",
        "parent_sha256": "0",
        "metrics": {"dense": {"top1": 90.0, "top5": 99.0, "images": 100}, "budget": "macs=0.5"},
        "tools": {"torch": "2"},
    }
    bare = {
        "tensors": [{"name": "t", "dense": [2, 2], "now": [1, 2]}],
        "input_size": [1],
        "num_classes": 2,
        "metadata": {"key": "value"},
        "sha256": "0",
    }
    for document in (named, bare):
        for place in leaves(document):
            for text in EVIL:
                assert_printable(
                    on_terminal(render_summary(changed(document, place, text)), capsys)
                )


@pytest.mark.parametrize("text", EVIL)
def test_everything_that_is_said_is_printable(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_text(f"{text}\n")
    say(text)
    say_error(text)
    said = capsys.readouterr()
    assert_printable(said.out + said.err)


def test_text_without_structure_stays_as_it_is() -> None:
    for text in (
        "layer1.0.conv1",
        "max_ratio",
        "x 0.648 [0.640, 0.650]",
        "été, 日本, שלום",
        "a * b",
    ):
        assert plain(text) == text
        assert markdown(text) == text


def test_every_way_out_is_one_of_those_that_are_safe() -> None:
    """Nothing else prints, and nothing else makes a terminal."""
    root = Path(sys.modules["compress"].__path__[0]).parent
    allowed = {"cli.py", "compress/terminal/console.py", "bench/reports/schema.py"}
    allowed |= {"compress/data/shards/__main__.py"}
    packages = [root / name for name in ("compress", "export", "bench")]
    sources = [root / "cli.py", *(path for folder in packages for path in folder.rglob("*.py"))]
    prints = {
        path.relative_to(root).as_posix()
        for path in sources
        if "print"
        in {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
    }
    assert prints <= allowed
