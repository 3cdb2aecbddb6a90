"""A network that is trained with the rounding of its 8-bit file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from compress.errors import ModelError
from compress.quantization.calls import Arguments, Function, calling
from compress.quantization.plan import Call, Layer, Plan
from compress.quantization.rounding import rounded, rounded_weight
from compress.quantization.scales import SMALLEST, half_up, room_for, weight_scales

AXIS = 0
"""Along which the output channels of a weight lie, in torch."""


class QuantizedNetwork(nn.Module):
    """A network that rounds what its 8-bit file rounds, and learns the ranges of activations.

    It computes in evaluation mode, whatever mode it is put into: statistics of BatchNorm stay as
    they are, because the file has them within its weights, and dropout is off.

    Args:
        network: it goes on being the user's, and trains with this.
        plan: what is rounded.
        ranges: of each of the plan's activations by name, the magnitude that the largest 8-bit
            number stands for.

    Raises:
        ModelError: an activation has no range, or none that is positive.
    """

    def __init__(self, network: nn.Module, plan: Plan, ranges: Mapping[str, float]) -> None:
        super().__init__()
        self.network, self.plan = network, plan
        device = next((p.device for p in network.parameters()), None)
        scales = [_range_of(each.name, ranges) / each.steps for each in plan.activations]
        self.scales = nn.Parameter(torch.tensor(scales, dtype=torch.float32, device=device))
        """Of the activations, (activations,)."""
        self.train()

    @property
    def ranges(self) -> dict[str, float]:
        """The range of each activation by name; a file written with them has these very scales."""
        scales = self._positive_scales().tolist()
        places = zip(self.plan.activations, scales, strict=True)
        return {each.name: scale * each.steps for each, scale in places}

    def train(self, mode: bool = True) -> QuantizedNetwork:
        """Set the mode of this module; the network within stays in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the network does, rounding.

        Raises:
            ModelError: the network called other operators than those of the plan.
        """
        step = _Step(self, self._positive_scales())
        with calling(self.plan.calls, step.call) as count:
            result = self.network(*args, **kwargs)
        if (count(), step.done) != (self.plan.total, len(self.plan.calls)):
            raise ModelError(
                f"{type(self.network).__name__} called {count()} operators where the plan of its "
                f"8 bits has {self.plan.total}: it takes a decision by its input or its mode"
            )
        return result

    def _positive_scales(self) -> torch.Tensor:
        return self.scales.clamp_min(SMALLEST)


class _Step:
    """One run of a network with rounding."""

    def __init__(self, network: QuantizedNetwork, scales: torch.Tensor) -> None:
        self._network, self._plan = network.network, network.plan
        if self._plan.half:
            scales = scales + (half_up(scales.detach()) - scales.detach())
        self._scales = scales.unbind()
        self._rounded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.done = 0

    def call(self, call: Call, function: Function, given: Arguments) -> Any:
        """Call an operator with rounded arguments."""
        self.done += 1
        if call.folded:
            return given[0][0]
        leaves, tree = pytree.tree_flatten(given)
        for place, number in call.reads.items():
            in_place = place == 0 and _in_place(call, given)
            leaves[place] = self._read(leaves[place], number, in_place=in_place)
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        if call.layer is None:
            return function(*args, **kwargs)
        named = dict(zip(("input", "weight", "bias"), args, strict=False))
        named |= {name: kwargs.pop(name) for name in ("input", "weight", "bias") if name in kwargs}
        weight, bias = self._weights(call.layer, named["weight"], named.get("bias"))
        return function(named["input"], weight, bias, *args[3:], **kwargs)

    def _read(self, values: torch.Tensor, number: int, *, in_place: bool) -> torch.Tensor:
        source, result = self._rounded.get(number, (None, None))
        if source is not values or result is None:
            bounds = self._plan.activations[number].bounds
            result = rounded(values, self._scales[number], *bounds)
            self._rounded[number] = values, result
        return values.copy_(result) if in_place else result

    def _weights(
        self, layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's rounded weight, and its bias, with BatchNorm in them."""
        with torch.autocast(weight.device.type, enabled=False):
            if layer.norm is not None:
                weight, bias = folded(norm_of(self._network, layer.norm), weight, bias)
            scales = weight_scales(weight, AXIS, self._plan.weight_levels)
            if bias is not None:
                for number in layer.inputs:
                    scales = torch.maximum(scales, room_for(bias, self._scales[number]))
            scales = half_up(scales) if layer.half else scales.float()
            return rounded_weight(weight, scales, AXIS), bias


def norm_of(network: nn.Module, name: str) -> _BatchNorm:
    """Return a BatchNorm by its qualified name."""
    norm = network.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    return norm


def folded(
    norm: _BatchNorm, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a layer with the BatchNorm behind it in them.

    The operations and their order are those of torch's ONNX exporter, so that the numbers are too.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    deviation = (variance + norm.eps).sqrt()
    factor = norm.weight / deviation if norm.affine else deviation.reciprocal()
    moved = -mean * factor if bias is None else (bias - mean) * factor
    shifted = moved + norm.bias if norm.affine else moved
    return weight * factor.view(-1, *(1,) * (weight.dim() - 1)), shifted


def _in_place(call: Call, given: Arguments) -> bool:
    """Whether an operator writes its result into its first argument."""
    name = call.operator
    plain = name.endswith("_") and not name.endswith("__")
    asked = bool(given[1].get("inplace"))  # as torch hands on the argument, wherever it was given
    return plain or asked or (name.startswith("__i") and name.endswith("__"))


def _range_of(name: str, ranges: Mapping[str, float]) -> float:
    found = ranges.get(name)
    if found is None or not 0 < found < float("inf"):
        raise ModelError(f"activation {name!r} has range {found}, and it must be positive")
    return found
