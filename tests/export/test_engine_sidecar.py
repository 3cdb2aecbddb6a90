from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_files import T4, V100, build_with, install, write_onnx

from compress.errors import CheckpointError, EnvironmentUnfitError
from export.engines.sidecar import read_engine_sidecar, refuse_foreign_engine, sidecar_path
from export.nvml import Gpu


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(monkeypatch, "10.4.0")
    path = tmp_path / "model.fp32.engine"
    build_with("10.4.0", write_onnx(tmp_path / "model.onnx"), path)
    return path


def change(path: Path, **values: Any) -> None:
    sidecar = sidecar_path(path)
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **values}))


def test_a_sidecar_keeps_the_whole_name_of_its_engine() -> None:
    assert sidecar_path(Path("a/model.fp16.engine")) == Path("a/model.fp16.engine.json")


def test_an_engine_is_read_with_its_sidecar(engine: Path) -> None:
    assert read_engine_sidecar(engine)["engine"]["file"] == "model.fp32.engine"


def test_an_engine_without_a_sidecar_is_refused(engine: Path) -> None:
    sidecar_path(engine).unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*\.json: No such file"):
        read_engine_sidecar(engine)


def test_a_sidecar_without_an_engine_is_refused(engine: Path) -> None:
    engine.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*\.engine: No such file"):
        read_engine_sidecar(engine)


@pytest.mark.parametrize("text", ["{", "\x80", ""])
def test_a_damaged_sidecar_is_refused(engine: Path, text: str) -> None:
    sidecar_path(engine).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="is not valid JSON; build the engine again"):
        read_engine_sidecar(engine)


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema_version": 2}', "null"])
def test_a_sidecar_of_another_schema_is_refused(engine: Path, text: str) -> None:
    sidecar_path(engine).write_text(text)
    with pytest.raises(CheckpointError, match=r"schema_version .* and this tool reads 1"):
        read_engine_sidecar(engine)


def test_a_sidecar_that_lacks_something_says_what(engine: Path) -> None:
    document = json.loads(sidecar_path(engine).read_text())
    del document["mean"], document["driver"]
    sidecar_path(engine).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="lacks driver, mean; build the engine again"):
        read_engine_sidecar(engine)


def test_another_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"is not the file that .* describes"):
        read_engine_sidecar(engine)


def test_a_sidecar_that_names_no_file_is_refused(engine: Path) -> None:
    change(engine, engine=None)
    with pytest.raises(CheckpointError, match=r"is not the file that .* describes"):
        read_engine_sidecar(engine)


def test_an_engine_of_this_machine_is_let_through(engine: Path) -> None:
    document = read_engine_sidecar(engine)
    refuse_foreign_engine(document, provider="tensorrt", version="10.4.0", gpu=V100)
    other = Gpu("Tesla V100-PCIE-32GB", "7.0", "535.1")  # another board of the same generation
    refuse_foreign_engine(document, provider="tensorrt", version="10.4.0", gpu=other)


@pytest.mark.parametrize(
    ("provider", "version", "gpu", "reason"),
    [
        ("tensorrt", "10.4.0", None, "built by tensorrt 10.4.0 for a GPU and there is no usable"),
        ("tensorrt", "10.4.0", T4, r"for SM 7\.0 \(Tesla V100.*and this Tesla T4 is SM 7\.5"),
        ("tensorrt", "10.16.1.11", V100, r"by tensorrt 10\.4\.0 and here is tensorrt 10\.16\.1"),
        ("tensorrt", "8.6.1", V100, r"or install tensorrt 10\.4\.0$"),
        ("tensorrt_rtx", "10.4.0", V100, "here is tensorrt_rtx 10.4.0, which cannot load it"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    engine: Path, provider: Any, version: str, gpu: Gpu | None, reason: str
) -> None:
    with pytest.raises(EnvironmentUnfitError, match=reason) as caught:
        refuse_foreign_engine(
            read_engine_sidecar(engine), provider=provider, version=version, gpu=gpu
        )
    assert ("for target test" in str(caught.value)) is (gpu is not None)


def test_an_engine_of_rtx_goes_to_any_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "rtx-1.7.1.116", gpu=None)
    path = tmp_path / "model.engine"
    document = build_with("rtx-1.7.1.116", write_onnx(tmp_path / "model.onnx"), path)
    for gpu in (V100, T4):
        refuse_foreign_engine(document, provider="tensorrt_rtx", version="1.7.1.116", gpu=gpu)
