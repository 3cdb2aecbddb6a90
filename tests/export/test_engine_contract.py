"""The recorded API: what it holds, that it is the real one, and that the stand-in keeps it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_files import write_onnx
from tensorrt_contract import RECORDED, VERSIONS, calls_of, fake_tensorrt, recorded_api

RECORDER = Path(__file__).parents[2] / "benchmarks" / "record_tensorrt_api.py"
EVERYWHERE = {
    "Builder": {"create_network", "create_builder_config", "create_optimization_profile"}
    | {"build_serialized_network"},
    "IBuilderConfig": {"set_memory_pool_limit", "profiling_verbosity", "add_optimization_profile"}
    | {"create_timing_cache", "set_timing_cache", "get_timing_cache", "set_flag"},
    "INetworkDefinition": {"num_inputs", "get_input"},
    "ITensor": {"name", "shape"},
    "IOptimizationProfile": {"set_shape"},
    "ITimingCache": {"serialize"},
    "OnnxParser": {"parse_from_file", "num_errors", "get_error"},
    "ParserError": {"__str__"},
    "Runtime": {"deserialize_cuda_engine"},
    "ICudaEngine": {"create_engine_inspector", "create_execution_context", "num_io_tensors"}
    | {"get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype"}
    | {"num_optimization_profiles", "get_tensor_profile_shape"},
    "IExecutionContext": {"set_optimization_profile_async", "set_input_shape", "get_tensor_shape"}
    | {"set_tensor_address", "execute_async_v3"},
    "EngineInspector": {"get_engine_information"},
    "MemoryPoolType": {"WORKSPACE"},
    "ProfilingVerbosity": {"DETAILED"},
    "LayerInformationFormat": {"JSON"},
    "TensorIOMode": {"INPUT", "OUTPUT"},
    "DataType": {"FLOAT", "HALF", "INT8", "INT32"},
    "ILogger.Severity": {"INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"},
}
"""What the adapter and the runner use without asking for it."""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_release_has_what_is_used_without_asking(version: str) -> None:
    api = recorded_api(version)
    recorded = {**api["classes"], **api["enums"]}
    assert not {
        f"{kind}.{member}"
        for kind, members in EVERYWHERE.items()
        for member in members - recorded[kind].keys()
    }


@pytest.mark.parametrize(
    ("kind", "member", "since", "until"),
    [
        ("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH", 8, 10),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", 10, 11),
        ("BuilderFlag", "FP16", 8, 10),
        ("BuilderFlag", "INT8", 8, 10),
        ("IBuilderConfig", "progress_monitor", 10, 11),
        ("ICudaEngine", "num_bindings", 8, 8),
        ("ICudaEngine", "device_memory_size", 8, 10),
    ],
)
def test_what_came_and_went(kind: str, member: str, since: int, until: int) -> None:
    for version in VERSIONS:
        api = recorded_api(version)
        release = 11 if version.startswith("rtx") else int(version.split(".")[0])
        has = member in {**api["classes"], **api["enums"]}[kind]
        assert has is (since <= release <= until), version


def test_the_folder_holds_these_releases_and_no_more() -> None:
    assert {file.stem for file in RECORDED.iterdir()} == set(VERSIONS)
    for version in VERSIONS:
        assert recorded_api(version)["version"] == version.removeprefix("rtx-")
        assert (RECORDED / f"{version}.json").stat().st_size < 60_000


def test_the_installed_rtx_is_as_recorded() -> None:
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    name = f"rtx-{module.__version__}"
    if name not in VERSIONS:
        pytest.skip(f"{name} is not recorded")
    assert record("tensorrt_rtx") == recorded_api(name)


def test_bindings_in_a_folder_are_as_recorded() -> None:
    folder = os.environ.get("TENSORRT_BINDINGS")
    if not folder:
        pytest.skip("TENSORRT_BINDINGS names no folder with wheels of TensorRT's bindings")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels = {
        version: path
        for path in Path(folder).glob(f"tensorrt*-{tag}-*.whl")
        for version in VERSIONS
        if re.search(rf"-{re.escape(version)}-", path.name)
    }
    if not wheels:
        pytest.skip(f"no wheel in {folder} is for {tag} and one of {', '.join(VERSIONS)}")
    for version, path in wheels.items():
        assert without_text(record(str(path))) == without_text(recorded_api(version)), version


def record(what: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, str(RECORDER), what], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def without_text(api: dict[str, Any]) -> dict[str, Any]:
    """Leave out what depends on the Python for which the bindings were built."""
    return {**api, "names": None, "functions": None}


# The stand-in


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Any:
    return fake_tensorrt(request.param)


def test_names_that_a_release_lacks_are_missing(trt: Any) -> None:
    assert not hasattr(trt, "CaffeParser") or trt.__version__.startswith("8.")
    assert hasattr(trt, "IProgressMonitor") is not trt.__version__.startswith("8.")
    builder = trt.Builder(trt.Logger())
    with pytest.raises(AttributeError, match=r"Builder of TensorRT .* has no sing"):
        builder.sing()
    with pytest.raises(AttributeError, match="NO_FLAG"):
        _ = trt.BuilderFlag.NO_FLAG
    with pytest.raises(AttributeError, match="has no sing"):
        _ = trt.sing


def test_what_is_read_only_cannot_be_set(trt: Any) -> None:
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError, match="has no colour"):
        config.colour = 1
    with pytest.raises(AttributeError, match=r"num_inputs of .* cannot be set"):
        builder.create_network().num_inputs = 1


def test_arguments_that_pybind11_would_refuse_are_refused(trt: Any, tmp_path: Path) -> None:
    logger = trt.Logger()
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    path = write_onnx(tmp_path / "model.onnx")
    network = builder.create_network(int("EXPLICIT_BATCH" in dir(trt)))
    for call in (
        lambda: trt.Builder(),
        lambda: trt.Builder("a logger"),
        lambda: trt.OnnxParser(logger, network),
        lambda: trt.OnnxParser(network, logger).parse_from_file(path),
        lambda: builder.create_network(1, 2),
        lambda: builder.create_network(flag=1),
        lambda: builder.create_network("EXPLICIT_BATCH"),
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
        lambda: config.set_memory_pool_limit(trt.DataType.FLOAT, 1),
        lambda: config.set_timing_cache(config.create_timing_cache(b"")),
        lambda: config.create_timing_cache("text"),
        lambda: config.add_optimization_profile(network),
        lambda: profile.set_shape("input", 1, 2, 3),
        lambda: builder.build_serialized_network(config, network),
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call()


def test_calls_are_recorded_by_position(trt: Any) -> None:
    builder = trt.Builder(trt.Logger())
    builder.create_network(flags=0)
    builder.create_network()
    assert calls_of(trt, "Builder.create_network") == [(0,), ()]


def test_subclasses_must_call_their_base(trt: Any) -> None:
    class Lazy(trt.ILogger):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="incompatible function arguments"):
        trt.Builder(Lazy())


def test_an_engine_of_another_release_is_not_loaded(tmp_path: Path) -> None:
    data = {}
    for version in ("10.4.0", "11.4.0.106"):
        trt = fake_tensorrt(version)
        logger = trt.Logger(trt.ILogger.INTERNAL_ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        path = write_onnx(tmp_path / "model.onnx")
        assert trt.OnnxParser(network, logger).parse_from_file(str(path))
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        profile.set_shape("input", (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))
        config.add_optimization_profile(profile)
        data[version] = builder.build_serialized_network(network, config)
        loaded = {
            other: trt.Runtime(logger).deserialize_cuda_engine(engine) is not None
            for other, engine in data.items()
        }
        assert loaded == {other: other == version for other in data}
