"""What is exported for where, how it must agree, and how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compress.files.documents import Section

Precision = Literal["fp32", "fp16", "int8"]
"""The number format of weights and activations in the deployed network."""
BatchSizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class ParityLimits(Section):
    """How far logits may lie from torch's float32 ones; docs/export.md defines the figures."""

    relative_error: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=-1.0, ge=-1, le=1)
    """Least cosine similarity of all logits."""
    top1_agreement: float = Field(default=0.0, ge=0, le=1)
    """Least share of images with the same top-1 class."""


class Fp16Limits(ParityLimits):
    """For eleven significant bits."""

    relative_error: float = Field(default=2e-2, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=0.999, ge=-1, le=1)
    """Least cosine similarity of all logits."""


class Int8Limits(ParityLimits):
    """For 255 levels a tensor."""

    relative_error: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Largest difference of a logit over the largest logit."""
    cosine: float = Field(default=0.97, ge=-1, le=1)
    """Least cosine similarity of all logits."""
    top1_agreement: float = Field(default=0.9, ge=0, le=1)
    """Least share of images with the same top-1 class."""


class PrecisionLimits(Section):
    """The limits of parity, by precision."""

    fp32: ParityLimits = ParityLimits()
    """Of two runtimes that round differently."""
    fp16: Fp16Limits = Fp16Limits()
    """Of weights and activations in half precision."""
    int8: Int8Limits = Int8Limits()
    """Of weights and activations in 8 bits."""


class ExportConfig(Section):
    """What is exported, and for where."""

    target: str = "cpu"
    """A deployment profile under ``configs/targets``."""
    precision: Precision = "fp32"
    """Number format of weights and activations; inputs and outputs stay float32."""
    batch: BatchSizes | Literal["dynamic"] = "dynamic"
    """Batch sizes that an engine is optimised for, one profile each, or one profile for a range."""
    dynamic_batch: tuple[int, int, int] = (1, 8, 32)
    """Least, usual and largest batch of the profile of ``batch = "dynamic"``."""
    workspace_mib: int = Field(default=1024, ge=1)
    """Most scratch memory of a layer of an engine, in MiB."""
    timing_cache: Path | None = None
    """Folder of the timing caches of engine builds; default ``timing_cache`` beside the engine."""
    calibration_images: int = Field(default=512, ge=8)
    """Training images from which the ranges of INT8 are measured."""
    calibration: Literal["max", "mse"] = "mse"
    """Range of a tensor: its largest magnitude, or that with the least squared rounding error."""
    parity_batches: BatchSizes = (1, 3, 8)
    """Batch sizes at which ONNX Runtime must agree with torch."""
    parity_images: int = Field(default=64, ge=1)
    """Validation images on which they are compared, at each of these batch sizes."""
    limits: PrecisionLimits = PrecisionLimits()
    """What counts as agreement."""

    @field_validator("batch", mode="before")
    @classmethod
    def _read_sizes(cls, value: Any) -> Any:
        if value == "dynamic":
            return value
        sizes = str(value).split(",") if isinstance(value, str | int) else value
        try:
            found = tuple(int(str(size)) for size in sizes)
        except (TypeError, ValueError):
            found = ()
        if min(found, default=0) < 1:
            raise ValueError("batch sizes are whole numbers from 1 on, as 1,8,32, or dynamic")
        return tuple(dict.fromkeys(found))

    @field_validator("dynamic_batch")
    @classmethod
    def _check_range(cls, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ValueError("least, usual and largest batch must rise, from 1 on")
        return sizes


Runtime = Literal[
    "torch-cpu",
    "torch-cuda",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "tensorrt",
]
"""What computes a network, and on what."""


class BenchConfig(Section):
    """How latency and accuracy are measured."""

    renamed: ClassVar = {"budgets": "limits"}

    runtime: Runtime = "onnxruntime-cpu"
    """What runs the networks; ``tensorrt`` runs the engines that ``compress export`` built."""
    cuda_graph: bool = False
    """On a GPU, record each batch size as a CUDA graph and replay that."""
    channels_last: bool = False
    """In torch, lay activations out as (N, H, W, C)."""
    compiled: bool = False
    """In torch, compile the networks with ``torch.compile``."""
    batch_sizes: BatchSizes = (1, 8)
    """Batch sizes at which latency is measured."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the runtime; default all physical cores that this process may use."""
    block_ms: float = Field(default=50.0, gt=0)
    """Least work in one timed block, in milliseconds."""
    min_blocks: int = Field(default=20, ge=4)
    """Fewest blocks per network and batch size."""
    max_seconds: float = Field(default=20.0, gt=0)
    """Most time per batch size, in seconds."""
    ratio_precision: float = Field(default=0.0075, gt=0)
    """Stop early when the half-width of the interval of the latency ratio is below this share."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    layer_calls: int = Field(default=20, ge=0)
    """Profiled calls per network and batch size, for the time of each layer; 0 for none."""
    limits: str = "default"
    """What the gate judges by: a file under ``configs/limits``, or a path."""

    @model_validator(mode="after")
    def _torch_alone(self) -> BenchConfig:
        for name in ("channels_last", "compiled"):
            if getattr(self, name) and not self.runtime.startswith("torch"):
                raise ValueError(f"{name} is for torch, and runtime is {self.runtime}")
        return self
