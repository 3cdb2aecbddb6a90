"""What a file of weights says of itself, in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors import safe_open

from compress.checkpoints.kinds import require_weights
from compress.config import ModelConfig
from compress.config.images import Option, OptionName
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.data.batches import ImageData

Length = Annotated[int, Field(ge=1, le=2**16)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]

FORMAT_VERSION = 2
"""Of files that are written. Version 1 names channel groups where 2 names tensors; 3 is written
where branches are gone."""
QUANTIZED_VERSION = 4
"""Of files that hold the ranges of a network that was trained in 8 bits."""
READABLE = (1, 2, 3, QUANTIZED_VERSION)
METADATA_KEY = "compress"
MOST_CLASSES = 2**18
"""Of a network: more than any data set of images has."""
MOST_HEADER_BYTES = 2**24
"""Of a safetensors file; names and shapes of a thousand layers with 20,000 classes take a MiB."""


class GroupFacts(BaseModel):
    """One channel group of a network, as ``compress inspect`` shows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dense: int
    """Channels of the dense network where they are written."""
    kept: int
    channels_per_unit: int
    writers: int
    readers: int
    residual: bool
    frozen: str | None
    """Why no channel of it may go."""


class BranchFacts(BaseModel):
    """One branch of a residual addition, as ``compress inspect`` shows it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kept: bool
    frozen: str | None
    """Why it may not go."""


def _all_told(found: dict[str, int]) -> dict[str, int]:
    if missing := [name for name in COSTS if name not in found]:
        raise ValueError(f"{', '.join(missing)} must be told")
    return found


COSTS = ("macs", "params", "channels")
Count = Annotated[int, Field(ge=0, le=2**53)]
Costs = Annotated[dict[str, Count], AfterValidator(_all_told)]


class Structure(BaseModel):
    """Costs, channel groups and branches of a network, dense and as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense: Costs
    """``macs`` of one image, ``params``, ``channels``."""
    now: Costs
    groups: tuple[GroupFacts, ...]
    branches: tuple[BranchFacts, ...] = ()
    unknown_operations: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> Structure:
        if any(self.now[name] > self.dense[name] for name in COSTS):
            raise ValueError("no network costs more than its dense one")
        return self


class Quantization(BaseModel):
    """How a network that was trained in 8 bits is rounded in its exported file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: str
    """Of the file: ``int8_form`` of the target that it was trained for."""
    ranges: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    """Of each activation by its name in the file: what the largest 8-bit number stands for."""


class Header(BaseModel):
    """The JSON document in the header of any file of weights that this tool wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    recipe: dict[str, Any] = Field(default_factory=dict)
    """What made the network from its dense one; empty for a dense network."""
    tools: dict[str, str] = Field(default_factory=dict)


class Saved(Header):
    """The header of a network that only its user's code builds; nothing but the cuts is needed."""

    metadata: dict[str, Any]
    """Whatever its user wants to keep with it."""
    tied: dict[str, str] = Field(default_factory=dict)
    """Other names of tensors, and the name under which the file holds each."""
    classes: tuple[str, ...] | None = Field(default=None, max_length=MOST_CLASSES)
    input_size: tuple[int, ...] | None = None
    """Of one example, as its user counts."""
    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[FiniteFloat, ...] | None = None


class Description(Header):
    """The header of a classifier that a name rebuilds."""

    architecture: str
    options: dict[OptionName, Option] = Field(default_factory=dict)
    """What it is called with, besides the classes and the channels of the images."""
    output: str | None = None
    """Where the logits are in what it returns; None where it returns them alone."""
    classes: tuple[str, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    input_size: tuple[Length, Length, Length]
    """(C, H, W) of one image."""
    mean: tuple[FiniteFloat, ...]
    """Per channel, of images scaled to [0, 1]."""
    std: tuple[Deviation, ...]
    structure: Structure | None = None
    """Of a network that was analysed; a file of version 1 has none."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    quantization: Quantization | None = None
    """Of a network that was trained in 8 bits."""
    parent_sha256: str | None = None
    """Digest of the file of the dense network that this one was pruned from."""

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Description:
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ValueError("mean and std have one number for each channel of the images")
        return self

    @model_serializer(mode="wrap")
    def _without_what_earlier_versions_refuse(
        self, written: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        document: dict[str, Any] = written(self)
        if self.quantization is None:
            document.pop("quantization", None)
        return document

    @classmethod
    def of(cls, model: ModelConfig, data: ImageData, metrics: dict[str, object]) -> Description:
        """Return what a file of weights says of itself when its network was fed with this data."""
        return cls(
            architecture=model.name,
            options=model.options,
            output=model.output,
            classes=data.classes,
            input_size=data.input_size,
            mean=data.mean,
            std=data.std,
            metrics=metrics,
        )

    @property
    def model(self) -> ModelConfig:
        """The dense network, as a configuration names it."""
        return ModelConfig(name=self.architecture, options=self.options, output=self.output)

    @property
    def num_classes(self) -> int:
        """Width of the classifier."""
        return len(self.classes)


def read_description(path: Path) -> Description | None:
    """Return what a safetensors file says of its classifier; None if it does not name one.

    Raises:
        CheckpointError: as ``read_header``.
    """
    header = read_header(path)
    return header if isinstance(header, Description) else None


def read_header(path: Path) -> Description | Saved | None:
    """Return the header document of a safetensors file; None if the file holds weights alone.

    Raises:
        CheckpointError: no such file, not safetensors, or a header that cannot be understood.
    """
    require_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except Exception as error:  # a damaged header can fail in any way
        raise CheckpointError(f"{path} is truncated or not a safetensors file") from error
    if text is None:
        return None
    try:
        document = json.loads(text)
        version = document.get("format_version")
        if version not in READABLE:
            raise CheckpointError(
                f"{path} is of format version {version} and this tool reads "
                f"{READABLE[0]} to {READABLE[-1]}"
            )
        kind = Saved if "metadata" in document else Description
        return kind.model_validate_json(text)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        many = len(text) > 2**16 and '"type":"too_long"' in getattr(error, "json", str)()
        why = f": it names more than {MOST_CLASSES} classes" if many else ""
        raise CheckpointError(f"{path} has a header that cannot be understood{why}") from error


def require_header(path: Path) -> None:
    """Refuse a file whose header is absurdly long, before it is parsed.

    Raises:
        CheckpointError: the file is absent, unreadable or not safetensors.
    """
    require_weights(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(f"{path} is truncated or not a safetensors file")
