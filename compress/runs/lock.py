"""One process at a time in a directory, by a lock that dies with the process that holds it.

The lock is that of flock(2) on a file. The kernel gives it up whatever way its holder ends, so a
file that a killed process left blocks nobody. Where the file system or the system knows no locks,
there is none: then nothing keeps two processes apart, as before.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import ConfigError, writing

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _let_go_in_child() -> None:
    """Close what a forked child inherited: it would hold the lock on when the parent is killed."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a file for the body; yield whether this file system has locks.

    The file and its folder are made, and removed when nobody holds the lock any more.

    Args:
        path: the file; its folder's parent is what the message calls in use.
        shared: whether others may share it, who only read; then a folder that cannot be written
            is no error.

    Raises:
        ConfigError: another process holds it.
        OutputError: the file cannot be made.
    """
    try:
        descriptor, holds = _taken(path, shared)
    except OSError as error:
        if not shared:
            with writing(path):
                raise error
        yield False
        return
    try:
        yield holds
    finally:
        _released(descriptor, path, holds)


def _taken(path: Path, shared: bool) -> tuple[int, bool]:
    """Open the file and lock it; return its descriptor, and whether there are locks here."""
    while True:
        try:
            descriptor = _opened(path)
        except FileNotFoundError:  # whoever held the lock removed the empty folder
            continue
        try:
            holds = _flock(descriptor, shared=shared)
        except BlockingIOError as error:
            who = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            _close(descriptor)
            raise ConfigError(
                f"{path.parent.parent} is in use by another process{f' ({who})' if who else ''}: "
                "wait until it ends, or give another --output"
            ) from error
        if not holds or _is_of(descriptor, path):
            break
        _close(descriptor)  # whoever held it removed the file after we had opened it
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor, holds


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A link could lead out of the run, and what it leads to would be written.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    _held.add(descriptor)
    return descriptor


def _released(descriptor: int, path: Path, holds: bool) -> None:
    """Let go; remove the file unless somebody shares the lock, and the folder if it is empty."""
    if descriptor not in _held:  # a forked child, which has closed it
        return
    with suppress(OSError):
        if not holds or (_flock(descriptor, shared=False) and _is_of(descriptor, path)):
            path.unlink()
    _close(descriptor)
    with suppress(OSError):
        path.parent.rmdir()


def _flock(descriptor: int, *, shared: bool) -> bool:
    """Lock without waiting; return False where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # ENOLCK, ENOTSUP, ENOSYS: some network file systems
        return False
    return True


def _is_of(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is that of the file that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)
