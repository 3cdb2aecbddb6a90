from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from host_gpu import fresh_host_gpu
from onnx import TensorProto, helper, numpy_helper

from bench.measuring.discovery import subjects
from bench.measuring.inputs import Batch, Inputs
from bench.measuring.session import Plan, measure
from bench.measuring.wiring import Wiring, wired
from bench.pages.publish import render_markdown
from bench.reports.report import build_report, load_report, save_report
from bench.reports.schema import Report
from compress.config import BenchConfig
from compress.errors import CheckpointError, ConfigError, DataError, EnvironmentUnfitError
from export.runners import TensorSpec

CONFIG = BenchConfig(
    batch_sizes=(1, 3), threads=1, block_ms=0.2, min_blocks=4, max_seconds=1.0, ratio_precision=1.0
)


def batches(size: int, count: int = 30) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(count, 1, 2, 3)).astype(np.float32)
    for start in range(0, count, size):
        part = images[start : start + size]
        labels = part.reshape(len(part), 6).argmax(axis=1)
        yield Batch({"images": part}, len(part), labels, int(start == 0))


def labelled(count: int = 30) -> Inputs:
    return Inputs("labelled", count, lambda size: batches(size, count), lambda: "f" * 64)


def benchmark(
    run_dir: Path, config: BenchConfig = CONFIG, count: int = 30, **options: Any
) -> Report:
    pair = subjects(run_dir, config=config, precision="fp32")
    plan = Plan(config=config, at_once=8)
    measured = measure(pair, lambda wiring: labelled(count), plan, **options)
    return build_report(pair.about, measured)


def save_network(path: Path, weight: np.ndarray, **changes: Any) -> None:
    """Write Flatten + Gemm and its sidecar as the export does."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
        ],
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 2, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    opsets = [helper.make_opsetid("", 17)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    onnx.checker.check_model(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    sidecar = {
        "schema_version": 2,
        "onnx": {
            "file": path.name,
            "sha256": sha256,
            "bytes": len(data),
            "opset": 17,
            "ir_version": 8,
        },
        "target": "cpu",
        "precision": "fp32",
        "conversion": None,
        "architecture": "linear",
        "num_classes": 6,
        "classes": list("abcdef"),
        "input_size": [1, 2, 3],
        "mean": [0.5],
        "std": [0.25],
        "weights_sha256": sha256[::-1],
        "macs": int(np.count_nonzero(weight)),
        "params": int(weight.size),
        "parity": [
            {
                "reference": "torch (cpu)",
                "candidate": "ONNX Runtime (CPU)",
                "batch_size": 1,
                "images": 30,
                "relative_error": 1e-7,
                "cosine": 1.0,
                "top1_agreement": 1.0,
                "limits": {"relative_error": 1e-4, "cosine": -1.0, "top1_agreement": 0.0},
            }
        ],
        "groups": [{"name": "conv1", "dense": 8, "kept": 5, "residual": True}],
        "pruning": {"criterion": "taylor-gate"},
        "tools": {},
        **changes,
    }
    path.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A dense network that is always right, and one that never sees class 0."""
    save_network(tmp_path / "export" / "dense.onnx", np.eye(6))
    blind = np.eye(6)
    blind[0, 0] = -1
    save_network(tmp_path / "export" / "pruned.onnx", blind)
    return tmp_path


def test_a_run_directory_becomes_a_report(run_dir: Path) -> None:
    steps: list[tuple[str, float]] = []
    found = benchmark(run_dir, progress=lambda step, share: steps.append((step, share)))
    labels = np.concatenate([batch.labels for batch in batches(8)])  # type: ignore[misc]
    lost = int((labels == 0).sum())
    assert found.networks.reference.top1 == 1.0
    assert found.networks.pruned.top1 == pytest.approx(1 - lost / 30)
    assert found.comparison.accuracy is not None
    assert found.comparison.accuracy.drop.flips_to_wrong == lost
    assert found.validation.model_dump() == {
        "kind": "labelled",
        "identity": "f" * 64,
        "images": 30,
        "skipped": 1,
        "max_skipped": 0.01,
    }
    assert found.pruning == {"criterion": "taylor-gate"}
    assert [group.model_dump() for group in found.groups] == [
        {"name": "conv1", "dense": 8, "kept": 5, "residual": True}
    ]
    assert [record.batch_size for record in found.comparison.latency] == [1, 3]
    assert found.comparison.bytes_ratio == 1.0
    assert found.runtime == "ONNX Runtime (CPU)"
    assert found.environment.threads == 1
    assert found.networks.reference.parity[0].relative_error == 1e-7
    assert {step for step, _ in steps} == {
        "accuracy",
        "latency, batch 1",
        "latency, batch 3",
        "layers, batch 1",
        "layers, batch 3",
    }
    save_report(found, run_dir / "report.json")
    assert load_report(run_dir / "report.json") == found
    assert str(run_dir) not in render_markdown(found, [])


def test_a_missing_export_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        benchmark(tmp_path)


def test_exports_that_do_not_belong_together(run_dir: Path) -> None:
    save_network(run_dir / "export" / "pruned.onnx", np.eye(6), num_classes=7)
    with pytest.raises(CheckpointError, match=r"differ in num_classes \(6 and 7\)"):
        benchmark(run_dir)


def test_each_precision_has_files_of_its_own(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dense\.fp16\.onnx; write it with: compress export"):
        subjects(run_dir, config=BenchConfig(runtime="onnxruntime-cpu"), precision="fp16")
    save_network(run_dir / "export" / "dense.fp16.onnx", np.eye(6), precision="fp16")
    save_network(run_dir / "export" / "pruned.fp16.onnx", np.eye(6))
    with pytest.raises(CheckpointError, match=r"differ in precision \(fp16 and fp32\)"):
        subjects(run_dir, config=BenchConfig(runtime="onnxruntime-cpu"), precision="fp16")


def test_the_runtime_decides_which_file_is_measured(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "dense.safetensors").write_bytes(b"12345")
    (run_dir / "pruned.safetensors").write_bytes(b"123")
    found = subjects(run_dir, config=BenchConfig(runtime="torch-cpu"), precision="fp32")
    assert found.pruned.artefact.bytes == 3
    found = subjects(run_dir, config=BenchConfig(runtime="onnxruntime-cuda"), precision="fp32")
    assert found.reference.path == run_dir / "export" / "dense.onnx"
    with pytest.raises(ConfigError, match="torch does not run the INT8 network"):
        subjects(run_dir, config=BenchConfig(runtime="torch-cpu"), precision="int8")
    monkeypatch.setattr("bench.measuring.discovery.require_usable", lambda runtime: None)
    with pytest.raises(CheckpointError, match=r"dense\.engine"):
        subjects(run_dir, config=BenchConfig(runtime="tensorrt"), precision="fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_runtime_that_cannot_work_here_is_refused(run_dir: Path) -> None:
    config = CONFIG.model_copy(update={"runtime": "onnxruntime-cuda"})
    with pytest.raises(EnvironmentUnfitError, match="CUDA"):
        benchmark(run_dir, config)


def test_no_images_is_one_sentence(run_dir: Path) -> None:
    with pytest.raises(DataError, match="none of 0 validation images"):
        benchmark(run_dir, count=0)


def test_timing_takes_real_inputs_and_repeats_them() -> None:
    spec = TensorSpec("images", "float32", ("batch", 1, 2, 3))
    wiring: Wiring = wired((spec,), (spec,), ("a", "b"))
    whole = np.concatenate([batch.feeds["images"] for batch in batches(8)])
    np.testing.assert_array_equal(labelled().first(10, wiring)["images"], whole[:10])
    few = labelled(3).first(7, wiring)["images"]
    np.testing.assert_array_equal(few, whole[:3][np.arange(7) % 3])
    assert few.flags.c_contiguous
    with pytest.raises(DataError, match="none could be read"):
        labelled(0).first(4, wiring)


class Builder:
    """ONNX Runtime's TensorRT provider, as far as it builds engines; it computes on the CPU.

    One engine serves all batch sizes from the least to the largest met by a session; outside of
    these it is built anew. A session that has none yet takes what lies in its folder.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built: list[tuple[int, int]] = []
        """Of each engine: for which sizes."""
        self.runs: list[tuple[int, int, int]] = []
        """Number of the session, of its engine, batch size."""
        self.timings: set[str] = set()
        sessions = 0
        outer = self

        class Session(onnxruntime.InferenceSession):
            def __init__(self, path: str, options: Any, providers: Any, **_: Any) -> None:
                nonlocal sessions
                self.number, sessions = sessions, sessions + 1
                self.asked = providers
                self.folder = Path(providers[0][1]["trt_engine_cache_path"])
                outer.timings.add(providers[0][1]["trt_timing_cache_path"])
                self.engine: tuple[int, int, int] | None = None
                super().__init__(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return [name for name, _ in self.asked]

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                super().run_with_iobinding(binding, options)
                size = binding.get_outputs()[0].shape()[0]
                # Its names of files tell no weights: dense and pruned have the same.
                file = self.folder / "graph.engine"
                if self.engine is None and file.exists():
                    self.engine = tuple(json.loads(file.read_text()))
                number, least, most = self.engine or (None, size, size)
                if number is None or not least <= size <= most:
                    outer.built.append((min(least, size), max(most, size)))
                    self.engine = (len(outer.built) - 1, *outer.built[-1])
                    file.write_text(json.dumps(self.engine))
                assert self.engine is not None
                outer.runs.append((self.number, self.engine[0], size))

        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        monkeypatch.setattr("export.runners.onnx_runner.Cuda", fresh_host_gpu())
        monkeypatch.setattr("export.runners.onnx_runner._load_tensorrt", lambda: None)


@pytest.mark.parametrize("sizes", [(1, 3, 8), (8, 1), (2,)])
def test_the_control_runs_the_engine_of_the_reference_and_none_is_built_while_timed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    builder = Builder(monkeypatch)
    wanted = {"runtime": "onnxruntime-tensorrt", "batch_sizes": sizes}
    found = benchmark(run_dir, CONFIG.model_copy(update=wanted))
    assert found.networks.reference.top1 == 1.0
    assert found.networks.pruned.top1 != 1.0  # which the engine of the reference would have given
    last = {session: engine for session, engine, _ in builder.runs}
    reference, pruned, control = (last[session] for session in range(3))
    assert reference == control != pruned
    # engines are built for the largest size first, and then for all of them
    bounds = [(max(sizes), max(sizes)), (min(sizes), max(sizes))]
    assert sorted(builder.built) == sorted(2 * list(dict.fromkeys(bounds)))
    assert builder.built[0] == bounds[0]
    first_of_control = next(at for at, run in enumerate(builder.runs) if run[0] == 2)
    assert {engine for session, engine, _ in builder.runs[first_of_control:]} == {reference, pruned}
    assert len(builder.timings) == 1
