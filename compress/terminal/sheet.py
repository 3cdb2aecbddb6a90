"""Tables of text that are printed on the terminal and written as Markdown from one object."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.terminal.text import markdown, plain

if TYPE_CHECKING:
    from compress.terminal.table import TextTable

Row = tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """One table of text: the first column names the row."""

    title: str
    header: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Sentences under the table."""


def fill(table: TextTable, sheet: Sheet) -> None:
    """Put the columns and rows of a sheet into an empty table of the terminal."""
    table.head(*sheet.header)
    for row in sheet.rows:
        table.add(*row)


def text_lines(sheet: Sheet, *, left: Collection[int] = (0,)) -> list[str]:
    """Return a sheet as lines of plain text, without title and notes.

    Args:
        sheet: the sheet.
        left: columns that are aligned to the left; the others are to the right.
    """
    table = [tuple(map(plain, cells)) for cells in (sheet.header, *sheet.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = ["<" if column in left else ">" for column in range(len(widths))]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in table
    ]


def markdown_lines(sheet: Sheet) -> list[str]:
    """Return a sheet as Markdown: a heading and the table, without the notes."""
    rule = ("---", *("---:",) * (len(sheet.header) - 1))
    head, *rows = map(_markdown_row, (sheet.header, *sheet.rows))
    return [f"## {markdown(sheet.title)}", "", head, f"| {' | '.join(rule)} |", *rows]


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(markdown(cell, begins=False) for cell in cells)} |"


def short_count(count: float) -> str:
    """Write a count with three digits and a unit: 1.81 G, 269 k, 640."""
    scale, unit = unit_of(count)
    return f"{count / scale:#.3g}".rstrip(".") + unit if unit else f"{count:,.0f}"


def short_size(count: float) -> str:
    """Write bytes with a decimal prefix (1 MB is 10^6 bytes): 1.08 MB, 640 B."""
    scale, unit = unit_of(count)
    return f"{count / scale:.2f}{unit}B" if unit else f"{count:.0f} B"


def unit_of(count: float) -> tuple[float, str]:
    """Return the unit that a count is written in with three digits: its size and its letter."""
    for scale, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= 0.9995 * scale:
            return scale, unit
    return 1.0, ""
