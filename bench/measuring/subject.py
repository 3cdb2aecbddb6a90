"""What is measured: a network as one runtime reads it, and what is known of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bench.measuring.records import Artefact, GroupRecord, ParityRecord
from compress.checkpoints.permission import BUILT_IN, Permission
from compress.config import BenchConfig, Precision, Runtime
from compress.config.targets import load_target
from compress.files.atomic import sha256_of
from compress.files.documents import named_files
from export.runners import Runner, TensorSpec, open_runner

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoints.checkpoint import Checkpoint

Facts = dict[str, Any]
"""What a sidecar or the header of a checkpoint says; a key that nobody tells is absent."""


@dataclass(frozen=True)
class Subject:
    """One network as a runtime reads it."""

    path: Path | None
    """A checkpoint, an ONNX file or an engine; None of a network in memory."""
    onnx: Path | None
    """The ONNX file of the same network, if there is one."""
    facts: Facts
    """What is known of the network."""
    config: BenchConfig
    """In what, and how, it runs."""
    permission: Permission = BUILT_IN
    """The network that the user asked for, where it is not built in."""
    module: nn.Module | None = field(default=None, repr=False)
    """A network in memory."""

    @property
    def runtime(self) -> Runtime:
        """What runs it."""
        return self.config.runtime

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path.name if self.path else type(self.module).__name__

    @property
    def channel_multiple(self) -> int:
        """What its target wants channels to be a multiple of; 1 where nothing tells the target."""
        name, precision = self.facts.get("target"), self.facts.get("precision")
        if name not in named_files("targets"):
            return 1
        return load_target(str(name)).channel_multiple.get(precision, 1)  # type: ignore[arg-type]

    @property
    def artefact(self) -> Artefact:
        """The network as a report names it."""
        facts = self.facts
        return Artefact(
            onnx_sha256=facts.get("onnx", {}).get("sha256"),
            weights_sha256=self.digest,
            bytes=sum(file.stat().st_size for file in self.files) or None,
            file=self.name if self.path else None,
            runtime=self.runtime,
            precision=facts.get("precision"),
            macs=facts.get("macs"),
            params=facts.get("params"),
            parity=tuple(
                ParityRecord(**{name: found[name] for name in ParityRecord.model_fields})
                for found in facts.get("parity") or ()
            ),
        )

    @property
    def groups(self) -> tuple[GroupRecord, ...]:
        """Channel groups, without those that may not be pruned."""
        return tuple(GroupRecord(**group) for group in self.facts.get("groups") or ())

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """What the runtime reads; an ONNX file may keep weights beside it."""
        if self.path is None:
            return ()
        if self.path.suffix != ".onnx" or "weights_sha256" in self.facts:
            return (self.path,)  # what this tool exports is one file
        from export.onnx.check import weight_files

        return weight_files(self.path)

    @cached_property
    def digest(self) -> str:
        """What tells this network from others."""
        if "weights_sha256" in self.facts:
            return str(self.facts["weights_sha256"])
        return sha256_of(*self.files) if self.files else _digest_of(self.module)

    @cached_property
    def source(self) -> Path | Checkpoint | nn.Module:
        """What the runtime reads: torch a network that is built anew, the others a file."""
        if self.path is None:
            assert self.module is not None
            return self.module
        if not self.runtime.startswith("torch"):
            return self.path
        from compress.checkpoints.checkpoint import load_checkpoint

        return load_checkpoint(self.path, self.permission)

    @property
    def torch_precision(self) -> Literal["fp32", "fp16"]:
        """In which torch computes it; ONNX files and engines bring their own."""
        torch = self.runtime.startswith("torch")
        return "fp16" if torch and self.facts.get("precision") == "fp16" else "fp32"

    def open(self, threads: int, builds: Path | None = None) -> Runner:
        """Return a runner of the network, not yet entered.

        Args:
            threads: of a runtime on the CPU.
            builds: folder for what a runtime builds of a file, for other runners to find.
        """
        config = self.config
        size = self.facts.get("input_size")
        inputs = None if size is None else (TensorSpec("input", "float32", (None, *size)),)
        runner = open_runner(
            self.source,
            self.runtime,
            threads=threads,
            precision=self.torch_precision,
            cuda_graph=config.cuda_graph,
            channels_last=config.channels_last,
            compiled=config.compiled,
            inputs=inputs,
        )
        if builds is not None and runner.builds_for_sizes:
            # Of the file itself: the same weights in two precisions are two engines.
            runner.keep_builds(builds, sha256_of(*self.files))
        return runner


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of two networks before they are measured; pairs are (reference, pruned)."""

    architecture: str | None
    target: str | None
    precision: Precision | None = "fp32"
    artefacts: tuple[Artefact, Artefact]
    groups: tuple[GroupRecord, ...] = ()
    """Channel groups of the pruned network, without those that may not be pruned."""
    pruning: dict[str, Any] | None = None
    """What the pruning stage said of itself."""


class Pair(NamedTuple):
    """What is compared."""

    reference: Subject
    pruned: Subject

    @property
    def names(self) -> tuple[str, str]:
        """What messages call both."""
        ours, theirs = (
            subject.name if subject.path else f"{role} ({subject.name})"
            for subject, role in zip(self, ("the reference", "the candidate"), strict=True)
        )
        if ours == theirs:
            return f"the reference {ours}", f"the candidate {theirs}"
        return ours, theirs

    @property
    def about(self) -> About:
        """What is known of both; what concerns one alone is of the pruned network."""
        facts = self.pruned.facts
        return About(
            architecture=facts.get("architecture"),
            target=facts.get("target"),
            precision=facts.get("precision"),
            artefacts=(self.reference.artefact, self.pruned.artefact),
            groups=self.pruned.groups,
            pruning=facts.get("pruning"),
        )


def _digest_of(module: nn.Module | None) -> str:
    import torch

    assert module is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
