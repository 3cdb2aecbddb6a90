"""How decoded images become what the network sees: resized, augmented by a seed, normalised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from compress.data.order import Int64s

Augment = Literal["none", "crop", "crop-flip", "imagenet"]
Interpolation = Literal["bilinear", "bicubic"]

CACHED_VALUES = 2**16
"""Values that a CPU normalises at once, to stay in a core's cache: 256 KiB of float32."""


class Scale(NamedTuple):
    """The normalisation of images that are scaled to [0, 1]."""

    mean: tuple[float, ...]
    """Per channel."""
    std: tuple[float, ...]
    """Per channel."""

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Turn uint8, or float in [0, 1], into normalised float32, where the images are.

        Shape (N, C, H, W) and memory format are kept.
        """
        mean, std = _columns(self, images.device)
        out = torch.empty_like(images, dtype=torch.float32)
        at_once = CACHED_VALUES if images.is_cpu else images.numel()
        several = max(1, at_once // max(1, images[:1].numel()))
        for part, source in zip(
            torch.split(out, several), torch.split(images, several), strict=True
        ):
            part.copy_(source)
            if not source.is_floating_point():
                part.mul_(1 / 255)
            part.sub_(mean).div_(std)
        return out


@cache
def _columns(scale: Scale, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation on a device: (C, 1, 1) each."""
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in scale)
    return mean, std


@dataclass(frozen=True)
class View:
    """How stored images become what the network sees."""

    size: int
    """Height and width in pixels."""
    augment: Augment
    mean: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]."""
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    crop: float = 0.875
    """Share of the shorter side that evaluation looks at; 224 of 256 pixels is customary."""

    @property
    def padding(self) -> int:
        """Pixels added on each side before a random crop."""
        return self.size // 8

    def resize(self, image: Any) -> Any:
        """Bring a PIL image or a tensor (..., C, H, W) to the network's size, without chance."""
        if self.augment != "imagenet":
            return functional.resize(image, [self.size, self.size], self._mode)
        resized = functional.resize(image, [round(self.size / self.crop)], self._mode)
        return functional.center_crop(resized, [self.size, self.size])

    def random_resize(self, image: Any, seed: int) -> Any:
        """Bring one PIL image or tensor (C, H, W) to the network's size as ``seed`` says."""
        if self.augment != "imagenet":
            return self.resize(image)
        with seeded(seed):
            return self._random_resized_crop(image)

    @cached_property
    def _random_resized_crop(self) -> v2.Compose:
        crop = v2.RandomResizedCrop(self.size, interpolation=self._mode)
        return v2.Compose([crop, v2.RandomHorizontalFlip()])

    @property
    def _mode(self) -> InterpolationMode:
        return InterpolationMode(self.interpolation)

    def shift(self, images: torch.Tensor, seeds: Int64s) -> torch.Tensor:
        """Pad with black, crop and perhaps flip each of (N, C, size, size) as its seed says."""
        if self.augment not in ("crop", "crop-flip"):
            return images
        # The digits of a seed in this mixed base are independent uniform draws.
        span = 2 * self.padding + 1
        rest, tops = np.divmod(seeds, span)
        flips, lefts = np.divmod(rest, span)
        padded = functional.pad(images, [self.padding])
        cropped = [
            image[:, top : top + self.size, left : left + self.size]
            for image, top, left in zip(padded, tops.tolist(), lefts.tolist(), strict=True)
        ]
        result = torch.stack(cropped)
        if self.augment == "crop-flip":
            flipped = torch.from_numpy(flips % 2 == 1)
            result[flipped] = functional.horizontal_flip(result[flipped])
        return result

    @property
    def scale(self) -> Scale:
        """How pixels are normalised."""
        return Scale(self.mean, self.std)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the body, and put its state back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which reseeds every GPU as well.
        torch.default_generator.manual_seed(seed)
        yield
