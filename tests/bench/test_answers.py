from __future__ import annotations

import numpy as np
import pytest

from bench.measuring.answers import Predictions, Tally, compare_predictions
from compress.errors import DataError, ModelError


def told(*batches: tuple[np.ndarray, list[int]], skipped: int = 0) -> Predictions:
    """Return what a network that gives these logits says of images with these labels."""
    tally = Tally()
    for logits, labels in batches:
        tally.add(np.asarray(logits, dtype=np.float32), np.asarray(labels))
    return tally.predictions(skipped)


def one_hot(classes: list[int], width: int = 8) -> np.ndarray:
    return np.eye(width)[classes]


def test_predictions_by_hand() -> None:
    falling = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])  # classes 0..4 are the five most likely
    found = told((np.tile(falling, (3, 1)), [0, 4, 5]), (one_hot([7]), [7]), skipped=3)
    assert found.top1.tolist() == [0, 0, 0, 7]
    assert found.correct.tolist() == [True, False, False, True]
    assert found.top5_correct.tolist() == [True, True, False, True]
    assert found.labels.tolist() == [0, 4, 5, 7]
    assert (found.skipped, found.top1_share, found.top5_share) == (3, 0.5, 0.75)


def test_splits_do_not_matter() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(12, 8)), list(np.arange(12) % 8)
    whole = told((logits, labels))
    parts = told(*((logits[i : i + 5], labels[i : i + 5]) for i in range(0, 12, 5)))
    np.testing.assert_array_equal(whole.top1, np.argmax(logits, axis=1))
    np.testing.assert_array_equal(whole.top1, parts.top1)
    np.testing.assert_array_equal(whole.top5_correct, parts.top5_correct)


def test_fewer_than_five_classes() -> None:
    assert told((one_hot([0, 1], width=3), [0, 2])).top5_correct.all()


def test_compare_counts_flips_and_predictions() -> None:
    labels = [0, 1, 2, 3]
    dense = told((one_hot([0, 1, 2, 7]), labels))
    pruned = told((one_hot([0, 5, 2, 6]), labels))
    found = compare_predictions(dense, pruned, 0.95)
    assert (found.drop.flips_to_wrong, found.drop.flips_to_right) == (1, 0)
    assert found.drop.drop_pp == 25.0
    assert found.drop.agreement == 0.75  # the last is wrong in both
    assert found.same_prediction == 0.5  # but wrong in different ways


@pytest.mark.parametrize("label", [8, -1])
def test_a_label_without_a_class_is_a_sentence(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} has no class, the network has 8"):
        told((one_hot([0]), [label]))


def test_logits_of_another_shape_are_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"\(1, 8\) logits for 2 images"):
        told((np.zeros((1, 8)), [0, 1]))


def test_other_images_cannot_be_compared() -> None:
    dense, pruned = (told((one_hot([0, 1]), labels)) for labels in ([0, 1], [1, 0]))
    with pytest.raises(DataError, match="not the same ones in the same order"):
        compare_predictions(dense, pruned, 0.95)
