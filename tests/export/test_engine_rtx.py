"""TensorRT-RTX itself, which parses and builds without a GPU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import networks
import onnx
import pytest
import torch
from conftest import lived_in, random_mask
from engine_files import build_with, write_onnx
from onnx_models import export_classifier
from torch import nn

from compress.config.targets import load_target
from compress.errors import ModelError
from compress.networks.analysis import analyse
from compress.networks.shrink import shrink
from export.engines import build
from export.engines.api import load_tensorrt
from export.engines.sidecar import read_engine_sidecar
from export.engines.timing_cache import save_cache, use_cache

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
RTX = "rtx-installed"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_gpu", lambda: None)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return write_onnx(tmp_path / "model.onnx"), tmp_path / "model.engine"


def build_rtx(onnx_path: Path, path: Path, **options: Any) -> dict[str, Any]:
    return build_with(RTX, onnx_path, path, target=load_target("rtx"), **options)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_precision_builds(precision: str, tmp_path: Path) -> None:
    onnx_path = write_onnx(tmp_path / "model.onnx", precision)
    path = tmp_path / "model.engine"
    document = build_rtx(onnx_path, path, precision=precision)
    assert read_engine_sidecar(path) == document
    assert path.stat().st_size > onnx_path.stat().st_size
    assert document["strongly_typed"] is True
    assert (document["sm"], document["inspection"], document["timing_cache"]) == (None, None, None)


@pytest.mark.parametrize("kind", [networks.Plain, networks.PreActivation, networks.Dense])
def test_dense_and_pruned_networks_build(kind: type[nn.Module], tmp_path: Path) -> None:
    model = lived_in(kind()).eval()
    size = (3, 12, 12)
    graph = analyse(model, size)
    for name, network in (
        ("dense", model),
        ("pruned", shrink(model, graph, random_mask(graph, 1))),
    ):
        onnx_path = tmp_path / f"{name}.onnx"
        export_classifier(
            network, onnx_path, target=load_target("rtx"), input_size=size, metadata={}
        )
        build_rtx(onnx_path, tmp_path / f"{name}.engine", batch=(1, 4))
        assert read_engine_sidecar(tmp_path / f"{name}.engine")["onnx"]["file"] == onnx_path.name


@pytest.mark.parametrize(
    ("options", "opt"),
    [({"batch": (1, 8, 32)}, [1, 8, 32]), ({"dynamic_batch": (1, 4, 16)}, [4])],
)
def test_profiles(options: dict[str, Any], opt: list[int], paths: tuple[Path, Path]) -> None:
    document = build_rtx(*paths, **options)
    assert [profile["opt"][0] for profile in document["profiles"]] == opt


def test_progress_rises_to_one(paths: tuple[Path, Path]) -> None:
    told: list[tuple[str, float]] = []
    build_rtx(*paths, progress=lambda *step: told.append(step))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert len(set(shares)) > 10
    assert shares[0] == 0.0
    assert shares[-1] == 1.0


@pytest.mark.parametrize("how", ["raised", "signalled"])
def test_ctrl_c_cancels_the_build(how: str, paths: tuple[Path, Path]) -> None:
    told = []

    def progress(step: str, share: float) -> None:
        told.append(share)
        if share > 0.1:
            if how == "raised":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_rtx(*paths, progress=progress)
    assert signal.getsignal(signal.SIGINT) is before
    assert max(told) < 0.5
    assert [file.name for file in paths[1].parent.iterdir()] == ["model.onnx"]


def test_what_the_parser_refuses_is_its_own_reason(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Sing", ["input"], ["logits"], name="choir")
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3, 8, 8])
        for name in ("input", "logits")
    ]
    graph = onnx.helper.make_graph([node], "odd", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"^TensorRT-RTX \S+ cannot parse .*choir.*Sing") as caught:
        build_rtx(path, tmp_path / "model.engine")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_pass_through_the_real_bindings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt = load_tensorrt("tensorrt_rtx")
    path = tmp_path / "folder" / "some.timing"
    config = tensorrt.create_builder().create_builder_config()
    assert use_cache(tensorrt, config, path) is False
    save_cache(config, path)
    assert path.stat().st_size > 0
    assert not caplog.records
    if not torch.cuda.is_available():
        path.write_bytes(b"damaged" * 100)
        assert use_cache(tensorrt, config, path) is False
        (record,) = caplog.records
        assert f"the timing cache {path} is ignored: " in record.getMessage()


def test_an_engine_needs_a_gpu_to_be_loaded(paths: tuple[Path, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    build_rtx(*paths)
    tensorrt = load_tensorrt("tensorrt_rtx")
    runtime = tensorrt.create_runtime()
    tensorrt.messages.clear()
    assert runtime.deserialize_cuda_engine(paths[1].read_bytes()) is None
    assert "cudaError" in tensorrt.messages.reason()
