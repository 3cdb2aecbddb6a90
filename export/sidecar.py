"""The sidecar of an ONNX file: what it is, for whom, and proof that it was not changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.files import sha256_of

SCHEMA_VERSION = 2
_REQUIRED = {
    *("onnx", "target", "precision", "conversion", "parity", "tools"),
    *("architecture", "num_classes", "classes", "input_size", "mean", "std"),
    *("weights_sha256", "macs", "params"),
}


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read the sidecar of an ONNX file and prove that it belongs to it.

    Args:
        path: the ONNX file or its sidecar; both share one name but for the suffix.

    Raises:
        CheckpointError: either file is missing, or the sidecar is damaged, of another version or
            of another ONNX file.
    """
    sidecar, model = path.with_suffix(".json"), path.with_suffix(".onnx")
    try:
        document = json.loads(_read(sidecar))
    except ValueError as error:
        raise CheckpointError(f"{sidecar} is not valid JSON; export again") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{sidecar} has schema_version {version!r} and this tool reads {SCHEMA_VERSION}; "
            "export again"
        )
    missing = _REQUIRED - document.keys()
    if missing:
        raise CheckpointError(f"{sidecar} lacks {', '.join(sorted(missing))}; export again")
    recorded = document["onnx"].get("sha256") if isinstance(document["onnx"], dict) else None
    if recorded != _digest(model):
        raise CheckpointError(f"{model} is not the file that {sidecar} describes; export again")
    return document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
