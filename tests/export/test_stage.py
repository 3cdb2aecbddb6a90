from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from host_gpu import HostGpu, fresh_host_gpu
from onnx_models import rounds_half_precision
from runs import DATA, config_of, pruned_run
from tensorrt_contract import fake_tensorrt

from bench.measuring.discovery import subjects
from bench.measuring.session import Plan, measure
from bench.measuring.sources import dataset_inputs
from bench.reports.report import build_report
from compress.checkpoints.checkpoint import load_checkpoint
from compress.config import BenchConfig, DataConfig, ExportConfig
from compress.config.targets import load_target
from compress.data.loading import Batch
from compress.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentUnfitError,
    OutputError,
    ParityError,
)
from compress.runs.rundirectory import RunDirectory
from export import stage
from export.checkpoint_to_onnx import Samples, samples_of
from export.engines.checks import runs_on
from export.nvml import Gpu
from export.onnx.sidecar import read_sidecar
from export.runners import engine_runner
from export.stage import Exported, export_run
from export.summary import export_sheet

CONFIG = config_of("resnet20", steps=1, interval=1)
EVERY = samples_of(DATA, CONFIG)
SAMPLES = Samples(EVERY.validation[:16], EVERY.training)
HOST = Gpu(HostGpu.name, HostGpu.sm, "570.1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return pruned_run(tmp_path_factory.mktemp("stage") / "run", CONFIG)


def export(run: RunDirectory, folder: Path, **options: Any) -> Exported:
    rest = {key: options.pop(key) for key in ("engine", "triton", "samples") if key in options}
    limits = {"int8": {"top1_agreement": 0.0}}  # one epoch leaves the classes nearly tied
    config = ExportConfig(parity_images=16, calibration_images=64, limits=limits, **options)
    return export_run(run, folder, config=config, **{"samples": SAMPLES, **rest})


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU of SM 9.0 and TensorRT 10.4, both stand-ins."""
    module = fake_tensorrt("10.4.0")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("export.runners.engine_runner.Cuda", fresh_host_gpu())
    for where in ("export.nvml.find_gpu", "export.engines.build.find_gpu"):
        monkeypatch.setattr(where, lambda: HOST)
    return module


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        pytest.param("fp32", onnx.TensorProto.FLOAT, marks=pytest.mark.slow),
        ("fp16", onnx.TensorProto.FLOAT16),
    ],
)
def test_the_weights_are_of_the_precision(
    run: RunDirectory, tmp_path: Path, precision: str, kind: int
) -> None:
    done = export(run, tmp_path, target="v100", precision=precision)
    suffix = "" if precision == "fp32" else f".{precision}"
    stems = [f"{network}{suffix}" for network in ("dense", "pruned")]
    assert names(tmp_path) == {f"{stem}.{kind}" for stem in stems for kind in ("onnx", "json")}
    for network, stem in zip(("dense", "pruned"), stems, strict=True):
        sidecar = read_sidecar(tmp_path / f"{stem}.onnx")
        assert sidecar == json.loads(json.dumps(done.onnx[network]))
        assert (sidecar["precision"], sidecar["onnx"]["opset"]) == (precision, 17)
        graph = onnx.load(tmp_path / f"{stem}.onnx")
        metadata = {entry.key: entry.value for entry in graph.metadata_props}
        assert metadata["precision"] == precision
        kernels = {node.input[1] for node in graph.graph.node if node.op_type == "Conv"}
        kinds = {tensor.data_type for tensor in graph.graph.initializer if tensor.name in kernels}
        assert kinds == {kind}
    assert done.onnx["pruned"]["weights_sha256"] == load_checkpoint(run.pruned).sha256
    assert done.onnx["pruned"]["onnx"]["bytes"] < done.onnx["dense"]["onnx"]["bytes"]
    assert done.onnx["pruned"]["parity"][-1]["images"] == 16


@pytest.mark.slow
def test_int8_is_calibrated_on_training_images(run: RunDirectory, tmp_path: Path) -> None:
    seen: list[np.ndarray] = []

    def training() -> list[Batch]:
        batches = list(SAMPLES.training())
        seen.extend(batch.images.numpy() for batch in batches)
        return batches

    done = export(
        *(run, tmp_path),
        target="v100",
        precision="int8",
        samples=Samples(SAMPLES.validation, training),
    )
    conversion = done.onnx["pruned"]["conversion"]
    assert conversion["calibration"] == "mse"
    assert conversion["images"] == len(DATA.train)  # there are no 512
    assert conversion["rest"] is None
    train = {image.numpy().tobytes() for image, _ in DATA.train}
    assert {image.tobytes() for batch in seen for image in batch} == train
    assert done.warnings == ("a V100 has no INT8 tensor cores, so INT8 rarely beats FP16 there",)
    assert done.onnx["dense"]["parity"][0]["cosine"] > 0.97


@pytest.mark.slow
def test_where_the_opset_allows_it_the_rest_of_int8_is_fp16(
    run: RunDirectory, tmp_path: Path
) -> None:
    done = export(run, tmp_path, target="a100", precision="int8")
    assert done.onnx["dense"]["onnx"]["opset"] == 20
    rest = done.onnx["dense"]["conversion"]["rest"]
    assert rest["weights"] > 0 if rounds_half_precision() else rest is None


def test_images_of_one_class_cannot_calibrate(run: RunDirectory, tmp_path: Path) -> None:
    whole = next(iter(SAMPLES.training()))
    rows = whole.labels == 0
    batch = Batch(whole.images[rows].repeat(4, 1, 1, 1), whole.labels[rows].repeat(4), 0)
    samples = Samples(SAMPLES.validation, lambda: [batch])
    with pytest.raises(DataError, match="class"):
        export(run, tmp_path, precision="int8", samples=samples)
    assert names(tmp_path) == set()


def test_a_precision_that_the_target_lacks(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target cpu does not compute fp16; it computes fp32"):
        export(run, tmp_path, precision="fp16")


@pytest.mark.parametrize("batch", [(1, 8), "dynamic"])
def test_engines_are_built_and_run_against_torch(
    run: RunDirectory, tmp_path: Path, h100: Any, batch: Any
) -> None:
    done = export(
        *(run, tmp_path / "out"),
        target="h100",
        precision="fp16",
        batch=batch,
        engine=True,
        triton=tmp_path / "models",
    )
    for network in ("dense", "pruned"):
        sidecar = done.engines[network]
        parity = sidecar["parity"]
        assert [found["batch_size"] for found in parity] == [
            *(batch if batch != "dynamic" else (1, 8, 32))
        ]
        assert parity[0]["candidate"] == "TensorRT 10.4.0 (Host GPU)"
        assert sidecar["onnx"]["sha256"] == done.onnx[network]["onnx"]["sha256"]
        written = tmp_path / "out" / f"{network}.fp16.engine.json"
        assert json.loads(written.read_text()) == json.loads(json.dumps(sidecar))
    found = names(tmp_path / "out")
    assert {name for name in found if ".engine" in name} == {
        *("dense.fp16.engine", "dense.fp16.engine.json"),
        *("pruned.fp16.engine", "pruned.fp16.engine.json"),
    }
    assert any(name.startswith("timing_cache/") for name in found)
    assert not any("building" in name for name in found)
    assert "resnet20_pruned_fp16/1/model.plan" in names(tmp_path / "models")
    assert set(done.triton) == {"resnet20_dense_fp16", "resnet20_pruned_fp16"}
    files = [row[0] for row in export_sheet(done).rows]
    assert files == [f"{n}.fp16.{kind}" for kind in ("onnx", "engine") for n in ("dense", "pruned")]


@pytest.mark.usefixtures("h100")
def test_an_engine_that_disagrees_gets_no_name(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disagree(*_: Any, **__: Any) -> None:
        raise ParityError("they disagree")

    monkeypatch.setattr(stage, "check_parity", disagree)
    with pytest.raises(ParityError):
        export(run, tmp_path, target="h100", engine=True)
    assert not [name for name in names(tmp_path) if "engine" in name or "building" in name]
    assert "dense.onnx" in names(tmp_path)  # it had been proven before


@pytest.mark.slow
@pytest.mark.usefixtures("h100")
def test_a_disk_that_fills_up_leaves_no_half_engine(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = export(run, tmp_path, target="h100", engine=True)
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".engine" and ".building" not in str(target):
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"dense\.engine: the disk is full"):
        export(run, tmp_path, target="h100", engine=True)
    monkeypatch.undo()
    sidecar = json.loads((tmp_path / "dense.engine.json").read_text())
    assert sidecar == json.loads(json.dumps(earlier.engines["dense"]))
    assert not [name for name in names(tmp_path) if "building" in name]


@pytest.mark.parametrize(
    ("target", "says"),
    [("v100", "torch finds none here"), ("cpu", "target cpu has no engines")],
)
def test_what_cannot_be_built_is_refused_before_any_file(
    run: RunDirectory, tmp_path: Path, target: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.nvml.find_gpu", lambda: None)
    with pytest.raises((EnvironmentUnfitError, ConfigError), match=says):
        export(run, tmp_path, target=target, engine=True)
    assert names(tmp_path) == set()


@pytest.mark.usefixtures("h100")
def test_a_v100_engine_is_refused_on_another_gpu(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"Host GPU is SM 9\.0"):
        export(run, tmp_path, target="v100", engine=True)
    assert names(tmp_path) == set()


def test_tensorrt_rtx_builds_for_real_and_says_that_nothing_ran(
    run: RunDirectory, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    gpu = this_gpu()
    if gpu and runs_on(load_target("rtx"), gpu):
        pytest.skip("there is a GPU that runs the engine")
    done = export(
        *(run, tmp_path / "out"),
        target="rtx",
        precision="fp16",
        batch=(1,),
        engine=True,
        triton=tmp_path / "models",
    )
    assert done.engines["pruned"]["parity"] is None
    assert done.engines["pruned"]["provider"] == "tensorrt_rtx"
    sheet = export_sheet(done)
    assert sheet.rows[-1][3] == "not run"
    assert "pruned.fp16.engine was not run: there is no GPU for it here" in sheet.notes
    # Triton has no backend for it, so it serves the ONNX files.
    assert "resnet20_dense_fp16/1/model.onnx" in names(tmp_path / "models")


@pytest.mark.usefixtures("h100")
def test_an_engine_for_other_gpus_is_built_and_not_run(run: RunDirectory, tmp_path: Path) -> None:
    """TensorRT-RTX builds on a machine with an H100, which it does not run on."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    done = export(run, tmp_path, target="rtx", engine=True, batch=(1,))
    assert [done.engines[name]["parity"] for name in ("dense", "pruned")] == [None, None]
    assert {"dense.engine", "pruned.engine"} <= names(tmp_path)


def this_gpu() -> Gpu | None:
    from export.nvml import find_gpu

    return find_gpu()


@pytest.mark.slow
@pytest.mark.usefixtures("h100")
def test_bench_measures_the_engines_and_none_that_was_changed(run: RunDirectory) -> None:
    done = export(run, run.export, target="h100", precision="fp16", engine=True, batch=(1, 2))
    for cuda_graph in (False, True):
        engine_runner.Cuda.opened.clear()
        measured(run, done, cuda_graph)
        captures = sum(opened.captures for opened in engine_runner.Cuda.opened)
        assert (captures > 0) == cuda_graph
    engine = run.export / "pruned.fp16.engine"
    engine.write_bytes(engine.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"pruned\.fp16\.engine is not the file that"):
        subjects(run.path, config=BenchConfig(runtime="tensorrt"), precision="fp16")


def measured(run: RunDirectory, done: Exported, cuda_graph: bool) -> None:
    config = BenchConfig(
        runtime="tensorrt",
        cuda_graph=cuda_graph,
        batch_sizes=(1, 2),
        block_ms=0.1,
        min_blocks=4,
        max_seconds=0.1,
        layer_calls=1,
    )
    pair = subjects(run.path, config=config, precision="fp16")
    measured = measure(
        pair, lambda wiring: dataset_inputs(DATA, wiring, DataConfig()), Plan(config=config)
    )
    report = build_report(pair.about, measured)
    assert report.runtime == "TensorRT 10.4.0 (Host GPU)"
    assert report.config.cuda_graph == cuda_graph
    assert (report.target, report.precision) == ("h100", "fp16")
    networks = {"dense": report.networks.reference, "pruned": report.networks.pruned}
    for network, record in networks.items():
        assert record.bytes == done.engines[network]["engine"]["bytes"]
        assert [found.batch_size for found in record.parity] == [1, 2]
        assert [found.batch_size for found in record.latency] == [1, 2]
        for found in record.latency:
            steps = {name: step.mean_ms for name, step in found.stages.items()}
            assert set(steps) == {"h2d", "compute", "d2h", "enqueue", "host"}
            on_device = steps["h2d"] + steps["compute"] + steps["d2h"]
            assert found.summary.mean_ms == pytest.approx(on_device)
            assert found.images_per_second == pytest.approx(1000 * found.batch_size / steps["host"])
