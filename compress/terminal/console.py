"""What goes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.segment import Segments

from compress.distributed.torchrun import is_main
from compress.errors import OutputError
from compress.terminal.text import lines


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    _write(json.dumps(document, indent=2, default=str) + "\n")


def print_table(renderable: RenderableType) -> None:
    """Print what rich can render on stdout, in the encoding of stdout.

    What is not printable in it is spelt out, and brackets are no markup: much of it is from files.
    """
    # It may not have the lines of a table.
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    console = Console(
        file=buffer, force_terminal=sys.stdout.isatty() or None, markup=False, emoji=False
    )
    parts = console.render(renderable)
    console.print(Segments(part._replace(text=lines(part.text)) for part in parts), end="")
    buffer.seek(0)
    _write(buffer.read())


def print_text(text: str) -> None:
    """Print lines on stdout; what is not printable in them is spelt out.

    Raises:
        OutputError: stdout is a file on a full disk.
    """
    _write(lines(text))


def _write(text: str) -> None:
    """Write to stdout; a reader that went away does not change the exit code.

    Of several processes, the main one speaks for all.

    Raises:
        OutputError: stdout is a file on a full disk.
    """
    if not is_main():
        return
    try:
        print(text, end="", flush=True)
    except OSError as error:
        _close(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or str(error)
            raise OutputError(f"cannot write to the standard output: {reason}") from error


def say(text: str) -> None:
    """Print a line on stderr, if this is the main process."""
    if is_main():
        _tell(text)


def say_error(text: str) -> None:
    """Print an error in one line on stderr, with the number of a process that is not the main."""
    whose = "" if is_main() else f"rank {os.environ['RANK']}: "
    _tell(f"{whose}error: {' '.join(text.split())}")  # whatever a library said


def log_to_stderr() -> None:
    """Have warnings go to stderr as lines; of several processes the main one alone warns."""
    handler = logging.StreamHandler(_Lines())
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logging.WARNING if is_main() else logging.ERROR
    logging.basicConfig(handlers=[handler], level=level)


def open_all() -> None:
    """Give a process whose stdin, stdout or stderr is closed one that leads nowhere.

    Else the first files that it opens would take their numbers, and what is printed would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


class Told(io.TextIOBase):
    """Stderr, where nothing that is written stops a command: its reader may be gone."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Write to stderr, if anybody is there to read it."""
        try:
            print(text, file=sys.stderr, end="", flush=True)
        except (OSError, ValueError):  # a full disk, a terminal that is gone
            _close(sys.stderr)
        return len(text)

    def isatty(self) -> bool:
        """Whether stderr is a terminal."""
        return sys.stderr.isatty()


class _Lines(Told):
    """The same, with all that is not printable spelt out."""

    def write(self, text: str) -> int:
        return super().write(lines(text))


def _tell(text: str) -> None:
    _Lines().write(f"{text}\n")


def _close(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere.

    Python would try again at its exit, and end with a code of its own.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
