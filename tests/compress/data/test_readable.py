"""Figures of what is left of a data set that cannot be read are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from compress.config import RunConfig, load_config
from compress.data.datasets import load_data
from compress.data.readable import Readable, counted
from compress.errors import DataError
from compress.runs.loop import accuracy_of


def asked(max_skipped: float = 0.01) -> Readable:
    return Readable(400, np.array([200, 150, 0, 50]), ("cat", "dog", "emu", "owl"), max_skipped)


@pytest.mark.parametrize(
    ("skipped", "read", "share", "says"),
    [
        (0, [200, 150, 0, 50], 0.0, None),
        (4, [196, 150, 0, 50], 0.01, None),
        (5, [195, 150, 0, 50], 0.01, r"5 of 400 images .* data\.max_skipped = 0\.01 of them"),
        (1, [199, 150, 0, 50], 0.0, r"1 of 400"),
        (199, [1, 150, 0, 50], 0.5, None),
        (50, [200, 150, 0, 0], 1.0, r"not one image of class 'owl' could be read \(50 of 400"),
        (200, [200, 0, 0, 0], 1.0, "of class 'dog', 'owl' could"),
        (5, [], 0.01, "5 of 400"),
        (4, [], 0.01, None),
    ],
)
def test_what_must_be_readable(
    skipped: int, read: list[int], share: float, says: str | None
) -> None:
    found = np.array(read, dtype=np.int64)
    if says is None:
        asked(share).require(skipped, found)
    else:
        with pytest.raises(DataError, match=says):
            asked(share).require(skipped, found)


def test_labels_are_counted() -> None:
    assert counted(np.array([0, 2, 2, 7]), 4).tolist() == [1, 0, 2, 0]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of an image folder: 3 classes of 20 validation images, of which label and colour are one."""
    for half, count in (("train", 2), ("val", 20)):
        for label, name in enumerate(("cat", "dog", "owl")):
            folder = tmp_path / half / name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = tuple(250 * (band == label) for band in range(3))
                Image.new("RGB", (8, 8), colour).save(folder / f"{number}.png")
    settings = ["data.image_size=8", "data.augment=none", "data.eval_batch_size=7"]
    return load_config("image-folder", [*settings, f"data.root={tmp_path}", "data.workers=0"])


class Brightest(nn.Module):
    """Answers with the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.mean((2, 3))


def break_files(config: RunConfig, name: str, count: int) -> None:
    for path in sorted(Path(str(config.data.root)).glob(f"val/{name}/*.png"))[:count]:
        path.write_bytes(b"broken")


def share(config: RunConfig, max_skipped: float) -> RunConfig:
    data = config.data.model_copy(update={"max_skipped": max_skipped})
    return config.model_copy(update={"data": data})


def test_accuracy_of_a_whole_set(config: RunConfig) -> None:
    found = accuracy_of(Brightest(), load_data(config.data), config)
    assert (found.top1, found.images, found.skipped) == (100.0, 60, 0)


def test_accuracy_needs_all_but_a_share_of_the_images(config: RunConfig) -> None:
    break_files(config, "dog", 1)
    data = load_data(config.data)
    with pytest.raises(DataError, match=r"1 of 60 images could not be read, and data\.max_skipped"):
        accuracy_of(Brightest(), data, config)
    found = accuracy_of(Brightest(), data, share(config, 1 / 60))
    assert (found.top1, found.images, found.skipped) == (100.0, 59, 1)


def test_accuracy_needs_an_image_of_every_class(config: RunConfig) -> None:
    break_files(config, "dog", 19)
    assert accuracy_of(Brightest(), load_data(config.data), share(config, 1.0)).images == 41
    break_files(config, "dog", 20)
    with pytest.raises(DataError, match="not one image of class 'dog' could be read"):
        accuracy_of(Brightest(), load_data(config.data), share(config, 1.0))
