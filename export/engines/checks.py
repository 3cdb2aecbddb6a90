"""Whether an engine can be built, answered before any work is done.

Everything here is a pure function of what was asked and what this machine has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from compress.errors import ConfigError, EnvironmentUnfitError, ModelError

if TYPE_CHECKING:
    from compress.config import Precision
    from compress.config.targets import Target
    from export.nvml import Gpu

_LEAST_SM: dict[str, tuple[int, int]] = {"fp16": (5, 3), "int8": (6, 1)}
"""NVIDIA, TensorRT support matrix, "hardware and precision": the first chips that compute it."""
_LAST_FOR_VOLTA = "10.4.0"  # SM 7.0 was removed in 10.5, says its release note


def refuse_engine(
    target: Target, precision: Precision, *, gpu: Gpu | None, opset: int
) -> str | None:
    """Refuse an engine that this machine or its target cannot have.

    Args:
        target: what the engine is for.
        precision: number format of weights and activations.
        gpu: the GPU of this machine.
        opset: of the ONNX file.

    Returns:
        A sentence for people when the precision is allowed and rarely pays, else None.

    Raises:
        ConfigError: the target has no engines, or does not compute the precision.
        ModelError: the file's opset is above the target's ceiling.
        EnvironmentUnfitError: there is no GPU, or not the one that the engine is for.
    """
    if target.builder is None:
        raise ConfigError(
            f"target {target.name} has no engines; export ONNX for it, or choose a target with a "
            "builder, such as v100"
        )
    target.require(precision)
    if opset > target.opset:
        raise ModelError(
            f"the ONNX file has opset {opset} and target {target.name} reads up to "
            f"{target.opset}; export it again for this target"
        )
    _refuse_gpu(target, precision, gpu)
    return target.warnings.get(precision)


def runs_on(target: Target, gpu: Gpu) -> bool:
    """Return whether a GPU runs the engines of a target.

    TensorRT-RTX builds on any machine, and its engines run on some GPUs only.
    """
    built_for = target.compute_capabilities
    if built_for and gpu.sm not in built_for:
        # What is built for 12.0 runs on later ones, as TensorRT-RTX itself says on others.
        later = tuple(map(int, gpu.sm.split("."))) > (12, 0) and "12.0" in built_for
        if not later:
            return False
    needed = target.requires.get("gpu")
    return needed is None or needed.versions is None or _is_within(gpu.sm, needed.versions)


def refuse_version(target: Target, version: str) -> None:
    """Refuse an installed TensorRT whose engines the target does not take.

    Raises:
        EnvironmentUnfitError: it is outside of the target's range; the sentence says what to
            install.
    """
    if target.tensorrt is None or _is_within(version, target.tensorrt):
        return
    library = "TensorRT-RTX" if target.builder == "tensorrt_rtx" else "TensorRT"
    wanted = f"target {target.name} needs {library} {target.tensorrt}"
    if target.sm == "7.0" and _is_within(version, f">{_LAST_FOR_VOLTA}"):
        raise EnvironmentUnfitError(
            f"{wanted} and {version} is installed, which no longer builds for SM 7.0: support "
            f"was dropped in 10.5; install tensorrt-cu12=={_LAST_FOR_VOLTA}"
        )
    raise EnvironmentUnfitError(
        f"{wanted} and {version} is installed; install a release of that range"
    )


def _refuse_gpu(target: Target, precision: Precision, gpu: Gpu | None) -> None:
    if gpu is None:
        if target.builder == "tensorrt_rtx":  # it builds on a CPU, and compiles when it loads
            return
        raise EnvironmentUnfitError(
            f"an engine for target {target.name} is built on the GPU that it is for and torch "
            f"finds none here; build it on a machine with {_with_sm(target)}"
        )
    if target.sm is not None and gpu.sm != target.sm:
        raise EnvironmentUnfitError(
            f"an engine for target {target.name} is built on the GPU that it is for, of SM "
            f"{target.sm}, and this {gpu.name} is SM {gpu.sm}; build it on a machine with "
            f"{_with_sm(target)}, or choose the target of this GPU"
        )
    least = _LEAST_SM.get(precision, (0, 0))
    if tuple(int(part) for part in gpu.sm.split(".")) < least:
        raise EnvironmentUnfitError(
            f"this {gpu.name} of SM {gpu.sm} does not compute {precision}, which begins with SM "
            f"{least[0]}.{least[1]}; build for fp32"
        )


def _with_sm(target: Target) -> str:
    return "an NVIDIA GPU" if target.sm is None else f"a GPU of SM {target.sm}"


def _is_within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
