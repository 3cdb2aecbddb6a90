"""Files that are either the old ones or the new ones, whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from compress.errors import writing


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    Raises:
        OutputError: it cannot be written; an earlier file of this name is kept as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically."""
    write_atomically(path, json.dumps(document, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
