"""What both networks answer to the same inputs: agreement, and accuracy where there are labels.

Both see a batch before the next one is read, so a data set is read once and nothing of it is kept.
Accuracy is kept per image, so that two networks are compared on the same images; how outputs agree
is defined in ``export.verify``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.measuring.inputs import Batch
from bench.measuring.records import AgreementRecord, OutputAgreement
from bench.measuring.wiring import Names, Wiring
from bench.statistics.shares import PairedDrop, paired_drop, share_of
from compress.errors import DataError, ModelError, no_number
from export.runners import Outputs, Runner
from export.verify import Agreement, is_logits


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


@dataclass(frozen=True)
class Answers:
    """What both networks answered to all inputs."""

    skipped: int
    agreement: AgreementRecord
    predictions: tuple[Predictions, Predictions] | None
    accuracy: AccuracyComparison | None


def ask_both(
    reference: Runner,
    pruned: Runner,
    wiring: Wiring,
    batches: Iterable[Batch],
    *,
    size: int | None,
    names: Names,
    confidence: float,
    output: str | None = None,
) -> Answers:
    """Run both networks over all inputs once.

    Args:
        reference: entered.
        pruned: entered.
        wiring: how the same arrays reach both.
        batches: of ``bench.measuring.inputs``.
        size: to which every batch is filled up, where only full ones can be run; what it is filled
            with does not count.
        names: of both, for messages.
        confidence: of the intervals.
        output: from which classes are read; default the first of shape (N, classes).

    Raises:
        DataError: no inputs, outputs that do not compare, or labels without classes.
        ModelError: a network cannot be computed, or answers with NaN or infinity.
    """
    course = _Course(names, output)
    for batch in batches:
        course.skipped += batch.skipped
        if not len(batch):
            continue
        feeds = batch.feeds if size is None else wiring.repeated(batch.feeds, size)
        fed = wiring.length(feeds)
        expected = wiring.cut(reference.run(wiring.for_reference(feeds)), fed, len(batch))
        actual = wiring.cut(pruned.run(wiring.for_pruned(feeds)), fed, len(batch))
        course.add(expected, actual, batch)
    return course.answers(confidence)


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
        _check_logits(logits, labels)
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


def compare_predictions(
    dense: Predictions, pruned: Predictions, confidence: float
) -> AccuracyComparison:
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


class _Course:
    """Everything that is summed up over the batches."""

    def __init__(self, names: Names, output: str | None) -> None:
        self.skipped = 0
        self._count = 0
        self._names = names
        self._output = output
        self._pairs: dict[str, str] = {}
        self._agreements: dict[str, Agreement] = {}
        self._tallies = Tally(), Tally()
        self._labelled = False
        self._strange: dict[tuple[str, str], tuple[int, int]] = {}
        self._fed = "inputs"

    def add(self, expected: Outputs, actual: Outputs, batch: Batch) -> None:
        self._pairs = self._pairs or paired_outputs(expected, actual, self._names)
        self._count += len(batch)
        if all(array.ndim == 4 for array in batch.feeds.values()):
            self._fed = "images"
        if self._note_strange(expected, actual, len(batch)):
            return
        for ours, theirs in self._pairs.items():
            values = expected[ours], actual[theirs]
            _require_alike(ours, values, self._names)
            self._agreements.setdefault(ours, Agreement()).add(*values, rows=len(batch))
        name = chosen_output(expected, self._output, rows=len(batch))
        if batch.labels is None:
            return
        if name is None:
            raise DataError(
                f"labels need an output of shape (N, classes), and {self._names[0]} has "
                f"{_listed(expected)}: give inputs without labels"
            )
        labels = np.asarray(batch.labels, dtype=np.int64)
        for tally, logits in zip(
            self._tallies, (expected[name], actual[self._pairs[name]]), strict=True
        ):
            tally.add(logits, labels)
        self._labelled = True

    def _note_strange(self, expected: Outputs, actual: Outputs, rows: int) -> bool:
        """Count the answers that are no numbers; return whether there are any in this batch."""
        found = False
        for ours, theirs in self._pairs.items():
            for who, name, values in zip(
                self._names, (ours, theirs), (expected[ours], actual[theirs]), strict=True
            ):
                counts = _not_finite(values, rows)
                if counts[1]:
                    before = self._strange.get((who, name), (0, 0))
                    self._strange[who, name] = before[0] + counts[0], before[1] + counts[1]
                    found = True
        return found

    def _require_finite(self) -> None:
        for (who, name), (with_nan, strange) in self._strange.items():
            raise ModelError(
                f"{who} gives {no_number(with_nan, strange)} on {strange} of {self._count} "
                f"{self._fed} at its output {name}: there is nothing to compare; look at its "
                "weights and at what it was fed"
            )

    def answers(self, confidence: float) -> Answers:
        self._require_finite()
        if not self._count:
            raise DataError(
                f"two networks are compared on inputs, and none of {self.skipped} validation "
                "images could be read"
            )
        said = None
        if self._labelled:
            first, second = (tally.predictions(self.skipped) for tally in self._tallies)
            said = first, second
        order = sorted(self._agreements, key=lambda name: name != self._output)
        outputs = (
            _output_agreement(name, self._agreements[name], confidence=confidence) for name in order
        )
        return Answers(
            skipped=self.skipped,
            agreement=AgreementRecord(inputs=self._count, outputs=tuple(outputs)),
            predictions=said,
            accuracy=compare_predictions(*said, confidence) if said else None,
        )


def paired_outputs(expected: Outputs, actual: Outputs, names: Names) -> dict[str, str]:
    """Return the pruned network's name of each output of the reference.

    They are paired by name, else by order where number and shapes agree.

    Raises:
        DataError: they do not compare.
    """
    if expected.keys() == actual.keys():
        return {name: name for name in expected}
    if len(expected) == len(actual):
        return dict(zip(expected, actual, strict=True))
    raise DataError(
        f"{names[0]} returns {_listed(expected)} and {names[1]} {_listed(actual)}: networks of "
        "different outputs do not compare"
    )


def chosen_output(outputs: Outputs, asked: str | None, *, rows: int) -> str | None:
    """Return the output that classes are read from: the one asked for, else the first that can.

    Raises:
        DataError: there is none of the name that is asked for.
    """
    if asked is not None:
        if asked not in outputs:
            raise DataError(f"no output is named {asked!r}: there is {_listed(outputs)}")
        return asked if is_logits(outputs[asked], rows) else None
    return next((name for name, values in outputs.items() if is_logits(values, rows)), None)


def _require_alike(name: str, values: tuple[np.ndarray, np.ndarray], names: Names) -> None:
    ours, theirs = values
    if ours.shape != theirs.shape:
        if ours.ndim == theirs.ndim == 2:
            raise DataError(
                f"{names[0]} names {ours.shape[1]} classes at its output {name} and {names[1]} "
                f"{theirs.shape[1]}: they were trained on other class lists and do not compare"
            )
        raise DataError(
            f"{names[0]} returns {name} of shape {ours.shape} and {names[1]} of {theirs.shape} for "
            "the same inputs: outputs compare where their shapes are equal"
        )


def _not_finite(values: np.ndarray, rows: int) -> tuple[int, int]:
    """Return for how many rows there is a NaN, and for how many a NaN or infinity."""
    if values.dtype.kind not in "fc":
        return 0, 0
    found = []
    for strange in (np.isnan(values), ~np.isfinite(values)):
        by_row = values.ndim > 0 and len(values) == rows
        each = strange.reshape(rows, -1).any(axis=1) if by_row else np.full(rows, strange.any())
        found.append(int(each.sum()))
    return found[0], found[1]


def _listed(outputs: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {values.shape}" for name, values in outputs.items())


def _output_agreement(name: str, found: Agreement, *, confidence: float) -> OutputAgreement:
    """Return the figures of one output; a single logit names no class."""
    same = share_of(found.same, found.rows, confidence=confidence) if found.classes > 1 else None
    error = found.relative_error
    return OutputAgreement(
        name=name,
        relative_error=None if math.isinf(error) else error,
        cosine=found.cosine,
        same_top1=same,
    )


def _check_logits(logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> None:
    if logits.ndim != 2 or len(logits) != len(labels):
        raise ModelError(f"the network returned {logits.shape} logits for {len(labels)} images")
    classes = logits.shape[1]
    stray = labels[(labels < 0) | (labels >= classes)]
    if stray.size:
        raise DataError(
            f"label {stray[0]} has no class, the network has {classes}; "
            "was it trained on another class list?"
        )
