"""What every runner is, and what they all check and say alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import DataError, ModelError, first_line

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from export.runners.stages import Stages

Feeds = Mapping[str, np.ndarray]
"""An array for each input, by its name."""
Outputs = dict[str, np.ndarray]
"""An array for each output, by its name and in the network's order."""
Shape = tuple[int | str | None, ...]
"""Sizes of a tensor; a word or None stands for any size."""


@dataclass(frozen=True)
class TensorSpec:
    """What a network says of one of its inputs or outputs."""

    name: str
    dtype: str
    """As numpy calls it: float32, float16, int64, uint8."""
    shape: Shape | None = None
    """None where not even the number of dimensions is known."""

    def __str__(self) -> str:
        sizes = "any shape" if self.shape is None else written(self.shape)
        return f"{self.name} {self.dtype} {sizes}"


class Runner(ABC):
    """A network loaded in some runtime; usable only inside its ``with`` block."""

    name: str
    """What runs and where, for messages."""
    stages: Stages | None = None
    """On a GPU, within the ``with`` block: its steps one by one."""
    inputs: tuple[TensorSpec, ...] | None = None
    """Within the ``with`` block: what it reads; None where the network does not say."""
    most: int | None = None
    """Within the ``with`` block: largest batch that it takes; None for any."""
    builds_for_sizes = False
    """Whether the first run on a batch size outside of those before builds an engine."""

    def __enter__(self) -> Runner:
        return self

    def keep_builds(self, folder: Path, name: str) -> None:
        """Say where to keep what it builds, before it is entered.

        Another runner of the same file then loads the same engine, and any runner uses the timings.

        Args:
            folder: for timings of kernels; it need not be there.
            name: of a folder in it for the engines of this file alone.
        """
        raise RuntimeError(f"{self.name} builds nothing, and was told where to keep it")

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def run(self, feeds: Feeds) -> Outputs:
        """Return every output for one array per input.

        Raises:
            DataError: the arrays have other names, shapes or types than the network reads.
            ModelError: the runtime cannot compute the network on them.
        """

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images, (N, C, H, W) float32 -> (N, classes) float32.

        Raises:
            DataError: the images have another shape or type than the network reads.
            ModelError: the runtime cannot compute the network on them, or it has several outputs.
        """
        inputs = self.inputs or (IMAGES,)
        check_images(images, inputs[0].shape or ())
        outputs = self.run({inputs[0].name: images})
        if len(outputs) != 1:
            names = ", ".join(outputs)
            raise ModelError(f"the network returns {len(outputs)} tensors ({names}), not one")
        return np.asarray(next(iter(outputs.values())), dtype=np.float32)


IMAGES = TensorSpec("input", "float32", (None, None, None, None))
"""What a classifier reads; named as in the ONNX files that the export writes."""


def entered(loaded: Any, name: str) -> Any:
    """Return what a runner loaded on entry; using it outside of its block is a bug."""
    if loaded is None:
        raise RuntimeError(f"{name} is used outside of its with block")
    return loaded


def failed(name: str, feeds: Feeds, error: Exception) -> ModelError:
    """Return the error of a runtime that gave up on a batch."""
    shapes = ", ".join(f"{key} {array.shape}" for key, array in feeds.items())
    return ModelError(f"{name} cannot compute the network on {shapes}: {first_line(error)}")


def check_images(images: np.ndarray, expected: Sequence[int | str | None] = ()) -> None:
    """Refuse what is no batch of float32 images, or not of the fixed sizes in ``expected``.

    Raises:
        DataError: naming the shape that is there and the one that is read.
    """
    if images.ndim != 4 or images.dtype != np.float32:
        raise DataError(
            "images must be float32 of shape (N, C, H, W), "
            f"not {images.dtype} of shape {images.shape}"
        )
    if not _fits(images.shape, expected):
        raise DataError(
            f"the network reads images of shape {written(expected)}, not {images.shape}"
        )


def check_feeds(feeds: Feeds, inputs: Sequence[TensorSpec]) -> None:
    """Refuse arrays of other names, types or shapes than a network reads.

    Raises:
        DataError: naming the array that is there and the one that is read.
    """
    if feeds.keys() != {spec.name for spec in inputs}:
        reads = ", ".join(spec.name for spec in inputs)
        raise DataError(f"the network reads {reads}, and it was given {', '.join(feeds) or 'none'}")
    for spec in inputs:
        array = feeds[spec.name]
        fits = spec.shape is None or (
            array.ndim == len(spec.shape) and _fits(array.shape, spec.shape)
        )
        if array.dtype != spec.dtype or not fits:
            raise DataError(
                f"the network reads {spec}, and it was given {array.dtype} of shape {array.shape}"
            )


def written(shape: Sequence[int | str | None]) -> str:
    """Return a shape in words: (batch, 3, 32, any)."""
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _fits(shape: Sequence[int], expected: Sequence[int | str | None]) -> bool:
    return all(
        size == wanted
        for size, wanted in zip(shape, expected, strict=False)
        if isinstance(wanted, int)
    )
