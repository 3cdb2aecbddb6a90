"""What ``compress export`` makes of a run: ONNX files, engines, a model repository.

What this machine or the target cannot do is refused before the first file is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoints.permission import BUILT_IN, Permission
from compress.config.targets import load_target
from compress.errors import writing
from compress.files.atomic import write_json
from export.checkpoint_to_onnx import Samples, export_checkpoint, samples_of
from export.verify import check_parity, judging

if TYPE_CHECKING:
    from compress.checkpoints.checkpoint import Checkpoint
    from compress.config import ExportConfig, RunConfig
    from compress.config.targets import Target
    from compress.data.batches import ImageData
    from compress.runs.rundirectory import RunDirectory
    from compress.terminal.progress import Progress
    from export.nvml import Gpu
    from export.request import ExportRequest

NETWORKS = ("dense", "pruned")


def onnx_path(folder: Path, network: str, precision: str) -> Path:
    """Return where a network's export lies: ``pruned.onnx``, or ``pruned.fp16.onnx``."""
    return folder / f"{network}{'' if precision == 'fp32' else f'.{precision}'}.onnx"


def engine_path(folder: Path, network: str, precision: str) -> Path:
    """Return where the engine of a network's export lies: ``pruned.fp16.engine``."""
    return onnx_path(folder, network, precision).with_suffix(".engine")


def target_of(config: ExportConfig) -> Target:
    """Return the target of an export.

    Raises:
        ConfigError: there is none of this name, or it does not compute the precision.
    """
    target = load_target(config.target)
    target.require(config.precision)
    return target


@dataclass(frozen=True)
class Exported:
    """What was written."""

    onnx: dict[str, dict[str, Any]]
    """The sidecar of each network's ONNX file."""
    engines: dict[str, dict[str, Any]]
    """The sidecar of each network's engine; empty where none were asked for."""
    triton: dict[str, str]
    """The folder of each model version in the repository; empty where none was asked for."""
    warnings: tuple[str, ...]
    """What the target has to say about the precision."""


def export_stage(
    run: RunDirectory,
    folder: Path,
    config: RunConfig,
    data: ImageData,
    permission: Permission = BUILT_IN,
    *,
    engine: bool = False,
    triton: Path | None = None,
) -> Exported:
    """Export a run with images of its data set, and show how far it is; see ``export_run``.

    Raises:
        DataError: not one validation image can be read.
        CompressError: see ``export_run``.
    """
    from compress.terminal.progress import percent_bar

    with percent_bar("exporting") as show:
        return export_run(
            *(run, folder),
            config=config.export,
            samples=samples_of(data, config),
            engine=engine,
            triton=triton,
            permission=permission,
            progress=show,
        )


def export_existing(request: ExportRequest) -> tuple[Exported, Path]:
    """Export a run that another command has written; also return the folder that holds the files.

    Raises:
        CompressError: see ``existing`` and ``export_run``.
    """
    from compress.runs.launch import existing, reading

    run, config, data = existing(request.run, request)
    folder = request.output or run.export
    with reading(run):
        exported = export_stage(
            *(run, folder, config, data, request.permission),
            engine=request.engine,
            triton=request.triton,
        )
    return exported, folder


def export_run(
    run: RunDirectory,
    folder: Path,
    *,
    config: ExportConfig,
    samples: Samples,
    engine: bool = False,
    triton: Path | None = None,
    permission: Permission = BUILT_IN,
    progress: Progress | None = None,
) -> Exported:
    """Export both networks of a run; on request build their engines and a model repository.

    An engine is run against torch on the GPU that it was built on. A TensorRT-RTX engine that was
    built without one, or beside one that does not run it, cannot be, and its sidecar says so:
    ``parity`` is null.

    Args:
        run: the run directory; both networks lie there.
        folder: where ONNX files, engines and their sidecars are written.
        config: target, precision, batch sizes and the limits of parity.
        samples: images for parity and for calibration.
        engine: build engines with the TensorRT that is installed here.
        triton: the model repository; it serves TensorRT engines if they are built, else ONNX files.
        permission: which networks that are not built in may be built.
        progress: told about the slow steps.

    Raises:
        EnvironmentUnfitError: this machine cannot build the engines.
        ParityError: a runtime computes something else than torch.
        CheckpointError: a network is missing or damaged.
        CompressError: see ``export_checkpoint``, ``build_engine`` and ``write_model_repository``.
    """
    from compress.checkpoints.checkpoint import load_checkpoint

    target = target_of(config)
    warning = target.warnings.get(config.precision)
    if engine:
        _refuse_machine(target, config)
    onnx, engines = {}, {}
    for name, path in zip(NETWORKS, (run.dense, run.pruned), strict=True):
        onnx[name] = export_checkpoint(
            load_checkpoint(path, permission),
            onnx_path(folder, name, config.precision),
            target=target,
            config=config,
            samples=samples,
            progress=progress,
        )
    for name, path in zip(NETWORKS if engine else (), (run.dense, run.pruned), strict=False):
        engines[name] = _build(
            *(load_checkpoint(path, permission), name, folder, onnx[name]),
            target=target,
            config=config,
            samples=samples,
            progress=progress,
        )
    served = _serve(triton, folder, target, config, onnx, engines) if triton else {}
    return Exported(onnx, engines, served, (warning,) if warning else ())


def _refuse_machine(target: Target, config: ExportConfig) -> None:
    """Refuse engines that cannot be built here."""
    from export.engines.api import load_tensorrt
    from export.engines.checks import refuse_engine, refuse_version
    from export.nvml import find_gpu

    # What is exported next keeps the target's ceiling.
    refuse_engine(target, config.precision, gpu=find_gpu(), opset=target.opset)
    if target.builder is not None:
        refuse_version(target, load_tensorrt(target.builder).version)


def _build(
    checkpoint: Checkpoint,
    name: str,
    folder: Path,
    onnx: dict[str, Any],
    *,
    target: Target,
    config: ExportConfig,
    samples: Samples,
    progress: Progress | None,
) -> dict[str, Any]:
    """Build an engine aside, run it against torch where it can run, then give it its name."""
    from export.engines.build import build_engine
    from export.engines.checks import runs_on
    from export.engines.sidecar import sidecar_path
    from export.nvml import find_gpu

    final = engine_path(folder, name, config.precision)
    cache = config.timing_cache or folder / "timing_cache"
    with _aside(final.parent) as scratch:
        path = scratch / final.name
        document = build_engine(
            onnx_path(folder, name, config.precision),
            path,
            target=target,
            config=config.model_copy(update={"timing_cache": cache}),
            onnx_sha256=onnx["onnx"]["sha256"],
            network=onnx,
            progress=progress,
        )
        gpu = find_gpu()
        if gpu is not None and not runs_on(target, gpu):
            gpu = None
        document["parity"] = _prove(checkpoint, path, config, samples, gpu) if gpu else None
        write_json(sidecar_path(path), document)
        with writing(final):
            path.replace(final)
            sidecar_path(path).replace(sidecar_path(final))
    return document


def _prove(
    checkpoint: Checkpoint, path: Path, config: ExportConfig, samples: Samples, gpu: Gpu
) -> list[dict[str, Any]]:
    from export.runners import EngineRunner, TorchRunner

    # From SM 8.0 on TensorRT computes FP32 in TF32, whose mantissa is as short as that of FP16.
    tf32 = config.precision == "fp32" and int(gpu.sm.partition(".")[0]) >= 8
    precision = "fp16" if tf32 else config.precision
    limits = getattr(config.limits, precision)
    sizes = config.dynamic_batch if config.batch == "dynamic" else config.batch
    with (
        judging(path.name, precision),
        TorchRunner(checkpoint.model, "cpu") as reference,
        EngineRunner(path) as candidate,
    ):
        found = check_parity(
            *(reference, candidate, samples.validation),
            batch_sizes=tuple(dict.fromkeys(sizes)),
            limits=limits,
        )
    return [result.to_dict() for result in found]


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Yield a folder for files that have not earned their names; it is removed at the end."""
    scratch = folder / f".building.{os.getpid()}"
    with writing(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        with suppress(OSError):
            shutil.rmtree(scratch)


def _serve(
    repository: Path,
    folder: Path,
    target: Target,
    config: ExportConfig,
    onnx: dict[str, dict[str, Any]],
    engines: dict[str, dict[str, Any]],
) -> dict[str, str]:
    from export.triton import TritonModel, model_name, write_model_repository

    sizes = config.dynamic_batch[1:] if config.batch == "dynamic" else config.batch
    # Triton has a backend for TensorRT and none for TensorRT-RTX.
    documents = engines if engines and target.builder == "tensorrt" else onnx
    place = engine_path if documents is engines else onnx_path
    networks = {
        model_name(document["architecture"], name, config.precision): TritonModel(
            place(folder, name, config.precision), document, target, tuple(sizes)
        )
        for name, document in documents.items()
    }
    written = write_model_repository(repository, networks=networks)
    return {name: str(path) for name, path in written.items()}
