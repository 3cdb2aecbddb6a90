"""Rounding to 8 bits and back, with gradients.

A number x becomes clip(round(x / s), low, high) s, half to even. The gradient goes straight through
where nothing was clipped (Bengio et al. 2013; Jacob et al. 2018, section 3). That of an
activation's scale is of Esser et al. 2020 (LSQ, eq. 3): round(x / s) - x / s within the bounds, and
the bound beyond them, over the root of the activation's numbers in one example times ``high``.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rounded(values: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Round an activation, in float32.

    Args:
        values: (N, ...), of any precision.
        scale: one positive number, float32; it may require a gradient.
        low: smallest 8-bit number.
        high: largest one.
    """
    with torch.autocast(values.device.type, enabled=False):
        result: torch.Tensor = _Rounding.apply(values.float(), scale, low, high)
    return result


def rounded_weight(weight: torch.Tensor, scales: torch.Tensor, axis: int) -> torch.Tensor:
    """Round a weight with scales that nothing of it exceeds; its gradient passes unchanged.

    Args:
        weight: float32.
        scales: (channels,), float32.
        axis: along which the channels lie.
    """
    shape = [-1 if place == axis else 1 for place in range(weight.dim())]
    factors = scales.view(shape)
    found = torch.round(weight.detach() / factors) * factors
    return weight + (found - weight.detach())


class _Rounding(torch.autograd.Function):
    """The rounding of an activation."""

    @staticmethod
    def forward(
        context: Any, values: torch.Tensor, scale: torch.Tensor, low: int, high: int
    ) -> torch.Tensor:
        steps = values / scale
        context.save_for_backward(steps)  # and not the values, which may be changed in place
        context.bounds = low, high
        return torch.round(steps).clamp_(low, high).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(
        context: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (steps,) = context.saved_tensors
        low, high = context.bounds
        inside = (steps >= low) & (steps <= high)
        slopes = torch.round(steps).clamp_(low, high) - torch.where(inside, steps, 0.0)
        share = 1 / sqrt(steps[0].numel() * high)
        return gradient * inside, (gradient * slopes).sum() * share, None, None
