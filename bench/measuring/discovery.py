"""Finds what is compared: the two networks of a run, or any two."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bench.measuring.subject import Facts, Pair, Subject
from compress.checkpoints.permission import BUILT_IN, Permission
from compress.config import BenchConfig, Precision, Runtime
from compress.errors import CheckpointError, ConfigError
from compress.files.atomic import sha256_of
from export.runners import artefact_suffix, require_usable

if TYPE_CHECKING:
    from torch import nn

USUAL: dict[str, Runtime] = {
    ".onnx": "onnxruntime-cpu",
    ".engine": "tensorrt",
    ".safetensors": "torch-cpu",
}
"""What runs each kind of file, unless another runtime is asked for that reads it."""
_SAME_IMAGES = ("num_classes", "mean", "std")
_SAME_RUN = ("precision", "input_size", *_SAME_IMAGES)
_SAME_PARENT = ("architecture", "target", *_SAME_RUN)
_IN_TORCH = ("channels_last", "compiled")


def subjects(
    run_dir: Path,
    *,
    config: BenchConfig,
    precision: Precision,
    against: Path | None = None,
    permission: Permission = BUILT_IN,
) -> Pair:
    """Find the pruned network of a run directory and its reference, and check that they compare.

    The reference is the dense network of the same run, or the pruned network of the run
    ``against``.

    Raises:
        CheckpointError: an export is missing or damaged, or the two do not belong together.
        ConfigError: the runtime does not compute the precision.
    """
    reference = (run_dir, "dense") if against is None else (against, "pruned")
    found = Pair(
        *(
            _of_run(folder, name, config=config, precision=precision, permission=permission)
            for folder, name in (reference, (run_dir, "pruned"))
        )
    )
    if against is None:
        why = "one is not the parent of the other; export both again"
        _check_pair(found, _SAME_PARENT, why)
    else:
        _check_pair(found, _SAME_RUN, "the two runs cannot be compared on the same images")
    return found


def any_subjects(
    reference: Path | nn.Module,
    pruned: Path | nn.Module,
    *,
    config: BenchConfig,
    runtime: Runtime | None = None,
    precision: Precision | None = None,
    permission: Permission = BUILT_IN,
) -> Pair:
    """Take any two of ONNX file, engine, checkpoint, run directory and network in memory.

    Each runs in ``runtime`` where that reads it, else in the usual one of its kind. Of a run
    directory it is the pruned network: in the kind of file that the runtime, or else the other
    network, asks for.

    Raises:
        ConfigError: a file of no such kind, or one of which the runtime reads neither.
        CheckpointError: one is missing or damaged, or the two do not compare.
    """
    given = (reference, pruned)
    kinds = [_suffix(one) for one in given]
    asked = artefact_suffix(runtime) if runtime else None
    if runtime and asked not in kinds and None not in kinds:
        names = " nor ".join(_named(one) for one in given)
        raise ConfigError(f"runtime {runtime} reads a file *{asked}, and that is neither {names}")
    _require_precision(kinds, precision)
    found = []
    for one, kind, other in zip(given, kinds, reversed(kinds), strict=True):
        kind = kind or asked or other or ".onnx"
        used = runtime if runtime and asked == kind else USUAL[kind]
        found.append(
            _any(one, config=_for(config, used), precision=precision, permission=permission)
        )
    pair = Pair(*found)
    _check_pair(pair, _SAME_IMAGES, "they cannot be compared on the same inputs")
    return pair


def higher_precisions(subject: Subject) -> Iterator[Subject]:
    """Yield the same network in each higher precision whose file lies beside its own.

    Torch computes one checkpoint in either.

    Raises:
        CheckpointError: such a file is damaged, or its sidecar is another file's.
    """
    from export.stage import onnx_path

    path, precision = subject.path, subject.facts.get("precision")
    order: tuple[Precision, ...] = get_args(Precision)
    if path is None or precision not in order:
        return
    for higher in order[: order.index(precision)]:
        if subject.runtime.startswith("torch"):
            yield replace(subject, facts={**subject.facts, "precision": higher})
            continue
        name = path.name.removesuffix(f".{precision}{path.suffix}")
        file = onnx_path(path.parent, name, higher).with_suffix(path.suffix)
        if file != path and file.is_file():
            found = _any(file, config=subject.config, precision=None, permission=subject.permission)
            if (found.facts.get("precision"), found.digest) == (higher, subject.digest):
                yield found


def missing_facts(pair: Pair) -> tuple[str, ...]:
    """Return what is not known of two networks for want of a sidecar, as notes of a report."""
    lacking = [
        name
        for subject, name in zip(pair, pair.names, strict=True)
        if subject.path is not None and "architecture" not in subject.facts
    ]
    if not lacking:
        return ()
    return (
        f"There is no sidecar of {' and '.join(lacking)}, so architecture, target, MACs, "
        "parameters, parity with torch and channel groups are left out.",
    )


def _suffix(given: Path | nn.Module) -> str | None:
    """Return the kind of a file; None of a run directory, which has several."""
    if not isinstance(given, Path):
        return ".safetensors"
    if given.is_dir():
        return None
    if given.suffix not in USUAL:
        raise ConfigError(
            f"{given} is none of the files that can be compared: {', '.join(USUAL)}, or a run "
            "directory"
        )
    return given.suffix


def _require_precision(kinds: Sequence[str | None], precision: Precision | None) -> None:
    """Refuse a precision that no side computes or that none would heed."""
    if precision == "int8" and ".safetensors" in kinds:
        raise ConfigError("torch does not run the INT8 network; name its ONNX file")
    if precision is not None and None not in kinds and ".safetensors" not in kinds:
        raise ConfigError(
            f"precision {precision} would be ignored: ONNX files and engines bring their own"
        )


def _named(given: Path | nn.Module) -> str:
    return given.name if isinstance(given, Path) else "a network in memory"


def _for(config: BenchConfig, runtime: Runtime) -> BenchConfig:
    """Return how one side is measured: what is for torch alone does not concern the other."""
    update: dict[str, Any] = {"runtime": runtime}
    if not runtime.startswith("torch"):
        update |= dict.fromkeys(_IN_TORCH, False)
    return config.model_copy(update=update)


def _any(
    given: Path | nn.Module,
    *,
    config: BenchConfig,
    precision: Precision | None,
    permission: Permission,
) -> Subject:
    if not isinstance(given, Path):
        facts: Facts = {"precision": precision} if precision else {}
        facts["params"] = sum(parameter.numel() for parameter in given.parameters()) or None
        return Subject(None, None, facts, config, module=given)
    if given.is_dir():
        from compress.runs.rundirectory import RunDirectory

        exported = precision or RunDirectory(given).saved_config().export.precision
        return _of_run(given, "pruned", config=config, precision=exported, permission=permission)
    if not given.is_file():
        raise CheckpointError(f"there is no file {given}")
    if given.suffix == ".engine":
        from export.engines.sidecar import read_engine_sidecar

        facts = read_engine_sidecar(given)
        return Subject(given, _onnx_of(given, facts), facts, config)
    if given.suffix == ".onnx":
        from export.onnx.sidecar import has_sidecar, read_sidecar

        facts = read_sidecar(given) if has_sidecar(given) else _bare(given)
        return Subject(given, given, facts, config)
    return _checkpoint(given, config=config, precision=precision, permission=permission)


def _onnx_of(engine: Path, facts: Facts) -> Path | None:
    """Return the ONNX file that an engine was built from, if it lies beside it."""
    path = engine.with_suffix(".onnx")
    return path if path.is_file() and sha256_of(path) == facts["onnx"]["sha256"] else None


def _bare(path: Path) -> Facts:
    """Return what an ONNX file without a sidecar tells: which one it is."""
    return {"onnx": {"sha256": sha256_of(path)}}


def _checkpoint(
    path: Path, *, config: BenchConfig, precision: Precision | None, permission: Permission
) -> Subject:
    """Take a checkpoint by itself; what a sidecar would tell is in its header."""
    from compress.checkpoints.checkpoint import load_checkpoint
    from export.onnx.sidecar import pruning_facts

    found = load_checkpoint(path, permission)
    facts: Facts = {
        **found.costs,
        "architecture": found.architecture,
        "num_classes": found.num_classes,
        "classes": list(found.classes),
        "input_size": list(found.input_size),
        "mean": list(found.mean),
        "std": list(found.std),
        "weights_sha256": found.sha256,
        "precision": precision or "fp32",
        **pruning_facts(found.description, found.structure),
    }
    return Subject(path, None, facts, config, permission)


def _of_run(
    run_dir: Path,
    name: str,
    *,
    config: BenchConfig,
    precision: Precision,
    permission: Permission,
) -> Subject:
    from export.onnx.sidecar import read_sidecar
    from export.stage import engine_path, onnx_path

    if config.runtime.startswith("torch") and precision == "int8":
        raise ConfigError("torch does not run the INT8 network; choose another bench.runtime")
    command = f"compress export {shlex.quote(str(run_dir))} --precision {precision}"
    onnx = onnx_path(run_dir / "export", name, precision)
    if config.runtime == "tensorrt":
        from export.engines.sidecar import read_engine_sidecar, sidecar_path

        path = engine_path(run_dir / "export", name, precision)
        files = (path, sidecar_path(path))
        _require(files, config.runtime, command=f"{command} --engine --target TARGET")
        facts = _with_pruning(read_engine_sidecar(path), run_dir / f"{name}.safetensors")
        return Subject(path, onnx, facts, config, permission)
    _require((onnx, onnx.with_suffix(".json")), config.runtime, command=command)
    checkpoint = run_dir / f"{name}.safetensors"
    path = checkpoint if config.runtime.startswith("torch") else onnx
    return Subject(path, onnx, _with_pruning(read_sidecar(onnx), checkpoint), config, permission)


def _with_pruning(facts: Facts, checkpoint: Path) -> Facts:
    """Add what sidecars of earlier versions do not tell, from the header of the checkpoint."""
    if "groups" in facts or not checkpoint.is_file():
        return facts
    from compress.checkpoints.description import read_description
    from export.onnx.sidecar import pruning_facts

    description = read_description(checkpoint)
    return facts | (pruning_facts(description, description.structure) if description else {})


def _require(files: Sequence[Path], runtime: Runtime, *, command: str) -> None:
    """Refuse an export that was never made, or of which a file is gone."""
    for file in files:
        if not file.exists():
            require_usable(runtime)  # else the file is made for nothing
            raise CheckpointError(f"there is no {file}; write it with: {command}")


def _check_pair(pair: Pair, keys: Sequence[str], why: str) -> None:
    """Refuse two networks of which something differs that is known of both."""
    for key in keys:
        theirs, ours = (subject.facts.get(key) for subject in pair)
        if ours != theirs and None not in (ours, theirs):
            names = f"{pair.reference.name} and {pair.pruned.name}"
            raise CheckpointError(f"{names} differ in {key} ({theirs} and {ours}), so {why}")
