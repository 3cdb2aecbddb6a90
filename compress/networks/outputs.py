"""The logits among what a network returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError, ModelError, no_number

PROBE = 2
"""Images on which a network is tried; BatchNorm needs two."""


class PickOutput:
    """A forward hook that passes one part of an output on; a tensor passes as it is."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> torch.Tensor:
        """Return the part.

        Raises:
            ModelError: there is none of this name, or it is no tensor.
        """
        if isinstance(output, torch.Tensor):
            return output
        found = _parts(output).get(self.key)
        if not isinstance(found, torch.Tensor):
            raise ModelError(
                f"model.output = {self.key!r} is no tensor in what {type(module).__name__} "
                f"returns, {_described(output)}"
            )
        return found


def rows_not_finite(logits: torch.Tensor) -> torch.Tensor:
    """Return how many rows of (N, ...) hold NaN, and how many NaN or infinity: (2,) int64."""
    rows = logits.flatten(1)
    return torch.stack([rows.isnan().any(1).sum(), (~rows.isfinite()).any(1).sum()])


def require_finite(strange: Sequence[int], images: int, who: str = "the network") -> None:
    """Refuse a network whose answers are no numbers, of which some would be the largest.

    Args:
        strange: Images on which it gives NaN, and on which it gives NaN or infinity.
        images: Of how many.
        who: What the message calls it.

    Raises:
        ModelError: it does on one image at least.
    """
    with_nan, not_finite = strange
    if not_finite:
        raise ModelError(
            f"{who} gives {no_number(with_nan, not_finite)} on {not_finite} of {images} images, "
            "and that is no class: look at its weights, and at how the images are normalised"
        )


def require_logits(network: nn.Module, input_size: tuple[int, int, int], classes: int) -> None:
    """Refuse a network that does not return one row of logits for each image, in either mode.

    It is run on two images, so its statistics change and it is left in training mode: give one
    that nothing else uses. On the meta device nothing is computed.

    Args:
        network: with ``model.output`` applied.
        input_size: (C, H, W) of one image.
        classes: how many logits there must be at least.

    Raises:
        ModelError: it fails on such images, or returns something else.
    """
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    images = torch.zeros(PROBE, *input_size, device=device)
    for training in (False, True):
        try:
            with torch.no_grad():
                output = network.train(training)(images)
        except CompressError:
            raise
        except Exception as error:  # the user's forward may raise anything
            raise ModelError(
                f"the network does not accept images of size {'x'.join(map(str, input_size))}"
                f"{' in training' if training else ''}: {type(error).__name__}: {error}"
            ) from error
        _require_rows(network, output, classes, training=training)


def _require_rows(network: nn.Module, output: Any, classes: int, *, training: bool) -> None:
    name, mode = type(network).__name__, "training" if training else "evaluation"
    if not isinstance(output, torch.Tensor):
        tensors = [key for key, part in _parts(output).items() if isinstance(part, torch.Tensor)]
        which = "".join(
            f": say which part the logits are, as --set model.output={key}" for key in tensors[:1]
        )
        raise ModelError(
            f"{name} returns {_described(output)} in {mode}, and a classifier a tensor of logits"
            f"{which}"
        )
    shape = "x".join(map(str, output.shape))
    if output.dim() != 2 or len(output) != PROBE:
        raise ModelError(
            f"{name} returns a tensor of {shape} for {PROBE} images in {mode}, and a classifier "
            "one row of logits for each"
        )
    if output.shape[1] < classes:
        raise ModelError(
            f"{name} returns {output.shape[1]} logits for each image and the data has {classes} "
            "classes: take num_classes in the callable"
        )


def _parts(output: Any) -> dict[str, Any]:
    """Return the parts of an output by what names them; none of what has no parts."""
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))
        return {str(name): value for name, value in zip(names, output, strict=True)}
    return {}


def _described(output: Any) -> str:
    return f"{type(output).__name__}({', '.join(_parts(output))})"
