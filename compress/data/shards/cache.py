"""A folder of fetched shards that stays below a limit, shared by the processes of a host.

A shard appears under its name whole or not at all. Locks of flock(2) keep two processes from
fetching the same shard and from counting the space wrongly; they die with the process that holds
them, so nothing has to be cleaned up after a kill.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from compress.errors import writing

LOCKS = 64
"""Files of locks; shards that share one wait for each other."""
TOUCHED_SECONDS = 60
"""How exact the time of the last reading is."""
PAUSE = 0.05
"""Seconds between two looks for room while other processes fetch."""

_WHOLE = re.compile(r"[0-9a-f]{40}\.tar")
_PART = re.compile(r"\.[0-9a-f]{40}\.\d+\.\d+\.part")


class _File(NamedTuple):
    path: Path
    length: int
    read_at: float


class ShardCache:
    """Files of at most ``limit`` bytes in all; those not read for longest make room for new ones.

    Other files in the folder are neither counted nor touched.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, key: str, length: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open a file for reading; if it is not there it is made first, by one process at a time.

        Args:
            key: 40 hexadecimal digits.
            length: Bytes of the file, at most the limit.
            fill: Writes exactly ``length`` bytes.

        Raises:
            OutputError: it cannot be written.
        """
        path = self._path(key)
        if (stream := _opened(path, length)) is not None:
            return stream
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"lock-{int(key[:8], 16) % LOCKS:02}"):
            if (stream := _opened(path, length)) is not None:
                return stream
            return self._made(path, length, fill)

    def _made(self, path: Path, length: int, fill: Callable[[BinaryIO], None]) -> BinaryIO:
        part = path.with_name(f".{path.stem}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            with self._reserved(part, length) as file:
                fill(file)
                with writing(path):
                    file.flush()
                    os.fsync(file.fileno())
                    # Still locked: a part that nobody locks is taken for one that a kill left. And
                    # opened first: another process may remove the file as soon as it has its name.
                    stream = part.open("rb", buffering=0)
                    try:
                        part.replace(path)
                    except OSError:
                        stream.close()
                        raise
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return stream

    def _reserved(self, part: Path, length: int) -> BinaryIO:
        """Make room, and an empty file that counts as if it were full, locked while it is open."""
        while True:
            with self._locked("lock"):
                if self._make_room(length):
                    with writing(part):
                        file = part.open("xb")
                    try:
                        with writing(part):
                            fcntl.flock(file, fcntl.LOCK_EX)
                            file.truncate(length)
                    except BaseException:
                        file.close()
                        raise
                    return file
            time.sleep(PAUSE)

    def _make_room(self, length: int) -> bool:
        """Remove the files read longest ago; return False while others' fetches take the room."""
        kept = []
        for file in self._files():
            if _PART.fullmatch(file.path.name) and _abandoned(file.path):
                with suppress(OSError):
                    file.path.unlink()
            else:
                kept.append(file)
        used = sum(file.length for file in kept)
        for file in sorted(kept, key=lambda file: file.read_at):
            if used + length > self.limit and _WHOLE.fullmatch(file.path.name):
                with suppress(OSError):
                    file.path.unlink()
                    used -= file.length
        return used + length <= self.limit

    def _files(self) -> Iterator[_File]:
        with writing(self.folder), os.scandir(self.folder) as entries:
            for entry in entries:
                if _WHOLE.fullmatch(entry.name) or _PART.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        yield _File(Path(entry.path), status.st_size, status.st_mtime)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.tar"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock; the file stays, because removing it would let two processes hold it."""
        path = self.folder / name
        with writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with writing(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # A process forked meanwhile has the descriptor too, so closing it is not enough.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _opened(path: Path, length: int) -> BinaryIO | None:
    """Open a whole file and remember that it was read; None if there is none."""
    try:
        stream = path.open("rb", buffering=0)
    except OSError:  # whatever it is, writing the file will tell
        return None
    status = os.fstat(stream.fileno())
    if status.st_size != length:  # no fetch leaves this; somebody else has written here
        stream.close()
        return None
    if time.time() - status.st_mtime > TOUCHED_SECONDS:
        with suppress(OSError):
            os.utime(path)
    return stream


def _abandoned(part: Path) -> bool:
    """Return whether nobody writes a file any more: its writer held a lock and is gone."""
    with suppress(OSError), part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
