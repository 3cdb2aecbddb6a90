"""Where shards lie: in a folder, or behind a URL, from which they are fetched into a cache."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import sleep
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import quote

from compress.config.location import scheme_of
from compress.data.shards.index import matches
from compress.data.walking import is_data_path, listed
from compress.distributed.torchrun import ranks_here
from compress.errors import CompressError, DataError, EnvironmentUnfitError, writing

if TYPE_CHECKING:
    from compress.data.shards.cache import ShardCache

logger = logging.getLogger("compress")

TRIES = 4
FIRST_PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long."""
LARGEST_FILE = 2**30
"""Bytes of an index or a list of classes: a server must not fill the memory."""
PIECE = 2**22
"""Bytes that are copied at a time."""

ResultT = TypeVar("ResultT")


class Store(ABC):
    """The root under which shards lie."""

    title: str
    """What messages call it."""

    @abstractmethod
    def read_small(self, name: str) -> bytes | None:
        """Return the contents of a file; None if there is none of this name.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def opened(self, name: str, length: int) -> BinaryIO:
        """Open a shard, unbuffered, whose index says that it has ``length`` bytes.

        Raises:
            DataError: it is gone, has another size, or cannot be fetched.
        """

    def keeps(self, length: int) -> bool:
        """Return whether shards are fetched, and ``length`` bytes of them kept for each rank."""
        return False

    def fetch_ahead(self, name: str, length: int) -> None:
        """Open a shard in the background, so that it is there when it is read.

        What goes wrong is told to whoever opens it for reading.
        """

        def fetch() -> None:
            with suppress(CompressError):
                self.opened(name, length).close()

        Thread(target=fetch, daemon=True).start()


class Folder(Store):
    """Shards on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.title = str(root)

    def read_small(self, name: str) -> bytes | None:
        """Return the contents of a file; None if there is none of this name."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unreadable(name, error) from error

    def opened(self, name: str, length: int) -> BinaryIO:
        """Open a shard, after a look at its size."""
        try:
            stream = (self.root / name).open("rb", buffering=0)
            found = stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if found != length:
            stream.close()
            raise resized(self.title, name, found, length)
        return stream

    def names(self, pattern: str) -> list[str]:
        """List the shards that match a pattern part by part, sorted."""
        return [name for name in self.globbed(pattern) if matches(name, pattern)]

    def globbed(self, pattern: str) -> list[str]:
        """List the files that a glob finds, sorted; ``**`` is any depth.

        Raises:
            DataError: the root cannot be searched.
        """
        try:
            paths = {
                path.relative_to(self.root).as_posix(): path for path in self.root.glob(pattern)
            }
        except (OSError, ValueError, NotImplementedError) as error:
            raise DataError(f"cannot look for {pattern!r} in {self.title}: {error}") from error
        names = sorted(filter(is_data_path, paths))
        # Opening a named pipe would wait for ever; what is gone is named when it is opened.
        special = [name for name in names if paths[name].exists() and not paths[name].is_file()]
        if special:
            logger.warning("left out, since they are no regular files: %s", listed(special))
        return [name for name in names if name not in special]

    def size(self, name: str) -> int:
        """Return the bytes of a shard."""
        try:
            return (self.root / name).stat().st_size
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: OSError) -> DataError:
        return DataError(f"cannot read {self.root / name}: {error.strerror or error}")


class Remote(Store):
    """Shards behind a URL that fsspec understands.

    Args:
        url: Of the root, without a slash at its end.
        cache: Where fetched shards are kept.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.title = url
        self.cache = cache
        self.edition = ""
        """Of the index: a new one makes shards that were fetched before it stale."""

    def read_small(self, name: str) -> bytes | None:
        """Return the contents of a file; None if there is none of this name."""

        def read() -> bytes:
            with self._stream(name) as source:
                return source.read(LARGEST_FILE + 1)

        try:
            content = self._tried(name, read)
        except FileNotFoundError:
            return None
        if len(content) > LARGEST_FILE:
            raise DataError(f"{name} under {self.title} has more than 1 GiB: it is no such file")
        return content

    def opened(self, name: str, length: int) -> BinaryIO:
        """Open the fetched copy of a shard; fetch it if there is none."""
        if length > self.cache.limit:
            raise DataError(
                f"the shard {name} has {length} bytes, more than data.cache_gib allows: raise it"
            )

        def fill(file: BinaryIO) -> None:
            try:
                self._tried(name, lambda: self._fetch(name, length, file))
            except FileNotFoundError as error:
                raise DataError(f"the shard {name} is not there under {self.title}") from error

        return self.cache.open(self._key(name), length, fill)

    def keeps(self, length: int) -> bool:
        """Return whether the cache has room for so many bytes of every rank of this host."""
        return ranks_here() * length <= self.cache.limit

    def _key(self, name: str) -> str:
        said = f"{self.title}\0{self.edition}\0{name}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(said).hexdigest()[:40]

    def _fetch(self, name: str, length: int, file: BinaryIO) -> None:
        """Copy a shard into a file from its start, whatever an earlier try has left there.

        Raises:
            DataError: it has another size.
            OSError: the connection broke off; other errors are the library's own.
        """
        file.seek(0)
        copied = 0
        with self._stream(name) as source:
            found = getattr(source, "size", None)
            if isinstance(found, int) and found != length:
                raise resized(self.title, name, found, length)
            while piece := source.read(PIECE):
                copied += len(piece)
                if copied > length:
                    raise resized(self.title, name, copied, length)
                with writing(self.cache.folder):
                    file.write(piece)
        if copied < length:
            raise ConnectionError("the connection broke off")

    def _stream(self, name: str) -> Any:
        """Open a remote file for reading."""
        path = quote(name) if scheme_of(self.title) in ("http", "https") else name
        # Asked for again each time: connections do not survive a fork, and fsspec knows it.
        system, found = _system(f"{self.title}/{path}")
        return system.open(found, "rb")

    def _tried(self, name: str, act: Callable[[], ResultT]) -> ResultT:
        """Try a few times; what a library says is not repeated, for it may quote a signed URL.

        Raises:
            FileNotFoundError: the file does not exist.
            DataError: it cannot be read.
        """
        pause = FIRST_PAUSE
        for last in [*[False] * (TRIES - 1), True]:
            try:
                return act()
            except CompressError:
                raise
            except Exception as error:
                cause = _cause(error)
                if isinstance(cause, FileNotFoundError):
                    raise
                # Every library has its own errors; these two do not pass with time.
                if last or isinstance(cause, PermissionError | ImportError):
                    raise DataError(
                        f"cannot read {name} under {self.title} ({type(cause).__name__}): look at "
                        "the network, the URL and the credentials in the environment"
                    ) from error
                logger.info("%s: %s, trying again", name, type(cause).__name__)
            sleep(pause)
            pause *= 2
        raise AssertionError("the last try returns or raises")


def _cause(error: Exception) -> BaseException:
    """Return what is wrong: fsspec says that a file is not there when a host is not to be reached.

    Its own reason is then an error of the operating system, and not the answer of a server.
    """
    below = error.__cause__
    unreached = isinstance(below, OSError | asyncio.TimeoutError)
    hidden = isinstance(error, FileNotFoundError) and not isinstance(below, FileNotFoundError)
    return below if below is not None and hidden and unreached else error


def resized(title: str, name: str, found: int, length: int) -> DataError:
    """Return the error for a shard that is not the one that was indexed."""
    return DataError(
        f"the shard {name} under {title} has {found} bytes, and its index says {length}: make the "
        "index again with python -m compress.data.shards index ROOT"
    )


def _system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it.

    Raises:
        EnvironmentUnfitError: a library is missing.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise EnvironmentUnfitError(
            "shards at a URL need fsspec: pip install 'compress-convnets[shards]'"
        ) from error
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise EnvironmentUnfitError(
            f"fsspec cannot open {scheme_of(url)} URLs here: install the library that it names "
            f"for this scheme ({' '.join(str(error).split())})"
        ) from error
