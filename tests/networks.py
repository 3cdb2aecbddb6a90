"""Small networks, one for each way in which channels can be tied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Plain(nn.Module):
    """Flatten with spatial positions, two linear layers, biases, no BatchNorm (LeNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8), nn.Tanh(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Linear(8 * 3 * 3, 10)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = F.dropout(
            F.leaky_relu(self.norm(self.hidden(x.view(x.size(0), -1)))), 0.5, self.training
        )
        return self.head(x)


class PreActivation(nn.Module):
    """BatchNorm and activation behind the residual add, on one of its two readers only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), conv(8, 12)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), conv(12, 8)
        self.norm3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.conv1(torch.relu(self.norm1(x)))
        x = x + self.conv2(F.silu(self.norm2(y)))
        return self.head(self.norm3(x).relu().mean((2, 3)))


class Dense(nn.Module):
    """Concatenation: readers see several groups at offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 5), conv(5, 4), conv(9, 6)
        self.norm = nn.BatchNorm2d(15)
        self.head = nn.Linear(15, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.a(x))
        ab = torch.cat([a, self.b(a)], 1)
        abc = torch.cat((ab, self.c(F.relu(ab))), dim=1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.norm(abc), 1), 1))


class Separable(nn.Module):
    """Depthwise convolution and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = conv(3, 12, 1), nn.BatchNorm2d(12)
        self.depthwise, self.norm2 = conv(12, 12, groups=12), nn.BatchNorm2d(12)
        self.pool, self.squeeze, self.excite = (
            nn.AdaptiveAvgPool2d(1),
            conv(12, 4, 1),
            conv(4, 12, 1),
        )
        self.project, self.act = conv(12, 8, 1), nn.PReLU(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm1(self.expand(x)))
        x = F.hardswish(self.norm2(self.depthwise(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
        return self.head(self.pool(self.act(self.project(x))).flatten(1))


class Grouped(nn.Module):
    """Many small groups, which go whole: one on a residual stream, one that multiplies channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 16), nn.BatchNorm2d(16)
        self.grouped = conv(16, 16, groups=4)
        self.widen = conv(16, 32, groups=8)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.grouped(x))
        return self.head(self.widen(x).mean([-2, -1]))


class FewGroups(nn.Module):
    """Few large groups, which all lose the same places: what they read, and what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = conv(3, 16), nn.BatchNorm2d(16)
        self.grouped, self.norm2 = conv(16, 24, groups=2), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        return self.head(F.relu(self.norm2(self.grouped(x))).mean((2, 3)))


class Shared(nn.Module):
    """One convolution called twice ties its inputs to its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.norm = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.twice(x)))
        x = F.relu(self.twice(x))
        return self.head(x.mean((2, 3)))


class Mixing(nn.Module):
    """An operation that mixes channels, so that none of those that it touches may go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), conv(6, 6), conv(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = torch.cumsum(x, 1)
        return self.head(F.relu(self.c(x)).mean((2, 3)))


class Unknown(Mixing):
    """An operation that mixes channels in a way the analysis does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        x = torch.fft.fft(x, dim=1).abs()
        return self.head(F.relu(self.c(x)).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    cls.__name__: cls
    for cls in (Plain, PreActivation, Dense, Separable, Grouped, FewGroups, Shared, Mixing)
}
