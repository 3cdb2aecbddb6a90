"""Files that appear under their name whole, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compress.errors import writing

_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.\d{1,10}(?P<suffix>\.[^.]+)?")


def temporary_name(path: Path) -> Path:
    """Return the name under which this process writes a file before it takes its real name."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")


def real_name(temporary: str) -> str | None:
    """Return the name that a file of ``temporary_name`` was to take, or None for other files."""
    found = _TEMPORARY.fullmatch(temporary)
    return f"{found['stem']}{found['suffix'] or ''}" if found else None


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it takes the real name if the block succeeds.

    If the block fails the temporary file is removed and whatever ``path`` held is kept. Missing
    parent folders are made.

    Raises:
        OutputError: the folder cannot be made or the file cannot be renamed.
    """
    temporary = temporary_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with writing(path):
            temporary.replace(path)
        sync_folder(path.parent)
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


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, where the file system can say so."""
    with suppress(OSError):  # the files are whole in any case
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    Raises:
        OutputError: it cannot be written; an earlier file of this name is kept as it was.
    """
    with staged(path) as temporary, writing(path):
        write_flushed(temporary, data.encode() if isinstance(data, str) else data)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file another name, as a hard link where the file system has them, else as a copy.

    Raises:
        OutputError: the name cannot be made; an earlier file of it is kept.
    """
    with staged(path) as temporary, writing(path):
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")


def sha256_of(*paths: Path) -> str:
    """Return the hex digest of a file's bytes, or of several files' one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
