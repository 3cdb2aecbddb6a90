"""Tables on narrow terminals: nothing is lost, and no name or figure is broken without need."""

from __future__ import annotations

import io

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
