"""What measuring writes down, as parts of a report: immutable, no unknown keys, no NaN.

MACs are per image, with one multiply-add counted as one; latencies are milliseconds per call.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from bench.statistics.shares import Share
from compress.config import Precision, Runtime
from compress.files.documents import Section

Sha256 = str
MOST_COUNTED = 2**53
"""Whole numbers up to this are exact as floating point numbers."""

_CLASSES = np.dtype("<u4")
_MOST_BYTES = 2**28  # of one unpacked field: 67 M images

InputKind = Literal["labelled", "images", "arrays", "random"]
"""What both networks were fed: images with labels, images or arrays without, or random numbers."""


class Record(Section):
    """Base of every part of a report: what it counts, a computation holds exactly."""

    @field_validator("*")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, int) and abs(number) > MOST_COUNTED for number in numbers):
            raise ValueError(f"whole numbers are at most {MOST_COUNTED}")
        return value


# The networks and what they are fed


class ParityRecord(Record):
    """How closely ONNX Runtime agrees with torch, as the export found it."""

    batch_size: int = Field(ge=1)
    relative_error: float = Field(ge=0)
    """Largest difference of the logits over the largest logit."""
    cosine: float = Field(ge=-1 - 1e-6, le=1 + 1e-6)
    """Cosine of all logits of the batch."""
    top1_agreement: float = Field(ge=0, le=1)
    """Share of images with the same most likely class."""


class Artefact(Record):
    """A network, by its file and by what is known of it."""

    onnx_sha256: Sha256 | None = None
    """Of the ONNX file that is measured, or that the engine was built from; None without one."""
    weights_sha256: Sha256
    """Of the weights that a sidecar names; without a sidecar of the file, or of a network in
    memory."""
    bytes: int | None = Field(default=None, ge=1, le=MOST_COUNTED)
    """Size of the file that the runtime reads; None of a network in memory."""
    file: str | None = None
    """Name of that file, without its folder."""
    runtime: Runtime | None = None
    """What ran it; None where it is that of the configuration."""
    precision: Precision | None = None
    """Number format of weights and activations; None where nothing tells."""
    macs: int | None = Field(default=None, ge=1, le=MOST_COUNTED)
    """Per image; None if the export did not count them."""
    params: int | None = Field(default=None, ge=1, le=MOST_COUNTED)
    """None if the export did not count them."""
    parity: tuple[ParityRecord, ...] = ()


class GroupRecord(Record):
    """One channel group, by its channels before and after pruning."""

    name: str
    dense: int = Field(ge=1)
    kept: int = Field(ge=0)
    residual: bool = False
    """Whether it is a residual stream."""


class PredictedLatency(Record):
    """Both networks at one batch size, as a latency table has them; nothing of it is measured."""

    batch_size: int = Field(ge=1)
    reference_ms: float = Field(gt=0)
    pruned_ms: float = Field(gt=0)
    ratio: float = Field(gt=0)
    """Pruned over reference."""

    @model_validator(mode="after")
    def _sound(self) -> PredictedLatency:
        if not math.isclose(self.ratio, self.pruned_ms / self.reference_ms, rel_tol=1e-9):
            raise ValueError("the predicted ratio is not that of its latencies")
        return self


class Prediction(Record):
    """What a latency table that was not measured here predicts of both networks."""

    device: str
    runtime: str
    precision: Precision
    source: str
    """Whose measurements the table was fitted to."""
    layer_error_median: float = Field(ge=0)
    """Of the relative errors of single layers that the fit did not see."""
    layer_error_p90: float = Field(ge=0)
    """Their 90th percentile."""
    network_error: float = Field(ge=0)
    """Mean relative error of whole networks of which figures are published."""
    latency: tuple[PredictedLatency, ...]

    @model_validator(mode="after")
    def _sound(self) -> Prediction:
        sizes = [found.batch_size for found in self.latency]
        if len(set(sizes)) < len(sizes):
            raise ValueError("a batch size is predicted twice")
        return self


class ValidationSet(Record):
    """The inputs that accuracy or agreement was measured on."""

    kind: InputKind = "labelled"
    identity: str
    """Digest of the set: of images from ``compress.data.datasets``, of arrays of their bytes."""
    images: int = Field(ge=0)
    skipped: int = Field(ge=0)
    """Images that could not be read."""
    max_skipped: float = Field(default=0.01, ge=0, le=1)
    """Share of the images that could be unreadable before nothing was measured."""

    @property
    def unread(self) -> str | None:
        """Why figures of so few images are not about the set, as the rest of a sentence."""
        whole = self.images + self.skipped
        if self.skipped <= self.max_skipped * whole:
            return None
        return f"{self.skipped} of {whole} images could not be read"


# What they answer


class OutputAgreement(Record):
    """One output of both networks on the same inputs."""

    name: str
    """As the reference calls it."""
    relative_error: float | None = Field(ge=0)
    """Largest difference over the reference's largest value; None where all of these are zero and
    the other network's are not."""
    cosine: float = Field(ge=-1, le=1)
    same_top1: Share | None = None
    """Share of inputs with the same most likely class, where the output is (N, classes)."""


class AgreementRecord(Record):
    """How closely the pruned network answers as the reference does."""

    inputs: int = Field(ge=1)
    outputs: tuple[OutputAgreement, ...]
    """The one that classes are read from first."""

    @property
    def same_top1(self) -> Share | None:
        """Share of inputs with the same class, by the first output that names one."""
        return next((found.same_top1 for found in self.outputs if found.same_top1), None)

    @property
    def largest_error(self) -> float | None:
        """Largest relative error of any output; None where one has none."""
        errors = [found.relative_error for found in self.outputs]
        return None if None in errors else max(filter(None, errors), default=0.0)


class Outcomes(Record):
    """Per image, in the order of the validation set; each field is base64 of zlib of bytes."""

    images: int = Field(ge=1)
    top1: str
    """Most likely class: unsigned 32-bit little-endian integers."""
    correct: str
    """Whether that is the label: bits, the first image in the highest bit of the first byte."""
    top5_correct: str
    """Whether the label is among the five most likely: bits likewise."""

    @model_validator(mode="after")
    def _whole(self) -> Outcomes:
        for read in (self.read_top1, self.read_correct, self.read_top5_correct):
            read()
        return self

    def read_top1(self) -> npt.NDArray[np.int64]:
        """Return the most likely classes, (images,)."""
        packed = _unpack(self.top1, self.images * _CLASSES.itemsize)
        return np.frombuffer(packed, dtype=_CLASSES).astype(np.int64)

    def read_correct(self) -> npt.NDArray[np.bool_]:
        """Return which images are right, (images,)."""
        return self._bits(self.correct)

    def read_top5_correct(self) -> npt.NDArray[np.bool_]:
        """Return which images have their label among the five most likely classes, (images,)."""
        return self._bits(self.top5_correct)

    def _bits(self, text: str) -> npt.NDArray[np.bool_]:
        packed = np.frombuffer(_unpack(text, -(-self.images // 8)), dtype=np.uint8)
        return np.unpackbits(packed, count=self.images).astype(bool)


def pack_outcomes(
    top1: npt.NDArray[np.int64],
    correct: npt.NDArray[np.bool_],
    top5_correct: npt.NDArray[np.bool_],
) -> Outcomes:
    """Pack what a network said of (images,) each."""
    return Outcomes(
        images=len(top1),
        top1=_pack(top1.astype(_CLASSES)),
        correct=_pack(np.packbits(correct)),
        top5_correct=_pack(np.packbits(top5_correct)),
    )


# The machine


class Environment(Record):
    """The machine and the software of one measurement."""

    cpu: str | None
    """Model name of the processor."""
    physical_cores: int | None
    """Of the whole machine."""
    logical_cores: int | None
    """Of the whole machine."""
    affinity: tuple[int, ...]
    """Logical cores that this process may run on."""
    cpu_quota: float | None
    """Cores' worth of time that the container grants; None without a limit."""
    threads: int
    """Threads that the runtime was given."""
    load_average: float | None
    """Runnable processes over the last minute, before the first measurement."""
    governor: str | None
    """Frequency governor of the first core of the affinity."""
    platform: str
    """Operating system, kernel release and instruction set."""
    python: str
    packages: dict[str, str]
    """Versions of what is installed of ``bench.measuring.environment.PACKAGES``."""
    gpu: dict[str, str] | None
    """Facts of the GPU that CUDA takes first, by the names of ``export.nvml.Gpu``, but for those
    that its driver does not tell; None without a GPU."""


class CpuConditions(Record):
    """What the processor did; counts are of the time that was watched."""

    load_average_after: float | None = Field(ge=0)
    """Runnable processes over the last minute, this one included (``/proc/loadavg``)."""
    quota_throttled_ms: float | None = Field(ge=0)
    """Milliseconds for which a CPU quota stopped the process: of its control group and those above,
    that which was stopped longest (``cpu.stat``). The kernel adds up the cores that it stops."""
    thermal_throttles: int | None = Field(ge=0)
    """Times that heat lowered the clocks: of each core of the affinity, and of the package that was
    hottest (``thermal_throttle/*_throttle_count``, on x86)."""
    stolen_share: float | None = Field(ge=0, le=1)
    """Share of the affinity's time that the hypervisor gave to others (``/proc/stat``)."""
    waited_share: float | None = Field(default=None, ge=0, le=1)
    """Share of the time that a thread of this process was ready and had no core, because others had
    them (``schedstat``): of the thread that waited longest. None also in reports of versions before
    0.2."""
    frequency_mhz_min: float | None = Field(ge=0)
    """Of the core that the measuring thread was on at each look (``scaling_cur_freq``, else
    ``/proc/cpuinfo``)."""
    frequency_mhz_max: float | None = Field(ge=0)


class GpuConditions(Record):
    """What the GPU did, over all readings (NVML)."""

    readings: int = Field(ge=1)
    sm_clock_mhz_min: int | None = Field(ge=0)
    """Clock of the multiprocessors."""
    sm_clock_mhz_max: int | None = Field(ge=0)
    memory_clock_mhz_min: int | None = Field(ge=0)
    memory_clock_mhz_max: int | None = Field(ge=0)
    temperature_c_max: int | None
    """Of the chip, in degrees Celsius."""
    power_w_max: float | None = Field(ge=0)
    """Of the whole board, in watts."""
    throttle_reasons: tuple[str, ...]
    """Those of ``export.nvml.THROTTLING`` that any reading had; none also where the driver does not
    tell."""


class Conditions(Record):
    """What the machine did while it was measured."""

    seconds: float = Field(ge=0)
    """How long it was watched."""
    cpu: CpuConditions
    gpu: GpuConditions | None
    """None where none was used or none could be read."""


# Where the time goes


class LayerFigures(Record):
    """One layer of one network."""

    macs: int = Field(ge=0)
    """Per image; 0 for what applies no weights."""
    milliseconds: float = Field(ge=0)
    """Per call."""
    channels: int | None = None
    """That it writes; None for what is no convolution or linear layer, or several."""


class LayerRecord(Record):
    """One layer of both networks."""

    name: str
    """Of a convolution or linear layer, its path in the network; of other work, its operator, all
    of which is one row. Layers that a runtime cannot tell apart are one row too."""
    kind: str
    """The operator."""
    reference: LayerFigures | None
    """None if the network has no such layer."""
    pruned: LayerFigures | None
    """None if the network has no such layer."""
    misses_multiple: bool
    """Whether the pruned layer reads or writes channels that are no multiple of what the target
    wants. Those of the image and of the logits are given and never count."""


class LayerTimes(Record):
    """Where the time of both networks goes."""

    batch_size: int = Field(ge=1)
    calls: int = Field(ge=1)
    """Profiled calls of each network."""
    multiple: int = Field(ge=1)
    """Channels run best on the target in multiples of this."""
    reference_ms: float = Field(gt=0)
    """All layers of a call together."""
    pruned_ms: float = Field(gt=0)
    """All layers of a call together."""
    layers: tuple[LayerRecord, ...]
    """Convolutions and linear layers in the order of the network, then all other work."""


def _pack(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode("ascii")


def _unpack(text: str, size: int) -> bytes:
    """Return exactly so many bytes; ValueError for anything else, which pydantic reports."""
    if size > _MOST_BYTES:
        raise ValueError("there are more images than a report holds")
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError("the outcomes of the images cannot be unpacked") from error
    if len(unpacked) != size:
        raise ValueError(f"the outcomes hold {len(unpacked)} bytes and not {size}")
    return unpacked
