"""Tables on narrow terminals: nothing is lost, and no name or figure is broken without need."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from compress.terminal.table import TextTable, shared, wrapped

JUDGED = (
    ("judged", "limit", "measured", "verdict"),
    ("accuracy.max_drop_pp", "1.00 pp", "-0.67 pp [-1.56, 0.01]", "PASS"),
    ("latency.max_ratio, batch 1", "0.950", "0.749 [0.746, 0.752]", "INCONCLUSIVE"),
    ("parity.max_relative_error", "1.0e-04", "5.3e-07", "PASS"),
)


def printed(width: int, *rows: tuple[str, ...]) -> str:
    """Return a table as it is printed on a console of so many columns."""
    head, *body = rows
    table = TextTable()
    table.head(*head)
    for row in body:
        table.add(*row)
    out = io.StringIO()
    Console(file=out, width=width, legacy_windows=False).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", range(60, 101, 5))
def test_every_name_stands_in_one_line(width: int) -> None:
    lines = printed(width, *JUDGED).splitlines()
    assert max(map(len, lines)) <= width
    for name in ("max_drop_pp", "latency.max_ratio,", "max_relative_error", "INCONCLUSIVE"):
        assert any(name in line for line in lines)


def test_intervals_stay_whole_where_there_is_room_for_them() -> None:
    assert "[-1.56, 0.01]" in printed(80, *JUDGED)
    assert "-0.67 pp [-1.56, 0.01]" in printed(100, *JUDGED)


SIX = (
    ("network", "MACs", "params", "top-1", "change", "Pareto"),
    ("dense", "10.1 M", "269 k", "80.63 %", "", ""),
    ("macs=0.8", "8.04 M (79.9 %)", "205 k (76.0 %)", "90.65 %", "+10.02 pp", "both"),
    ("macs=0.2", "1.86 M (18.5 %)", "40.4 k (15.0 %)", "52.25 %", "-28.38 pp", "both"),
)
REPORTS = (
    ("", "top-1", "change", "MACs", "latency, batch 1", "latency, batch 8"),
    ("a.json", "85.48 %", "-8.85 pp [-12.86, -4.89]", "x 0.491", "0.634 ms", "x 0.290"),
)


@pytest.mark.parametrize("rows", [SIX, REPORTS], ids=["sweep", "reports"])
@pytest.mark.parametrize("width", range(60, 101, 5))
def test_no_figure_of_six_columns_is_parted_from_its_unit(
    rows: tuple[tuple[str, ...], ...], width: int
) -> None:
    found = printed(width, *rows)
    assert max(map(len, found.splitlines())) <= width
    cells = [cell for row in rows[1:] for cell in row[1:]]
    for figure in re.findall(r"[-+]?[\d.]+ (?:%|pp|ms|[kM])|x [\d.]+", "; ".join(cells)):
        assert figure in found


def test_spaces_beside_the_rules_go_before_a_figure_breaks() -> None:
    assert "│ macs=0.8 │" in printed(80, *SIX)
    assert "│macs=0.8│" in printed(60, *SIX)
    assert len(printed(80, *SIX).splitlines()) == len(SIX) + 3  # and no lines between them


def test_no_console_is_too_narrow_for_the_text() -> None:
    found = printed(30, *JUDGED)
    letters = [letter for row in JUDGED for cell in row for letter in cell if letter != " "]
    assert all(found.count(letter) >= letters.count(letter) for letter in {*letters})


NAMES = st.sampled_from(["a", "layer1", "max_drop_pp", "accuracy.max_ratio", "0.25 pp", "relative"])
WORDS = st.lists(NAMES, max_size=5).map(" ".join)


@given(WORDS, st.integers(1, 60))
def test_lines_hold_the_text_and_fit_if_it_can_be_broken(text: str, width: int) -> None:
    lines = wrapped(text, width)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    if width >= 10:  # the longest part between breaks, with the mark that it ends with
        assert all(len(line) <= width for line in lines)
    if len(text) <= width:
        assert lines == [text]


@pytest.mark.parametrize("figure", ["0.749 [0.746, 0.752]", "x 0.749", "12.5 ms", "98.66 %"])
def test_a_figure_keeps_its_unit_and_an_interval_its_ends(figure: str) -> None:
    *parts, last = wrapped(f"about {figure}", max(map(len, figure.split(" ["))) + 1)
    assert last in figure
    assert " ".join((*parts, last)) == f"about {figure}"
    assert all(part not in ("x", "ms", "%", "0.752]") for part in (*parts, last))


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3), max_size=4), st.integers(0, 200))
def test_shared_widths_never_exceed_the_room(columns: list[list[str]], room: int) -> None:
    found = [width for width in shared(columns, room) if width is not None]
    assert not found or sum(found) <= room
    whole = [max(map(len, column)) for column in columns]
    if sum(whole) <= room:
        assert found == whole
