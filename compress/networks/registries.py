"""Networks of other packages by name, ``timm:NAME`` and ``torchvision:NAME``, with fresh weights.

Neither package is ever asked for weights: those come from the user's checkpoint.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any, Protocol

from compress.errors import EnvironmentUnfitError, ModelError, UnknownModelError

READERS = frozenset(
    {
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
        *("pretrained_filter_fn", "pretrained_model_args", "checkpoint_path", "cache_dir"),
        *("weights", "weights_backbone", "pretrained_backbone"),
    }
)
"""Options that make a builder read files or the network."""


class Registry(Protocol):
    """A package that knows networks by name."""

    def names(self) -> Iterable[str]:
        """Return every name."""

    def builder(self, name: str, *, num_classes: int, in_channels: int) -> partial[Any]:
        """Return what builds a network of these ends; it takes further options by keyword."""

    def images(self, name: str) -> dict[str, Any]:
        """Return how the package's own weights saw images, by keys of the section ``data``."""


class Torchvision:
    """``torchvision.models``: classification, segmentation, detection."""

    def names(self) -> Iterable[str]:
        """Return every name."""
        from torchvision import models

        return models.list_models()

    def builder(self, name: str, *, num_classes: int, in_channels: int) -> partial[Any]:
        """Return what builds a network of these ends.

        Raises:
            ModelError: the images have not three channels.
        """
        from torchvision import models

        if in_channels != 3:
            raise ModelError(
                f"torchvision:{name} takes images of 3 channels and the data has {in_channels}"
            )
        found = models.get_model_builder(name)
        taken = inspect.signature(found).parameters
        weightless = {key: None for key in ("weights", "weights_backbone") if key in taken}
        return partial(found, **weightless, num_classes=num_classes)

    def images(self, name: str) -> dict[str, Any]:
        """Return how the weights that torchvision calls its best saw images."""
        from torchvision import models
        from torchvision.transforms._presets import ImageClassification

        best = getattr(models.get_model_weights(name), "DEFAULT", None)
        seen = best.transforms() if best else None
        if not isinstance(seen, ImageClassification):  # boxes and masks are prepared otherwise
            return {}
        return _known(
            size=seen.crop_size,
            mean=seen.mean,
            std=seen.std,
            interpolation=seen.interpolation.value,
            crop=seen.crop_size[0] / seen.resize_size[0],
        )


class Timm:
    """timm, an extra of this package; the tag of a name says whose weights are meant."""

    def names(self) -> Iterable[str]:
        """Return every name, with and without tags.

        Raises:
            EnvironmentUnfitError: timm is not installed.
        """
        timm = _timm()
        return [*timm.list_models(), *timm.list_models(pretrained=True)]

    def builder(self, name: str, *, num_classes: int, in_channels: int) -> partial[Any]:
        """Return what builds a network of these ends."""
        return partial(
            _timm().create_model,
            name,
            pretrained=False,
            num_classes=num_classes,
            in_chans=in_channels,
        )

    def images(self, name: str) -> dict[str, Any]:
        """Return how the weights of the name's tag, or of its usual one, saw images."""
        seen = _timm().get_pretrained_cfg(name)
        if seen is None:
            return {}
        return _known(
            size=seen.input_size[1:],
            mean=seen.mean,
            std=seen.std,
            interpolation=seen.interpolation,
            crop=seen.crop_pct,
        )


REGISTRIES: dict[str, Registry] = {"timm": Timm(), "torchvision": Torchvision()}
"""By what stands before the colon."""


def registered(name: str) -> tuple[Registry, str] | None:
    """Return the registry that a name asks for and the name in it; None for any other name.

    Raises:
        UnknownModelError: there is no such name in the registry.
        EnvironmentUnfitError: the package is not installed.
    """
    package, _, inner = name.partition(":")
    registry = REGISTRIES.get(package)
    if registry is None:
        return None
    known = set(registry.names())
    if inner not in known:  # a path or an address is none either
        close = difflib.get_close_matches(inner, known, n=1)
        hint = f"did you mean {package}:{close[0]}?" if close else f"see {package}.list_models()"
        raise UnknownModelError(f"{package} has no network of the name {inner!r}: {hint}")
    return registry, inner


def usual_images(name: str) -> dict[str, Any]:
    """Return how a network's published weights saw images, by keys of the section ``data``.

    Empty for a name of no registry, and where the registry does not know.

    Raises:
        ModelError, EnvironmentUnfitError: as ``registered``.
    """
    found = registered(name)
    return found[0].images(found[1]) if found else {}


def _known(
    *, size: Iterable[int], mean: Iterable[float], std: Iterable[float], **resized: Any
) -> dict[str, Any]:
    """Return what of this the section ``data`` can say: images are square, resizing is smooth."""
    sides = set(size)
    about = {"image_size": sides.pop() if len(sides) == 1 else None, **resized}
    if about["interpolation"] not in ("bilinear", "bicubic"):
        del about["interpolation"]
    about |= {"mean": tuple(mean), "std": tuple(std)}
    return {key: value for key, value in about.items() if value is not None}


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise EnvironmentUnfitError(
            "networks of timm need the package timm: pip install 'compress-convnets[timm]'"
        ) from error
    return timm
