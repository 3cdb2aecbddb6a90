"""The report as data: what ``bench`` writes, ``gate`` judges and people read.

Units: latency in milliseconds per call, accuracy as a share of the images, drops in percentage
points, MACs with one multiply-add counted as one, file sizes in bytes. Ratios are pruned over
reference, which is the dense parent unless the report is against another run.

A report may come from anybody, and pages and verdicts take its figures as measured. So figures that
no measurement gives together are refused when it is read, and nothing after that need expect them.

``docs/report.schema.json`` is this module as a JSON schema:

    python -m bench.reports.schema > docs/report.schema.json
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from bench.limits import Limits
from bench.measuring.answers import AccuracyComparison
from bench.measuring.latency import HOST, Warmup
from bench.measuring.records import (
    AgreementRecord,
    Artefact,
    Conditions,
    Environment,
    GroupRecord,
    LayerTimes,
    Outcomes,
    Prediction,
    Record,
    Sha256,
    ValidationSet,
)
from bench.reports.soundness import (
    require,
    require_blocks_of,
    require_ratio_of,
    sound_blocks,
    sound_date,
    sound_drop,
    sound_interval,
    sound_share,
    sound_stage,
    sound_summary,
)
from bench.reports.summary import summary_text
from bench.statistics.latency_ratios import LatencySummary, RatioInterval
from bench.statistics.shares import PairedDrop
from compress.config import BenchConfig, Precision

SCHEMA_VERSION: Literal[4] = 4

Against = Literal["dense", "run", "file"]
"""What the reference is: the dense parent, the pruned network of another run, or any file."""


Summary = Annotated[LatencySummary, AfterValidator(sound_summary)]
Stage = Annotated[LatencySummary, AfterValidator(sound_stage)]
"""A step of a call may be too short for a clock."""
Blocks = Annotated[tuple[float, ...], AfterValidator(sound_blocks)]
Interval = Annotated[RatioInterval, AfterValidator(sound_interval)]
Drop = Annotated[PairedDrop, AfterValidator(sound_drop)]
Date = Annotated[AwareDatetime, AfterValidator(sound_date)]


# The parts


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

    @model_validator(mode="after")
    def _derived(self) -> LatencyRecord:
        if self.block_medians_ms:
            require_blocks_of(self.summary, self.block_medians_ms)
        calls = self.stages.get(HOST, self.summary)
        rate = 1000 * self.batch_size / calls.mean_ms if calls.mean_ms else math.inf
        agrees = math.isclose(self.images_per_second, rate, rel_tol=1e-9)
        require(agrees, "the images per second are not those of the calls")
        return self


class NetworkRecord(Artefact):
    """An exported network and what was measured of it."""

    top1: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    top5: float | None = Field(default=None, ge=0, le=1)
    """Share of images."""
    outcomes: Outcomes | None = None
    """What it said of every image."""
    latency: tuple[LatencyRecord, ...] = ()

    @model_validator(mode="after")
    def _derived(self) -> NetworkRecord:
        if self.outcomes is not None:
            right = (self.outcomes.read_correct(), self.outcomes.read_top5_correct())
            for told, each in zip((self.top1, self.top5), right, strict=True):
                share = float(each.mean())
                agrees = told is None or math.isclose(told, share, abs_tol=1e-9)
                require(agrees, "the accuracy is not that of the images")
        return self


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

    @model_validator(mode="after")
    def _derived(self) -> LatencyComparison:
        agrees = math.isclose(self.speed_up * self.ratio.ratio, 1, rel_tol=1e-9)
        require(agrees, "the speed-up is not that of the ratio")
        return self


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


class PrecisionRatio(Record):
    """One network in the report's precision against the same in a higher one, in alternation."""

    network: Literal["reference", "pruned"]
    precision: Precision
    higher: Precision
    batch_size: int = Field(ge=1)
    ratio: Interval
    """The report's precision over the higher one: above 1 is slower."""


class LatencyChange(Record):
    """How the latency of one batch size changed; above 1 is slower."""

    batch_size: int = Field(ge=1)
    ratio: Interval
    """Ratio of pruned over reference: now over then."""
    median: Interval | None
    """Median of the pruned network: now over then; None where the machines differ."""
    reference: float | None = Field(default=None, gt=0)
    """Time of the reference now over then, 1 where the middle halves of its rounds meet. How far it
    is from 1 widens both intervals; None in reports of versions before 0.2, which left that out."""


class Change(Record):
    """This report against a stored one of the same reference, runtime and precision."""

    created: Date
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


class Report(Record):
    """One comparison of a pruned network with its reference."""

    renamed: ClassVar = {"budgets": "limits"}

    schema_version: Literal[4] = SCHEMA_VERSION
    created: Date
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
    precisions: tuple[PrecisionRatio, ...] = ()
    """How much the precision gains, where a higher one of the same networks lies beside; no limit
    judges it."""
    prediction: Prediction | None = None
    """Of the latency on the target, where a table for it comes with the tool; never judged as
    measured."""
    groups: tuple[GroupRecord, ...] = ()
    """Channel groups of the pruned network, in its order; those that may not be pruned left out."""
    layers: tuple[LayerTimes, ...] = ()
    """Where the time goes, one for each batch size; empty where the runtime does not tell."""
    change: Change | None = None
    """Against a stored report, where one was named."""
    limits: Limits | None = None
    """What it was judged by when it was written."""
    environment: Environment
    config: BenchConfig
    """How it was measured; verdicts read the precision and the confidence asked for from here."""
    pruning: dict[str, Any] | None = None
    """What the pruning stage said of itself, passed through."""

    def __str__(self) -> str:
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
            blocks = one.block_medians_ms
            require_ratio_of(found.ratio, blocks, other.block_medians_ms)
            require_ratio_of(found.control, blocks, found.control_block_medians_ms)
        if len(set(compared)) < len(compared):
            raise ValueError("a batch size is there twice")
        return self

    @model_validator(mode="after")
    def _derived(self) -> Report:
        """Refuse ratios and drops that are not those of the counts beside them."""
        one, other = self.networks.reference, self.networks.pruned
        for name in ("macs", "params", "bytes"):
            ratio = getattr(self.comparison, f"{name}_ratio")
            counts = getattr(one, name), getattr(other, name)
            if ratio is not None:
                agrees = all(counts) and math.isclose(ratio, counts[1] / counts[0], rel_tol=1e-9)
                require(agrees, f"{name}_ratio is not that of the counts")
        accuracy = self.comparison.accuracy
        if accuracy is not None and one.outcomes is not None and other.outcomes is not None:
            require(one.outcomes.images == other.outcomes.images, "the images are others")
            told = (
                (accuracy.drop, one.outcomes.read_correct(), other.outcomes.read_correct()),
                (
                    accuracy.top5_drop,
                    one.outcomes.read_top5_correct(),
                    other.outcomes.read_top5_correct(),
                ),
            )
            for drop, was, is_ in told:
                flips = (drop.images, drop.flips_to_wrong, drop.flips_to_right)
                found = (len(was), int((was & ~is_).sum()), int((~was & is_).sum()))
                require(flips == found, "the drop is not that of the images")
        return self


# As a JSON schema


def report_schema() -> dict[str, Any]:
    """Return the schema of ``report.json``, JSON Schema of 2020-12."""
    schema = Report.model_json_schema(mode="serialization")
    schema["properties"]["sha256"] = {
        "description": (
            "SHA-256 of this document without sha256, written with sorted keys, no spaces and "
            "ASCII only."
        ),
        "pattern": "^[0-9a-f]{64}$",
        "type": "string",
    }
    # A written report holds every key, also those that have a default.
    schema["required"] = sorted(schema["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Report of compress bench, schema_version {SCHEMA_VERSION}",
        **{name: part for name, part in schema.items() if name != "title"},
    }


def main() -> None:
    """Print the schema."""
    print(json.dumps(report_schema(), indent=2))


if __name__ == "__main__":
    main()
