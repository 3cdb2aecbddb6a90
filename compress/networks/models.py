"""Networks by name: built in, of timm and torchvision, and the user's own."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from compress.config import ModelConfig
from compress.errors import ModelError, UnknownModelError, nearest
from compress.networks.architectures import (
    CifarDenseNet,
    CifarResNet,
    CifarVGG,
    LeNet,
    PreActBlock,
    PreActBottleneck,
    PreActResNet,
)
from compress.networks.outputs import PickOutput
from compress.networks.registries import READERS, REGISTRIES, registered

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
CIFAR_DEPTHS = {
    "resnet8": 8,
    "resnet14": 14,
    "resnet20": 20,
    "resnet32": 32,
    "resnet56": 56,
    "resnet110": 110,
}
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

ANY_CLASSES = 10
"""For a network of which only the names of its tensors are wanted."""


def build_model(name: str, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network by its name alone; see ``build_network``."""
    model = ModelConfig(name=name)
    return build_network(model, num_classes=num_classes, in_channels=in_channels)


def build_network(model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        model: its name is one of BUILTIN_MODELS, ``timm:NAME``, ``torchvision:NAME``, or
            ``package.module:callable``, which is called with ``num_classes`` and ``in_channels``
            as far as it takes them; all are called with its options.
        num_classes: width of the classifier.
        in_channels: channels of the images.

    Raises:
        ModelError: no such architecture, the callable cannot be imported or called, or what it
            returns has no weights yet or quantized ones.
        EnvironmentUnfitError: timm is not installed.
    """
    build = _builder(model, num_classes=num_classes, in_channels=in_channels)
    for key in build.keywords.keys() & model.options.keys():
        raise ModelError(f"model.options.{key} follows from the data: leave it out")
    try:
        network = build(**model.options)
    except Exception as error:  # the user's code may raise anything
        if is_builtin(model):
            raise
        raise ModelError(f"{model.name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{model.name} returned {type(network).__name__}, not a torch.nn.Module")
    _require_float_weights(network, model.name)
    if model.output is not None:
        network.register_forward_hook(PickOutput(model.output))
    return network


def build_skeleton(model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a network for its structure, in no memory where its constructor is known to allow it.

    Raises:
        ModelError, EnvironmentUnfitError: as ``build_network``.
    """
    # A constructor of anybody else may compute with its tensors, or keep some that no file holds.
    with torch.device("meta" if is_builtin(model) else "cpu"):
        return build_network(model, num_classes=num_classes, in_channels=in_channels)


def is_builtin(model: ModelConfig) -> bool:
    """Whether this tool's own code says all that is run to build a network."""
    return ":" not in model.name and not model.options


def head_of(model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> frozenset[str]:
    """Return the names of the tensors that follow the number of classes.

    Raises:
        ModelError, EnvironmentUnfitError: as ``build_network``.
    """
    one, more = (
        build_skeleton(model, num_classes=classes, in_channels=in_channels).state_dict()
        for classes in (num_classes, num_classes + 1)
    )
    return frozenset(name for name, tensor in one.items() if tensor.shape != more[name].shape)


def ends_in(model: ModelConfig) -> tuple[str, str]:
    """Return the names of a network's first convolution and of its classifier.

    A network that is not built in is built to find them; where none follows the number of classes
    they are those of a ResNet, which is the likeliest guess.

    Raises:
        ModelError, EnvironmentUnfitError: as ``build_network``.
    """
    if is_builtin(model):
        return ends_of(model.name)
    state = build_skeleton(model, num_classes=ANY_CLASSES).state_dict()
    head = head_of(model, num_classes=ANY_CLASSES)
    first = next((name for name in state if state[name].dim() == 4), "conv1")
    last = next((name for name in state if name in head), "fc")
    return first.removesuffix(".weight"), last.removesuffix(".weight")


def ends_of(name: str) -> tuple[str, str]:
    """Return the names of a built-in network's first convolution and of its classifier."""
    if name in TORCHVISION_MODELS and name.startswith("vgg"):
        return "features.0", "classifier.6"
    if name in TORCHVISION_MODELS and name.startswith("densenet"):
        return "features.conv0", "classifier"
    if name in SMALL_IMAGE_MODELS and name.startswith("vgg"):
        return "features.0", "fc"
    return "conv1", "fc"


def _builder(model: ModelConfig, *, num_classes: int, in_channels: int) -> partial[Any]:
    """Return what builds a network of these ends; it takes the options."""
    name, ends = model.name, {"num_classes": num_classes, "in_channels": in_channels}
    found = registered(name)
    if not found and ":" in name:
        return _own_builder(name, **ends)
    for key in READERS & model.options.keys():
        raise ModelError(
            f"model.options.{key} would read weights: a network begins with fresh ones, and those "
            "of --checkpoint are put in"
        )
    if found:
        registry, inner = found
        return registry.builder(inner, **ends)
    if name in SMALL_IMAGE_MODELS:
        return partial(SMALL_IMAGE_MODELS[name], **ends)
    if name in TORCHVISION_MODELS:
        if in_channels != 3:
            raise ModelError(
                f"{name} takes images of 3 channels and the data has {in_channels}: "
                f"choose one of {', '.join(SMALL_IMAGE_MODELS)}"
            )
        return REGISTRIES["torchvision"].builder(name, **ends)
    raise UnknownModelError(
        f"no architecture is named {name!r}: {nearest(name, BUILTIN_MODELS)} "
        "(or timm:NAME, torchvision:NAME, or package.module:callable for your own)"
    )


def _own_builder(name: str, **ends: int) -> partial[Any]:
    builder = _import_callable(name)
    try:
        taken = inspect.signature(builder).parameters
    except ValueError as error:  # it is written in C
        raise ModelError(f"{name} does not tell what it takes: wrap it in a function") from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    return partial(builder, **{k: v for k, v in ends.items() if takes_all or k in taken})


def _require_float_weights(network: nn.Module, name: str) -> None:
    """Refuse a network whose weights are not there yet, or not numbers that can be trained."""
    for place, module in network.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, tensors)):
            kind = type(module).__name__
            raise ModelError(
                f"{name} has a {kind} ({place}), whose width only the first image decides: give "
                f"its channels, as nn.{kind.removeprefix('Lazy')} takes them"
            )
    for key, value in network.state_dict().items():
        if "_packed_params" in key or getattr(value, "is_quantized", False):
            raise ModelError(
                f"{name} is quantized ({key}): prune the network in floating point, and give "
                "--precision int8 to compress export"
            )


def _import_callable(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    # A console script does not see the folder it is called from; the user's module lies there.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except Exception as error:  # the user's module may raise anything
        kind = UnknownModelError if _is_absent(module_name, error) else ModelError
        raise kind(f"cannot import {module_name!r} for --model {name}: {error}") from error
    if not callable(found):
        raise UnknownModelError(f"{module_name!r} has no callable {attribute!r}")
    return found


def _is_absent(module_name: str, error: Exception) -> bool:
    """Whether it is the module itself, or a package around it, that is not there."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return not module_name
    return f"{module_name}.".startswith(f"{error.name}.")
