"""A checkpoint becomes an ONNX file that is proven to compute the same, and its sidecar.

``model.onnx`` and ``model.json`` appear together, after parity with torch, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import ExportConfig
from compress.errors import CheckpointError, ConfigError
from compress.files import write_json
from export.onnx_check import OnnxFacts
from export.onnx_export import staged_onnx
from export.runners import OnnxRunner, TorchRunner
from compress.targets import Target, load_target
from export.verify import ParityResult, check_parity

if TYPE_CHECKING:
    import numpy as np

    from compress.checkpoint import Checkpoint
    from compress.session import RunDirectory

SCHEMA_VERSION = 1
_REQUIRED = {
    *("onnx", "target", "parity", "tools"),
    *("architecture", "num_classes", "classes", "input_size", "mean", "std"),
    *("weights_sha256", "macs", "params"),
}


def export_checkpoint(
    checkpoint: Checkpoint,
    path: Path,
    *,
    target: Target,
    config: ExportConfig,
    images: np.ndarray,
) -> dict[str, Any]:
    """Export a checkpoint for a target, prove it against torch and write both files.

    Parity is that of ONNX Runtime on the CPU with torch on the CPU, in float32.

    Args:
        checkpoint: the network and what is known of it.
        path: the file, ``*.onnx``; its sidecar is ``*.json`` beside it.
        target: what the file must fit.
        config: batch sizes and tolerance of the parity check.
        images: (N, C, H, W) float32, real and normalised as the network expects them.

    Returns:
        The sidecar's document; docs/export.md describes it.

    Raises:
        ModelError: the network cannot be expressed for the target.
        ParityError: ONNX Runtime computes something else.
        OutputError: a file cannot be written.
        ConfigError: ``path`` does not end in ``.onnx``.
    """
    if path.suffix != ".onnx":
        raise ConfigError(f"an ONNX file is named *.onnx, not {path.name!r}")
    network = _describe(checkpoint)
    with staged_onnx(
        checkpoint.model,
        path,
        target=target,
        input_size=checkpoint.input_size,
        metadata=_as_metadata({**network, "target": target.name}),
    ) as facts:
        parity = _prove(checkpoint, facts, config=config, images=images)
        document = {
            "schema_version": SCHEMA_VERSION,
            "onnx": _file_facts(facts, path.name),
            "target": target.name,
            **network,
            "macs": checkpoint.macs,
            "params": checkpoint.params,
            "parity": [result.to_dict() for result in parity],
            "tools": _tools(),
        }
        write_json(path.with_suffix(".json"), document)
    return document


def export_run(
    run: RunDirectory,
    folder: Path,
    *,
    config: ExportConfig,
    images: np.ndarray,
    model: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Export the dense and the pruned network of a run for its target.

    Args:
        run: the run directory; both networks lie there.
        folder: where ``dense.onnx`` and ``pruned.onnx`` are written.
        config: target and parity.
        images: (N, C, H, W) float32 validation images, for parity.
        model: ``package.module:callable``, where the networks are of the user's own architecture.

    Returns:
        The sidecar of each network, by name.

    Raises:
        CheckpointError: a network is missing or damaged.
        CompressError: see export_checkpoint.
    """
    from compress.checkpoint import load_checkpoint

    target = load_target(config.target)
    return {
        path.stem: export_checkpoint(
            load_checkpoint(path, model),
            folder / f"{path.stem}.onnx",
            target=target,
            config=config,
            images=images,
        )
        for path in (run.dense, run.pruned)
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
    digest = hashlib.sha256(_read(model)).hexdigest()
    if not isinstance(document["onnx"], dict) or document["onnx"].get("sha256") != digest:
        raise CheckpointError(f"{model} is not the file that {sidecar} describes; export again")
    return document


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "architecture": checkpoint.architecture,
        "num_classes": checkpoint.num_classes,
        "classes": list(checkpoint.classes),
        "input_size": list(checkpoint.input_size),
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
        "weights_sha256": checkpoint.sha256,
    }


def _as_metadata(values: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }


def _file_facts(facts: OnnxFacts, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "sha256": facts.sha256,
        "bytes": facts.bytes,
        "opset": facts.opset,
        "ir_version": facts.ir_version,
    }


def _prove(
    checkpoint: Checkpoint, facts: OnnxFacts, *, config: ExportConfig, images: np.ndarray
) -> list[ParityResult]:
    with TorchRunner(checkpoint.model, "cpu") as reference, OnnxRunner(facts.path) as candidate:
        return check_parity(
            reference,
            candidate,
            images,
            batch_sizes=config.parity_batches,
            tolerance=config.limits.fp32.relative_error,
        )


def _tools() -> dict[str, str]:
    import onnx
    import onnxruntime
    import torch

    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
