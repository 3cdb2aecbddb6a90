"""What is measured: a network of a run as one runtime reads it, and what its sidecar says."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.reports.schema import Artefact, ParityRecord
from compress.config import BenchConfig, ModelConfig, Precision, Runtime
from compress.config.targets import load_target
from compress.documents import named_files
from compress.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from compress.checkpoints.checkpoint import Checkpoint
    from export.runners import Runner

_SAME_IMAGES = ("precision", "num_classes", "input_size", "mean", "std")
_SAME_PARENT = ("architecture", "target", *_SAME_IMAGES)


@dataclass(frozen=True)
class Subject:
    """One network as a runtime reads it."""

    path: Path
    """A checkpoint, an ONNX file or an engine."""
    onnx: Path
    """The ONNX file of the same network."""
    facts: dict[str, Any]
    """What the sidecar of the export says of the network."""
    config: BenchConfig
    """In what, and how, it runs."""
    typed: ModelConfig | None = None
    """The network that the user asked for, where it is not built in."""

    @property
    def runtime(self) -> Runtime:
        """What runs it."""
        return self.config.runtime

    @property
    def channel_multiple(self) -> int:
        """What its target wants channels to be a multiple of; 1 for a target without a name."""
        name, precision = self.facts["target"], self.facts["precision"]
        if name not in named_files("targets"):
            return 1
        return load_target(name).channel_multiple.get(precision, 1)

    @property
    def artefact(self) -> Artefact:
        """The network as a report names it."""
        facts = self.facts
        return Artefact(
            onnx_sha256=facts["onnx"]["sha256"],
            weights_sha256=facts["weights_sha256"],
            bytes=self.path.stat().st_size,
            macs=facts["macs"],
            params=facts["params"],
            parity=tuple(
                ParityRecord(**{name: found[name] for name in ParityRecord.model_fields})
                for found in facts["parity"] or ()
            ),
        )

    def open(self, threads: int) -> Runner:
        """Return a runner of the network, not yet entered."""
        from export.runners import open_runner

        config = self.config
        return open_runner(
            self.source,
            config.runtime,
            threads=threads,
            precision=self.torch_precision,
            cuda_graph=config.cuda_graph,
            channels_last=config.channels_last,
            compiled=config.compiled,
        )

    @property
    def source(self) -> Path | Checkpoint:
        """What the runtime reads: torch a network that is built anew, the others a file."""
        if not self.config.runtime.startswith("torch"):
            return self.path
        from compress.checkpoints.checkpoint import load_checkpoint

        return load_checkpoint(self.path, self.typed)

    @property
    def torch_precision(self) -> Literal["fp32", "fp16"]:
        """In which torch computes it; ONNX files and engines bring their own."""
        torch = self.config.runtime.startswith("torch")
        return "fp16" if torch and self.facts["precision"] == "fp16" else "fp32"


def subjects(
    run_dir: Path,
    *,
    config: BenchConfig,
    precision: Precision,
    against: Path | None = None,
    typed: ModelConfig | None = None,
) -> dict[str, Subject]:
    """Find the pruned network of a run directory and its reference, and check that they compare.

    The reference is the dense network of the same run, or the pruned network of the run
    ``against``.

    Raises:
        CheckpointError: an export is missing or damaged, or the two do not belong together.
        ConfigError: the runtime does not compute the precision.
    """
    if config.runtime.startswith("torch") and precision == "int8":
        raise ConfigError("torch does not run the INT8 network; choose another bench.runtime")
    places = {
        "reference": (run_dir, "dense") if against is None else (against, "pruned"),
        "pruned": (run_dir, "pruned"),
    }
    found = {
        slot: replace(_subject(folder, name, config=config, precision=precision), typed=typed)
        for slot, (folder, name) in places.items()
    }
    _check_pair(found["reference"], found["pruned"], dense=against is None)
    return found


def _subject(run_dir: Path, name: str, *, config: BenchConfig, precision: Precision) -> Subject:
    from export.exporter import engine_path, onnx_path
    from export.sidecar import read_sidecar

    command = f"compress export {shlex.quote(str(run_dir))} --precision {precision}"
    onnx = onnx_path(run_dir / "export", name, precision)
    if config.runtime == "tensorrt":
        from export.engines.sidecar import read_engine_sidecar, sidecar_path

        path = engine_path(run_dir / "export", name, precision)
        _require(path, sidecar_path(path), command=f"{command} --engine --target TARGET")
        return Subject(path, onnx, read_engine_sidecar(path), config)
    _require(onnx, onnx.with_suffix(".json"), command=command)
    torch = config.runtime.startswith("torch")
    path = run_dir / f"{name}.safetensors" if torch else onnx
    return Subject(path, onnx, read_sidecar(onnx), config)


def _require(*files: Path, command: str) -> None:
    """Refuse an export that was never made, or of which a file is gone."""
    for file in files:
        if not file.exists():
            raise CheckpointError(f"there is no {file}; write it with: {command}")


def _check_pair(reference: Subject, pruned: Subject, *, dense: bool) -> None:
    why = "one is not the parent of the other; export both again"
    if not dense:
        why = "the two runs cannot be compared on the same images"
    for key in _SAME_PARENT if dense else _SAME_IMAGES:
        ours, theirs = pruned.facts[key], reference.facts[key]
        if ours != theirs:
            names = f"{reference.path.name} and {pruned.path.name}"
            raise CheckpointError(f"{names} differ in {key} ({theirs} and {ours}), so {why}")
