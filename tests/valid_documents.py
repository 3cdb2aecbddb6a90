"""Documents as this tool writes them, for tests that break them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from conftest import lived_in, random_mask

from bench.statistics.shares import tango_interval
from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import METADATA_KEY, Description
from compress.config import Budget, load_config
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.sweep.report import PointState, stored_flips, sweep_document
from compress.sweep.request import Goal

# Sidecars

NETWORK: dict[str, Any] = {
    "architecture": "lenet",
    "num_classes": 2,
    "classes": ["a", "b"],
    "input_size": [1, 8, 8],
    "mean": [0.5],
    "std": [0.2],
    "weights_sha256": "0" * 64,
    "macs": 100,
    "params": 10,
    "target": "cpu",
    "precision": "fp32",
    "parity": [{"batch_size": 1, "relative_error": 1e-7, "cosine": 1.0, "top1_agreement": 1.0}],
    "groups": [{"name": "conv1", "dense": 8, "kept": 5, "residual": False}],
    "pruning": {"finetuned": {"top1": 90.0, "images": 100}},
}
DIGEST = hashlib.sha256(b"network").hexdigest()
SIDECAR = {
    **NETWORK,
    "schema_version": 2,
    "onnx": {"file": "pruned.onnx", "sha256": DIGEST, "bytes": 7, "opset": 17, "ir_version": 8},
    "conversion": None,
    "tools": {"onnx": "1"},
}
ENGINE = {
    **NETWORK,
    "schema_version": 1,
    "engine": {"file": "pruned.engine", "sha256": DIGEST},
    "onnx": {"sha256": DIGEST},
    "provider": "tensorrt",
    "tensorrt": "10.4.0",
    "sm": "7.0",
    "gpu": "x",
    "driver": "1",
    "strongly_typed": True,
    "profiles": [],
    "workspace_mib": 1,
    "build_seconds": 1.0,
    "timing_cache": False,
    "inspection": None,
}

# Weights

SIZE = (1, 8, 8)


GRAPH = analyse(build_model("lenet", num_classes=3, in_channels=1), SIZE)


def _pruned(path: Path) -> bytes:
    """Return a pruned LeNet as a file of ours."""
    model = lived_in(build_model("lenet", num_classes=3, in_channels=1)).eval()
    kept = random_mask(GRAPH, 1, 0.8)
    description = Description(
        architecture="lenet", classes=("a", "b", "c"), input_size=SIZE, mean=(0.5,), std=(0.2,)
    )
    smaller = shrink(model, GRAPH, kept)
    save_checkpoint(path, smaller, description=description, graph=GRAPH, kept=kept)
    return path.read_bytes()


with tempfile.TemporaryDirectory() as _folder:
    PRUNED = _pruned(Path(_folder) / "pruned.safetensors")
LENGTH = int.from_bytes(PRUNED[:8], "little")
HEADER = json.loads(PRUNED[8 : 8 + LENGTH])
DESCRIPTION = json.loads(HEADER["__metadata__"][METADATA_KEY])


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + PRUNED[8 + LENGTH :]


def with_description(description: Any) -> bytes:
    return with_header({**HEADER, "__metadata__": {METADATA_KEY: json.dumps(description)}})


# Tables, sweeps, oracles

IDENTITY = {"network": "0123", "images": "4567"}
LOG = [
    {"schema_version": 1, **IDENTITY},
    {"batch": 0, "removed": "conv1", "first": 0, "sums": [0.5, 1.25, 3]},
    {"batch": 1, "removed": "conv1", "first": 8, "sums": [0.5, 1.25, 4]},
]
SHAPE = {"kind": "conv2d", "kernel": [3, 3], "stride": [1, 1], "dilation": [1, 1]}
SHAPE |= {"input_size": [8, 8], "output_size": [8, 8], "groups": 1, "group_width": 0}
TABLE = {
    "schema_version": 1,
    "fingerprint": {
        "machine": "a CPU",
        "runtime": "onnxruntime-cpu",
        "version": "1.2",
        "precision": "fp32",
        "batch": 1,
        "threads": 1,
        "network": "0123",
    },
    "channel_multiple": 8,
    "fixed_ms": 0.1,
    "layers": [
        {
            "shape": {**SHAPE, "then": ["relu"]},
            "read": [8, 16],
            "written": [8, 16],
            "ms": [[1.0, 2.0], [2.0, None]],
        }
    ],
    "weights": {"bytes": [0, 1000], "ms": [0.0, 0.5]},
    "dense": {"ms": 4.0, "weight_bytes": 1000},
    "error": {"mean": 0.01, "largest": 0.02, "pairs_ms": [[1.01, 1.0], [1.98, 2.0]]},
    "spread": 0.01,
}


def _sweep() -> dict[str, Any]:
    """Return the document of a sweep of two points, one of them unfinished."""
    costs = {"macs": 1000, "params": 400, "channels": 50}
    stages = {name: {"top1": 90.0, "top5": 99.0} for name in ("masked", "pruned", "finetuned")}
    budgets = tuple(Budget(kind="macs", value=share) for share in (0.8, 0.5))
    found = {"dense": costs, "costs": costs, **stages}
    return sweep_document(
        Goal(budgets=budgets, config=load_config()),
        accuracy={"top1": 92.0, "top5": 99.5},
        dense_seconds=5.0,
        points=[
            PointState("macs-0.8", budgets[0], found, None, 1.0, stored_flips(FLIPS)),
            PointState("macs-0.5", budgets[1], None, "out of memory", 1.0),
        ],
        search=None,
        chosen=None,
        interval=tango_interval,
    )


FLIPS = {"flips": {"to_wrong": 25, "to_right": 5, "images": 1000}}
SWEEP = json.loads(json.dumps(_sweep()))
