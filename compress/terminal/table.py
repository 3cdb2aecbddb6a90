"""Tables that fit a narrow terminal: lines break between words, not within names and figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from compress.terminal.text import NO_BREAK, plain, together

_BREAKS = tuple(
    map(
        re.compile,
        (
            r"(?<= )",
            r"(?<=\.)(?=[^\W\d])",  # accuracy.|max_drop_pp, and no decimal point
            r"(?<=[_/])",
            rf"(?<=,{NO_BREAK})",  # between the ends of an interval
            rf"(?<={NO_BREAK})",  # between a figure and its unit
        ),
    )
)
"""Where a line may break, the last where nothing else helps."""

_ROOMY = 1
"""The breaks that a table with spaces beside its rules may need; with more it does without them."""


@dataclass(frozen=True)
class Words:
    """What stands in a cell."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines of a cell that is so wide."""
        yield Text("\n".join(wrapped(self.text, options.max_width)), self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the width of the longest part that is not broken, and of the whole."""
        return Measurement(_longest(self.text, 0), _longest(self.text, -1))


class TextTable(Table):
    """A table whose cells are ``Words``, and whose columns share the width by what they hold."""

    def head(self, *names: str) -> None:
        """Add the columns: the first one has its words at the left, the others at the right."""
        for index, name in enumerate(names):
            self.add_column(Words(name), justify="right" if index else "left", overflow="fold")

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row of text, of which none is markup."""
        self.add_row(*(Words(plain(cell), style) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table at the width of the console."""
        held = [[_text(cell) for cell in (each.header, *each.cells)] for each in self.columns]
        room = options.max_width - len(held) - 1  # the rules
        needed = sum(_widest(column, _ROOMY) for column in held)
        self.padding = (0, int(needed <= room - 2 * len(held)))
        room -= 2 * self.padding[1] * len(held)
        for column, width in zip(self.columns, shared(held, room), strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)


def _text(cell: RenderableType) -> str:
    return cell if isinstance(cell, str) else getattr(cell, "text", "")


def shared(columns: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Return the widths of columns of text that share so much room.

    Each has the width of what is broken most of all, then of what is broken less, up to the whole;
    of several that lack it, first the one that lacks most. What is left goes to the first that is
    broken. None where there is no room for the parts.
    """
    levels = range(-1, len(_BREAKS))
    *more, least = ([_widest(column, level) for column in columns] for level in levels)
    spare = room - sum(least)
    if spare < 0:
        return [None] * len(columns)
    widths = least
    for wanted in reversed(more):
        for index in sorted(range(len(columns)), key=lambda i: widths[i] - wanted[i]):
            if wanted[index] - widths[index] <= spare:
                spare -= wanted[index] - widths[index]
                widths[index] = wanted[index]
    for index, whole in enumerate(more[0]):  # fewer lines, though not one
        given = min(spare, whole - widths[index])
        spare, widths[index] = spare - given, widths[index] + given
    return list(widths)


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, each at most so wide if it has places to break at."""
    lines, line = [], ""
    for part in _parts(together(text), width, 0):
        if line and cell_len((line + part).rstrip(" ")) > width:
            lines.append(line)
            line = ""
        line += part
    return [line.rstrip(" ").replace(NO_BREAK, " ") for line in (*lines, line)]


def _parts(text: str, width: int, level: int) -> Iterator[str]:
    """Yield what is not broken: longer than the width only where it cannot be helped."""
    for part in _BREAKS[level].split(text):
        if cell_len(part.rstrip(" ")) > width and level + 1 < len(_BREAKS):
            yield from _parts(part, width, level + 1)
        else:
            yield part


def _widest(column: Sequence[str], level: int) -> int:
    return max((_longest(text, level) for text in column), default=0)


def _longest(text: str, level: int) -> int:
    """Return the width of the longest part between breaks of the levels up to one; -1 is none."""
    parts = [together(text)]
    for breaks in _BREAKS[: level + 1]:
        parts = [each for part in parts for each in breaks.split(part)]
    return max(cell_len(part.rstrip(" ")) for part in parts)
