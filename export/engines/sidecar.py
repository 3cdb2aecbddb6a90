"""The JSON beside an engine: what it was built from and by, and where it may run.

An engine is a program for one GPU generation and one TensorRT release. Its sidecar is read, and
compared with the machine, before TensorRT sees the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, EnvironmentUnfitError
from export.onnx.sidecar import read_document, require_described

if TYPE_CHECKING:
    from export.engines.api import Provider
    from export.nvml import Gpu

SCHEMA_VERSION = 1
NETWORK_FACTS = (
    *("architecture", "num_classes", "classes", "input_size", "mean", "std"),
    *("weights_sha256", "macs", "params"),
)
"""What an engine's sidecar takes over from that of its ONNX file."""
PRUNING_FACTS = ("groups", "pruning")
"""What it takes over too, where that is of a version that tells."""
_REQUIRED = {
    *("engine", "provider", "tensorrt", "sm", "gpu", "driver", "target", "precision"),
    *("strongly_typed", "profiles", "workspace_mib", "onnx", "build_seconds", "timing_cache"),
    "inspection",
    *NETWORK_FACTS,
}


def sidecar_path(path: Path) -> Path:
    """Return the name of an engine's sidecar: ``model.engine`` has ``model.engine.json``."""
    return path.with_name(f"{path.name}.json")


def read_engine_sidecar(path: Path) -> dict[str, Any]:
    """Read the sidecar of an engine and prove that it belongs to it.

    Args:
        path: the engine.

    Raises:
        CheckpointError: either file is missing, or the sidecar is damaged, of another version or
            of another engine.
    """
    sidecar, advice = sidecar_path(path), "build the engine again"
    if path.is_file() and not sidecar.exists():
        raise CheckpointError(
            f"cannot read {sidecar}: No such file; an engine is only used with the sidecar that "
            "was written beside it"
        )
    document = read_document(sidecar, version=SCHEMA_VERSION, required=_REQUIRED, advice=advice)
    require_described(path, document["engine"], sidecar, advice=advice)
    if not isinstance(document["onnx"], dict) or type(document["onnx"].get("sha256")) is not str:
        raise CheckpointError(f"{sidecar} is damaged at onnx.sha256; {advice}")
    return document


def refuse_foreign_engine(
    document: dict[str, Any], *, provider: Provider, version: str, gpu: Gpu | None
) -> None:
    """Refuse an engine that another TensorRT or another GPU generation was built for.

    Args:
        document: the engine's sidecar.
        provider: the library that shall load it.
        version: its version.
        gpu: the GPU that shall run it.

    Raises:
        EnvironmentUnfitError: it cannot run here; the sentence says what to build where.
    """
    built_by = f"{document['provider']} {document['tensorrt']}"
    again = f"build it again on this machine for target {document['target']}"
    if gpu is None:
        raise EnvironmentUnfitError(
            f"the engine was built by {built_by} for a GPU and there is no usable one here; "
            "use a machine with one, or measure the ONNX file on the CPU"
        )
    if (provider, version) != (document["provider"], document["tensorrt"]):
        raise EnvironmentUnfitError(
            f"the engine was built by {built_by} and here is {provider} {version}, which cannot "
            f"load it; {again}, or install {built_by}"
        )
    # No SM means TensorRT-RTX, which compiles for the GPU that loads the engine.
    if document["sm"] is not None and document["sm"] != gpu.sm:
        raise EnvironmentUnfitError(
            f"the engine was built for SM {document['sm']} ({document['gpu'] or 'unnamed'}) and "
            f"this {gpu.name} is SM {gpu.sm}; {again}, or use it on the GPU that it was built for"
        )
