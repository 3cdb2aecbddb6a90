"""What serves a network: the runtime, how it is asked, and the files that it reads."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from compress.config.targets import Target, load_target
from compress.errors import ConfigError, EnvironmentUnfitError
from compress.latency.fingerprint import Fingerprint, network_digest
from compress.latency.table import table_name
from export.latency.rounds import Effort, Measured, Told, measured, timer_of

if TYPE_CHECKING:
    from torch import nn

    from compress.config import Runtime
    from compress.networks.groups import ChannelGraph
    from export.runners import Runner

_OPENING = 0.3  # share of the time that exporting and loading takes
PRECISIONS = ("fp32", "fp16")
"""In which tables are measured; INT8 needs images to calibrate every network."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A runtime and how it is asked to serve."""

    runtime: Runtime = "onnxruntime-cpu"
    precision: Literal["fp32", "fp16"] = "fp32"
    batch: int = 1
    threads: int = 1
    """Of a runtime on the CPU."""
    target: str = "cpu"
    """Whose opset bounds ONNX files."""

    @property
    def table_name(self) -> str:
        """The name of the table's file."""
        return table_name(self.runtime, self.precision, self.batch, self.threads)

    def __post_init__(self) -> None:
        """Refuse what no table is measured for.

        Raises:
            ConfigError: naming it.
        """
        from export.runners import RUNTIMES, artefact_suffix

        artefact_suffix(self.runtime)
        if self.runtime == "onnxruntime-tensorrt":
            others = ", ".join(name for name in RUNTIMES if name != self.runtime)
            raise ConfigError(f"no latency table is measured in {self.runtime}; in {others}")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"latency tables are measured in {' and '.join(PRECISIONS)}, not {self.precision}"
            )
        if self.precision == "fp16" and self.on_cpu:
            raise ConfigError(
                f"fp16 was asked of {self.runtime}, which computes it in fp32: "
                "measure fp32 there, or name a runtime on a GPU"
            )
        for name in ("batch", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is none; it is 1 or more")

    @property
    def on_cpu(self) -> bool:
        """Whether it computes on the CPU."""
        return self.runtime.endswith("-cpu")

    def fingerprint(self, graph: ChannelGraph) -> Fingerprint:
        """Return what a table of a network's layers would hold for here.

        Raises:
            EnvironmentUnfitError: the runtime or its GPU is not there.
        """
        return Fingerprint(
            machine=(cpu_name() or platform.machine()) if self.on_cpu else _gpu_name(),
            runtime=self.runtime,
            version=_version(self.runtime),
            precision=self.precision,
            batch=self.batch,
            threads=self.threads if self.on_cpu else 1,
            network=network_digest(graph),
        )


class Network(NamedTuple):
    """A network and the size (C, H, W) of one of its images."""

    model: nn.Module
    input_size: tuple[int, int, int]


def measure_ms(
    networks: Sequence[Network],
    serving: Serving,
    effort: Effort | None = None,
    *,
    seed: int = 0,
    told: Told | None = None,
) -> Measured:
    """Measure networks against each other, as the export writes them, in turn in this process.

    Args:
        networks: dense, pruned, any; they are as they were afterwards.
        serving: what serves them.
        effort: how long it may take.
        seed: of images and order.
        told: the share that is done.

    Raises:
        ModelError: a network cannot be exported or served.
        EnvironmentUnfitError: the runtime or its device is not there.
    """
    rng = np.random.default_rng(seed)
    tell = told or (lambda share: None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        timers = []
        for number, network in enumerate(networks):
            source = readable(network, serving, folder / f"{number}.onnx")
            runner = stack.enter_context(opened(source, serving))
            shape = (serving.batch, *network.input_size)
            feeds = {"input": rng.standard_normal(shape).astype(np.float32)}
            timers.append(timer_of(runner, feeds, threads=serving.threads))
            tell(_OPENING * (number + 1) / len(networks))
        return measured(
            timers, effort, seed=seed, told=lambda share: tell(_OPENING + (1 - _OPENING) * share)
        )


def readable(network: Network, serving: Serving, path: Path) -> Path | nn.Module:
    """Return what a runtime reads of a network: a file, written under this name, or itself."""
    if serving.runtime.startswith("torch"):
        return network.model
    target = load_target(serving.target)
    _write_onnx(network, path, serving, target)
    return _engine(path, serving, target) if serving.runtime == "tensorrt" else path


def opened(source: Path | nn.Module, serving: Serving) -> Runner:
    """Return a runner, not yet entered, of what ``readable`` gave."""
    from export.runners import open_runner
    from export.runners.protocol import IMAGES

    if isinstance(source, Path):
        return open_runner(source, serving.runtime, threads=serving.threads)
    return open_runner(
        source,
        serving.runtime,
        threads=serving.threads,
        precision=serving.precision,
        inputs=(IMAGES,),
    )


def _write_onnx(network: Network, path: Path, serving: Serving, target: Target) -> None:
    from export.onnx.trace import onnx_from_network
    from export.precision.fp16 import to_fp16

    proto = onnx_from_network(network.model, target=target, input_size=network.input_size)
    if serving.precision == "fp16":
        to_fp16(proto)
    path.write_bytes(proto.SerializeToString())


def _engine(path: Path, serving: Serving, target: Target) -> Path:
    """Build an engine for one batch size; timings are shared by all engines of a process."""
    from compress.config import ExportConfig
    from compress.files.atomic import sha256_of
    from export.engines.build import build_engine
    from export.engines.sidecar import NETWORK_FACTS

    engine = path.with_suffix(".engine")
    config = ExportConfig(
        target=serving.target,
        precision=serving.precision,
        batch=(serving.batch,),
        timing_cache=path.parent / "timing_cache",
    )
    build_engine(
        path,
        engine,
        target=target,
        config=config,
        onnx_sha256=sha256_of(path),
        network=dict.fromkeys(NETWORK_FACTS),
    )
    return engine


def cpu_name() -> str | None:
    """Return the name of the processor, as the kernel gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None


def _gpu_name() -> str:
    from export.nvml import find_gpu

    gpu = find_gpu()
    if gpu is None:
        raise EnvironmentUnfitError(
            "a latency table for a GPU was asked for, and there is no GPU here: measure where "
            "there is one, or name a runtime on the CPU"
        )
    return gpu.name


def _version(runtime: str) -> str:
    if runtime.startswith("torch"):
        import torch

        return torch.__version__
    if runtime == "tensorrt":
        from export.engines.api import load_tensorrt

        return load_tensorrt("tensorrt").version
    from export.runners.onnx_runner import import_onnxruntime

    return import_onnxruntime().__version__
