from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from compress.data.loading import Batch
from compress.errors import DataError, ModelError
from compress.training.evaluate import Accuracy, evaluate

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """The image is its own logits."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.9)
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(self.norm(x)).flatten(1)


def batch(logits: list[list[float]], labels: list[int], skipped: int = 0) -> Batch:
    images = torch.tensor(logits).reshape(len(labels), 1, 1, -1)
    return Batch(images, torch.tensor(labels, dtype=torch.int64), skipped)


# Seven classes; the order of the classes by logit is 6, 5, 4, 3, 2, 1, 0.
RISING = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_top1_and_top5_by_hand() -> None:
    first = batch([RISING, RISING, RISING], [6, 5, 2])  # right, second, fifth
    second = batch([RISING, RISING], [1, 0])  # sixth, seventh
    assert evaluate(Lookup(), [first, second], CPU) == Accuracy(20.0, 60.0, 5, 0)


def test_every_image_counts_once_however_they_are_batched() -> None:
    logits, labels = [RISING] * 6, [6, 6, 0, 3, 2, 6]
    whole = evaluate(Lookup(), [batch(logits, labels)], CPU)
    assert whole == Accuracy(50.0, 100 * 5 / 6, 6, 0)
    for cut in (1, 2, 5):
        parts = [batch(logits[:cut], labels[:cut]), batch(logits[cut:], labels[cut:])]
        assert evaluate(Lookup(), parts, CPU) == whole


def test_fewer_than_five_classes_are_all_in_the_top_five() -> None:
    found = evaluate(Lookup(), [batch([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], [2, 2])], CPU)
    assert (found.top1, found.top5) == (50.0, 100.0)


@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_what_is_not_finite_is_no_class(value: float, kind: str) -> None:
    """Of a row with NaN the NaN is the largest, so that it would be right by chance."""
    odd = [0.0, value, 2.0, 3.0, 4.0, 5.0, 6.0]
    batches = [batch([RISING, odd, odd], [6, 1, 1]), batch([odd, RISING], [1, 6])]
    with pytest.raises(ModelError, match=f"the network gives {kind} on 3 of 5 images"):
        evaluate(Lookup(), batches, CPU)
    both = batch([[math.nan, *RISING[1:]], [math.inf, *RISING[1:]]], [0, 0])
    with pytest.raises(ModelError, match="gives NaN or infinity on 2 of 2 images"):
        evaluate(Lookup(), [both], CPU)


def test_skipped_images_are_counted_and_do_not_weigh() -> None:
    empty = Batch(torch.empty(0, 1, 1, 7), torch.empty(0, dtype=torch.int64), 4)
    found = evaluate(Lookup(), [batch([RISING], [6], skipped=2), empty], CPU)
    assert found == Accuracy(100.0, 100.0, 1, 6)
    assert found.as_dict() == {"top1": 100.0, "top5": 100.0, "images": 1, "skipped": 6}


def test_no_readable_image_is_an_error_that_counts() -> None:
    empty = Batch(torch.empty(0, 1, 1, 7), torch.empty(0, dtype=torch.int64), 4)
    with pytest.raises(DataError, match="evaluation needs images, and none of 8 could be read"):
        evaluate(Lookup(), [empty, empty], CPU)


def test_evaluation_changes_nothing_and_draws_nothing() -> None:
    model = Lookup().train()
    model.norm.eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    evaluate(model, [batch([RISING, RISING], [6, 6])], CPU)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(1))


def test_modes_come_back_when_a_batch_raises() -> None:
    model = Lookup().train()
    model.noise.eval()

    def broken() -> Iterator[Batch]:
        assert not any(m.training for m in model.modules())
        yield batch([RISING], [6])
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        evaluate(model, broken(), CPU)
    assert [m.training for m in model.modules()] == [True, False, True]
