"""Accuracy per image, so that two networks can be compared on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.statistics.paired import PairedDrop, paired_drop
from compress.errors import DataError, ModelError

if TYPE_CHECKING:
    from export.runners import Runner


class LabelledImages(Protocol):
    """One batch: what ``compress.data.loading.Batch`` is."""

    @property
    def images(self) -> Any:
        """(N, C, H, W) float32, normalised as the network expects; a tensor or an array."""

    @property
    def labels(self) -> Any:
        """(N,) class indices."""

    @property
    def skipped(self) -> int:
        """Images of this batch that could not be read and are not among the N."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What one network says about every image, in the order of the batches."""

    top1: npt.NDArray[np.int64]
    """(images,) most likely class."""
    correct: npt.NDArray[np.bool_]
    """(images,) whether ``top1`` is the label."""
    top5_correct: npt.NDArray[np.bool_]
    """(images,) whether the label is among the five most likely classes, or all if fewer."""
    labels: npt.NDArray[np.int64]
    """(images,)"""
    skipped: int
    """Images that could not be read."""

    @property
    def top1_share(self) -> float:
        """Share of images that are right, 0 to 1."""
        return float(self.correct.mean())

    @property
    def top5_share(self) -> float:
        """Share of images whose label is among the five most likely, 0 to 1."""
        return float(self.top5_correct.mean())


@dataclass(frozen=True, kw_only=True)
class AccuracyComparison:
    """Two networks on the same images."""

    drop: PairedDrop
    """Of top-1."""
    top5_drop: PairedDrop
    same_prediction: float
    """Share of images for which both name the same class, right or wrong."""


def measure_accuracy(runner: Runner, batches: Iterable[LabelledImages]) -> Predictions:
    """Run a network over a data set once.

    Raises:
        DataError: no images, or a label that the network has no class for.
        ModelError: logits that are not finite.
    """
    top1, top5, labels, skipped = [], [], [], 0
    for batch in batches:
        skipped += batch.skipped
        wanted = np.asarray(batch.labels, dtype=np.int64)
        if not wanted.size:
            continue
        logits = runner.infer(np.ascontiguousarray(batch.images, dtype=np.float32))
        _check(logits, wanted)
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        top1.append(best[:, 0])
        top5.append((best == wanted[:, None]).any(axis=1))
        labels.append(wanted)
    if not labels:
        raise DataError(
            f"accuracy needs images, and none of {skipped} validation images could be read"
        )
    predicted, actual = np.concatenate(top1), np.concatenate(labels)
    return Predictions(
        top1=predicted,
        correct=predicted == actual,
        top5_correct=np.concatenate(top5),
        labels=actual,
        skipped=skipped,
    )


def compare(dense: Predictions, pruned: Predictions, confidence: float) -> AccuracyComparison:
    """Compare two networks image by image.

    Raises:
        DataError: they did not see the same labels in the same order.
    """
    if not np.array_equal(dense.labels, pruned.labels):
        raise DataError(
            f"the dense network saw {len(dense.labels)} images and the pruned one saw "
            f"{len(pruned.labels)}, not the same ones in the same order; accuracy is compared "
            "image by image"
        )
    return AccuracyComparison(
        drop=paired_drop(dense.correct, pruned.correct, confidence=confidence),
        top5_drop=paired_drop(dense.top5_correct, pruned.top5_correct, confidence=confidence),
        same_prediction=float((dense.top1 == pruned.top1).mean()),
    )


def _check(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> None:
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ModelError(f"the network returned {logits.shape} logits for {len(labels)} images")
    if not np.isfinite(logits).all():
        raise ModelError(
            "the network returned logits that are not finite; its accuracy means nothing"
        )
    classes = logits.shape[1]
    stray = labels[(labels < 0) | (labels >= classes)]
    if stray.size:
        raise DataError(
            f"label {stray[0]} has no class, the network has {classes}; "
            "was it trained on another class list?"
        )
