"""Do two runtimes compute the same function?

Conventions. Logits are compared in float64. The relative error of a batch is the largest
difference of any logit over the largest magnitude among the reference's logits, so it has no unit
and small logits cannot inflate it. The cosine similarity is that of the whole batch of logits.

Within the tolerance every logit may move by ``tolerance * max|reference|``, so two logits may trade
places when they are closer than twice that. A changed top-1 class counts as disagreement only when
the reference's first two logits lie further apart. Disagreement therefore always comes with an
error beyond the tolerance; the share says how much a failure would matter to a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

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
    """Images in the batch."""
    relative_error: float
    """Largest difference of a logit over the largest logit of the reference."""
    cosine: float
    """Cosine similarity of all logits of the batch."""
    top1_agreement: float
    """Share of images, 0 to 1, whose top-1 class is the same or was nearly tied."""
    tolerance: float
    """Largest relative error that passes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def check_parity(
    reference: Runner,
    candidate: Runner,
    images: np.ndarray,
    *,
    batch_sizes: Sequence[int] = (1, 3, 8),
    tolerance: float,
) -> list[ParityResult]:
    """Prove that two entered runners agree, at every batch size.

    Args:
        reference: the runner that is believed.
        candidate: the runner that is judged.
        images: (N, C, H, W) float32; a batch takes the first of them, again and again if too few.
        batch_sizes: sizes to compare at, one result each.
        tolerance: largest relative error that passes.

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
    return [
        _check_batch(reference, candidate, images[np.arange(size) % len(images)], tolerance)
        for size in batch_sizes
    ]


def _check_batch(
    reference: Runner, candidate: Runner, batch: np.ndarray, tolerance: float
) -> ParityResult:
    names = f"{candidate.name} disagrees with {reference.name} at batch size {len(batch)}"
    expected = reference.infer(batch).astype(np.float64)
    actual = candidate.infer(batch).astype(np.float64)
    if expected.shape != actual.shape:
        raise ParityError(f"{names}: shape {actual.shape} instead of {expected.shape}")
    for runner, logits in ((reference, expected), (candidate, actual)):
        if not np.isfinite(logits).all():
            raise ParityError(f"{names}: {runner.name} gives NaN or infinity")
    result = ParityResult(
        reference=reference.name,
        candidate=candidate.name,
        batch_size=len(batch),
        relative_error=_relative_error(expected, actual),
        cosine=_cosine(expected, actual),
        top1_agreement=_top1_agreement(expected, actual, tolerance),
        tolerance=tolerance,
    )
    if result.relative_error > tolerance:
        raise ParityError(
            f"{names}: relative error {result.relative_error:.1e} exceeds the tolerance "
            f"{tolerance:.1e}, and top-1 agrees on {result.top1_agreement:.0%} of the images"
        )
    return result


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
    return float(np.vdot(expected, actual)) / norms


def _top1_agreement(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> float:
    same = expected.argmax(axis=1) == actual.argmax(axis=1)
    if expected.shape[1] == 1:
        return 1.0
    second, first = np.partition(expected, -2, axis=1)[:, -2:].T
    tied = first - second <= 2 * tolerance * np.abs(expected).max()
    return float(np.mean(same | tied))
