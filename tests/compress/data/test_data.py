import hashlib
import logging
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from idx_files import noise, write_idx
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import compress.data.loading
from compress.config import DataConfig
from compress.data.batches import ImageData, TrainBatches, eval_batches, require_images
from compress.data.datasets import load_data
from compress.data.imagefolder import FileList, scan
from compress.data.loading import Batch, TensorImages
from compress.data.views import View
from compress.errors import ConfigError, DataError

# Newer Pythons warn about worker processes, which does not matter to these tests.
with_workers = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
WORKERS = [0, pytest.param(2, marks=with_workers)]

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(DataConfig())


def save_image(path: Path, *, seed: int, height: int = 24, width: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, 3, seed=seed)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 2 classes, 5 + 5 training and 3 + 3 validation images."""
    root = tmp_path / "images"
    for half, count in (("train", 5), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                suffix = ".jpg" if number % 2 else ".png"
                path = root / half / name / f"{number}{suffix}"
                save_image(path, seed=100 * label + number + len(half))
    return root


def folder_config(root: Path, **keys) -> DataConfig:
    return DataConfig(dataset="imagefolder", root=root, **{"image_size": 16, **keys})


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.skipped == other.skipped


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


# ---- digits ------------------------------------------------------------------------------------


def test_digits_split_is_stratified_disjoint_and_complete(digits):
    source = load_digits()
    rows = torch.cat([digits.train.images, digits.val.images]).flatten(1) * 16
    labels = torch.cat([digits.train.labels, digits.val.labels])
    found = sorted(zip(labels.tolist(), map(tuple, rows.tolist()), strict=True))
    assert found == sorted(zip(source.target.tolist(), map(tuple, source.data), strict=True))
    assert (len(digits.train), len(digits.val)) == (1198, 599)
    whole = np.bincount(source.target)
    assert np.abs(np.bincount(digits.train.labels) - whole * 2 / 3).max() <= 1


def test_digits_split_never_changes(digits):
    torch.manual_seed(7)
    np.random.seed(7)
    other = load_data(DataConfig())
    assert torch.equal(other.val.images, digits.val.images)
    assert other.identity == digits.identity
    # Accuracy is comparable between releases only while this holds.
    assert digits.identity == "5273c2091c70c4ac9546259ca969ddadcf32cfdfcbbb100c34afc26c2bfac415"


def test_digits_describes_itself(digits):
    assert digits.classes == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.input_size == (1, 32, 32)


@pytest.mark.parametrize("size", [32, 40])
def test_digits_moments_are_those_of_the_training_images(size):
    data = load_data(DataConfig(image_size=size))
    images, _ = joined(eval_batches(data.train, batch_size=256))
    assert images.shape == (1198, 1, size, size)
    assert images.dtype == torch.float32
    assert abs(images.mean().item()) < 1e-3
    assert abs(images.std().item() - 1) < 1e-3


def test_digits_are_upsampled_bilinearly(digits):
    image, label = digits.val[5]
    raw = digits.val.images[5:6]
    expected = torch.nn.functional.interpolate(raw, (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(image * digits.std[0] + digits.mean[0], expected)
    assert label == digits.val.labels[5].item()


def test_identity_follows_the_validation_pixels_and_labels(tmp_path):
    def identity(pixels: np.ndarray, labels: np.ndarray) -> str:
        write_idx(tmp_path, test=(pixels, labels))
        return load_data(DataConfig(dataset="mnist", root=tmp_path)).identity

    pixels, labels = noise(6, 28, 28), np.arange(6, dtype=np.uint8)
    changed = pixels.copy()
    changed[0, 0, 0] ^= 1
    assert identity(pixels, labels) == identity(pixels, labels)
    variants = [(pixels, labels), (changed, labels), (pixels, labels[::-1])]
    assert len({identity(*variant) for variant in variants}) == 3


# ---- order, augmentation, resumption -----------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("augment", ["crop-flip", "imagenet"])
def test_an_epoch_is_the_same_with_workers_and_when_resumed(augment, workers):
    data = load_data(DataConfig(augment=augment))
    whole = list(TrainBatches(data, batch_size=200, seed=3).epoch(2))
    batches = TrainBatches(data, batch_size=200, seed=3, workers=workers)
    assert_same(list(batches.epoch(2)), whole)
    assert_same(list(batches.epoch(2, start=3)), whole[3:])
    assert list(batches.epoch(2, start=len(batches))) == []


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("augment", ["crop", "imagenet"])
def test_image_folder_resumes_without_decoding_again(folder, monkeypatch, augment, workers):
    data = load_data(folder_config(folder, augment=augment))
    batches = TrainBatches(data, batch_size=4, seed=1, workers=workers)
    whole = list(TrainBatches(data, batch_size=4, seed=1).epoch(0))
    assert_same(list(batches.epoch(0)), whole)
    log = folder / "decoded"
    read_rgb = compress.data.loading.read_rgb

    def logged(path: str) -> Image.Image:
        with log.open("a") as file:
            file.write(path + "\n")
        return read_rgb(path)

    monkeypatch.setattr(compress.data.loading, "read_rgb", logged)
    batches.close()  # workers know the function that they were started with
    assert_same(list(batches.epoch(0, start=1)), whole[1:])
    assert len(log.read_text().splitlines()) == 4


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("augment", ["crop-flip", "imagenet"])
def test_global_generators_are_neither_used_nor_disturbed(augment, workers):
    data = load_data(DataConfig(augment=augment))
    batches = TrainBatches(data, batch_size=400, seed=0, workers=workers)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        runs.append(list(batches.epoch(0)))
        list(eval_batches(data.val, batch_size=300, workers=workers))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
        assert random.getstate() == before[2]
    assert_same(*runs)


def test_generator_is_restored_between_batches():
    batches = TrainBatches(load_data(DataConfig(augment="imagenet")), batch_size=100, seed=0)
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    drawn = [torch.rand(1) for _, _ in zip(range(3), batches.epoch(0), strict=False)]
    assert torch.equal(torch.cat(drawn), undisturbed)


@pytest.mark.parametrize("augment", ["crop-flip", "imagenet"])
def test_images_do_not_depend_on_the_batch_size(augment):
    data = load_data(DataConfig(augment=augment))
    small, large = (
        joined(TrainBatches(data, batch_size=size, seed=0).epoch(0)) for size in (100, 200)
    )
    torch.testing.assert_close(small[0][:1000], large[0])
    assert torch.equal(small[1][:1000], large[1])


def test_epochs_and_seeds_differ(digits):
    def first(seed: int, epoch: int) -> Batch:
        return next(TrainBatches(digits, batch_size=64, seed=seed).epoch(epoch))

    reference = first(0, 0)
    for other in (first(0, 1), first(1, 0)):
        assert not torch.equal(reference.labels, other.labels)


class Numbers(Dataset):
    """Image i is the number i, so that batches show what was asked of the set."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), float(index)), index


def as_data(train: Dataset, val: Dataset | None = None) -> ImageData:
    return ImageData(train, val or train, ("a", "b"), (1, 8, 8), (0.0,), (1.0,), "")


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(0, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**31 - 1),
    epoch=st.integers(0, 500),
    start=st.integers(0, 45),
)
def test_an_epoch_is_a_permutation_cut_into_batches(count, batch_size, seed, epoch, start):
    batches = TrainBatches(as_data(Numbers(count)), batch_size=batch_size, seed=seed)
    found = [batch.labels.tolist() for batch in batches.epoch(epoch)]
    expected = count // batch_size if count >= batch_size else min(count, 1)
    assert len(batches) == len(found) == expected
    flat = [index for batch in found for index in batch]
    assert len(set(flat)) == len(flat) == min(count, batch_size * max(count // batch_size, 1))
    resumed = [batch.labels.tolist() for batch in batches.epoch(epoch, start=start)]
    assert resumed == found[start:]
    short = TrainBatches(as_data(Numbers(count)), batch_size=batch_size, seed=seed, limit=3)
    assert len(short) == min(expected, 3)
    limited = [batch.labels.tolist() for batch in short.epoch(epoch, start=start)]
    assert limited == found[start:3]
    everything = [batch.labels.tolist() for batch in eval_batches(Numbers(count), batch_size=7)]
    assert [index for batch in everything for index in batch] == list(range(count))


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 60),
    batch_size=st.integers(1, 30),
    ranks=st.integers(1, 8),
    epoch=st.integers(0, 5),
    start=st.integers(0, 4),
)
def test_ranks_read_the_batches_of_one_process(count, batch_size, ranks, epoch, start):
    assume(batch_size >= ranks and (count == 0 or count >= ranks))
    data = as_data(Numbers(count))
    alone = TrainBatches(data, batch_size=batch_size, seed=4)
    shared = [
        TrainBatches(data, batch_size=batch_size, seed=4, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    assert {len(batches) for batches in shared} == {len(alone)}
    # Position r::ranks of each batch, whatever the number of ranks when the epoch was begun.
    for rank, batches in enumerate(shared):
        expected = [b.labels[rank::ranks].tolist() for b in alone.epoch(epoch, start=start)]
        found = [b.labels.tolist() for b in batches.epoch(epoch, start=start)]
        assert found == expected
        assert all(found)
    parts = [
        [b.labels.tolist() for b in eval_batches(Numbers(count), batch_size=7, rank=r, ranks=ranks)]
        for r in range(ranks)
    ]
    whole = [batch.labels.tolist() for batch in eval_batches(Numbers(count), batch_size=7)]
    assert [whole[r::ranks] for r in range(ranks)] == parts


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("augment", ["crop-flip", "imagenet"])
def test_ranks_see_the_pixels_of_one_process(augment, workers):
    data = load_data(DataConfig(augment=augment))
    alone = list(TrainBatches(data, batch_size=250, seed=3).epoch(2))
    for rank in range(3):
        batches = TrainBatches(data, batch_size=250, seed=3, workers=workers, rank=rank, ranks=3)
        for part, whole in zip(batches.epoch(2), alone, strict=True):
            assert torch.equal(part.images, whole.images[rank::3])
            assert torch.equal(part.labels, whole.labels[rank::3])


def test_ranks_without_an_image_each_are_refused():
    with pytest.raises(ConfigError, match=r"data\.batch_size = 3 .* all 4 ranks"):
        TrainBatches(as_data(Numbers(10)), batch_size=3, seed=0, ranks=4)
    with pytest.raises(DataError, match="the 3 training images cannot be shared by 4 ranks"):
        TrainBatches(as_data(Numbers(3)), batch_size=8, seed=0, ranks=4)


class Jittered(Numbers):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(1, 2, 2), index


@pytest.mark.parametrize("workers", WORKERS)
def test_a_data_set_of_the_users_own_is_seeded_too(workers):
    data = as_data(Jittered(12))
    reference = list(TrainBatches(data, batch_size=4, seed=0).epoch(1))
    batches = TrainBatches(data, batch_size=4, seed=0, workers=workers)
    assert_same(list(batches.epoch(1, start=1)), reference[1:])
    images, _ = joined(reference)
    assert len(images.unique(dim=0)) == 12


def shifts(image: torch.Tensor, padding: int, *, flips: bool) -> dict[tuple, torch.Tensor]:
    """Every crop of a padded image (C, S, S), by (top, left, flipped)."""
    size = image.shape[-1]
    canvas = torch.zeros(len(image), size + 2 * padding, size + 2 * padding)
    canvas[:, padding : padding + size, padding : padding + size] = image
    result = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = canvas[:, top : top + size, left : left + size]
            result[top, left, False] = crop
            if flips:
                result[top, left, True] = crop.flip(2)
    return result


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_crops_are_uniform_over_padded_and_flipped_images(augment):
    images = torch.from_numpy(noise(300, 2, 8, 8))
    view = View(8, augment, (0.0, 0.0), (1.0, 1.0))
    data = as_data(TensorImages(images, torch.arange(300), view))
    seen: dict[tuple, int] = {}
    for batch in TrainBatches(data, batch_size=100, seed=0).epoch(0):
        for image, label in zip(batch.images, batch.labels, strict=True):
            options = shifts(images[label], 1, flips=augment == "crop-flip")
            matches = [
                key for key, crop in options.items() if torch.equal(crop, (image * 255).round())
            ]
            assert len(matches) == 1
            seen[matches[0]] = seen.get(matches[0], 0) + 1
    kinds = 18 if augment == "crop-flip" else 9
    assert len(seen) == kinds
    # Five standard deviations of a uniform count, and of the share of flips.
    expected = 300 / kinds
    assert all(abs(count - expected) < 5 * expected**0.5 for count in seen.values())
    flips = sum(count for (_, _, flipped), count in seen.items() if flipped)
    assert flips == 0 if augment == "crop" else abs(flips - 150) < 5 * 75**0.5


def test_augmentation_none_leaves_training_images_alone():
    data = load_data(DataConfig(augment="none"))
    order, labels = joined(TrainBatches(data, batch_size=1198, seed=0).epoch(0))
    images, _ = joined(eval_batches(data.train, batch_size=400))
    # Order apart, both hold the same images.
    sums = sorted(order.double().sum((1, 2, 3)).tolist())
    assert sums == pytest.approx(sorted(images.double().sum((1, 2, 3)).tolist()))
    assert not torch.equal(labels, data.train.labels)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", "crop"),
        ("mnist", "crop"),
        ("fashion-mnist", "crop-flip"),
        ("cifar10", "crop-flip"),
        ("cifar100", "crop-flip"),
    ],
)
def test_auto_augmentation(dataset, expected, tmp_path, monkeypatch):
    write_idx(tmp_path)
    write_cifar(tmp_path, monkeypatch, "cifar10")
    write_cifar(tmp_path, monkeypatch, "cifar100")
    data = load_data(DataConfig(dataset=dataset, root=tmp_path))
    same = load_data(DataConfig(dataset=dataset, root=tmp_path, augment=expected))
    none = load_data(DataConfig(dataset=dataset, root=tmp_path, augment="none"))
    first, expectation, plain = (
        list(TrainBatches(each, batch_size=6, seed=0).epoch(0)) for each in (data, same, none)
    )
    assert_same(first, expectation)
    assert not torch.equal(first[0].images, plain[0].images)


def test_auto_augmentation_of_an_image_folder(folder):
    data, same = (load_data(folder_config(folder, augment=a)) for a in ("auto", "imagenet"))
    assert_same(*(list(TrainBatches(d, batch_size=5, seed=0).epoch(0)) for d in (data, same)))


@pytest.mark.parametrize("workers", WORKERS)
def test_evaluation_reads_everything_in_order(digits, workers):
    found = list(eval_batches(digits.val, batch_size=256, workers=workers))
    assert [len(batch.labels) for batch in found] == [256, 256, 87]
    images, labels = joined(found)
    assert torch.equal(labels, digits.val.labels)
    assert labels.dtype == torch.int64
    assert torch.equal(images[300], digits.val[300][0])
    assert not any(batch.skipped for batch in found)


def test_image_sets_serve_torch_data_loaders(digits):
    images, labels = next(iter(DataLoader(digits.val, batch_size=8)))
    expected = next(eval_batches(digits.val, batch_size=8))
    torch.testing.assert_close(images, expected.images)
    assert torch.equal(labels, expected.labels)
    assert digits.val[-1][1] == digits.val.labels[-1].item()
    with pytest.raises(IndexError):
        digits.val[599]


def test_ready_made_tensors_are_passed_through():
    images, labels = torch.randn(10, 3, 4, 4), torch.arange(10)
    found, found_labels = joined(eval_batches(TensorDataset(images, labels), batch_size=4))
    assert torch.equal(found, images)
    assert torch.equal(found_labels, labels)


# ---- CIFAR ---------------------------------------------------------------------------------------


def write_cifar(root: Path, monkeypatch, name: str) -> None:
    """Write small CIFAR batches, and have torchvision expect their checksums."""
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    base = root / reader.base_folder
    base.mkdir(parents=True)

    def write(file: str, document: dict) -> str:
        (base / file).write_bytes(pickle.dumps(document))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = [
            [file, write(file, {"data": noise(4, 3072, seed=number), key: [3, 1, 0, 2]})]
            for number, (file, _) in enumerate(getattr(reader, attribute))
        ]
        monkeypatch.setattr(reader, attribute, files)
    names = [f"class {number}" for number in range(10 if name == "cifar10" else 100)]
    md5 = write(reader.meta["filename"], {reader.meta["key"]: names})
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5})


@pytest.mark.parametrize(("name", "classes", "train"), [("cifar10", 10, 20), ("cifar100", 100, 4)])
def test_cifar_is_read_from_its_batches(name, classes, train, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, name)
    data = load_data(DataConfig(dataset=name, root=tmp_path))
    assert (len(data.train), len(data.val)) == (train, 4)
    assert data.num_classes == classes
    assert data.classes[1] == "class 1"
    assert data.input_size == (3, 32, 32)
    images, labels = joined(eval_batches(data.val, batch_size=4))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    planes = torch.from_numpy(noise(4, 3072)).view(4, 3, 32, 32)
    torch.testing.assert_close(images * std + mean, planes / 255)
    assert labels.tolist() == [3, 1, 0, 2]


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar_file_that_was_tampered_with_is_never_unpickled(file, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    marker = tmp_path / "executed"
    path = tmp_path / datasets.CIFAR10.base_folder / file
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DataError, match="missing or damaged"):
        load_data(DataConfig(dataset="cifar10", root=tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_an_absent_data_set_says_how_to_get_it(dataset, tmp_path):
    with pytest.raises(DataError, match=r"data\.download=true") as caught:
        load_data(DataConfig(dataset=dataset, root=tmp_path))
    assert dataset in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.__cause__ is not None
    with pytest.raises(DataError, match=r"does not exist.*data\.download=true"):
        load_data(DataConfig(dataset=dataset, root=tmp_path / "nowhere"))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("Error downloading")])
def test_a_failed_download_is_a_data_error(error, tmp_path, monkeypatch):
    def fail(self) -> None:
        raise error

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    config = DataConfig(dataset="cifar10", root=tmp_path / "new", download=True)
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        load_data(config)
    assert caught.value.__cause__ is error


# ---- image folders -----------------------------------------------------------------------------


def test_image_folder_is_listed_but_not_decoded(folder, monkeypatch):
    def refuse(path: str) -> Image.Image:
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(compress.data.loading, "read_rgb", refuse)
    data = load_data(folder_config(folder, image_size=None))
    assert (len(data.train), len(data.val)) == (10, 6)
    assert data.classes == ("cat", "dog")
    assert data.input_size == (3, 224, 224)
    assert TrainBatches(data, batch_size=4, seed=0).epoch(0) is not None


def normalised(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - IMAGENET_MEAN) / IMAGENET_STD


@pytest.mark.parametrize("augment", ["imagenet", "crop", "none"])
def test_evaluation_geometry(folder, augment):
    path = folder / "val" / "cat" / "0.png"
    save_image(path, seed=5, height=200, width=300)
    data = load_data(folder_config(folder, augment=augment, image_size=64))
    source = Image.open(path).convert("RGB")
    if augment == "imagenet":
        # 64 * 256 / 224 = 73.1 on the shorter side, then the middle 64 x 64.
        left, top = round((109 - 64) / 2), round((73 - 64) / 2)
        resized = source.resize((int(73 * 300 / 200), 73), Image.Resampling.BILINEAR)
        expected = resized.crop((left, top, left + 64, top + 64))
    else:
        expected = source.resize((64, 64), Image.Resampling.BILINEAR)
    torch.testing.assert_close(data.val[0][0], normalised(expected))
    trained = next(TrainBatches(data, batch_size=10, seed=0).epoch(0))
    assert trained.images.shape == (10, 3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(folder, mode):
    suffix = ".tif" if mode == "CMYK" else ".png"
    path = folder / "val" / "cat" / f"00{suffix}"
    image = Image.fromarray(noise(16, 16, 3)).convert(mode)
    image.save(path)
    data = load_data(folder_config(folder, augment="none"))
    torch.testing.assert_close(data.val[1][0], normalised(image.convert("RGB")))


def test_identity_of_a_folder_follows_names_sizes_and_labels(folder, tmp_path):
    def identity(root: Path) -> str:
        return load_data(folder_config(root)).identity

    reference = identity(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    save_image(moved / "train" / "cat" / "more.png", seed=0)
    assert identity(moved) == reference
    file = moved / "val" / "cat" / "0.png"
    file.write_bytes(file.read_bytes() + b"x")
    longer = identity(moved)
    file.rename(file.with_name("9.png"))
    renamed = identity(moved)
    (moved / "val" / "cat" / "9.png").rename(moved / "val" / "dog" / "9.png")
    assert len({reference, longer, renamed, identity(moved)}) == 4


def damage(folder: Path) -> set[Path]:
    """Replace four training images of class cat by files that are no images."""
    cats = folder / "train" / "cat"
    whole = (cats / "1.jpg").read_bytes()
    (cats / "0.png").write_text("not an image")
    (cats / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (cats / "2.png").write_bytes(b"")
    (cats / "3.jpg").unlink()
    (cats / "3.jpg").symlink_to("nowhere.jpg")
    return {cats / name for name in ("0.png", "1.jpg", "2.png", "3.jpg")}


@pytest.mark.parametrize("workers", WORKERS)
def test_broken_images_are_skipped_counted_and_the_first_is_named(folder, caplog, workers):
    whole = list(eval_batches(load_data(folder_config(folder)).train, batch_size=2))
    damage(folder)
    data = load_data(folder_config(folder))
    with caplog.at_level(logging.WARNING, logger="compress"):
        found = list(eval_batches(data.train, batch_size=2, workers=workers))
        list(eval_batches(data.train, batch_size=2, workers=workers))
    assert [batch.skipped for batch in found] == [2, 2, 0, 0, 0]
    assert found[0].images.shape == (0, 3, 16, 16)
    assert found[0].labels.shape == (0,)
    assert found[0].labels.dtype == torch.int64
    assert_same(found[2:], whole[2:])
    (record,) = caplog.records
    assert str(folder / "train" / "cat" / "0.png") in record.getMessage()
    assert record.exc_info is None


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("augment", ["crop", "imagenet"])
def test_broken_images_do_not_change_the_others(folder, augment, workers):
    data = load_data(folder_config(folder, augment=augment))
    (whole,) = TrainBatches(data, batch_size=10, seed=0).epoch(0)
    damage(folder)
    batches = TrainBatches(data, batch_size=10, seed=0, workers=workers)
    (found,) = batches.epoch(0)
    assert (len(found.images), found.skipped) == (6, 4)
    survivors = {image.numpy().tobytes() for image in whole.images}
    assert all(image.numpy().tobytes() in survivors for image in found.images)


def test_a_truncated_image_is_reported_with_its_reason(folder, caplog):
    path = folder / "val" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    data = load_data(folder_config(folder))
    with pytest.raises(DataError, match="truncated"):
        data.val[4]
    assert sum(batch.skipped for batch in eval_batches(data.val, batch_size=4)) == 1
    assert "truncated" in caplog.text


def test_a_decoder_that_meets_nonsense_does_not_stop_a_run(folder):
    rng = np.random.default_rng(0)
    paths = [folder / "val" / "cat" / name for name in ("0.png", "1.jpg")]
    sources = [path.read_bytes() for path in paths]
    data = load_data(folder_config(folder))
    for _ in range(50):
        for path, source in zip(paths, sources, strict=True):
            content = np.frombuffer(source, dtype=np.uint8).copy()
            content[rng.integers(0, len(content), 6)] = rng.integers(0, 256, 6)
            path.write_bytes(content[: rng.integers(1, len(content))].tobytes())
        (batch,) = eval_batches(data.val, batch_size=6)
        assert len(batch.images) + batch.skipped == 6


def test_require_images():
    require_images(1, 5, purpose="evaluation")
    with pytest.raises(DataError, match="evaluation needs images, and none of 5"):
        require_images(0, 5, purpose="evaluation")


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dataset", ["mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder"]
)
def test_a_root_that_is_not_set(dataset):
    with pytest.raises(DataError, match=rf"'{dataset}'.*data\.root is not set.*--set data\.root="):
        load_data(DataConfig(dataset=dataset))


def test_a_root_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_data(folder_config(tmp_path / "nowhere"))


@pytest.mark.parametrize("missing", [("train",), ("val",), ("train", "val")])
def test_a_half_that_is_missing(folder, missing):
    for name in missing:
        shutil.rmtree(folder / name)
    with pytest.raises(DataError) as caught:
        load_data(folder_config(folder))
    for name in ("train", "val"):
        assert (f"no {name}/" in str(caught.value)) == (name in missing)


def test_a_half_without_class_folders(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    (folder / "val" / "stray.png").touch()
    with pytest.raises(DataError, match=r"val has no class folders"):
        load_data(folder_config(folder))


def test_a_class_without_images_is_named(folder):
    (folder / "train" / "emu").mkdir()
    (folder / "train" / "emu" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"train has no image for class 'emu'"):
        load_data(folder_config(folder))


def test_classes_that_differ_are_named(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(DataError, match=r"only train/ has 'dog' and only val/ has 'wolf'"):
        load_data(folder_config(folder))


def test_a_long_list_of_classes_is_cut(folder):
    for number in range(8):
        save_image(folder / "train" / f"extra{number}" / "0.png", seed=number)
    with pytest.raises(DataError, match=r"'extra4' and 3 more"):
        load_data(folder_config(folder))


def test_a_list_of_files_holds_what_was_put_in(tmp_path):
    samples = [("/a/b.png", 3), ("c", 0), (os.fsdecode(b"/not-\xff-utf8.png"), 7), ("d" * 300, 7)]
    files = FileList.of(samples)
    assert list(files) == samples
    assert (files[-1], files[1:3], len(files)) == (samples[-1], samples[1:3], 4)
    with pytest.raises(IndexError):
        files[4]
    assert list(FileList.of([])) == []


def test_an_image_folder_is_listed_as_torchvision_lists_it(folder):
    for name in ("deep/er/a.PNG", "deep/b.jpg", "deep.png/c.webp", "0.txt", "Z.png", "deep0.png"):
        path = folder / "train" / "cat" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copytree(folder / "val" / "dog", folder / "elsewhere")
    (folder / "train" / "dog" / "linked").symlink_to(folder / "elsewhere")
    expected = datasets.ImageFolder(str(folder / "train")).samples
    assert len(expected) == 18
    assert list(scan(folder).train) == expected


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("compress.data.imagefolder.class_folders", denied)
    with pytest.raises(DataError, match=r"cannot list .*: Permission denied"):
        load_data(folder_config(folder))


class Deadly(Numbers):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if get_worker_info() is not None:
            os._exit(1)
        return super().__getitem__(index)


class Buggy(Numbers):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        raise RuntimeError("a bug")


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS[1:])
def test_a_dead_worker_is_a_data_error(workers):
    with pytest.raises(DataError, match=r"2 processes .* died.*data\.workers"):
        list(eval_batches(Deadly(4), batch_size=2, workers=workers))


@pytest.mark.parametrize("workers", WORKERS)
def test_a_bug_keeps_its_traceback(workers):
    with pytest.raises(RuntimeError, match="a bug"):
        list(eval_batches(Buggy(4), batch_size=2, workers=workers))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop", "side"), [(0.875, 9), (0.5, 16), (1.0, 8)])
def test_evaluation_looks_at_a_share_of_the_shorter_side(mode, crop, side):
    image = torch.from_numpy(noise(1, 3, 20, 30))[0]
    view = View(8, "imagenet", (0.5,) * 3, (0.5,) * 3, mode, crop)
    resized = functional.resize(image, [side], InterpolationMode(mode), antialias=True)
    assert torch.equal(view.resize(image), functional.center_crop(resized, [8, 8]))


def test_what_the_configuration_says_of_pixels():
    data = load_data(DataConfig(image_size=12, mean=(0.25,), std=(0.5,), interpolation="bicubic"))
    usual = load_data(DataConfig(image_size=12))
    assert (data.mean, data.std) == ((0.25,), (0.5,))
    first, second = (next(iter(eval_batches(d.val, batch_size=4))).images for d in (data, usual))
    assert not torch.allclose(first * 0.5 + 0.25, second * usual.std[0] + usual.mean[0], atol=1e-3)
    with pytest.raises(
        ConfigError, match=r"data.mean has 3 numbers and the images of digits have 1"
    ):
        load_data(DataConfig(mean=(0.5, 0.5, 0.5)))
