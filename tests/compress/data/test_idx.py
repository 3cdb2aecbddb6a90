"""MNIST, Fashion-MNIST and what was made like them, from idx files."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import NAMES, idx_bytes, noise, write_idx
from torchvision import datasets

from compress.config import DataConfig
from compress.data import datasets as known
from compress.data.batches import ImageData, TrainBatches, eval_batches
from compress.data.datasets import load_data
from compress.errors import ConfigError, DataError

FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
READERS = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}


def opened(root: Path | None, dataset: str = "fashion-mnist", **keys) -> ImageData:
    return load_data(DataConfig(dataset=dataset, root=root, **{"image_size": 28, **keys}))


def refusal(root: Path | None, dataset: str = "fashion-mnist", **keys) -> str:
    with pytest.raises(DataError) as caught:
        opened(root, dataset, **keys)
    return str(caught.value)


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", FOLDERS)
def test_what_torchvision_reads(dataset: str, tmp_path: Path) -> None:
    write_idx(tmp_path / FOLDERS[dataset])
    data = opened(tmp_path, dataset)
    for half, train in ((data.train, True), (data.val, False)):
        expected = READERS[dataset](tmp_path, train=train)
        assert torch.equal(half.images[:, 0], expected.data)
        assert torch.equal(half.labels, expected.targets)
    assert data.classes == tuple(READERS[dataset].classes)


@pytest.mark.parametrize("dataset", FOLDERS)
def test_identity_is_that_of_earlier_releases(dataset: str, tmp_path: Path) -> None:
    write_idx(tmp_path / FOLDERS[dataset])
    source = READERS[dataset](tmp_path, train=False)
    digest = hashlib.sha256(b"(5, 1, 28, 28) torch.uint8")
    digest.update(source.data.numpy().tobytes() + source.targets.numpy().tobytes())
    assert opened(tmp_path, dataset).identity == digest.hexdigest()


@pytest.mark.parametrize(
    ("dataset", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)]
)
def test_pixels_are_normalised_by_the_usual_constants(
    dataset: str, mean: float, std: float, tmp_path: Path
) -> None:
    write_idx(tmp_path)
    data = opened(tmp_path, dataset)
    (batch,) = eval_batches(data.val, batch_size=5)
    expected = (torch.from_numpy(noise(5, 28, 28, seed=1)).float() / 255 - mean) / std
    torch.testing.assert_close(batch.images, expected.unsqueeze(1))
    assert batch.labels.tolist() == [0, 1, 2, 3, 4]
    assert (data.num_classes, data.input_size, len(data.train)) == (10, (1, 28, 28), 12)


def test_images_are_resized_to_32_by_default(tmp_path: Path) -> None:
    write_idx(tmp_path)
    data = opened(tmp_path, "mnist", image_size=None)
    image, _ = data.val[2]
    raw = torch.from_numpy(noise(5, 28, 28, seed=1)[2]).float().view(1, 1, 28, 28)
    expected = torch.nn.functional.interpolate(raw, (32, 32), mode="bilinear", antialias=True)[0]
    # The image is rounded to uint8 before it is scaled.
    difference = (image * 0.3081 + 0.1307) * 255 - expected
    assert difference.abs().max() < 1.01
    assert data.input_size == (1, 32, 32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_files_are_found_packed_or_not(packed: bool, place: str, tmp_path: Path) -> None:
    write_idx(tmp_path / "expected")
    write_idx(tmp_path / "found" / place, packed=packed)
    data, expected = opened(tmp_path / "found"), opened(tmp_path / "expected")
    assert data.identity == expected.identity
    assert torch.equal(data.train.images, expected.train.images)


def test_files_of_the_other_spelling_are_found(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=True)
    expected = opened(tmp_path).identity
    for name in NAMES:
        (tmp_path / f"{name}.gz").rename(tmp_path / f"{name.replace('-idx', '.idx')}.gz")
    assert opened(tmp_path).identity == expected


def test_whether_a_file_is_packed_is_not_told_by_its_name(tmp_path: Path) -> None:
    write_idx(tmp_path)
    expected = opened(tmp_path).identity
    plain = (tmp_path / NAMES[2]).read_bytes()
    (tmp_path / NAMES[2]).write_bytes(gzip.compress(plain))
    (tmp_path / NAMES[3]).rename(tmp_path / f"{NAMES[3]}.gz")
    assert opened(tmp_path).identity == expected


def test_the_folder_with_all_files_is_read(tmp_path: Path) -> None:
    write_idx(tmp_path / FOLDERS["fashion-mnist"])
    (tmp_path / NAMES[0]).write_bytes(b"left over")
    assert len(opened(tmp_path).train) == 12


def test_debians_package_is_found_without_a_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = known._GREY["fashion-mnist"]
    assert said.installed == Path("/usr/share/datasets/fashion-mnist")
    installed = tmp_path / "usr"
    monkeypatch.setitem(known._GREY, "fashion-mnist", said._replace(installed=installed))
    sentence = refusal(None)
    assert "data.root is not set" in sentence
    assert "Debian's package dataset-fashion-mnist" in sentence
    write_idx(installed, packed=True)
    write_idx(tmp_path / "own", test=(noise(3, 28, 28), np.arange(3, dtype=np.uint8)))
    assert len(opened(None).val) == 5
    assert len(opened(tmp_path / "own").val) == 3
    assert "Debian" not in refusal(None, "mnist")


def test_grey_images_for_a_network_of_three_channels(tmp_path: Path) -> None:
    write_idx(tmp_path)
    plain, data = opened(tmp_path), opened(tmp_path, channels=3)
    assert data.input_size == (3, 28, 28)
    assert (data.mean, data.std) == ((0.2860,) * 3, (0.3530,) * 3)
    assert data.identity == plain.identity
    one, three = (
        next(TrainBatches(d, batch_size=12, seed=0).epoch(0)).images for d in (plain, data)
    )
    assert torch.equal(three, one.expand(-1, 3, -1, -1))
    own = opened(tmp_path, channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(
        own.val[0][0], (plain.val[0][0] * 0.3530 + 0.2860) - torch.tensor(own.mean).view(3, 1, 1)
    )


def test_coloured_images_are_not_made_grey(tmp_path: Path) -> None:
    for half in ("train", "val"):
        (tmp_path / half / "cat").mkdir(parents=True)
        (tmp_path / half / "cat" / "0.png").touch()
    config = DataConfig(dataset="imagefolder", root=tmp_path, channels=1)
    with pytest.raises(
        ConfigError, match=r"data\.channels = 1 and the images of imagefolder have 3"
    ):
        load_data(config)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", FOLDERS)
def test_a_folder_without_such_files(dataset: str, tmp_path: Path) -> None:
    sentence = refusal(tmp_path, dataset)
    assert str(tmp_path / FOLDERS[dataset]) in sentence
    assert "data.download=true" in sentence
    assert "does not exist" in refusal(tmp_path / "nowhere", dataset)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / name).unlink()
    assert f"{tmp_path} has no {name}" in refusal(tmp_path)


GOOD = {name: idx_bytes(noise(5, *(28, 28) * ("images" in name)) % 10) for name in NAMES}
HUGE = b"\xff\xff\xff\xff"
DAMAGE = {
    "empty": (lambda good: b"", "begins with nothing and not with 0000080"),
    "no idx": (lambda good: b"not an idx file", "begins with 6e6f7420 and not with 0000080"),
    "of floats": (lambda good: good[:2] + b"\x0d" + good[3:], r"begins with 00000d0\d"),
    "of other dimensions": (lambda good: good[:3] + b"\x02" + good[4:], "begins with 00000802"),
    "cut in its head": (lambda good: good[:6], "is cut short in its first bytes"),
    "cut": (lambda good: good[:-1], "is cut short: it says that it holds 5"),
    "longer": (lambda good: good + b"\0", "goes on after the 5"),
    "of nothing": (lambda good: good[:4] + bytes(4) + good[8:], "holds 0"),
    "of four billion": (lambda good: good[:4] + HUGE + good[8:], "holds 4294967295"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_named(name: str, damage: str, packed: bool, tmp_path: Path) -> None:
    write_idx(tmp_path)
    change, phrase = DAMAGE[damage]
    content = change(GOOD[name])
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=phrase) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda packed: packed[:-9], "it is cut short"),
        (lambda packed: packed[:20], "it is cut short"),
        (lambda packed: packed[:-8] + b"\0\0\0\0" + packed[-4:], "CRC check failed"),
        (lambda packed: packed + b"more", "Not a gzipped file"),
        (lambda packed: packed[:10] + b"\xff" * 20 + packed[30:], "Error -3|invalid"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_packed_file_is_named(name: str, change, phrase: str, tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(change(gzip.compress(GOOD[name])))
    with pytest.raises(DataError, match=rf"cannot be unpacked \(.*({phrase})") as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(("half", "name"), [("train", NAMES[0]), ("test", NAMES[2])])
def test_images_without_a_label_each(half: str, name: str, tmp_path: Path) -> None:
    write_idx(tmp_path, **{half: (noise(5, 28, 28), np.arange(3, dtype=np.uint8))})
    sentence = refusal(tmp_path)
    assert sentence.startswith(f"{tmp_path / name} has 5 images and {name.split('-')[0]}-labels")
    assert "3 labels" in sentence


def test_halves_of_other_sizes(tmp_path: Path) -> None:
    write_idx(tmp_path, test=(noise(5, 28, 20), np.arange(5, dtype=np.uint8)))
    assert "28 x 28 pixels and the test images 28 x 20" in refusal(tmp_path)


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    write_idx(tmp_path, test=(noise(5, 28, 28), np.array([0, 9, 10, 200, 1], dtype=np.uint8)))
    sentence = refusal(tmp_path)
    assert f"{tmp_path / NAMES[3]} says that image 2 is of class 10" in sentence


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nonsense_is_read_or_refused(name: str, packed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_idx(tmp_path, train=(noise(5, 28, 28), np.arange(5, dtype=np.uint8)))
    content = gzip.compress(GOOD[name]) if packed else GOOD[name]
    refused = 0
    for _ in range(40):
        bad = np.frombuffer(content, dtype=np.uint8).copy()
        bad[rng.integers(0, min(len(bad), 64), 3)] = rng.integers(0, 256, 3)
        whole = rng.random() < 0.5
        (tmp_path / name).write_bytes(bad[: None if whole else rng.integers(len(bad))].tobytes())
        said = sentence_or_none(tmp_path)
        assert said is None or name in said
        refused += said is not None
    assert refused >= 20


def sentence_or_none(root: Path) -> str | None:
    try:
        opened(root)
    except DataError as error:
        return str(error)
    return None


# ---- downloads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_missing_is_downloaded_where_that_is_allowed(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(self: datasets.FashionMNIST) -> None:
        write_idx(Path(self.raw_folder))

    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    if begun:
        raw = tmp_path / FOLDERS["fashion-mnist"]
        raw.mkdir(parents=True)
        (raw / NAMES[0]).write_bytes(b"")
    assert len(opened(tmp_path, download=True).train) == 12


def test_what_is_there_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: datasets.FashionMNIST) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(datasets.FashionMNIST, "download", refuse)
    write_idx(tmp_path, packed=True)
    assert len(opened(tmp_path, download=True).train) == 12
