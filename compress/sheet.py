"""Tables of text that are printed on the terminal and written as Markdown from one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """One table of text: the first column names the row."""

    title: str
    header: Row
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Sentences under the table."""


def fill(table: Table, sheet: Sheet) -> None:
    """Put the columns and rows of a sheet into an empty table of the terminal."""
    from rich.text import Text

    for index, name in enumerate(sheet.header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row))


def markdown_lines(sheet: Sheet) -> list[str]:
    """Return a sheet as Markdown: a heading and the table, without the notes."""
    rule = ("---", *("---:",) * (len(sheet.header) - 1))
    return [f"## {sheet.title}", "", *map(_markdown_row, (sheet.header, rule, *sheet.rows))]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
