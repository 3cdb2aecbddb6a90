"""Accuracy per image, so that two networks can be compared on the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.statistics.paired import PairedDrop, paired_drop
from compress.errors import DataError, ModelError


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


class Tally:
    """What one network says, batch by batch."""

    def __init__(self) -> None:
        self._top1: list[npt.NDArray[np.int64]] = []
        self._top5_correct: list[npt.NDArray[np.bool_]] = []
        self._labels: list[npt.NDArray[np.int64]] = []

    def add(self, logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> None:
        """Take in finite logits (N, classes) and labels (N,).

        Raises:
            DataError: a label that the network has no class for.
            ModelError: logits of another shape.
        """
        _check(logits, labels)
        best = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :5]
        self._top1.append(best[:, 0])
        self._top5_correct.append((best == labels[:, None]).any(axis=1))
        self._labels.append(labels)

    def predictions(self, skipped: int = 0) -> Predictions:
        """Return all of it; there must be something."""
        predicted, actual = np.concatenate(self._top1), np.concatenate(self._labels)
        return Predictions(
            top1=predicted,
            correct=predicted == actual,
            top5_correct=np.concatenate(self._top5_correct),
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
    classes = logits.shape[1]
    stray = labels[(labels < 0) | (labels >= classes)]
    if stray.size:
        raise DataError(
            f"label {stray[0]} has no class, the network has {classes}; "
            "was it trained on another class list?"
        )
