"""What in a folder is data, and what only lies there.

Names that begin with a dot, and those that file managers, archives and network drives leave behind,
are neither classes nor images. No real folder is listed twice, whatever links lead to it, and what
is no regular file is left out: reading a named pipe would wait for ever.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from compress.errors import DataError

logger = logging.getLogger("compress")

LEFT_BEHIND = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *(
            "__macosx",
            "icon\r",
            "@eadir",
            "@recycle",
            "@recently-snapshot",
            "#recycle",
            "#snapshot",
        ),
        *("lost+found", "__pycache__"),
    }
)
"""In small letters: of Windows; of macOS, Synology and QNAP; of Linux and Python."""

APART = b"\0"
"""What no name holds."""

Kind = Literal["folder", "file", "special"]


def is_data(name: str) -> bool:
    """Return whether a name within a data set can be that of a class or of an image."""
    return not name.startswith(".") and name.casefold() not in LEFT_BEHIND


def is_data_path(name: str) -> bool:
    """Return whether every part of a relative path, with slashes, can belong to a data set."""
    return all(part in ("", ".", "..") or is_data(part) for part in name.split("/"))


def is_image(name: str) -> bool:
    """Return whether a name ends like that of an image."""
    return name.lower().endswith(IMG_EXTENSIONS)


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder, sorted.

    Raises:
        DataError: names that are no text, or that cannot be told from each other.
        OSError: the folder cannot be listed.
    """
    with os.scandir(folder) as entries:
        folders = [e.name for e in filter(_is_data_entry, entries) if _kind(e) == "folder"]
    names = sorted(folders)
    require_distinct(names, os.fspath(folder))
    return names


def require_distinct(names: Iterable[str], where: str) -> None:
    """Refuse class names that cannot be written down, or that look like each other.

    Raises:
        DataError: one is not UTF-8 or holds control characters, or two look the same.
    """
    seen: dict[str, str] = {}
    for name in names:
        kinds = set(map(unicodedata.category, name))
        if kinds & {"Cs", "Cc"}:  # surrogates stand for bytes that are not UTF-8
            what = "is not UTF-8" if "Cs" in kinds else "holds control characters"
            raise DataError(f"the class name {name!a} in {where} {what}: rename it")
        other = seen.setdefault(_looks(name), name)
        if other != name:
            raise DataError(
                f"the class names {other!a} and {name!a} in {where} look the same and "
                "are different: rename or join them"
            )


def _looks(name: str) -> str:
    """Return a name as it is seen: composed, without what is invisible."""
    seen = "".join(c for c in name if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFC", seen).split())


class Found(NamedTuple):
    """The images in a folder and in the real folders below it."""

    folders: list[tuple[str, bytes]]
    """Path of each folder, and the names of its images, sorted and joined by ``APART``: a million
    strings take 100 MB."""
    links: list[str]
    """Paths of the links to folders, sorted; they were not followed."""


class Walk:
    """Lists the images in folders, each real folder once."""

    def __init__(self) -> None:
        self._entered: dict[tuple[int, int], str] = {}
        self._special: list[str] = []
        self._again: list[str] = []

    def enter(self, folder: str) -> str | None:
        """Mark a folder as listed; return the path by which it was before, if it was.

        Raises:
            OSError: it is gone.
        """
        found = os.stat(folder)  # noqa: PTH116 - Path takes seconds more
        identity = found.st_dev, found.st_ino
        before = self._entered.get(identity)
        self._entered.setdefault(identity, folder)
        return before

    def shut(self, other: Walk) -> None:
        """Mark what another walk has listed as listed here."""
        self._entered = {**other._entered, **self._entered}

    def follow(self, link: str) -> Found:
        """List what a link leads to, unless that is listed already.

        Raises:
            OSError: a folder cannot be listed.
        """
        if self.enter(link) is None:
            return self.images(link)
        self._again.append(link)
        return Found([], [])

    def images(self, folder: str, *, deep: bool = True) -> Found:
        """List the images of a folder, and of the real folders below it unless told otherwise.

        A link to a file that is not there is listed like the broken image that it is.

        Raises:
            OSError: a folder cannot be listed.
        """
        found, links, waiting = [], [], [folder]
        while waiting:
            path = waiting.pop()
            names = []
            with os.scandir(path) as entries:
                for entry in filter(_is_data_entry, entries):
                    kind = _kind(entry)
                    if kind == "folder" and entry.is_symlink():
                        links.append(entry.path)
                    elif kind == "folder" and deep:
                        self.enter(entry.path)
                        waiting.append(entry.path)
                    elif kind == "file" and is_image(entry.name):
                        names.append(entry.name)
                    elif kind == "special" and is_image(entry.name):
                        self._special.append(entry.path)
            found.append((path, APART.join(map(os.fsencode, sorted(names)))))
        return Found(sorted(found), sorted(links))

    def report(self) -> None:
        """Name in the log what was left out."""
        for paths, why in (
            (self._special, "they are no regular files"),
            (self._again, "they are links to folders that are listed elsewhere"),
        ):
            if paths:
                logger.warning("left out, since %s: %s", why, listed(paths))


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return a few names for a message, letters that look alike told apart."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(ascii(name) for name in names[:limit]) + more


def _is_data_entry(entry: os.DirEntry[str]) -> bool:
    return is_data(entry.name)


def _kind(entry: os.DirEntry[str]) -> Kind:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except OSError:  # a link that leads nowhere, or to itself: reading it will say so
        return "file"
    return "special"
