"""Where the time of one call goes: what a runtime ran, layer by layer, and how long each took.

A profiler costs time itself, most where layers are small. ONNX Runtime's is taken off, that of
torch and of TensorRT is not, so these times explain a latency and never replace it: what one
network takes against another is measured without a profiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from compress.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from compress.checkpoints.checkpoint import Checkpoint
    from compress.config import Runtime

__all__ = [
    "WARMUPS",
    "LayerTime",
    "Profile",
    "joined_profiles",
    "profile_from_calls",
    "profile_network",
]

WARMUPS = 3
"""Calls before the first profiled one: the first few allocate, and choose kernels."""


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One thing that a runtime ran in every call."""

    name: str
    """The runtime's own name of it: a node, a fused node, an engine layer, a module."""
    kind: str
    """Its operator, as the runtime calls it."""
    nodes: tuple[str, ...]
    """The ONNX nodes, or the torch module, that it computes, as far as known."""
    milliseconds: float
    """Per call; median over the profiled calls."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one network ran, in order of execution."""

    calls: int
    """Profiled calls."""
    total_ms: float
    """The sum of all layers in a call; median over the calls."""
    layers: tuple[LayerTime, ...]


def profile_network(
    source: Path | Checkpoint | nn.Module,
    runtime: Runtime,
    images: np.ndarray,
    *,
    calls: int,
    threads: int | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
    device: str = "cuda",
    channels_last: bool = False,
    compiled: bool = False,
) -> Profile | None:
    """Return what a runtime runs for a batch of images and how long each part takes.

    Args:
        source: the path of what the runtime reads: a checkpoint, an ONNX file or an engine; or a
            checkpoint or a module that is loaded already.
        runtime: what runs it.
        images: one batch (N, C, H, W), float32.
        calls: how many are profiled, after ``WARMUPS`` that are not.
        threads: of a runtime on the CPU; None leaves the choice to it.
        precision: in which torch computes; ONNX files and engines bring their own.
        device: of a runtime on a GPU, ``cuda`` or ``cuda:N``.
        channels_last: in torch, lay activations out as (N, H, W, C).
        compiled: in torch, through ``torch.compile``.

    Returns:
        None where the runtime cannot tell. Compiled networks have no modules any more. ONNX Runtime
        on a GPU cannot tell, because the profile that its released packages write holds the time
        in which the host launched a node, not the one in which the GPU computed it; on the CPU it
        cannot where a name in the network breaks the JSON that it writes.

    Raises:
        ConfigError: a file that the runtime does not read, or fewer calls than one.
        CheckpointError: the file is missing or damaged.
        EnvironmentUnfitError: the runtime or its device is not there.
        DataError: the images are not of the shape or type that the network reads.
        ModelError: the runtime cannot compute the network on them.
    """
    from export.runners import network_of, require_readable

    require_readable(source, runtime)
    if calls < 1:
        raise ConfigError(f"a profile of {calls} calls was asked for; it takes at least one")
    if compiled or runtime in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        return None
    if isinstance(source, Path) and runtime == "onnxruntime-cpu":
        from export.profiling.onnx_profile import profile_onnx

        return profile_onnx(source, images, calls=calls, threads=threads)
    if isinstance(source, Path) and runtime == "tensorrt":
        from export.profiling.engine_profile import profile_engine

        return profile_engine(source, images, calls=calls, device=device)
    from export.profiling.torch_profile import profile_module

    return profile_module(
        network_of(source),
        "cpu" if runtime == "torch-cpu" else device,
        images,
        calls=calls,
        threads=threads,
        precision=precision,
        channels_last=channels_last,
    )


def profile_from_calls(
    layers: Sequence[tuple[str, str, tuple[str, ...]]], calls: Sequence[Sequence[float]]
) -> Profile:
    """Return the medians over calls.

    Args:
        layers: name, kind and nodes of each layer, in order of execution.
        calls: milliseconds of each layer, in the same order, for each profiled call.
    """
    return Profile(
        calls=len(calls),
        total_ms=median(map(sum, calls)),
        layers=tuple(
            LayerTime(name=name, kind=kind, nodes=nodes, milliseconds=median(times))
            for (name, kind, nodes), times in zip(layers, zip(*calls, strict=True), strict=True)
        ),
    )


def joined_profiles(profiles: Sequence[Profile]) -> Profile:
    """Return one profile of several of the same network in the same runtime; medians of medians."""
    return Profile(
        calls=sum(profile.calls for profile in profiles),
        total_ms=median(profile.total_ms for profile in profiles),
        layers=tuple(
            replace(times[0], milliseconds=median(time.milliseconds for time in times))
            for times in zip(*(profile.layers for profile in profiles), strict=True)
        ),
    )
