"""The report as data: what ``bench`` writes, ``gate`` judges and people read.

Units: latency in milliseconds per call, accuracy as a share of the images, drops in percentage
points, MACs with one multiply-add counted as one, file sizes in bytes. Ratios are pruned over
dense.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field

from bench.accuracy import AccuracyComparison
from bench.environment import Environment
from bench.latency import Warmup
from bench.stats import LatencySummary, RatioInterval
from compress.config import BenchConfig, Precision
from compress.documents import Section

SCHEMA_VERSION: Literal[1] = 1

Sha256 = str


class Record(Section):
    """Base of every part of the report: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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
    """An exported network, by what its sidecar says."""

    onnx_sha256: Sha256
    """Of the ONNX file that is measured, or that the engine was built from."""
    weights_sha256: Sha256
    bytes: int = Field(ge=1)
    """Size of the file that the runtime reads."""
    macs: int | None = Field(default=None, ge=1)
    """Per image; None if the export did not count them."""
    params: int | None = Field(default=None, ge=1)
    """None if the export did not count them."""
    parity: tuple[ParityRecord, ...] = ()


class LatencyRecord(Record):
    """One network at one batch size."""

    batch_size: int = Field(ge=1)
    summary: LatencySummary
    iterations: int = Field(ge=1)
    """Timed calls per block."""
    block_medians_ms: tuple[float, ...]
    """One per round, in order."""
    warmup: Warmup


class NetworkRecord(Artefact):
    """An exported network and what was measured of it."""

    top1: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    top5: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    latency: tuple[LatencyRecord, ...] = ()


class Networks(Record):
    """The two that are compared."""

    dense: NetworkRecord
    pruned: NetworkRecord


class LatencyComparison(Record):
    """Pruned against dense at one batch size, and dense against itself in the same rounds."""

    batch_size: int = Field(ge=1)
    ratio: RatioInterval
    speed_up: float
    """1 / ratio."""
    control: RatioInterval
    control_block_medians_ms: tuple[float, ...]
    seconds: float
    converged: bool
    """Whether the ratio became as precise as asked before the time was up."""


class Comparison(Record):
    """Everything that is judged."""

    latency: tuple[LatencyComparison, ...] = ()
    accuracy: AccuracyComparison | None = None
    macs_ratio: float | None = None
    params_ratio: float | None = None
    bytes_ratio: float | None = None


class ValidationSet(Record):
    """The images that accuracy was measured on."""

    identity: str
    """Digest of the set, from ``compress.data``."""
    images: int = Field(ge=0)
    skipped: int = Field(ge=0)
    """Images that could not be read."""


class Report(Record):
    """One comparison of a pruned network with its dense parent."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: AwareDatetime
    """UTC."""
    runtime: str
    """What ran the networks, as the runner names it."""
    architecture: str
    target: str
    precision: Precision = "fp32"
    """Number format of weights and activations."""
    validation: ValidationSet
    networks: Networks
    comparison: Comparison
    environment: Environment
    config: BenchConfig
    """How it was measured; verdicts read the precision and the confidence asked for from here."""
    pruning: dict[str, Any] | None = None
    """What the pruning stage said of itself, passed through."""
