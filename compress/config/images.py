"""Which network, and which images it is trained and measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.config.location import Location, NoUrl, scheme_of
from compress.documents import Section
from compress.errors import ConfigError

Scheme = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]+$")]
Share = Annotated[float, Field(gt=0, le=1)]


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet20"
    """A built-in architecture, or ``package.module:callable`` for the user's own."""


class DataConfig(Section):
    """Which images, and how they are read."""

    dataset: Literal["digits", "mnist", "cifar10", "cifar100", "imagefolder", "shards"] = "digits"
    """``digits`` is embedded; the others are read from ``root``."""
    root: Location | None = None
    """Folder of the data set; for ``imagefolder`` it holds ``train/`` and ``val/``. For ``shards``
    it may be a URL."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width in pixels that the network sees; default 224 for imagefolder and shards,
    else 32."""
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
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the main process."""
    prefetch: int = Field(default=2, ge=1, le=64)
    """Batches that each of these processes reads ahead while the network trains."""
    decoder: Literal["pil", "tensor"] = "pil"
    """What decodes and resizes files: ``tensor`` is faster, its pixels differ by rounding."""
    download: bool = False
    """Let torchvision download MNIST or CIFAR when they are not under ``root``."""
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
