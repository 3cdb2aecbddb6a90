"""Scales of 8-bit numbers, computed in one way by training and by export.

All arithmetic is in float64 and rounded to float32 once, so both have the same scales bit for bit.
"""

from __future__ import annotations

import torch

from compress.quantization.plan import LEVELS

LARGEST_BIAS = 2**30
"""A rounded bias, which leaves as much of 32 bits to what is added to it."""
SMALLEST = torch.finfo(torch.float32).tiny
"""A scale below it is of zeros alone, or of numbers too small to matter."""


def weight_scales(weight: torch.Tensor, axis: int, levels: int = LEVELS) -> torch.Tensor:
    """Return the scale of every channel of a weight, float64 of shape (channels,).

    Its largest magnitude becomes ``levels``. A channel of zeros, or of numbers so small that their
    scale would be zero, gets scale 1.

    Args:
        weight: of any shape.
        axis: along which its output channels lie.
        levels: largest 8-bit number of a weight.
    """
    largest = weight.detach().movedim(axis, 0).flatten(1).abs().amax(1)
    scales = largest.double() / levels
    return torch.where(scales < SMALLEST, 1.0, scales)


def room_for(bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the smallest scales of a weight with which a bias fits into 32 bits.

    Integer kernels round it to a multiple of both scales' product, and saturate.

    Args:
        bias: (channels,).
        scale: of the activation that the weight is multiplied with, one number.

    Returns:
        float64 of shape (channels,).
    """
    return bias.detach().abs().double() / (scale.detach().double() * LARGEST_BIAS)


def half_up(scales: torch.Tensor) -> torch.Tensor:
    """Round positive scales up to half precision, so that none is 0 and no number falls out."""
    rounded = scales.to(torch.float16)
    up = (rounded.view(torch.int16) + 1).view(torch.float16)
    return torch.where(rounded.double() < scales.double(), up, rounded).float()
