"""The report as data: what ``bench`` writes, ``gate`` judges and people read.

Units: latency in milliseconds per call, accuracy as a share of the images, drops in percentage
points, MACs with one multiply-add counted as one, file sizes in bytes. Ratios are pruned over
reference, which is the dense parent unless the report is against another run.

``docs/report.schema.json`` is this module as a JSON schema.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field, model_validator

from bench.budgets import Budgets
from bench.measuring.accuracy import AccuracyComparison
from bench.measuring.agreement import AgreementRecord
from bench.measuring.conditions import Conditions
from bench.measuring.environment import Environment
from bench.measuring.latency import Warmup
from bench.measuring.layer_records import LayerTimes
from bench.record import Record, Sha256
from bench.reports.outcomes import Outcomes
from bench.reports.soundness import Blocks, Drop, Interval, Stage, Summary, sound_drop, sound_share
from compress.config import BenchConfig, Precision, Runtime

SCHEMA_VERSION: Literal[2] = 2

Against = Literal["dense", "run", "file"]
"""What the reference is: the dense parent, the pruned network of another run, or any file."""

InputKind = Literal["labelled", "images", "arrays", "random"]
"""What both networks were fed: images with labels, images or arrays without, or random numbers."""


class ParityRecord(Record):
    """How closely ONNX Runtime agrees with torch, as the export found it."""

    batch_size: int
    relative_error: float
    """Largest difference of the logits over the largest logit."""
    cosine: float
    """Cosine of all logits of the batch."""
    top1_agreement: float
    """Share of images with the same most likely class."""


class Artefact(Record):
    """A network, by its file and by what is known of it."""

    onnx_sha256: Sha256 | None = None
    """Of the ONNX file that is measured, or that the engine was built from; None without one."""
    weights_sha256: Sha256
    """Of the weights that a sidecar names; without a sidecar of the file, or of a network in
    memory."""
    bytes: int | None = Field(default=None, ge=1)
    """Size of the file that the runtime reads; None of a network in memory."""
    file: str | None = None
    """Name of that file, without its folder."""
    runtime: Runtime | None = None
    """What ran it; None where it is that of the configuration."""
    macs: int | None = Field(default=None, ge=1)
    """Per image; None if the export did not count them."""
    params: int | None = Field(default=None, ge=1)
    """None if the export did not count them."""
    parity: tuple[ParityRecord, ...] = ()


class LatencyRecord(Record):
    """One network at one batch size."""

    batch_size: int = Field(ge=1)
    summary: Summary
    images_per_second: float = Field(gt=0)
    """Images of all timed calls over the time that they took on the host."""
    stages: dict[str, Stage] = Field(default_factory=dict)
    """On a GPU, of each step of a call: h2d, compute, d2h and, by the host's clock, enqueue and
    host, which is the whole call."""
    iterations: int = Field(ge=1)
    """Timed calls per block."""
    block_medians_ms: Blocks
    """One per round, in order."""
    warmup: Warmup


class NetworkRecord(Artefact):
    """An exported network and what was measured of it."""

    top1: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    top5: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    outcomes: Outcomes | None = None
    """What it said of every image."""
    latency: tuple[LatencyRecord, ...] = ()


class Networks(Record):
    """The two that are compared."""

    reference: NetworkRecord
    pruned: NetworkRecord


class LatencyComparison(Record):
    """Pruned against reference at one batch size, and reference against itself in those rounds."""

    batch_size: int = Field(ge=1)
    ratio: Interval
    speed_up: float
    """1 / ratio."""
    control: Interval
    control_block_medians_ms: Blocks
    seconds: float
    converged: bool
    """Whether the ratio became as precise as asked before the time was up."""
    conditions: Conditions | None = None
    """What the machine did meanwhile."""


class Comparison(Record):
    """Everything that is judged."""

    latency: tuple[LatencyComparison, ...] = ()
    accuracy: AccuracyComparison | None = None
    agreement: AgreementRecord | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    bytes_ratio: float | None = None

    @model_validator(mode="after")
    def _sound(self) -> Comparison:
        if self.accuracy is not None:
            sound_drop(self.accuracy.drop)
            sound_drop(self.accuracy.top5_drop)
        for output in self.agreement.outputs if self.agreement else ():
            if output.same_top1 is not None:
                sound_share(output.same_top1)
        return self


class ValidationSet(Record):
    """The inputs that accuracy or agreement was measured on."""

    kind: InputKind = "labelled"
    identity: str
    """Digest of the set: of images from ``compress.data.datasets``, of arrays of their bytes."""
    images: int = Field(ge=0)
    skipped: int = Field(ge=0)
    """Images that could not be read."""


class LatencyChange(Record):
    """How the latency of one batch size changed; above 1 is slower."""

    batch_size: int = Field(ge=1)
    ratio: Interval
    """Ratio of pruned over reference: now over then."""
    median: Interval | None
    """Median of the pruned network: now over then; None where the machines differ."""


class Change(Record):
    """This report against a stored one of the same reference, runtime and precision."""

    created: AwareDatetime
    """Of the stored report."""
    sha256: Sha256
    """Digest of the stored report."""
    differences: tuple[str, ...]
    """What differs between the two machines and their software; empty for the same."""
    latency: tuple[LatencyChange, ...]
    """Batch sizes that both measured, the stored one on a fit machine."""
    accuracy: Drop | None
    """Top-1 of the stored pruned network minus that of this one, on the same images."""
    no_accuracy: str | None
    """Why there is none, if so."""


class GroupRecord(Record):
    """One channel group, by its channels before and after pruning."""

    name: str
    dense: int = Field(ge=1)
    kept: int = Field(ge=0)
    residual: bool = False
    """Whether it is a residual stream."""


class Report(Record):
    """One comparison of a pruned network with its reference."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created: AwareDatetime
    """UTC."""
    runtime: str
    """What ran the networks, as the runner names it."""
    against: Against = "dense"
    architecture: str | None = None
    """None where nothing tells it, as the two that follow."""
    target: str | None = None
    precision: Precision | None = "fp32"
    """Number format of weights and activations."""
    notes: tuple[str, ...] = ()
    """What is missing and why, and what was assumed, one sentence each."""
    validation: ValidationSet
    networks: Networks
    comparison: Comparison
    groups: tuple[GroupRecord, ...] = ()
    """Channel groups of the pruned network, in its order; those that may not be pruned left out."""
    layers: tuple[LayerTimes, ...] = ()
    """Where the time goes, one for each batch size; empty where the runtime does not tell."""
    change: Change | None = None
    """Against a stored report, where one was named."""
    budgets: Budgets | None = None
    """What it was judged by when it was written."""
    environment: Environment
    config: BenchConfig
    """How it was measured; verdicts read the precision and the confidence asked for from here."""
    pruning: dict[str, Any] | None = None
    """What the pruning stage said of itself, passed through."""

    def __str__(self) -> str:
        from bench.reports.summary import summary_text  # it is built on this module

        return summary_text(self)

    @model_validator(mode="after")
    def _same_batch_sizes(self) -> Report:
        compared = [found.batch_size for found in self.comparison.latency]
        for network in (self.networks.reference, self.networks.pruned):
            if [found.batch_size for found in network.latency] != compared:
                raise ValueError("the networks are not measured at the batch sizes compared")
        for found, one, other in zip(
            self.comparison.latency,
            self.networks.reference.latency,
            self.networks.pruned.latency,
            strict=True,
        ):
            rounds = {len(each.block_medians_ms) for each in (one, other)}
            if rounds != {len(found.control_block_medians_ms)}:
                raise ValueError("the networks are not measured in the same rounds")
        if len(set(compared)) < len(compared):
            raise ValueError("a batch size is there twice")
        return self
