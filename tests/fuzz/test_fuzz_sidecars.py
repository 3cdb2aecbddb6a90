"""Sidecars of exports and engines: whatever they say, a sentence or the facts of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mutations import damaged, fuzzed, mutated, refused_in_a_sentence
from valid_documents import ENGINE, SIDECAR

from bench.measuring.discovery import subjects
from compress.config import BenchConfig
from export.engines.sidecar import read_engine_sidecar


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
