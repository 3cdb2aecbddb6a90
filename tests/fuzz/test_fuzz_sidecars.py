"""Sidecars of exports and engines: whatever they say, a sentence or the facts of a network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mutations import damaged, fuzzed, mutated, refused_in_a_sentence

from bench.measuring.discovery import subjects
from compress.config import BenchConfig
from export.engines.sidecar import read_engine_sidecar

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    folder.mkdir()
    for name in ("dense.onnx", "pruned.onnx", "pruned.engine"):
        (folder / name).write_bytes(b"network")
    (folder / "dense.json").write_text(json.dumps(SIDECAR))
    return folder.parent


def use(run: Path) -> None:
    """Do with both sidecars what a measurement does before it loads a network."""
    found = subjects(run, config=BenchConfig(), precision="fp32")
    for subject in found:
        assert subject.artefact.bytes == 7
        assert subject.channel_multiple >= 1
        assert all(group.dense for group in subject.groups)


@fuzzed
@given(document=mutated(SIDECAR))
def test_a_sidecar_of_any_structure(run: Path, document: Any) -> None:
    (run / "export" / "pruned.json").write_text(json.dumps(document))
    refused_in_a_sentence(lambda: use(run))


@fuzzed
@given(data=damaged(json.dumps(SIDECAR).encode()))
def test_a_sidecar_of_any_bytes(run: Path, data: bytes) -> None:
    (run / "export" / "pruned.json").write_bytes(data)
    refused_in_a_sentence(lambda: use(run))


@fuzzed
@given(document=mutated(ENGINE))
def test_an_engine_s_sidecar_of_any_structure(run: Path, document: Any) -> None:
    path = run / "export" / "pruned.engine"
    path.with_name("pruned.engine.json").write_text(json.dumps(document))
    refused_in_a_sentence(lambda: read_engine_sidecar(path))


def test_the_sidecars_that_are_mutated_are_good(run: Path) -> None:
    (run / "export" / "pruned.json").write_text(json.dumps(SIDECAR))
    use(run)
    path = run / "export" / "pruned.engine"
    path.with_name("pruned.engine.json").write_text(json.dumps(ENGINE))
    assert read_engine_sidecar(path)["sm"] == "7.0"
