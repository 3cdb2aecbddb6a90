"""Which network, and which images it is trained and measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from compress.documents import Section


class ModelConfig(Section):
    """Which network."""

    name: str = "resnet20"
    """A built-in architecture, or ``package.module:callable`` for the user's own."""


class DataConfig(Section):
    """Which images, and how they are read."""

    dataset: Literal["digits", "mnist", "cifar10", "cifar100", "imagefolder"] = "digits"
    """``digits`` is embedded; the others are read from ``root``."""
    root: Path | None = None
    """Folder of the data set; for ``imagefolder`` it holds ``train/`` and ``val/``."""
    image_size: int | None = Field(default=None, ge=8, le=2048)
    """Height and width in pixels that the network sees; default 224 for imagefolder, else 32."""
    augment: Literal["auto", "none", "crop", "crop-flip", "imagenet"] = "auto"
    """Training augmentation; ``auto`` is what is usual for the data set."""
    batch_size: int = Field(default=128, ge=2)
    """Images per training step; BatchNorm needs two."""
    eval_batch_size: int = Field(default=256, ge=1)
    """Images per evaluation step."""
    workers: int = Field(default=0, ge=0)
    """Processes that decode images; 0 decodes in the main process."""
    download: bool = False
    """Let torchvision download MNIST or CIFAR when they are not under ``root``."""
