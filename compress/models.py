"""Networks by name: torchvision's ResNets, the CIFAR ResNets of He et al., and the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError, nearest

TORCHVISION_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "resnext50_32x4d",
)
CIFAR_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet56": 56, "resnet110": 110}
BUILTIN_MODELS = (*TORCHVISION_MODELS, *CIFAR_DEPTHS)


class ChannelPad(nn.Module):
    """The parameter-free shortcut of He et al. 2016, section 3.3, option A.

    Takes every ``stride``-th pixel and adds ``front`` and ``back`` channels of zeros:
    (N, C, H, W) -> (N, front + C + back, H / stride, W / stride).
    """

    def __init__(self, stride: int, front: int, back: int) -> None:
        super().__init__()
        self.stride, self.front, self.back = stride, front, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Subsample and pad."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Show the settings when printed."""
        return f"stride={self.stride}, front={self.front}, back={self.back}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        widened = outputs - inputs
        same = stride == 1 and widened == 0
        self.shortcut = (
            nn.Identity() if same else ChannelPad(stride, widened // 2, widened - widened // 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The 6n+2 layer ResNet for 32x32 images of He et al. 2016, section 4.2.

    Args:
        depth: 6n + 2; 20 gives 0.27 M parameters and 40.6 M MACs at 3x32x32.
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) -> (N, num_classes) logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: one of BUILTIN_MODELS, or ``package.module:callable``; the callable is called with
            ``num_classes`` and ``in_channels`` as far as it takes them.
        num_classes: width of the classifier.
        in_channels: channels of the images.

    Raises:
        ModelError: no such architecture, or the callable cannot be imported or called.
    """
    if ":" in name:
        return _build_custom(name, num_classes=num_classes, in_channels=in_channels)
    if name in CIFAR_DEPTHS:
        return CifarResNet(CIFAR_DEPTHS[name], num_classes, in_channels)
    if name in TORCHVISION_MODELS:
        if in_channels != 3:
            raise ModelError(
                f"{name} takes images of 3 channels and the data has {in_channels}: "
                f"choose one of {', '.join(CIFAR_DEPTHS)}"
            )
        return _torchvision_builder(name)(weights=None, num_classes=num_classes)
    raise ModelError(
        f"no architecture is named {name!r}: {nearest(name, BUILTIN_MODELS)} "
        "(or package.module:callable for your own)"
    )


def is_custom(name: str) -> bool:
    """Whether a name asks for the user's own code to be imported."""
    return ":" in name


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    builder: Callable[..., nn.Module] = getattr(models, name)
    return builder


def _build_custom(name: str, **available: int) -> nn.Module:
    builder = _import_callable(name)
    try:
        parameters = inspect.signature(builder).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        chosen = {k: v for k, v in available.items() if takes_all or k in parameters}
        model = builder(**chosen)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _import_callable(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    # A console script does not see the folder it is called from; the user's module lies there.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"cannot import {module_name!r} for --model {name}: {error}") from error
    if not callable(found):
        raise ModelError(f"{module_name!r} has no callable {attribute!r}")
    return found
