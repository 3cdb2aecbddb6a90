"""What every runner is, and what they all check and say alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from compress.errors import DataError, ModelError
from export.onnx_check import first_line

if TYPE_CHECKING:
    from types import TracebackType


class Runner(Protocol):
    """A network loaded in some runtime; usable only inside its ``with`` block."""

    @property
    def name(self) -> str:
        """What runs and where, for messages."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def infer(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of images, (N, C, H, W) float32 -> (N, classes) float32.

        Raises:
            DataError: the images have another shape or type than the network reads.
            ModelError: the runtime cannot compute the network on them.
        """
        ...


def entered(loaded: Any, name: str) -> Any:
    """Return what a runner loaded on entry; using it outside of its block is a bug."""
    if loaded is None:
        raise RuntimeError(f"{name} is used outside of its with block")
    return loaded


def failed(name: str, images: np.ndarray, error: Exception) -> ModelError:
    """Return the error of a runtime that gave up on a batch."""
    return ModelError(
        f"{name} cannot compute the network on images {images.shape}: {first_line(error)}"
    )


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
    for size, wanted in zip(images.shape, expected, strict=False):
        if isinstance(wanted, int) and size != wanted:
            shape = ", ".join(str(dimension or "any") for dimension in expected)
            raise DataError(f"the network reads images of shape ({shape}), not {images.shape}")
