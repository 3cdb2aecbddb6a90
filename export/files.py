"""Files that appear under their name whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import writing


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it takes the real name if the block succeeds.

    If the block fails the temporary file is removed and whatever ``path`` held is kept. Missing
    parent folders are made.

    Raises:
        OutputError: the folder cannot be made or the file cannot be renamed.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with writing(path):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_flushed(path: Path, data: bytes) -> None:
    """Write ``data`` and wait until the disk has it.

    Raises:
        OSError: untranslated, because only the caller knows the name that the user gave.
    """
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
