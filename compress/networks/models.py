"""Networks by name: torchvision's, those of compress.architectures, and the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from compress.errors import ModelError, nearest
from compress.networks.architectures import (
    CifarDenseNet,
    CifarResNet,
    CifarVGG,
    LeNet,
    PreActBlock,
    PreActBottleneck,
    PreActResNet,
)

TORCHVISION_MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "vgg11_bn",
    "vgg16_bn",
    "densenet121",
    "densenet201",
)
CIFAR_DEPTHS = {"resnet20": 20, "resnet32": 32, "resnet56": 56, "resnet110": 110}
VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALL_IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(CifarResNet, depth) for name, depth in CIFAR_DEPTHS.items()},
    "preact_resnet18": partial(PreActResNet, PreActBlock, (2, 2, 2, 2)),
    "preact_resnet50": partial(PreActResNet, PreActBottleneck, (3, 4, 6, 3)),
    "preact_resnet101": partial(PreActResNet, PreActBottleneck, (3, 4, 23, 3)),
    "preact_resnet152": partial(PreActResNet, PreActBottleneck, (3, 8, 36, 3)),
    "vgg11_bn_cifar": partial(CifarVGG, VGG11),
    "vgg16_bn_cifar": partial(CifarVGG, VGG16),
    "densenet_cifar": partial(CifarDenseNet, 100, 12),
    "lenet": LeNet,
}
"""Our own definitions; images of 32x32 pixels are what they are meant for."""
BUILTIN_MODELS = (*TORCHVISION_MODELS, *SMALL_IMAGE_MODELS)


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
    if name in SMALL_IMAGE_MODELS:
        return SMALL_IMAGE_MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if name in TORCHVISION_MODELS:
        if in_channels != 3:
            raise ModelError(
                f"{name} takes images of 3 channels and the data has {in_channels}: "
                f"choose one of {', '.join(SMALL_IMAGE_MODELS)}"
            )
        return _torchvision_builder(name)(weights=None, num_classes=num_classes)
    raise ModelError(
        f"no architecture is named {name!r}: {nearest(name, BUILTIN_MODELS)} "
        "(or package.module:callable for your own)"
    )


def is_custom(name: str) -> bool:
    """Whether a name asks for the user's own code to be imported."""
    return ":" in name


def ends_of(name: str) -> tuple[str, str]:
    """Return the names of a built-in network's first convolution and of its classifier.

    Of any other network it returns those of a ResNet, which is the likeliest guess.
    """
    if name in TORCHVISION_MODELS and name.startswith("vgg"):
        return "features.0", "classifier.6"
    if name in TORCHVISION_MODELS and name.startswith("densenet"):
        return "features.conv0", "classifier"
    if name in SMALL_IMAGE_MODELS and name.startswith("vgg"):
        return "features.0", "fc"
    return "conv1", "fc"


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
