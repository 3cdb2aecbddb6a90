"""One small interface to every runtime: enter, run, exit.

A runner takes an array for each input by its name and returns one for each output; ``infer`` is
that for a classifier, images of shape (N, C, H, W) to logits of shape (N, classes). Timing and
comparing live outside of it; on a GPU its ``stages`` are what to time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from compress.config import Runtime
from compress.errors import ConfigError, EnvironmentUnfitError, nearest
from export.runners.cuda import require_gpu
from export.runners.engine_runner import EngineRunner
from export.runners.onnx_runner import CPU, CUDA, TENSORRT, OnnxRunner, require_provider
from export.runners.protocol import Feeds, Outputs, Runner, TensorSpec
from export.runners.stages import Stages
from export.runners.torch_runner import TorchRunner

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoints.checkpoint import Checkpoint

__all__ = [
    "RUNTIMES",
    "EngineRunner",
    "Feeds",
    "OnnxRunner",
    "Outputs",
    "Runner",
    "Runtime",
    "Stages",
    "TensorSpec",
    "TorchRunner",
    "artefact_suffix",
    "network_of",
    "open_runner",
    "require_readable",
    "require_usable",
    "stages_of",
]

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
"""What runs a network, and where."""

_SUFFIXES = {"torch": ".safetensors", "onnxruntime": ".onnx", "tensorrt": ".engine"}
_PROVIDERS = {
    "onnxruntime-cpu": CPU,
    "onnxruntime-cuda": CUDA,
    "onnxruntime-tensorrt": TENSORRT,
}


def stages_of(runner: Runner) -> Stages | None:
    """Return the steps of an entered runner on a GPU; None on the CPU, where there is but one."""
    return getattr(runner, "stages", None)


def artefact_suffix(runtime: Runtime) -> str:
    """Return the suffix of the file that a runtime reads: what has to be there, or to be made.

    Raises:
        ConfigError: no such runtime.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"no runtime is named {runtime!r}: {nearest(runtime, RUNTIMES)}")
    return _SUFFIXES[runtime.partition("-")[0]]


def open_runner(
    source: Path | Checkpoint | nn.Module,
    runtime: Runtime,
    *,
    threads: int | None = None,
    device: str = "cuda",
    precision: Literal["fp32", "fp16"] = "fp32",
    cuda_graph: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
    inputs: Sequence[TensorSpec] | None = None,
) -> Runner:
    """Return a runner, not yet entered, of what a runtime reads.

    Args:
        source: the path of a checkpoint (``*.safetensors``), an ONNX file (``*.onnx``) or an engine
            (``*.engine``), whichever the runtime reads; or a checkpoint or a module that is loaded
            already.
        runtime: what runs it.
        threads: of a runtime on the CPU; None leaves the choice to it.
        device: of a runtime on a GPU, ``cuda`` or ``cuda:N``.
        precision: in which torch computes; ONNX files and engines bring their own.
        cuda_graph: replay the network as a CUDA graph.
        channels_last: in torch, lay activations out as (N, H, W, C).
        compiled: in torch, through ``torch.compile``.
        inputs: in torch, what the network reads, in the order of its arguments.

    Raises:
        ConfigError: no such runtime, a file that it does not read, or what it cannot do.
        CheckpointError: a checkpoint that is missing or damaged.
    """
    require_readable(source, runtime)
    if not isinstance(source, Path) or runtime in ("torch-cpu", "torch-cuda"):
        return TorchRunner(
            network_of(source),
            "cpu" if runtime == "torch-cpu" else device,
            precision=precision,
            cuda_graph=cuda_graph,
            channels_last=channels_last,
            compiled=compiled,
            threads=threads,
            inputs=inputs,
        )
    if channels_last or compiled:
        raise ConfigError(f"channels_last and compiled are for torch, not for {runtime}")
    if runtime == "tensorrt":
        return EngineRunner(source, device=device, cuda_graph=cuda_graph)
    return OnnxRunner(
        source,
        provider=_PROVIDERS[runtime],
        threads=threads,
        device=device,
        cuda_graph=cuda_graph,
    )


def require_usable(runtime: Runtime) -> None:
    """Refuse a runtime that cannot work here, where it has no file yet to find that out with.

    Raises:
        ConfigError: no such runtime.
        EnvironmentUnfitError: it is not installed, or there is no GPU that it could use.
    """
    artefact_suffix(runtime)
    if runtime in _PROVIDERS:
        require_provider(_PROVIDERS[runtime])
    if runtime == "tensorrt":
        _require_tensorrt()
    if not runtime.endswith("-cpu"):
        require_gpu(f"{runtime} was asked for")


def _require_tensorrt() -> None:
    """Refuse to go on without either library; which one an engine needs, its sidecar says."""
    from export.engines.api import load_tensorrt

    try:
        load_tensorrt("tensorrt")
    except EnvironmentUnfitError:
        try:
            load_tensorrt("tensorrt_rtx")
        except EnvironmentUnfitError:
            pass
        else:
            return
        raise


def require_readable(source: Path | Checkpoint | nn.Module, runtime: Runtime) -> None:
    """Refuse what a runtime does not read.

    Raises:
        ConfigError: it is a file of another kind, or there is no such runtime.
    """
    suffix = artefact_suffix(runtime)
    found = source.suffix if isinstance(source, Path) else _SUFFIXES["torch"]
    if found != suffix:
        given = source.name if isinstance(source, Path) else "a network in memory"
        raise ConfigError(f"runtime {runtime} reads a file *{suffix}, not {given}")


def network_of(source: Path | Checkpoint | nn.Module) -> nn.Module:
    """Return the network of a checkpoint, loading it if that was not done.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    from compress.checkpoints.checkpoint import Checkpoint, load_checkpoint

    if isinstance(source, Path):
        return load_checkpoint(source).model
    return source.model if isinstance(source, Checkpoint) else source
