from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from engine_files import ADA, NETWORK, T4, V100, any_gpu_target, build_with, install, write_onnx
from tensorrt_contract import VERSIONS, calls_of

from compress.config import ExportConfig
from compress.config.targets import load_target
from compress.errors import (
    CheckpointError,
    ConfigError,
    EnvironmentUnfitError,
    ModelError,
    OutputError,
)
from export.engines.build import build_engine
from export.engines.sidecar import read_engine_sidecar
from export.engines.watching import Watch

EIGHT = [version for version in VERSIONS if version.startswith("8.")]
FULL = [version for version in VERSIONS if not version.startswith("rtx")]
MONITOR = [version for version in VERSIONS if version not in EIGHT]


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return write_onnx(tmp_path / "model.onnx"), tmp_path / "out" / "model.engine"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_release_builds_every_precision(
    version: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version)
    onnx_path = write_onnx(tmp_path / "model.onnx", precision)
    path = tmp_path / "model.engine"
    document = build_with(version, onnx_path, path, precision=precision)
    assert read_engine_sidecar(path) == document
    assert onnx_path.read_bytes() in path.read_bytes()


@pytest.mark.parametrize(
    ("version", "creation", "builder_flags"),
    [
        ("8.5.3.1", ["EXPLICIT_BATCH"], ["FP16", "INT8"]),
        ("8.6.1", ["EXPLICIT_BATCH"], ["FP16", "INT8"]),
        ("10.4.0", ["EXPLICIT_BATCH", "STRONGLY_TYPED"], []),
        ("10.16.1.11", ["EXPLICIT_BATCH", "STRONGLY_TYPED"], []),
        ("11.4.0.106", [], []),
        ("rtx-1.7.1.116", [], ["REQUIRE_USER_ALLOCATION"]),
    ],
)
def test_a_release_gets_the_flags_that_it_has(
    version: str,
    creation: list[str],
    builder_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = install(monkeypatch, version)
    onnx_path = write_onnx(tmp_path / "model.onnx", "int8")
    document = build_with(version, onnx_path, tmp_path / "model.engine", precision="int8")
    flags = module.NetworkDefinitionCreationFlag
    assert calls_of(module, "Builder.create_network") == [
        (sum(1 << flags[name] for name in creation),)
    ]
    assert [flag.name for (flag,) in calls_of(module, "IBuilderConfig.set_flag")] == builder_flags
    assert document["strongly_typed"] is (not version.startswith("8"))


@pytest.mark.parametrize(
    ("precision", "flags"), [("fp32", []), ("fp16", ["FP16"]), ("int8", ["FP16", "INT8"])]
)
def test_tensorrt_8_is_allowed_the_precision_and_no_more(
    precision: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "8.6.1")
    onnx_path = write_onnx(tmp_path / "model.onnx", precision)
    build_with("8.6.1", onnx_path, tmp_path / "model.engine", precision=precision)
    assert [flag.name for (flag,) in calls_of(module, "IBuilderConfig.set_flag")] == flags


@pytest.mark.parametrize("version", VERSIONS)
def test_settings_reach_the_builder(
    version: str, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, version)
    document = build_with(version, *paths, batch=(1, 8, 8), workspace_mib=300)
    assert calls_of(module, "IBuilderConfig.set_memory_pool_limit") == [
        (module.MemoryPoolType.WORKSPACE, 300 * 2**20)
    ]
    assert calls_of(module, "IBuilderConfig.profiling_verbosity=") == [
        (module.ProfilingVerbosity.DETAILED,)
    ]
    one, eight = (1, 3, 8, 8), (8, 3, 8, 8)
    assert calls_of(module, "IOptimizationProfile.set_shape") == [
        ("input", one, one, one),
        ("input", eight, eight, eight),
    ]
    assert [profile["opt"] for profile in document["profiles"]] == [list(one), list(eight)]


def test_a_dynamic_batch_is_one_profile(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "10.4.0")
    document = build_with("10.4.0", *paths, dynamic_batch=(1, 4, 16))
    shapes = [(1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)]
    assert calls_of(module, "IOptimizationProfile.set_shape") == [("input", *shapes)]
    assert document["profiles"] == [
        {"min": [1, 3, 8, 8], "opt": [4, 3, 8, 8], "max": [16, 3, 8, 8]}
    ]


def test_the_sidecar_says_what_the_engine_is(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0")
    onnx_path, path = paths
    target = any_gpu_target("10.4.0", name="v100")
    document = build_with("10.4.0", *paths, target=target, workspace_mib=64)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "model.engine",
        "model.engine.json",
        "timing_cache",
    ]
    assert json.loads((path.parent / "model.engine.json").read_text()) == document
    assert document.pop("build_seconds") >= 0
    assert document == {
        "schema_version": 1,
        "engine": {
            "file": "model.engine",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        },
        "provider": "tensorrt",
        "tensorrt": "10.4.0",
        "sm": "7.0",
        "compute_capabilities": [],
        "gpu": "Tesla V100-SXM2-16GB",
        "driver": "550.90.07",
        "target": "v100",
        "precision": "fp32",
        "strongly_typed": True,
        "profiles": [{"min": [1, 3, 8, 8], "opt": [8, 3, 8, 8], "max": [32, 3, 8, 8]}],
        "workspace_mib": 64,
        "onnx": {
            "file": "model.onnx",
            "sha256": hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        },
        "timing_cache": {"file": "tensorrt-10.4.0-sm7.0.timing", "used": False},
        "inspection": {
            "layers": 2,
            "types": {"unknown": 2},
            "fused": {"1": 2},
            "outputs": {},
            "io": ["input", "logits"],
        },
        **{key: value for key, value in NETWORK.items() if key != "parity"},
    }


def test_an_engine_of_rtx_is_bound_to_no_gpu(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "rtx-1.7.1.116", gpu=T4)
    document = build_with("rtx-1.7.1.116", *paths)
    assert (document["provider"], document["tensorrt"]) == ("tensorrt_rtx", "1.7.1.116")
    assert (document["sm"], document["gpu"]) == (None, "Tesla T4")


def test_the_stand_in_computes_what_the_onnx_file_computes(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "10.4.0")
    onnx_path, path = paths
    build_with("10.4.0", *paths)
    images = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    logits = np.empty((3, 4), np.float32)
    logger = module.Logger()
    engine = module.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    assert context.set_input_shape("input", images.shape)
    assert context.set_tensor_address("input", images.ctypes.data)
    assert context.set_tensor_address("logits", logits.ctypes.data)
    assert context.execute_async_v3(0)
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(logits, session.run(None, {"input": images})[0], rtol=1e-6)


# What goes wrong


def nothing_left(path: Path) -> bool:
    left = [file for file in path.parent.glob("**/*") if file.is_file()] if path.parent else []
    return not [file for file in left if file.suffix != ".timing"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("behaviour", "error", "reason"),
    [
        ({"parse_errors": ("no Foo here", "nor Bar")}, ModelError, "no Foo here; .*nor Bar$"),
        ({"build_error": "no implementation for conv"}, ModelError, "no implementation for conv$"),
        ({"refuses_profiles": True}, ModelError, "refuses the optimization profile {'min': "),
        ({"driver": False}, EnvironmentUnfitError, "finds no usable GPU or driver .*error: 35"),
    ],
)
def test_a_failing_step_is_one_sentence_and_leaves_nothing(
    version: str,
    behaviour: dict[str, Any],
    error: type[Exception],
    reason: str,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, version, **behaviour)
    with pytest.raises(error, match=reason) as caught:
        build_with(version, *paths)
    assert "\n" not in str(caught.value)
    assert nothing_left(paths[1])


def test_an_engine_that_cannot_be_loaded_is_not_written(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0", deserialize_error="out of memory")
    with pytest.raises(EnvironmentUnfitError, match=r"cannot load: out of memory; is the GPU's"):
        build_with("10.4.0", *paths)
    assert nothing_left(paths[1])


def test_rtx_may_build_what_this_gpu_cannot_load(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "rtx-1.7.1.116", deserialize_error="SM 7.0 is not supported")
    assert build_with("rtx-1.7.1.116", *paths)["inspection"] is None
    install(monkeypatch, "rtx-1.7.1.116", gpu=ADA, deserialize_error="out of memory")
    with pytest.raises(EnvironmentUnfitError, match="an engine that it cannot load: out of memory"):
        build_with("rtx-1.7.1.116", *paths)


def test_an_engine_for_other_chips_is_not_loaded_here(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "rtx-1.7.1.116", gpu=ADA, deserialize_error="built for Turing")
    turing = load_target("rtx").model_copy(update={"compute_capabilities": ("7.5",)})
    assert build_with("rtx-1.7.1.116", *paths, target=turing)["inspection"] is None


def test_an_engine_of_rtx_is_built_for_the_chips_of_its_target(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "rtx-1.7.1.116", gpu=None)
    document = build_with("rtx-1.7.1.116", *paths)
    kinds = module.ComputeCapability
    assert calls_of(module, "IBuilderConfig.set_compute_capability") == [
        (kinds.SM80, 0),
        (kinds.SM86, 1),
        (kinds.SM89, 2),
        (kinds.SM120, 3),
    ]
    assert document["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    target = load_target("rtx").model_copy(update={"compute_capabilities": ("9.0",)})
    with pytest.raises(ConfigError, match=r"does not build for SM 9\.0: take it out of the target"):
        build_with("rtx-1.7.1.116", *paths, target=target)


def test_a_full_disk_keeps_the_earlier_engine(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0")
    document = build_with("10.4.0", *paths)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        build_with("10.4.0", *paths, batch=(2,))
    monkeypatch.undo()
    assert read_engine_sidecar(paths[1]) == document
    assert sorted(file.name for file in paths[1].parent.iterdir()) == [
        "model.engine",
        "model.engine.json",
        "timing_cache",
    ]


def test_no_engine_without_its_sidecar(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0")
    paths[1].parent.mkdir()
    (paths[1].parent / "model.engine.json").mkdir()  # nothing can be renamed to it
    with pytest.raises(OutputError, match=r"model\.engine\.json"):
        build_with("10.4.0", *paths)
    assert nothing_left(paths[1])


@pytest.mark.parametrize("version", MONITOR)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, BrokenPipeError])
def test_what_the_progress_raises_cancels_the_build(
    version: str,
    kind: type[BaseException],
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = install(monkeypatch, version)
    seen = []

    def progress(step: str, share: float) -> None:
        seen.append(share)
        if share >= 0.5:
            raise kind

    with pytest.raises(kind):
        build_with(version, *paths, progress=progress)
    assert seen == [0.0, 0.25, 0.5]
    assert not calls_of(module, "IBuilderConfig.get_timing_cache")  # it never came to an end
    assert nothing_left(paths[1])


def test_without_a_monitor_ctrl_c_waits_for_the_end_of_the_build(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "8.6.1")
    stand_in = type(module.Builder(module.Logger()))
    plain = stand_in.__getattribute__

    def interrupted(self: Any, name: str) -> Any:
        if name == "build_serialized_network":
            signal.raise_signal(signal.SIGINT)
        return plain(self, name)

    monkeypatch.setattr(stand_in, "__getattribute__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_with("8.6.1", *paths)
    assert calls_of(module, "Builder.build_serialized_network")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert nothing_left(paths[1])


def test_nested_phases_are_one_rising_share(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0", phases=(("outer", 2), ("inner", 4)))
    seen: list[tuple[str, float]] = []
    build_with("10.4.0", *paths, progress=lambda *told: seen.append(told))
    assert seen == [
        ("outer", 0.0),
        *(("inner", share / 16) for share in range(5)),  # half of the first of two steps
        ("inner", 1 / 4),
        *(("outer", share) for share in (0.5, 1.0, 1.0)),
    ]


def test_phases_that_follow_each_other_within_a_step_share_it() -> None:
    shares = []
    watch = Watch(lambda name, share: shares.append(share))
    watch.start("outer", 2)
    for name in ("first", "second"):
        watch.start(name, 1)
        watch.step(name, 0)
        watch.finish(name)
    watch.step("outer", 0)
    assert shares == [0, *(0, 1 / 4, 1 / 4), *(1 / 4, 3 / 8, 3 / 8), 1 / 2]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"name": "model.plan"}, ConfigError, r"named \*\.engine, not 'model\.plan'"),
        ({"target": load_target("cpu")}, ConfigError, "target cpu has no engines"),
        ({"onnx_sha256": "00" * 32}, CheckpointError, "not the file that its sidecar describes"),
        ({"onnx": "missing.onnx"}, CheckpointError, "cannot read .*missing.onnx: No such file"),
    ],
)
def test_what_is_refused_before_tensorrt_is_imported(
    change: dict[str, Any],
    error: type[Exception],
    reason: str,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = install(monkeypatch, "10.4.0")
    onnx_path, path = paths
    with pytest.raises(error, match=reason):
        build_engine(
            onnx_path.with_name(change.get("onnx", onnx_path.name)),
            path.with_name(change.get("name", path.name)),
            target=change.get("target", load_target("v100")),
            config=ExportConfig(),
            onnx_sha256=change.get(
                "onnx_sha256", hashlib.sha256(onnx_path.read_bytes()).hexdigest()
            ),
            network=NETWORK,
        )
    assert not calls_of(module, "Builder")


def test_bytes_that_are_no_onnx_are_refused(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10.4.0")
    paths[0].write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="damaged or is not an ONNX file"):
        build_with("10.4.0", *paths)


def test_a_release_outside_of_the_target_is_refused(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "10.16.1.11")
    with pytest.raises(EnvironmentUnfitError, match=r"install tensorrt-cu12==10\.4\.0"):
        build_with("10.16.1.11", *paths, target=load_target("v100"))
    assert not calls_of(module, "Builder")


@pytest.mark.parametrize(
    "shape", [["batch", 3, "height", 8], [2, 3, 8, 8], ["batch", 8]], ids=["size", "batch", "rank"]
)
def test_an_input_of_another_shape_is_refused(
    shape: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    install(monkeypatch, "10.4.0")
    node = onnx.helper.make_node("Relu", ["input"], ["logits"])
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name in ("input", "logits")
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "other", ends[:1], ends[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"built for one input 'input' of shape \(-1, C, H, W\)"):
        build_with("10.4.0", path, tmp_path / "model.engine")


# The timing cache


@pytest.mark.parametrize("version", FULL)
def test_timings_are_kept_and_used_again(
    version: str,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = install(monkeypatch, version)
    folder = paths[1].parent / "timings"
    first = build_with(version, *paths, timing_cache=folder)
    (file,) = folder.iterdir()
    assert file.name == f"{module.__name__}-{module.__version__}-sm7.0.timing"
    kept = file.read_bytes()
    second = build_with(version, *paths, timing_cache=folder)
    assert first["timing_cache"] == {"file": file.name, "used": False}
    assert second["timing_cache"] == {"file": file.name, "used": True}
    assert calls_of(module, "IBuilderConfig.create_timing_cache") == [(b"",), (kept,)]
    assert not caplog.records


def test_timings_of_another_gpu_lie_in_another_file(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = paths[1].parent / "timing_cache"
    for gpu in (V100, T4):
        install(monkeypatch, "8.6.1", gpu=gpu)
        build_with("8.6.1", *paths, target=any_gpu_target("8.6.1", sm=None))
    install(monkeypatch, "10.4.0")
    build_with("10.4.0", *paths)
    assert sorted(file.name for file in folder.iterdir()) == [
        "tensorrt-10.4.0-sm7.0.timing",
        "tensorrt-8.6.1-sm7.0.timing",
        "tensorrt-8.6.1-sm7.5.timing",
    ]


@pytest.mark.parametrize("version", FULL)
def test_a_damaged_timing_cache_is_ignored_with_a_warning(
    version: str,
    paths: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = install(monkeypatch, version)
    build_with(version, *paths)
    (file,) = (paths[1].parent / "timing_cache").iterdir()
    kept = file.read_bytes()
    file.write_bytes(b"damaged")
    document = build_with(version, *paths)
    assert document["timing_cache"]["used"] is False
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is ignored: Failed to deserialize timing cache" in record.getMessage()
    assert calls_of(module, "IBuilderConfig.create_timing_cache")[1:] == [(b"damaged",), (b"",)]
    assert file.read_bytes() == kept


def test_timings_of_another_board_are_not_used(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        install(monkeypatch, "10.4.0", foreign_timings=True)
        document = build_with("10.4.0", *paths)
        assert document["timing_cache"]["used"] is False
    assert "is ignored: it is of another GPU or release" in caplog.text


def test_a_timing_cache_that_cannot_be_saved_costs_only_a_warning(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "10.4.0")
    folder = paths[0].parent / "no folder"
    folder.write_bytes(b"")
    build_with("10.4.0", *paths, timing_cache=folder)
    assert read_engine_sidecar(paths[1])
    assert "the timing cache is not saved" in caplog.text


def test_rtx_times_nothing(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = install(monkeypatch, "rtx-1.7.1.116", gpu=ADA)
    document = build_with("rtx-1.7.1.116", *paths)
    assert document["timing_cache"] is None
    assert document["inspection"] is not None
    assert not calls_of(module, "IBuilderConfig.create_timing_cache")


def test_without_a_gpu_there_are_no_timings_and_no_inspection(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install(monkeypatch, "rtx-1.7.1.116", gpu=None)
    document = build_with("rtx-1.7.1.116", *paths)
    assert (document["timing_cache"], document["inspection"]) == (None, None)
    assert (document["sm"], document["gpu"], document["driver"]) == (None, None, None)
    assert not calls_of(module, "IBuilderConfig.create_timing_cache")
    assert not calls_of(module, "Runtime")
