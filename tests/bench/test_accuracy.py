from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from bench.measuring.accuracy import compare, measure_accuracy
from compress.errors import DataError, ModelError


class Batch(NamedTuple):
    images: torch.Tensor | np.ndarray
    labels: torch.Tensor | np.ndarray
    skipped: int = 0


class Echo:
    """Its logits are the pixels of the first row, so that a test says what is predicted."""

    name = "ONNX Runtime (CPU)"

    def infer(self, images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        assert images.flags.c_contiguous
        return images[:, 0, 0, :]


def batch(scores: list[list[float]], labels: list[int], skipped: int = 0) -> Batch:
    images = torch.tensor(scores, dtype=torch.float32)[:, None, None, :]
    return Batch(images, torch.tensor(labels), skipped)


def one_hot(classes: list[int], width: int = 8) -> list[list[float]]:
    return np.eye(width)[classes].tolist()


def test_predictions_by_hand() -> None:
    falling = [8.0, 7, 6, 5, 4, 3, 2, 1]  # classes 0..4 are the five most likely
    found = measure_accuracy(
        Echo(), [batch([falling] * 3, [0, 4, 5], skipped=2), batch(one_hot([7]), [7], skipped=1)]
    )
    assert found.top1.tolist() == [0, 0, 0, 7]
    assert found.correct.tolist() == [True, False, False, True]
    assert found.top5_correct.tolist() == [True, True, False, True]
    assert found.labels.tolist() == [0, 4, 5, 7]
    assert (found.skipped, found.top1_share, found.top5_share) == (3, 0.5, 0.75)


def test_arrays_serve_as_well_as_tensors_and_splits_do_not_matter() -> None:
    scores, labels = np.random.default_rng(0).normal(size=(12, 8)), np.arange(12) % 8
    images = scores[:, None, None, :]
    whole = measure_accuracy(Echo(), [Batch(images, labels)])
    parts = measure_accuracy(
        Echo(), [Batch(images[i : i + 5], labels[i : i + 5]) for i in range(0, 12, 5)]
    )
    np.testing.assert_array_equal(whole.top1, np.argmax(scores, axis=1))
    np.testing.assert_array_equal(whole.top1, parts.top1)
    np.testing.assert_array_equal(whole.top5_correct, parts.top5_correct)


def test_fewer_than_five_classes() -> None:
    found = measure_accuracy(Echo(), [batch(one_hot([0, 1], width=3), [0, 2])])
    assert found.top5_correct.all()


def test_compare_counts_flips_and_predictions() -> None:
    labels = [0, 1, 2, 3]
    dense = measure_accuracy(Echo(), [batch(one_hot([0, 1, 2, 7]), labels)])
    pruned = measure_accuracy(Echo(), [batch(one_hot([0, 5, 2, 6]), labels)])
    found = compare(dense, pruned, 0.95)
    assert (found.drop.flips_to_wrong, found.drop.flips_to_right) == (1, 0)
    assert found.drop.drop_pp == 25.0
    assert found.drop.agreement == 0.75  # the last is wrong in both
    assert found.same_prediction == 0.5  # but wrong in different ways


def test_no_image_is_a_sentence() -> None:
    with pytest.raises(DataError, match="none of 4 validation images could be read"):
        measure_accuracy(Echo(), [Batch(np.empty((0, 1, 1, 8)), np.empty(0, dtype=int), 4)])
    with pytest.raises(DataError, match="none of 0"):
        measure_accuracy(Echo(), [])


@pytest.mark.parametrize("label", [8, -1])
def test_a_label_without_a_class_is_a_sentence(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} has no class, the network has 8"):
        measure_accuracy(Echo(), [batch(one_hot([0]), [label])])


def test_nan_logits_are_a_sentence() -> None:
    with pytest.raises(ModelError, match="not finite"):
        measure_accuracy(Echo(), [batch([[float("nan")] * 8], [0])])


def test_logits_of_another_shape_are_a_sentence() -> None:
    class Wrong(Echo):
        def infer(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((1, 8), dtype=np.float32)

    with pytest.raises(ModelError, match=r"\(1, 8\) logits for 2 images"):
        measure_accuracy(Wrong(), [batch(one_hot([0, 1]), [0, 1])])


def test_other_images_cannot_be_compared() -> None:
    dense = measure_accuracy(Echo(), [batch(one_hot([0, 1]), [0, 1])])
    pruned = measure_accuracy(Echo(), [batch(one_hot([0, 1]), [1, 0])])
    with pytest.raises(DataError, match="not the same ones in the same order"):
        compare(dense, pruned, 0.95)
