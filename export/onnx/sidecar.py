"""The sidecar of an exported file: what it is, for whom, and proof that it is still the same."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.config import Precision
from compress.errors import CheckpointError
from compress.files.atomic import sha256_of
from compress.files.documents import parsed_json, shown

if TYPE_CHECKING:
    from compress.checkpoints.checkpoint import Checkpoint
    from compress.checkpoints.description import Description, Structure

SCHEMA_VERSION = 2
MOST_BYTES = 2**24
"""Of a sidecar; what is longer is cut off, and no JSON any more."""
_REQUIRED = {
    *("onnx", "target", "precision", "conversion", "parity", "tools"),
    *("architecture", "num_classes", "classes", "input_size", "mean", "std"),
    *("weights_sha256", "macs", "params"),
}

Size = Annotated[int, Field(ge=1, le=2**53)]


class _Parity(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    batch_size: Size
    relative_error: Annotated[float, Field(ge=0)]
    cosine: Annotated[float, Field(ge=-1 - 1e-6, le=1 + 1e-6)]
    top1_agreement: Annotated[float, Field(ge=0, le=1)]


class _Group(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    dense: Size
    kept: Annotated[int, Field(ge=0, le=2**53)]
    residual: bool


class _Facts(BaseModel):
    """What a measurement takes from any sidecar; other keys are of no consequence."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    architecture: str
    target: str
    precision: Precision
    num_classes: Size
    classes: list[str]
    input_size: Annotated[list[Size], Field(min_length=3, max_length=3)]
    mean: list[float]
    std: list[float]
    weights_sha256: str
    macs: Size | None
    params: Size | None
    parity: list[_Parity] | None = None
    groups: list[_Group] | None = None
    pruning: dict[str, Any] | None = None


def network_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a sidecar says of the network that was exported."""
    return {
        "architecture": checkpoint.architecture,
        "num_classes": checkpoint.num_classes,
        "classes": list(checkpoint.classes),
        "input_size": list(checkpoint.input_size),
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
        "weights_sha256": checkpoint.sha256,
    }


def pruning_facts(description: Description, structure: Structure | None) -> dict[str, Any]:
    """Return what pruning made of a network: its channel groups, and what it said of itself.

    Groups that may not be pruned are left out; there are none of a network that was not analysed.
    """
    groups = structure.groups if structure else ()
    return {
        "groups": [
            {key: getattr(group, key) for key in ("name", "dense", "kept", "residual")}
            for group in groups
            if group.frozen is None
        ],
        "pruning": description.metrics,
    }


def has_sidecar(path: Path) -> bool:
    """Whether a sidecar lies beside an ONNX file: JSON of another tool by that name is none."""
    try:
        document = parsed_json(path.with_suffix(".json").read_bytes()[:MOST_BYTES])
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # whoever reads it says what is wrong with it
        return True
    return isinstance(document, dict) and "schema_version" in document


def read_sidecar(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the sidecar of an ONNX file and prove that it belongs to it.

    Args:
        path: the ONNX file or its sidecar; both share one name but for the suffix.

    Raises:
        CheckpointError: either file is missing, or the sidecar is damaged, of another version or
            of another ONNX file.
    """
    sidecar, model = (Path(path).with_suffix(suffix) for suffix in (".json", ".onnx"))
    document = read_document(
        sidecar, version=SCHEMA_VERSION, required=_REQUIRED, advice="export again"
    )
    require_described(model, document["onnx"], sidecar, advice="export again")
    return document


def read_document(
    sidecar: Path, *, version: int, required: Collection[str], advice: str
) -> dict[str, Any]:
    """Read a sidecar and check its form.

    Args:
        sidecar: the JSON file.
        version: the ``schema_version`` that it must have.
        required: keys that it must have.
        advice: ends the sentence of an error.

    Raises:
        CheckpointError: it is missing, damaged, of another version or lacks a key.
    """
    try:
        with sidecar.open("rb") as stream:
            document = parsed_json(stream.read(MOST_BYTES))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {sidecar}: {error.strerror or error}; {advice}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{sidecar} is not valid JSON; {advice}") from error
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found != version:
        raise CheckpointError(
            f"{sidecar} has schema_version {shown(found)} and this tool reads {version}; {advice}"
        )
    missing = set(required) - document.keys()
    if missing:
        raise CheckpointError(f"{sidecar} lacks {', '.join(sorted(missing))}; {advice}")
    try:
        _Facts.model_validate(document)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) if error.error_count() < 100 else "all"
        raise CheckpointError(f"{sidecar} is damaged at {place}; {advice}") from error
    return document


def require_described(path: Path, entry: Any, sidecar: Path, *, advice: str) -> None:
    """Prove that a file is the one that its sidecar's entry gives a ``sha256`` of.

    Raises:
        CheckpointError: it is missing or another one.
    """
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(entry, dict) or entry.get("sha256") != digest:
        raise CheckpointError(f"{path} is not the file that {sidecar} describes; {advice}")
