"""Progress on stderr: a bar on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from compress.distributed.torchrun import is_main
from compress.terminal.console import Told, say
from compress.terminal.text import plain

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it that is done, 0 to 1."""


SECONDS = 60.0
"""Between two lines that say how far a task is, where no terminal shows a bar."""


class Bar:
    """One running task."""

    def __init__(self, bars: Bars, total: int, description: str) -> None:
        self._bars, self._total, self._description = bars, total, description
        self._task = bars.add_task(plain(description), total=total, note="")
        self._said = time.monotonic()

    def at(self, completed: float, note: str = "") -> None:
        """Move to a position and show a note beside it."""
        self._bars.update(self._task, completed=completed, note=plain(note))
        if not sys.stderr.isatty() and time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            far = f"{self._description}: {completed:g} of {self._total}"
            say(f"{far}, {note}" if note else far)


@contextmanager
def bar(description: str, total: int) -> Iterator[Bar]:
    """Show a bar with the time left while the block runs.

    Where stderr is no terminal, a line a minute instead; nothing but in the main process.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = Console(file=cast(TextIO, Told()))
    quiet = not (sys.stderr.isatty() and is_main())
    with Bars(*columns, console=console, transient=True, disable=quiet) as bars:
        yield Bar(bars, total, description)


@contextmanager
def percent_bar(description: str) -> Iterator[Progress]:
    """Yield what shows the step that is being done and its share that is done, 0 to 1."""
    with bar(description, 100) as shown:
        yield lambda step, share: shown.at(round(100 * share), step)
