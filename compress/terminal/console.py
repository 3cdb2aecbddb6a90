"""What goes to the terminal: results to stdout, everything else to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

from rich.console import Console, RenderableType

from compress.distributed.torchrun import is_main
from compress.errors import OutputError


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print_text(json.dumps(document, indent=2, default=str) + "\n")


def print_table(renderable: RenderableType) -> None:
    """Print what rich can render on stdout, in the encoding of stdout."""
    # It may not have the lines of a table.
    buffer = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)
    Console(file=buffer, force_terminal=sys.stdout.isatty() or None).print(renderable)
    buffer.seek(0)
    print_text(buffer.read())


def print_text(text: str) -> None:
    """Print on stdout; a reader that went away does not change the exit code.

    Of several processes, the main one speaks for all.

    Raises:
        OutputError: stdout is a file on a full disk.
    """
    if not is_main():
        return
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # Python would try again at its exit, and end with a code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or str(error)
            raise OutputError(f"cannot write to the standard output: {reason}") from error


def say(text: str) -> None:
    """Print a line on stderr, if this is the main process."""
    if is_main():
        print(text, file=sys.stderr)


def say_error(text: str) -> None:
    """Print an error in one line on stderr, with the number of a process that is not the main."""
    whose = "" if is_main() else f"rank {os.environ['RANK']}: "
    print(f"{whose}error: {' '.join(text.split())}", file=sys.stderr)  # whatever a library said
