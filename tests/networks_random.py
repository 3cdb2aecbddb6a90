"""Random networks out of blocks, one kind of block for each way in which channels run.

Everything follows from a seed. Every block takes (N, C, 6, 6) with any C that is a multiple of 4
and returns (N, ``width``, 6, 6), so that any block may follow any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compress.networks.capture import Example

SIDE = 6
"""Height and width of every activation between blocks."""


class Draw:
    """Choices of a generator that a seed started."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def one(self, *choices: Any) -> Any:
        """Return one of some choices."""
        return choices[int(self.generator.integers(len(choices)))]

    def width(self) -> int:
        """Return the channels of a block: a multiple of 4, so that they can be taken apart."""
        return int(self.one(4, 8, 12, 16))

    def inner(self) -> int:
        """Return a number of channels that nothing divides on purpose."""
        return int(self.generator.integers(3, 12))

    def maybe(self, share: float = 0.5) -> bool:
        """Return True in a share of all cases."""
        return bool(self.generator.random() < share)

    def conv(self, inputs: int, outputs: int, kernel: int | None = None, **more: Any) -> nn.Module:
        """Return a convolution that keeps height and width."""
        kernel = kernel or self.one(1, 3)
        dilation = more.pop("dilation", 1)
        return nn.Conv2d(
            *(inputs, outputs, kernel),
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=self.maybe(),
            **more,
        )

    def norm(self, width: int) -> nn.Module:
        """Return a layer behind a convolution that leaves channels apart, or none."""
        return self.one(
            nn.BatchNorm2d(width),
            nn.BatchNorm2d(width, affine=False),
            nn.InstanceNorm2d(width),
            OwnNorm(width),
            nn.InstanceNorm2d(width, affine=True, track_running_stats=self.maybe()),
            nn.GroupNorm(width, width),
            nn.Identity(),
        )

    def act(self, width: int) -> nn.Module:
        """Return an activation."""
        return self.one(
            *(nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True), nn.Hardswish()),
            *(nn.PReLU(), nn.PReLU(width), nn.LeakyReLU(0.1), nn.Tanh(), nn.Softplus()),
        )


class Block(nn.Module):
    """A part of a network."""

    width: int
    """Channels that it returns."""
    dense: ClassVar[str] = ""
    """Why some of what it touches stays dense; empty where all of it may go."""
    tried: ClassVar[bool] = False
    """Whether the trial, and not the analysis, finds that out."""
    computed: ClassVar[bool] = False
    """Whether something is read in a form at which no explicit gate can be put."""


KINDS: dict[str, type[Block]] = {}


def kind(cls: type[Block]) -> type[Block]:
    """Enter a kind of block."""
    KINDS[cls.__name__] = cls
    return cls


# Convolutions


@kind
class Plain(Block):
    """Convolution, norm, activation."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width = draw.width()
        self.conv = draw.conv(inputs, self.width, dilation=draw.one(1, 2))
        self.norm, self.act = draw.norm(self.width), draw.act(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class OwnConv(nn.Conv2d):
    """A subclass, as networks define them; it adds nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)


class OwnNorm(nn.BatchNorm2d):
    """BatchNorm by the functional form, as timm's BatchNormAct2d."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None
        batch = self.training
        return F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias, batch, 0.1, self.eps)
        )


@kind
class Subclassed(Block):
    """A subclass of Conv2d and one of BatchNorm2d."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width = draw.width()
        self.conv, self.norm = OwnConv(inputs, self.width, 3, padding=1), OwnNorm(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


@kind
class FewGroups(Block):
    """A grouped convolution whose groups lose the same places."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.one(12, 16, 20), draw.width()
        self.enter, self.norm = draw.conv(inputs, middle), draw.norm(middle)
        self.grouped = draw.conv(middle, self.width, groups=2)
        self.act = draw.act(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.grouped(self.norm(self.enter(x))))


@kind
class ManyGroups(Block):
    """A grouped convolution whose groups go whole."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        groups = draw.one(3, 4, 5)
        middle, after = groups * draw.one(2, 3), groups * draw.one(1, 2, 3)
        self.width = draw.width()
        self.enter, self.grouped = (
            draw.conv(inputs, middle),
            draw.conv(middle, after, groups=groups),
        )
        self.norm, self.leave = draw.norm(after), draw.conv(after, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(F.relu(self.norm(self.grouped(self.enter(x)))))


@kind
class Depthwise(Block):
    """A separable convolution, with or without a multiplier."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, many = draw.inner(), draw.one(1, 1, 2, 3)
        self.width = draw.width()
        self.enter = draw.conv(inputs, middle, 1)
        self.depthwise = draw.conv(middle, many * middle, 3, groups=middle)
        self.norm, self.act = draw.norm(many * middle), draw.act(many * middle)
        self.leave = draw.conv(many * middle, self.width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.act(self.norm(self.depthwise(torch.relu(self.enter(x))))))


@kind
class Transposed(Block):
    """Down by a stride and up by a transposed convolution of any kind."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        groups, self.width = draw.one(1, 1, 2, 4), draw.width()
        middle = draw.one(12, 16) if groups == 2 else 4 * draw.one(1, 2)
        after = middle if draw.maybe() else 8
        groups = middle if groups == 4 and after == middle and draw.maybe() else groups
        self.down = nn.Conv2d(inputs, middle, 3, 2, 1)
        self.up = nn.ConvTranspose2d(middle, after, 2, 2, groups=groups, bias=draw.maybe())
        self.norm, self.leave = draw.norm(after), draw.conv(after, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(F.relu(self.norm(self.up(F.relu(self.down(x))))))


@kind
class OneDimension(Block):
    """Convolutions over the pixels in a row, plain, depthwise and transposed."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter = nn.Conv1d(inputs, middle, 3, padding=1)
        self.norm = draw.one(nn.BatchNorm1d(middle), nn.InstanceNorm1d(middle), nn.Identity())
        self.depthwise = nn.Conv1d(middle, middle, 3, padding=1, groups=middle)
        self.leave = nn.ConvTranspose1d(middle, self.width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.enter(x.flatten(2))))
        return self.leave(self.depthwise(y)).unflatten(2, (SIDE, SIDE))


@kind
class ThreeDimensions(Block):
    """Convolutions over one frame more than space has."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter, self.norm = (
            nn.Conv3d(inputs, middle, (1, 3, 3), padding=(0, 1, 1)),
            nn.BatchNorm3d(middle),
        )
        self.leave = nn.ConvTranspose3d(middle, self.width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.leave(F.relu(self.norm(self.enter(x.unsqueeze(2)))))
        return F.max_pool3d(y, 3, 1, 1).squeeze(2)


@kind
class BareWeight(Block):
    """Functional convolutions whose weight and bias are parameters of the block."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first = nn.Parameter(torch.randn(middle, inputs, 3, 3) / 6)
        self.shift = nn.Parameter(torch.randn(middle))
        self.second = nn.Parameter(torch.randn(self.width, middle) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, self.first, self.shift, padding=1).relu_()
        return F.linear(y.permute(0, 2, 3, 1), self.second).permute(0, 3, 1, 2)


class Standardised(nn.Conv2d):
    """Every filter has mean 0, or deviation 1."""

    centred = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        else:
            weight = self.weight / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, padding=1)


@kind
class ComputedWeight(Block):
    """Weights that are standardised: what they read stays, what they write may go."""

    dense, computed = "statistics of a weight", True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first, self.norm = Standardised(inputs, middle, 3), draw.norm(middle)
        self.first.centred = draw.maybe()
        self.second = draw.conv(middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


@kind
class WeightNorm(Block):
    """The parametrisation of torch, over the filters."""

    dense, computed = "norms over it", True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first = parametrizations.weight_norm(nn.Conv2d(inputs, middle, 3, padding=1))
        self.second = draw.conv(middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.silu(self.first(x)))


@kind
class ScaledWeight(Block):
    """A weight times a number, as equalised learning rates have it, and one times a mask."""

    computed = True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first, self.second = nn.Conv2d(inputs, middle, 3), nn.Conv2d(middle, self.width, 3)
        self.register_buffer("mask", (torch.rand(3, 3) < 0.7).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(F.conv2d(x, self.first.weight * 0.7, self.first.bias, padding=1))
        return F.conv2d(y, self.second.weight * self.mask, self.second.bias, padding=1)


@kind
class SharedModule(Block):
    """One convolution, called twice."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width = draw.width()
        self.enter, self.twice = draw.conv(inputs, self.width), draw.conv(self.width, self.width)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.enter(x))
        return self.norm(self.twice(F.relu(self.norm(self.twice(x)))))


@kind
class SharedWeight(Block):
    """Two modules with one parameter, and a linear layer that goes back by the same weight."""

    computed = True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter = draw.conv(inputs, self.width, 1)
        self.first, self.second = (nn.Conv2d(self.width, middle, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight
        self.back = draw.maybe()
        self.leave = draw.conv(middle, self.width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        y = F.relu(self.first(x)) * torch.sigmoid(self.second(x))
        if self.back:
            return F.conv_transpose2d(y, self.first.weight, padding=1)
        return self.leave(y)


# Linear layers and attention


@kind
class Tokens(Block):
    """Linear layers on (N, T, C)."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first, self.second = nn.Linear(inputs, middle), nn.Linear(middle, self.width)
        self.place = nn.Parameter(torch.randn(1, SIDE * SIDE, middle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x.flatten(2).transpose(1, 2)) + self.place
        y = self.second(F.gelu(y)).transpose(-1, -2)
        return y.reshape(x.shape[0], -1, SIDE, SIDE)


@kind
class ChannelsLast(Block):
    """Linear layers on (N, H, W, C), with or without LayerScale."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.first, self.second = nn.Linear(inputs, middle), nn.Linear(middle, self.width)
        self.scale = nn.Parameter(torch.randn(self.width)) if draw.maybe() else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.gelu(self.first(x.permute(0, 2, 3, 1)))) * self.scale
        return torch.movedim(y, -1, 1) if y.shape[-1] != 8 else y.permute(0, 3, 1, 2).contiguous()


@kind
class ConvNeXt(Block):
    """Depthwise, LayerNorm, linear layers, LayerScale, add; the inner width alone may go."""

    dense = "layer_norm over channels"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width = inputs
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        self.norm = nn.LayerNorm(inputs)
        self.up, self.down = nn.Linear(inputs, 2 * inputs), nn.Linear(2 * inputs, inputs)
        self.gamma = nn.Parameter(torch.randn(inputs, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.gamma * y


@kind
class Attention(Block):
    """Heads; queries and keys stay, values may go."""

    dense = "a product of activations"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.heads, self.size, self.width = draw.one(1, 2, 3), draw.one(4, 5), inputs
        self.query, self.key, self.value = (
            nn.Linear(inputs, self.heads * self.size) for _ in range(3)
        )
        self.leave = nn.Linear(self.heads * self.size, inputs)
        self.fused = draw.maybe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).view(len(x), -1, self.heads, layer.out_features // self.heads)
            for layer in (self.query, self.key, self.value)
        )
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if self.fused:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            y = torch.softmax(query @ key.transpose(-2, -1) / 2, -1) @ value
        y = self.leave(y.transpose(1, 2).flatten(2))
        return x + y.transpose(1, 2).view(len(x), -1, SIDE, SIDE)


@kind
class Product(Block):
    """Weights that a product of matrices applies to pixels, from either side."""

    computed = True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.left = nn.Parameter(torch.randn(middle, inputs) / 3)
        self.right = nn.Parameter(torch.randn(middle, self.width) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.left @ x.flatten(2))
        y = torch.matmul(y.transpose(1, 2), self.right)
        return y.transpose(1, 2).unflatten(-1, (SIDE, SIDE))


@kind
class Einsum(Block):
    """A layer written as a sum over indices, one of which counts no channels."""

    dense, computed = "einsum of a fixed width", True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.weight = nn.Parameter(torch.randn(middle, inputs, 2) / 3)
        self.leave, self.first = draw.conv(middle, self.width), draw.maybe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([x, x.flip(-1)], 2)  # torch counts no sum over a single channel
        if self.first:
            y = torch.einsum("ock, nckhw -> nohw", self.weight, both)
        else:
            y = torch.einsum("nckhw,ock->nohw", both, self.weight)
        return self.leave(F.relu(y))


@kind
class Unknown(Block):
    """An operator without a rule keeps what it touches."""

    dense = "unknown operation"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter, self.leave = draw.conv(inputs, middle), draw.conv(middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        return self.leave(y + torch.diff(y, dim=1).square().mean())


# Norms


@kind
class GroupNorms(Block):
    """A norm group goes whole."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        groups, self.width = draw.one(2, 4), draw.width()
        middle = groups * draw.one(2, 3)
        self.enter = draw.conv(inputs, middle)
        self.norm = nn.GroupNorm(groups, middle, affine=draw.maybe(0.7))
        self.leave = draw.conv(middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(F.relu(self.norm(self.enter(x))))


@kind
class LocalResponse(Block):
    """A norm over neighbouring channels keeps them."""

    dense = "along it"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter, self.leave = draw.conv(inputs, middle), draw.conv(middle, self.width)
        self.norm = nn.LocalResponseNorm(3, alpha=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.norm(self.enter(x)))


@kind
class OneNormGroup(Block):
    """Statistics over all channels keep them, in whichever form they are taken."""

    dense = "norm"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width, self.form = draw.inner(), draw.width(), draw.one(0, 1, 2, 3)
        self.enter, self.leave = draw.conv(inputs, middle), draw.conv(middle, self.width)
        self.scale, self.shift = (nn.Parameter(torch.randn(middle)) for _ in range(2))
        self.whole = nn.LayerNorm([middle, SIDE, SIDE])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        if self.form == 0:
            y = F.group_norm(y, 1, self.scale, self.shift)
        elif self.form == 1:
            y = self.whole(y)
        else:
            y = y.permute(0, 2, 3, 1)
            if self.form == 2:
                y = F.layer_norm(y, self.scale.shape, self.scale, self.shift)
            else:
                y = F.rms_norm(y, self.scale.shape, self.scale)
            y = y.permute(0, 3, 1, 2)
        return self.leave(F.relu(y))


# Elementwise, broadcasting, reductions


@kind
class SqueezeExcite(Block):
    """A factor for each channel, by convolutions or linear layers."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width, self.linear = draw.inner(), inputs, draw.maybe()
        layer = nn.Linear if self.linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.down, self.up = layer(inputs, middle), layer(middle, inputs)
        self.pool = draw.one(nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pool(x)
        if self.linear:
            y = y.view(x.size(0), -1)
        y = self.up(torch.relu(self.down(y))).sigmoid()
        return x * (y.view(*y.shape[:2], 1, 1).expand_as(x) if self.linear else y)


@kind
class Scales(Block):
    """Bare parameters and buffers of every shape that fits, and numbers."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width = inputs
        shape = draw.one((inputs, 1, 1), (1, inputs, 1, 1), (1, inputs, SIDE, SIDE))
        self.gamma, self.alpha = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(1))
        self.register_buffer("mean", torch.randn(inputs))
        self.register_buffer("grid", torch.randn(SIDE, SIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x - self.mean[None, :, None, None]) * self.gamma
        y.mul_(self.alpha).add_(self.grid)
        return torch.where(y > 0, y, 0.1 * y) + 2 - 0.5 * self.mean.view(1, -1, 1, 1).abs()


@kind
class SpaceStatistics(Block):
    """Numbers over space for each channel, put back on it."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, self.form = inputs, draw.one(0, 1, 2, 3)
        self.power = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == 0:
            y = x.mean((2, 3), keepdim=True).expand(-1, -1, SIDE, SIDE)
        elif self.form == 1:
            y = x.flatten(2).amax(-1)[:, :, None, None]
        elif self.form == 2:
            powers = x.clamp(min=1e-3).pow(self.power)
            y = F.avg_pool2d(powers, SIDE).pow(1 / self.power)
        else:
            deviation, mean = torch.std_mean(x, (-2, -1), keepdim=True)
            y = (x - mean) / (deviation + 1)
        return x * torch.sigmoid(y)


@kind
class ChannelStatistics(Block):
    """Numbers over channels keep them."""

    dense = "over channels"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, self.form = draw.width(), draw.one(0, 1, 2, 3, 4)
        self.leave = draw.conv(inputs, self.width)
        self.space = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == 0:
            x = x * torch.sigmoid(self.space(x.mean(1, keepdim=True)))
        elif self.form == 1:
            x = torch.softmax(x, 1)
        elif self.form == 2:
            x = x.cumsum(1)
        elif self.form == 3:
            x = x / x.norm(dim=1, keepdim=True)
        else:
            x = x - x.amax(1, keepdim=True)
        return self.leave(x)


@kind
class Pools(Block):
    """Windows in space, and back to the old size."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, self.form = inputs, draw.one(0, 1, 2, 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == 0:
            return F.max_pool2d(x, 3, 1, 1)
        if self.form == 1:
            return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)
        if self.form == 2:
            return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
        if self.form == 3:
            small = F.adaptive_max_pool2d(x, 3)
            return F.interpolate(small, x.shape[2:], mode="bilinear", align_corners=False)
        small, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(small, places, 2)


@kind
class Gated(Block):
    """One half of the channels opens and shuts the other."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, self.form = draw.width(), draw.one(0, 1, 2, 3)
        self.both = draw.conv(inputs, 2 * self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.both(x)
        if self.form == 0:
            return F.glu(y, 1)
        if self.form == 1:
            a, b = y.chunk(2, 1)
            return a * b.tanh()
        if self.form == 2:
            half = y.shape[1] // 2
            return torch.max(y[:, :half], y[:, half:])
        a, b = torch.split(y, y.shape[1] // 2, dim=1)
        return torch.minimum(a, b) + a


# Joining and taking apart


@kind
class Dense(Block):
    """Concatenations of concatenations, some by keyword ``axis``."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        first, second, self.width = draw.inner(), draw.inner(), draw.width()
        self.a, self.b = draw.conv(inputs, first), draw.conv(inputs + first, second)
        self.norm = draw.norm(inputs + first + second)
        self.c = draw.conv(inputs + first + second, self.width)
        self.later = draw.maybe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat((self.a(x), x), axis=1)
        z = torch.cat([y, self.b(F.relu(y))] if self.later else [self.b(F.relu(y)), y], dim=-3)
        return self.c(F.relu(self.norm(z)))


@kind
class PartlyPassed(Block):
    """Some channels take a way of their own: unequal slices or parts, whose sizes are kept."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        kept = draw.one(1, 2, 3)
        self.sizes, self.width = [kept, inputs - kept], draw.width()
        self.kept, self.sliced = kept, draw.maybe()
        self.a = draw.conv(inputs - kept, 5)
        self.b = draw.conv(kept + 5, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sliced:
            first, rest = x[:, : self.kept], x[:, self.kept :]
        else:
            first, rest = torch.split(x, self.sizes, 1)
        return self.b(torch.cat([first, F.relu(self.a(rest))], 1))


@kind
class EvenParts(Block):
    """Parts of one length, each with a convolution of its own, as in Res2Net."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        parts, self.width = draw.one(2, 4), draw.width()
        self.parts, self.size = parts, draw.one(3, 5)  # which number is the size must be clear
        self.enter = draw.conv(inputs, parts * self.size)
        self.layers = nn.ModuleList(draw.conv(self.size, 3) for _ in range(parts - 1))
        self.leave = draw.conv(3 * (parts - 1) + self.size, self.width)
        self.by_size = draw.maybe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        first, *rest = y.split(self.size, 1) if self.by_size else y.chunk(self.parts, 1)
        done = [layer(part) for layer, part in zip(self.layers, rest, strict=True)]
        return self.leave(torch.cat([first, *done], 1))


@kind
class Halves(Block):
    """Two slices of one length, which go ways of their own."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        half, self.width = draw.inner(), draw.width()
        self.enter, self.leave = draw.conv(inputs, 2 * half), draw.conv(half + 4, self.width)
        self.layer = draw.conv(half, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        half = y.shape[1] // 2
        return self.leave(torch.cat([y[:, :half], self.layer(y[:, half:]).relu()], 1))


@kind
class Selective(Block):
    """Branches that a softmax over them weighs, as in selective kernels."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, middle = draw.width(), draw.inner()
        self.branches = nn.ModuleList(draw.conv(inputs, self.width) for _ in range(2))
        self.norms = nn.ModuleList(draw.norm(self.width) for _ in range(2))
        self.down = nn.Conv2d(self.width, middle, 1)
        self.up = nn.Conv2d(middle, 2 * self.width, 1)
        self.stacked = draw.maybe()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = [n(b(x)) for n, b in zip(self.norms, self.branches, strict=True)]
        stacked = torch.stack(both, dim=1)
        weights = self.up(F.relu(self.down(stacked.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(x.shape[0], 2, self.width, 1, 1).softmax(1)
        if self.stacked:
            return (stacked * weights).sum(dim=1)
        first, second = weights.unbind(1)
        return both[0] * first + both[1] * second


@kind
class Picked(Block):
    """Channels by their numbers stay."""

    dense = "picked by number"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.width, self.form, middle = draw.width(), draw.one(0, 1, 2), draw.inner()
        self.enter, self.leave = draw.conv(inputs, middle), draw.conv(middle, self.width)
        order = torch.from_numpy(draw.generator.permutation(middle))
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        if self.form == 0:
            return self.leave(y[:, self.order])
        if self.form == 1:
            return self.leave(y.index_select(1, self.order))
        return self.leave(y) * y.select(1, 1).unsqueeze(1)


@kind
class Written(Block):
    """Channels are written into a tensor, in halves."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.half, self.width = draw.inner(), draw.width()
        self.a, self.b = draw.conv(inputs, self.half), draw.conv(inputs, self.half)
        self.leave = draw.conv(2 * self.half, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        y = torch.zeros(len(x), 2 * a.shape[1], SIDE, SIDE, dtype=x.dtype, device=x.device)
        y[:, : a.shape[1]] = a
        y[:, a.shape[1] :] = b
        return self.leave(F.relu(y))


@kind
class Repeated(Block):
    """Copies of channels, side by side or one by one, and backwards."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width, self.form = draw.inner(), draw.width(), draw.one(0, 1, 2)
        self.enter = draw.conv(inputs, middle)
        self.leave = draw.conv(2 * middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        if self.form == 0:
            return self.leave(y.repeat(1, 2, 1, 1))
        if self.form == 1:
            return self.leave(y.repeat_interleave(2, dim=1))
        return self.leave(torch.cat([y, y.flip(1, 3)], 1))


@kind
class ChannelPad(Block):
    """Constants beside channels, and a shortcut that is as wide by them."""

    dense = "padding of a fixed width"

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.more, self.width = draw.one(2, 3), draw.width()
        self.layer = draw.conv(inputs, inputs + self.more)
        self.leave = draw.conv(inputs + self.more, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more = (self.layer.out_channels - x.shape[1]) if self.more == 3 else 2
        return self.leave(F.relu(self.layer(x) + F.pad(x, (0, 0, 0, 0, 0, more))))


# Layout


@kind
class ShuffledParts(Block):
    """A channel shuffle, by views or by the operator, between grouped convolutions."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.groups, self.width, self.operator = draw.one(2, 3), draw.width(), draw.maybe()
        middle = self.groups * draw.one(4, 6)
        self.enter = draw.conv(inputs, middle, 1)
        self.depthwise = draw.conv(middle, middle, 3, groups=middle)
        self.leave = draw.conv(middle, self.width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.enter(x))
        if self.operator:
            y = F.channel_shuffle(y, self.groups)
        else:
            n, c, h, w = y.shape
            y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
            y = y.reshape(n, c, h, w)
        return self.leave(self.depthwise(y))


@kind
class PixelShuffled(Block):
    """Channels become space and back, by the operators or by views."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width, self.form = draw.one(3, 5, 7), draw.width(), draw.one(0, 1, 2)
        self.down = nn.Conv2d(inputs, 4 * middle, 3, 2, 1)
        self.leave = draw.conv(4 * middle if self.form == 1 else middle, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.down(x))
        if self.form == 0:
            return self.leave(F.pixel_shuffle(y, 2))
        if self.form == 1:
            y = F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)
            return self.leave(F.interpolate(y, scale_factor=2))
        n, c, h, w = y.shape
        y = y.view(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return self.leave(y.reshape(n, c // 4, 2 * h, 2 * w))


@kind
class Flattened(Block):
    """Every pixel of every channel is read by a linear layer of its own."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.small, self.form = nn.Conv2d(inputs, middle, 3, 2, 1), draw.one(0, 1, 2)
        self.hidden = nn.Linear(9 * middle, draw.inner())
        self.norm = nn.BatchNorm1d(self.hidden.out_features)
        self.leave = nn.Linear(self.hidden.out_features, self.width)
        self.passed = draw.conv(inputs, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.small(x))
        if self.form == 0:
            y = torch.flatten(y, 1)
        elif self.form == 1:
            y = y.reshape(len(x), -1)
        else:
            y = y.permute(0, 2, 3, 1).flatten(1)
        y = self.leave(F.relu(self.norm(self.hidden(y))))
        return self.passed(x) * y[..., None, None]


@kind
class FixedView(Block):
    """A view with a number in it: the trial finds it."""

    dense, tried = "forward fails", True

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        middle, self.width = draw.inner(), draw.width()
        self.enter, self.leave = draw.conv(inputs, middle), draw.conv(middle, self.width)
        self.shape = torch.Size((middle, SIDE * SIDE))
        self.last = draw.conv(self.width, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x).view(len(x), *tuple(self.shape))
        return self.last(self.leave(F.relu(y).view(len(x), -1, SIDE, SIDE)))


# Residual blocks, which hold others


class Residual(Block):
    """A block and a way around it, before or behind norm and activation."""

    def __init__(self, draw: Draw, inputs: int, inner: Callable[[Draw, int], Block]) -> None:
        super().__init__()
        first = draw.norm(inputs)
        self.before = first if draw.maybe() else nn.Identity()
        self.inner = inner(draw, inputs)
        self.width = self.inner.width
        same = self.width == inputs
        self.around = nn.Identity() if same else draw.conv(inputs, self.width, 1)
        self.act, self.form = draw.act(self.width), draw.one(0, 1, 2)
        self.drop = nn.Dropout2d(0.2) if draw.maybe(0.2) else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.inner(self.before(x).relu()))
        if self.form == 0:
            y = y + self.around(x)
        elif self.form == 1:
            y = y * 0.5
            y += self.around(x)
        else:
            y = torch.add(self.around(x), y, alpha=0.3)
        return self.act(y)


class Branched(Block):
    """Two blocks beside each other, concatenated."""

    def __init__(self, draw: Draw, inputs: int, inner: Callable[[Draw, int], Block]) -> None:
        super().__init__()
        self.a, self.b = inner(draw, inputs), inner(draw, inputs)
        self.width = self.a.width + self.b.width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


# Heads


class Head(nn.Module):
    """The end of a network, in whichever form it returns its outputs."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        super().__init__()
        self.form = draw.one("mean", "pool", "max", "flat", "map", "dict", "pair")
        hidden = draw.inner()
        entries = inputs * SIDE * SIDE if self.form == "flat" else inputs
        self.map = nn.Conv2d(inputs, 3, 1) if self.form in ("map", "dict", "pair") else None
        self.hidden = nn.Linear(entries, hidden) if self.form != "map" else None
        self.drop, self.last = nn.Dropout(0.1), nn.Linear(hidden, 4)

    def forward(self, x: torch.Tensor) -> Any:
        maps = None if self.map is None else F.interpolate(self.map(x), scale_factor=2)
        if self.hidden is None:
            return maps
        if self.form == "flat":
            y = torch.flatten(x, 1)
        elif self.form == "pool":
            y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)
        else:
            y = x.amax((2, 3)) if self.form == "max" else x.mean([-1, -2])
        y = self.last(self.drop(F.silu(self.hidden(y))))
        if maps is None:
            return y
        return {"out": maps, "aux": y} if self.form == "dict" else (y, [maps])


class RandomNetwork(nn.Module):
    """A stem, blocks and a head; a second input, by keyword, may shift and scale the stem."""

    def __init__(self, draw: Draw, kinds: Sequence[str], nested: bool) -> None:
        super().__init__()
        stem = draw.width()
        self.stem, self.norm = draw.conv(3, stem), nn.BatchNorm2d(stem)
        self.extra = nn.Linear(5, 2 * stem) if nested and draw.maybe(0.2) else None
        blocks: list[Block] = []
        width = stem
        for _ in range(draw.one(1, 2, 3) if nested else 1):
            blocks.append(self._drawn(draw, kinds, width, nested))
            width = blocks[-1].width
        self.blocks = nn.Sequential(*blocks)
        self.between = draw.conv(width, draw.inner())
        self.head = Head(draw, self.between.out_channels)

    @staticmethod
    def _drawn(draw: Draw, kinds: Sequence[str], width: int, nested: bool) -> Block:
        def inner(draw: Draw, inputs: int) -> Block:
            return KINDS[draw.one(*kinds)](draw, inputs)

        form = draw.one(inner, inner, Residual, Branched) if nested else inner
        return form(draw, width) if form is inner else form(draw, width, inner)

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> Any:
        x = self.norm(self.stem(x))
        if self.extra is not None:
            scale, shift = self.extra(extra)[:, :, None, None].chunk(2, dim=1)
            x = x * (1 + scale) + shift
        return self.head(F.silu(self.between(self.blocks(F.silu(x)))))

    def has(self, about: str) -> bool:
        """Return whether a block says something about itself."""
        return any(getattr(m, about) for m in self.modules() if isinstance(m, Block))


def random_network(
    seed: int, kinds: Sequence[str] | None = None, *, nested: bool = True
) -> tuple[RandomNetwork, Example]:
    """Return a network with values as after training, and inputs for it.

    Args:
        seed: of everything.
        kinds: names of blocks to draw from; all of them by default.
        nested: several blocks, side by side and with ways around them; else one alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draw = Draw(seed)
        model = RandomNetwork(draw, tuple(kinds or KINDS), nested)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor.is_floating_point() and "mask" not in name:
                    _live_(name, tensor)
        more = {} if model.extra is None else {"extra": torch.randn(2, 5)}
        return model.eval(), Example((torch.randn(2, 3, SIDE, SIDE),), more)


def _live_(name: str, tensor: torch.Tensor) -> None:
    """Draw a tensor at random: no channel is without effect, and no activation grows."""
    if name.endswith(("running_var", "power")):
        tensor.uniform_(0.5, 1.5)
    elif tensor.dim() > 1:
        tensor.normal_(0, 1 / math.sqrt(max(4, tensor[0].numel())))
    else:
        tensor.uniform_(0.3, 1.0).mul_(torch.randn(tensor.shape).sign())
