"""An ONNX file becomes an engine for the GPU of this machine, and its sidecar.

``model.engine`` and ``model.engine.json`` appear together or not at all.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.config import ExportConfig
from compress.config.targets import Target
from compress.errors import CheckpointError, ConfigError, EnvironmentUnfitError, ModelError, writing
from compress.files.atomic import staged, write_flushed, write_json
from export.engines.api import TensorRT, load_tensorrt
from export.engines.checks import refuse_engine, refuse_version, runs_on
from export.engines.inspection import summarise_inspection
from export.engines.network import (
    Shapes,
    add_profiles,
    parse_network,
    profile_shapes,
    set_allocation,
    set_chips,
    set_precision,
)
from export.engines.sidecar import NETWORK_FACTS, PRUNING_FACTS, SCHEMA_VERSION, sidecar_path
from export.engines.timing_cache import cache_path, save_cache, use_cache
from export.engines.watching import attach
from export.nvml import Gpu, find_gpu
from export.onnx.check import standard_opset

if TYPE_CHECKING:
    from compress.terminal.progress import Progress

SUFFIX = ".engine"


def build_engine(
    onnx_path: Path,
    path: Path,
    *,
    target: Target,
    config: ExportConfig,
    onnx_sha256: str,
    network: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build an engine from an ONNX file and write it with its sidecar.

    Nothing is built before it is known that target, file and machine fit together. Matrix products
    and convolutions of FP32 may use TF32 where the GPU has it, which is TensorRT's own default.

    Args:
        onnx_path: the network, as ``compress export`` writes it, in the precision of ``config``.
        path: the engine, ``*.engine``; its sidecar is ``*.engine.json``.
        target: what the engine is for.
        config: precision, batch sizes, workspace and timing cache.
        onnx_sha256: digest that the sidecar of the ONNX file gives for it.
        network: what that sidecar says of the network; see ``sidecar.NETWORK_FACTS``.
        progress: takes the step and the share done, where TensorRT tells them (since 10.0).

    Returns:
        The sidecar's document; docs/engines.md describes it.

    Raises:
        ConfigError: the target has no engines or not this precision, or ``path`` has another
            suffix.
        EnvironmentUnfitError: TensorRT or the GPU is missing, or is not what the target needs.
        CheckpointError: the ONNX file is missing or is not the one that was described.
        ModelError: TensorRT cannot parse or build the network.
        OutputError: the engine cannot be written.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"an engine is named *{SUFFIX}, not {path.name!r}")
    opset, gpu = _verified_opset(onnx_path, onnx_sha256), find_gpu()
    refuse_engine(target, config.precision, gpu=gpu, opset=opset)
    assert target.builder is not None  # refuse_engine has seen to it
    tensorrt = load_tensorrt(target.builder)
    refuse_version(target, tensorrt.version)
    cache = _cache_path(config, path, tensorrt, gpu)
    built = _build(tensorrt, onnx_path, target, config, cache=cache, progress=progress)
    document = {
        "schema_version": SCHEMA_VERSION,
        "engine": {
            "file": path.name,
            "sha256": hashlib.sha256(built.data).hexdigest(),
            "bytes": len(built.data),
        },
        **_machine(tensorrt, gpu),
        "target": target.name,
        "precision": config.precision,
        "strongly_typed": tensorrt.has_strongly_typed,
        "profiles": [shapes.to_dict() for shapes in built.profiles],
        "workspace_mib": config.workspace_mib,
        "onnx": {"file": onnx_path.name, "sha256": onnx_sha256},
        "build_seconds": round(built.seconds, 3),
        "timing_cache": None if cache is None else {"file": cache.name, "used": built.cache_used},
        "compute_capabilities": list(target.compute_capabilities),
        "inspection": _inspect(tensorrt, built.data, gpu, target),
        **{key: network[key] for key in NETWORK_FACTS},
        **{key: network[key] for key in PRUNING_FACTS if key in network},
    }
    with staged(path) as temporary:
        with writing(path):
            write_flushed(temporary, built.data)
        write_json(sidecar_path(path), document)
    return document


@dataclass(frozen=True)
class _Built:
    data: bytes
    profiles: list[Shapes]
    cache_used: bool
    seconds: float


def _build(
    tensorrt: TensorRT,
    onnx_path: Path,
    target: Target,
    config: ExportConfig,
    *,
    cache: Path | None,
    progress: Progress | None,
) -> _Built:
    # It builds for CUDA's current device: that which find_gpu has judged, and which loads it.
    builder = tensorrt.create_builder()
    settings = builder.create_builder_config()
    watch = attach(tensorrt, settings, progress)
    with watch.guarded():
        network = parse_network(tensorrt, builder, onnx_path)
        _set_up(tensorrt, settings, config)
        set_chips(tensorrt, settings, target.compute_capabilities)
        set_allocation(tensorrt, settings)
        profiles = profile_shapes(network, config)
        add_profiles(builder, settings, network, profiles)
        used = cache is not None and use_cache(tensorrt, settings, cache)
        tensorrt.messages.clear()
        start = time.perf_counter()
        serialized = builder.build_serialized_network(network, settings)
        seconds = time.perf_counter() - start
    if serialized is None:
        raise ModelError(f"{tensorrt.title} cannot build {onnx_path}: {tensorrt.messages.reason()}")
    if cache is not None:
        save_cache(settings, cache)
    return _Built(bytes(serialized), profiles, used, seconds)


def _set_up(tensorrt: TensorRT, settings: Any, config: ExportConfig) -> None:
    module = tensorrt.module
    settings.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
    settings.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    set_precision(tensorrt, settings, config.precision)


def _verified_opset(onnx_path: Path, sha256: str) -> int:
    """Return the opset of an ONNX file, once it is known to be the one that was described."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    try:
        data = onnx_path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(
                f"{onnx_path} is not the file that its sidecar describes; export again"
            )
        return standard_opset(onnx.load_model_from_string(data))
    except OSError as error:
        raise CheckpointError(f"cannot read {onnx_path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise CheckpointError(f"{onnx_path} is damaged or is not an ONNX file") from error


def _cache_path(
    config: ExportConfig, path: Path, tensorrt: TensorRT, gpu: Gpu | None
) -> Path | None:
    """Return where timings lie; None where nothing is timed."""
    if gpu is None or not tensorrt.has_timing_cache:
        return None
    return cache_path(config.timing_cache or path.parent / "timing_cache", tensorrt, gpu)


def _machine(tensorrt: TensorRT, gpu: Gpu | None) -> dict[str, str | None]:
    """Return what the engine is bound to; TensorRT-RTX compiles for the GPU that loads it."""
    bound = gpu is not None and tensorrt.provider == "tensorrt"
    return {
        "provider": tensorrt.provider,
        "tensorrt": tensorrt.version,
        "sm": gpu.sm if gpu is not None and bound else None,
        "gpu": gpu.name if gpu is not None else None,
        "driver": gpu.driver if gpu is not None else None,
    }


def _inspect(
    tensorrt: TensorRT, data: bytes, gpu: Gpu | None, target: Target
) -> dict[str, Any] | None:
    """Load an engine and summarise it; None where it is not for the GPU of this machine."""
    if gpu is None or not runs_on(target, gpu):  # which only TensorRT-RTX builds for
        return None
    runtime = tensorrt.create_runtime()
    engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        form = tensorrt.module.LayerInformationFormat.JSON
        return summarise_inspection(engine.create_engine_inspector().get_engine_information(form))
    raise EnvironmentUnfitError(
        f"{tensorrt.title} built an engine that it cannot load: {tensorrt.messages.reason()}; "
        "is the GPU's memory used up?"
    )
