"""What was measured so far, one JSON object a line, so that a stopped measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import CheckpointError, ConfigError, writing
from compress.files.atomic import write_atomically

SCHEMA_VERSION = 1


class Key(NamedTuple):
    """Which figures a line holds."""

    batch: int
    """Number of the batch of images."""
    removed: str
    """Name of the job: a group, or two."""
    first: int
    """Position of the first removal in the job."""


class ChangeLog:
    """A file of figures under keys, each written as soon as it is known.

    The first line says what is measured. Figures are sums over the images of a batch. Floats are
    written so that they read back exactly, so a resumed file equals one that was never stopped.

    Args:
        path: the file; what is there is gone on with.
        identity: what is measured; equal for all runs that may share the file.

    Raises:
        ConfigError: the file there is of another measurement.
        CheckpointError: the file there is damaged.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.entries: dict[Key, list[float]] = {}
        header = {"schema_version": SCHEMA_VERSION, **identity}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A line that a kill or a full disk cut off was never finished.
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not whole:
            write_atomically(path, json.dumps(header) + "\n")
            return
        self._read(whole, header)
        if "".join(whole) != text:
            write_atomically(path, "".join(whole))

    def entry(self, key: Key, compute: Callable[[], list[float]]) -> list[float]:
        """Return the figures of a key; what is not there is computed and written."""
        if key not in self.entries:
            self.entries[key] = compute()
            line = json.dumps({**key._asdict(), "sums": self.entries[key]})
            with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        return self.entries[key]

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        try:
            found, *documents = map(json.loads, lines)
            self._check(found, header)
            for document in documents:
                sums = [float(value) for value in document.pop("sums")]
                self.entries[Key(**document)] = sums
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is damaged: start anew with --overwrite") from error

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for name, wanted in header.items():
            if found.get(name) != wanted:
                raise ConfigError(
                    f"{self.path} was measured with {name} = {_short(found.get(name))} and now "
                    f"{_short(wanted)} is given: give the same, or start anew with --overwrite"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12]
