"""Which network, and which images it is trained and measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from compress.config.location import Location, NoUrl, scheme_of
from compress.errors import ConfigError
from compress.files.documents import Section

Scheme = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]+$")]
Share = Annotated[float, Field(gt=0, le=1)]

MOST_LISTS = 2
"""Of an option, one in the other: as deep as the settings of a network's stages are."""


def _plain(value: Any, lists: int = MOST_LISTS) -> Any:
    """Return the value of an option; what cannot be said in TOML and in JSON alike is refused."""
    if isinstance(value, list | tuple) and lists:
        return [_plain(item, lists - 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("input should be finite")
    if not isinstance(value, bool | int | float | str):
        raise ValueError("input should be a number, a text, true or false, or a list of these")
    return value


OptionName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Option = Annotated[Any, PlainValidator(_plain)]
"""A number, a text, a truth value, or a list of them."""


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet20"
    """A built-in architecture, ``timm:NAME``, ``torchvision:NAME``, or ``package.module:callable``
    for the user's own."""
    options: dict[OptionName, Option] = Field(default_factory=dict)
    """What it is called with, besides the classes and the channels of the images."""
    output: str | None = None
    """Where its output is no tensor: the key, the field or the number of the logits in it."""
    new_head: bool = False
    """Leave the classifier of a checkpoint out and begin a new one, for other classes."""

    @property
    def words(self) -> tuple[str, ...]:
        """What is typed to ask for this network: equal for equal code and equal options."""
        options = sorted(self.options.items())
        settings = (f"model.options.{key}={json.dumps(value)}" for key, value in options)
        return ("--model", self.name, *(word for text in settings for word in ("--set", text)))


class DataConfig(Section):
    """Which images, and how they are read."""

    dataset: Literal[
        "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder", "shards"
    ] = "digits"
    """``digits`` is embedded; the others are read from ``root``, ``fashion-mnist`` without one from
    where Debian's package puts it."""
    root: Location | None = None
    """Folder of the data set; for ``imagefolder`` it holds ``train/`` and ``val/``. For ``shards``
    it may be a URL."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width in pixels that the network sees; default 224 for imagefolder and shards,
    else 32."""
    channels: Literal[1, 3] | None = None
    """Channels that the network sees; 3 repeats those of grey images. Default: as many as the
    images have."""
    mean: tuple[float, ...] | None = None
    """Per channel, of images scaled to [0, 1]; default that of the data set, see docs/data.md."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Per channel, of images scaled to [0, 1]; default that of the data set."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized, with antialiasing."""
    crop: Share = 0.875
    """With the augmentation ``imagenet``: share of the shorter side that evaluation looks at."""
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"
    """Training augmentation; ``auto`` is what is usual for the data set."""
    batch_size: int = Field(default=128, ge=2)
    """Images per training step; BatchNorm needs two."""
    eval_batch_size: int = Field(default=256, ge=1)
    """Images per evaluation step."""
    limit_batches: int | None = Field(default=None, ge=1)
    """Training steps of an epoch at most, for a trial run."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the main process."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches that each of these processes reads ahead while the network trains."""
    decoder: Literal["pil", "tensor"] = "pil"
    """What decodes and resizes files: ``tensor`` is faster, its pixels differ by rounding."""
    max_skipped: float = Field(default=0.01, ge=0, le=1)
    """Largest share of the validation images that may be unreadable; with more, or with none of a
    class left, nothing is measured."""
    download: bool = False
    """Let torchvision download MNIST, Fashion-MNIST or CIFAR when they are not under ``root``."""
    train_shards: Annotated[str, NoUrl] = "train/*.tar"
    """Which tar archives under ``root`` hold the training images; ``*`` matches no slash."""
    val_shards: Annotated[str, NoUrl] = "val/*.tar"
    """Which tar archives under ``root`` hold the validation images."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Training shards whose images are mixed with each other."""
    schemes: tuple[Scheme, ...] = ()
    """Schemes that the URL in ``root`` may have, such as s3, gs or https; none unless named."""
    cache: Annotated[Path | None, NoUrl] = None
    """Folder for fetched shards; default below the user's cache directory."""
    cache_gib: float = Field(default=64.0, gt=0)
    """Most GiB of fetched shards to keep; those not read for longest go first."""

    @property
    def photographs(self) -> bool:
        """Whether the images are files of any size."""
        return self.dataset in ("imagefolder", "shards")

    def prepared(self, how: Mapping[str, Any]) -> DataConfig:
        """Return a section that prepares photographs so, where this one does not say how."""
        unsaid = {key: how[key] for key in how if key not in self.model_fields_set}
        return self.model_copy(update=unsaid) if self.photographs else self

    @model_validator(mode="after")
    def _only_enabled_urls(self) -> DataConfig:
        scheme = scheme_of(self.root) if self.root is not None else None
        # Raised as it is: what pydantic makes of a mistake repeats the whole section.
        if scheme and self.dataset != "shards":
            raise ConfigError(
                f"data.root = {self.root} is a URL, and data.dataset = {self.dataset!r} is read "
                "from a folder: set data.dataset=shards, or name a folder"
            )
        if scheme and scheme not in self.schemes:
            raise ConfigError(
                f"data.root = {self.root} is a URL of a scheme that is not enabled: "
                f"add --set 'data.schemes=[\"{scheme}\"]' if shards may be fetched from there"
            )
        return self
