"""Logits among what a network returns, and networks that return none."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from compress.errors import ModelError
from compress.networks.outputs import PickOutput, require_logits

Named = namedtuple("Named", ["logits", "features"])
SIZE = (3, 4, 4)


@dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Wrapped(nn.Module):
    """A linear classifier that wraps its logits."""

    def __init__(self, wrap: Any, only_in: bool | None = None) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 5)
        self.wrap, self.only_in = wrap, only_in

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.fc(x.flatten(1))
        return logits if self.only_in not in (None, self.training) else self.wrap(logits)


def as_dict(logits: torch.Tensor) -> Any:
    return {"features": logits + 1, "logits": logits}


def as_named(logits: torch.Tensor) -> Any:
    return Named(logits, logits + 1)


def as_tuple(logits: torch.Tensor) -> Any:
    return logits + 1, logits


def as_plain(logits: torch.Tensor) -> Any:
    return logits


@pytest.mark.parametrize(
    ("wrap", "key"),
    [(as_dict, "logits"), (Answer, "logits"), (as_named, "logits"), (as_tuple, "1")],
)
def test_a_part_is_picked(wrap: Any, key: str) -> None:
    network = Wrapped(wrap)
    names = list(network.state_dict())
    with pytest.raises(ModelError, match=r"Wrapped returns .* say which part the logits are, as"):
        require_logits(network, SIZE, 5)
    network.register_forward_hook(PickOutput(key))
    require_logits(network, SIZE, 5)
    images = torch.randn(2, *SIZE)
    expected = network.fc(images.flatten(1))
    for same in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(same(images), expected)
    assert list(network.state_dict()) == names


def test_a_tensor_passes() -> None:
    network = Wrapped(as_plain)
    network.register_forward_hook(PickOutput("logits"))
    require_logits(network, SIZE, 5)


@pytest.mark.parametrize("training", [False, True])
def test_either_mode_is_tried(training: bool) -> None:
    mode = "training" if training else "evaluation"
    with pytest.raises(ModelError, match=rf"returns Named\(logits, features\) in {mode}"):
        require_logits(Wrapped(as_named, only_in=training), SIZE, 5)


def test_a_part_that_is_not_there() -> None:
    network = Wrapped(as_dict)
    network.register_forward_hook(PickOutput("out"))
    with pytest.raises(ModelError, match=r"'out' is no tensor in .*, dict\(features, logits\)"):
        require_logits(network, SIZE, 5)


@pytest.mark.parametrize(
    ("wrap", "classes", "message"),
    [
        (lambda logits: [{}], 5, r"returns list\(0\) in evaluation, and .* of logits$"),
        (lambda logits: "a cat", 5, r"returns str\(\) in evaluation"),
        (lambda logits: logits[:, :, None], 5, "a tensor of 2x5x1 for 2 images in evaluation"),
        (lambda logits: logits.mean(0), 5, "a tensor of 5 for 2 images"),
        (as_plain, 6, "returns 5 logits for each image and the data has 6 classes"),
    ],
)
def test_no_row_of_logits_for_each_image(wrap: Any, classes: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        require_logits(Wrapped(wrap), SIZE, classes)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="does not accept images of size 3x5x5: RuntimeError: "):
        require_logits(Wrapped(as_plain), (3, 5, 5), 5)


class AlwaysDropped(nn.Module):
    """Dropout that no mode turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(x.flatten(1)))


class OfTheBatch(nn.Module):
    """BatchNorm that has no statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.head = nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).flatten(1))


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (AlwaysDropped, "AlwaysDropped gives other logits for the same images.*F.dropout"),
        (OfTheBatch, "OfTheBatch gives other logits for an image alone.*track_running_stats"),
    ],
)
def test_an_answer_that_is_not_the_image_s_own(network: type[nn.Module], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        require_logits(network(), (3, 4, 4), 3)
