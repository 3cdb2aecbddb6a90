"""Do two runtimes compute the same function?

Conventions. Logits are compared in float64, over all images of a batch size at once. The relative
error is the largest difference of any logit over the largest magnitude among the reference's
logits, so it has no unit and small logits cannot inflate it. The cosine similarity is that of all
logits as one vector. Top-1 agreement is the share of images for which both name the same class; two
logits that nearly tie may trade places within the limit on the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compress.config import ParityLimits
from compress.errors import ConfigError, DataError, ParityError
from export.runners import Runner


@dataclass(frozen=True)
class ParityResult:
    """How closely a candidate follows its reference at one batch size."""

    reference: str
    """Name of the runner that is believed."""
    candidate: str
    """Name of the runner that is judged."""
    batch_size: int
    """Images in a batch."""
    images: int
    """Images in all batches."""
    relative_error: float
    """Largest difference of a logit over the largest logit of the reference."""
    cosine: float
    """Cosine similarity of all logits."""
    top1_agreement: float
    """Share of images, 0 to 1, whose top-1 class is the same."""
    limits: dict[str, float]
    """The limits that these figures keep, by their names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def check_parity(
    reference: Runner,
    candidate: Runner,
    images: np.ndarray,
    *,
    batch_sizes: Sequence[int] = (1, 3, 8),
    limits: ParityLimits,
) -> list[ParityResult]:
    """Prove that two entered runners agree, at every batch size.

    Args:
        reference: the runner that is believed.
        candidate: the runner that is judged.
        images: (N, C, H, W) float32; a last batch that is not full is filled from the start.
        batch_sizes: sizes to compare at, one result each.
        limits: what counts as agreement.

    Raises:
        ParityError: at the first batch size where they disagree or one gives NaN or infinity.
        DataError: there are no images, or not of the shape that the network reads.
        ConfigError: there are no batch sizes, or one is below 1.
    """
    if len(images) == 0:
        raise DataError("parity is checked on real images and none were given")
    if min(batch_sizes, default=0) < 1:
        raise ConfigError(
            f"parity needs batch sizes of at least 1, not {list(batch_sizes)}; "
            "set export.parity_batches"
        )
    return [_compare(reference, candidate, images, size, limits) for size in batch_sizes]


@contextmanager
def judging(name: str, precision: str) -> Iterator[None]:
    """Name the file that a ParityError of the block is about, and the limits that it keeps."""
    try:
        yield
    except ParityError as error:
        raise ParityError(
            f"{name} is not written: {error}; export.limits.{precision} holds the limits"
        ) from error


def _compare(
    reference: Runner, candidate: Runner, images: np.ndarray, size: int, limits: ParityLimits
) -> ParityResult:
    names = f"{candidate.name} disagrees with {reference.name} at batch size {size}"
    batches = list(_batches(images, size))
    expected, actual = (
        np.concatenate([runner.infer(batch) for batch in batches]).astype(np.float64)
        for runner in (reference, candidate)
    )
    if expected.shape != actual.shape:
        raise ParityError(f"{names}: shape {actual.shape} instead of {expected.shape}")
    for runner, logits in ((reference, expected), (candidate, actual)):
        if not np.isfinite(logits).all():
            raise ParityError(f"{names}: {runner.name} gives NaN or infinity")
    result = ParityResult(
        reference=reference.name,
        candidate=candidate.name,
        batch_size=size,
        images=len(expected),
        relative_error=_relative_error(expected, actual),
        cosine=_cosine(expected, actual),
        top1_agreement=float(np.mean(expected.argmax(axis=1) == actual.argmax(axis=1))),
        limits=limits.model_dump(),
    )
    if broken := _broken(result, limits):
        raise ParityError(f"{names}: {broken}")
    return result


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[np.arange(start, start + size) % len(images)]


def _broken(result: ParityResult, limits: ParityLimits) -> str | None:
    """Return the first limit that a result breaks and all of its figures, as half a sentence."""
    error, agreement = result.relative_error, result.top1_agreement
    if error > limits.relative_error:
        said = f"relative error {error:.1e} exceeds the limit {limits.relative_error:.1e}"
    elif result.cosine < limits.cosine:
        said = f"cosine {result.cosine:.5f} is below the limit {limits.cosine:g}"
    elif agreement < limits.top1_agreement:
        said = f"top-1 agreement {agreement:.0%} is below the limit {limits.top1_agreement:.0%}"
    else:
        return None
    return (
        f"{said} (error {error:.1e}, cosine {result.cosine:.5f}, "
        f"top-1 agrees on {agreement:.0%} of {result.images} images)"
    )


def _relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    difference = float(np.abs(expected - actual).max())
    scale = float(np.abs(expected).max())
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / scale


def _cosine(expected: np.ndarray, actual: np.ndarray) -> float:
    norms = float(np.linalg.norm(expected) * np.linalg.norm(actual))
    if norms == 0:
        return 1.0 if np.array_equal(expected, actual) else 0.0
    # Rounding may carry it past the ends, and a limit may be one of them.
    return min(1.0, max(-1.0, float(np.vdot(expected, actual)) / norms))
