"""Order, contents and opening of tar shards; their damage, their tools and their URLs."""

import io
import logging
import shutil
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from commands import no_file_beyond
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from compress.config import DataConfig
from compress.data.batches import ImageData, TrainBatches, eval_batches
from compress.data.datasets import load_data
from compress.data.order import Share, fetched_ahead, streamed
from compress.data.shards.__main__ import main
from compress.data.shards.index import INDEX, parsed_index, read_shard
from compress.errors import ConfigError, DataError

WORKERS = [
    0,
    pytest.param(
        2,
        marks=[
            pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
        ],
    ),
]
CLASSES = ("cat", "dog", "emu")


def encoded(seed: int, form: str = "PNG") -> bytes:
    """Return a noisy image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive as Python writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def samples(count: int, classes: int = 2, first: int = 0) -> dict[str, bytes]:
    """Return the files of some samples."""
    files = {}
    for number in range(first, first + count):
        files[f"{number:03}.png"] = encoded(number)
        files[f"{number:03}.cls"] = str(number % classes).encode()
    return files


def write_shards(root: Path, *, train: list[bytes], val: bytes | None = None) -> Path:
    halves = {f"train/{at}.tar": content for at, content in enumerate(train)}
    for name, content in {**halves, "val/0.tar": val or tarred(samples(4, first=900))}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def config_of(root: Path | str, **keys: object) -> DataConfig:
    settings = {"dataset": "shards", "root": root, "image_size": 8, **keys}
    return DataConfig.model_validate(settings)


def opened(root: Path | str, **keys: object) -> ImageData:
    return load_data(config_of(root, **keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 33 training and 12 validation images."""
    root = tmp_path_factory.mktemp("images")
    for half, count in (("train", 11), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / half / name).mkdir(parents=True)
            for number in range(count):
                form, suffix = ("JPEG", ".JPEG") if number % 2 else ("PNG", ".png")
                content = encoded(100 * label + number + 1000 * (half == "val"), form)
                (root / half / name / f"{number:02}{suffix}").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as shards of 5; read only."""
    root = tmp_path_factory.mktemp("packed") / "shards"
    assert main(["pack", str(folder), str(root), "--images-per-shard", "5"]) == 0
    return root


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copied"))


# ---- order -------------------------------------------------------------------------------------

ORDERS = {
    "sizes": st.lists(st.integers(1, 9), min_size=1, max_size=12),
    "window": st.integers(1, 5),
    "batch_size": st.integers(1, 20),
    "ranks": st.integers(1, 6),
    "seed": st.integers(0, 99),
}


def order_of(sizes: list[int], window: int, share: Share, seed: int) -> np.ndarray:
    first = np.cumsum([0, *sizes])
    return streamed(first, window, share, np.random.default_rng(seed))


@settings(max_examples=60, deadline=None)
@given(**ORDERS)
def test_ranks_take_as_many_steps_and_read_no_image_twice(sizes, window, batch_size, ranks, seed):
    images = sum(sizes)
    assume(batch_size >= ranks and images >= ranks)
    parts = [order_of(sizes, window, Share(batch_size, r, ranks), seed) for r in range(ranks)]
    steps, joined = max(images // batch_size, 1), min(batch_size, images)
    assert [part.shape for part in parts] == [
        (steps, len(range(rank, joined, ranks))) for rank in range(ranks)
    ]
    seen = np.concatenate([part.ravel() for part in parts])
    assert len(np.unique(seen)) == len(seen) == steps * joined
    assert seen.min() >= 0
    assert seen.max() < images
    again = order_of(sizes, window, Share(batch_size, ranks - 1, ranks), seed)
    assert np.array_equal(again, parts[-1])


@settings(max_examples=60, deadline=None)
@given(**ORDERS)
def test_only_a_window_of_shards_is_read_at_a_time(sizes, window, batch_size, ranks, seed):
    assume(batch_size >= ranks and sum(sizes) >= ranks)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for rank in range(ranks):
        order = order_of(sizes, window, Share(batch_size, rank, ranks), seed).ravel()
        shards = owner[order].tolist()
        # Shards that are open: read before and read again later.
        for at in range(len(shards)):
            assert len(set(shards[:at]) & set(shards[at:])) <= window


@settings(max_examples=60, deadline=None)
@given(**ORDERS)
def test_every_shard_is_fetched_while_the_window_before_is_read(
    sizes, window, batch_size, ranks, seed
):
    assume(batch_size >= ranks and sum(sizes) >= ranks)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shards = owner[order_of(sizes, window, Share(batch_size, ranks - 1, ranks), seed)]
    plan = fetched_ahead(shards, window)
    assert len(plan) == len(shards)
    order = list(dict.fromkeys(shards.ravel().tolist()))  # of first use
    begun = [next(step for step, row in enumerate(shards) if shard in row) for shard in order]
    planned = {shard: step for step, row in enumerate(plan) for shard in row}
    assert sum(map(len, plan)) == len(planned)
    assert sorted(planned) == sorted(order[window:])
    for place, shard in enumerate(order[window:], start=window):
        now, later = begun[(place // window - 1) * window], begun[place // window * window]
        assert now <= planned[shard] <= now + (later - now) // 2
        assert planned[shard] < begun[place] or now == later


def test_images_of_a_window_are_mixed_and_epochs_differ():
    sizes, share = [50] * 8, Share(10)
    one, other = (order_of(sizes, 4, share, seed).ravel() for seed in (0, 1))
    owner = np.repeat(np.arange(8), 50)
    for half in (one[:200], one[200:]):
        assert np.unique(owner[half]).size == 4
        # Any ten images in a row would be of one shard if shards were read one after the other.
        assert min(np.unique(owner[half[at : at + 20]]).size for at in range(0, 200, 20)) >= 2
    assert not np.array_equal(one, other)
    assert set(owner[one[:200]]) != set(owner[other[:200]])


def test_what_an_epoch_leaves_out_changes():
    sizes = [3, 4, 5, 6]
    counts = np.zeros(18, dtype=int)
    for seed in range(40):
        for rank in range(2):
            np.add.at(counts, order_of(sizes, 2, Share(8, rank, 2), seed).ravel(), 1)
    assert counts.sum() == 40 * 16
    assert counts.min() > 20


def test_more_ranks_than_shards_share_them():
    parts = [order_of([40], 8, Share(8, rank, 4), 0) for rank in range(4)]
    assert {part.shape for part in parts} == {(5, 2)}
    assert len(np.unique(np.concatenate(parts))) == 40


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_is_the_same_with_workers_and_when_resumed(packed, monkeypatch, workers):
    data = opened(packed, augment="crop-flip", shuffle_shards=2)
    options = {"batch_size": 8, "seed": 3, "rank": 1, "ranks": 2}
    whole = list(TrainBatches(data, **options).epoch(1))
    assert [len(batch.images) for batch in whole] == [4, 4, 4, 4]
    batches = TrainBatches(data, workers=workers, **options)
    for start in (0, 3):
        found = list(batches.epoch(1, start=start))
        assert len(found) == 4 - start
        for one, other in zip(found, whole[start:], strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)


# ---- contents ----------------------------------------------------------------------------------


def test_shards_hold_the_pixels_of_the_image_folder(folder, packed):
    files = load_data(DataConfig(dataset="imagefolder", root=folder, image_size=8))
    shards = opened(packed)
    assert shards.classes == files.classes == CLASSES
    assert shards.input_size == files.input_size
    # Reports of runs on either are comparable.
    assert shards.identity == files.identity
    for one, other in zip(
        eval_batches(files.val, batch_size=5), eval_batches(shards.val, batch_size=5), strict=True
    ):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    pixels = [
        {
            (image.numpy().tobytes(), int(label))
            for image, label in map(data.train.__getitem__, range(33))
        }
        for data in (files, shards)
    ]
    assert pixels[0] == pixels[1]
    assert len(pixels[0]) == 33


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_pythons_tarfile(form):
    deep = "/".join(["folder"] * 14)
    names = ["a", "b/c", f"{deep}/{'n' * 90}", "./d", "/absolute/e", "../../outside", "f.g/h"]
    if form != tarfile.USTAR_FORMAT:
        names += [f"{'long' * 60}/{'x' * 140}", "weiß/日本"]
    files = {}
    for number, name in enumerate(names):
        files[f"{name}.cls"] = f" {number}\n".encode()
        files[f"{name}.PnG"] = encoded(number)[: 512 * (number % 2) or None]
        files[f"{name}.json"] = b"{}"
    content = tarred(files, form)
    shard = read_shard(io.BytesIO(content), len(content), "a.tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        images = [member for member in archive if member.name.endswith(".PnG")]
        expected = [(m.name, m.offset_data, m.size) for m in images]
    decoded = [name.decode() for name in shard.names]
    assert list(zip(decoded, shard.offsets, shard.sizes, strict=True)) == expected
    assert shard.labels == list(range(len(names)))


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(
            st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="./"),
            min_size=1,
            max_size=150,
        ),
        st.integers(0, 2000),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_names_are_indexed_as_pythons_tarfile_reads_them(sizes, form):
    files = {}
    for key, size in sizes.items():
        files |= {f"{key}.jpg": b"x" * size, f"{key}.cls": b"7"}
    content = tarred(files, form)
    shard = read_shard(io.BytesIO(content), len(content), "a.tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = {(m.name, m.offset_data, m.size) for m in archive if m.name.endswith(".jpg")}
    names = [name.decode() for name in shard.names]
    assert set(zip(names, shard.offsets, shard.sizes, strict=True)) == expected


def test_times_in_a_header_of_gnu_are_no_part_of_its_name():
    content = bytearray(tarred({"a.png": b"x", "a.cls": b"1"}, tarfile.GNU_FORMAT))
    for start in (0, 1024):
        content[start + 345 : start + 357] = b"14567123456\0"  # the time of access
        content[start + 148 : start + 156] = b" " * 8
        total = sum(content[start : start + 512])
        content[start + 148 : start + 156] = f"{total:06o}\0 ".encode()
    assert read_shard(io.BytesIO(bytes(content)), len(content), "a.tar").names == [b"a.png"]


def test_names_never_become_paths(tmp_path):
    files = {}
    for number, name in enumerate(["../../outside", "/absolute", "a/../../b"]):
        files |= {f"{name}.png": encoded(number), f"{name}.cls": b"0"}
    root = write_shards(tmp_path / "shards", train=[tarred(files)])
    before = sorted(tmp_path.rglob("*"))
    data = opened(root, augment="none", val_shards="train/0.tar", train_shards="val/0.tar")
    (batch,) = eval_batches(data.val, batch_size=8)
    assert len(batch.images) == 3
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("workers", WORKERS)
def test_a_broken_image_is_skipped_counted_and_named(tmp_path, caplog, workers):
    files = samples(4)
    files["002.png"] = files["002.png"][:60]
    root = write_shards(tmp_path, train=[tarred(samples(4))], val=tarred(files))
    (batch,) = eval_batches(opened(root).val, batch_size=8, workers=workers)
    assert (len(batch.images), batch.skipped) == (3, 1)
    assert "002.png in val/0.tar" in caplog.text


@pytest.mark.parametrize("workers", WORKERS)
def test_a_shard_that_goes_while_it_is_read_stops_the_run_with_a_sentence(tmp_path, workers):
    root = write_shards(tmp_path, train=[tarred(samples(4))])
    data = opened(root)
    (root / "val" / "0.tar").unlink()
    with pytest.raises(DataError) as caught:
        list(eval_batches(data.val, batch_size=2, workers=workers))
    assert str(caught.value) == f"cannot read {root / 'val' / '0.tar'}: No such file or directory"
    write_shards(root, train=[], val=tarred(samples(12)))
    with pytest.raises(DataError, match=r"val/0\.tar .* bytes, and its index says .*index again"):
        list(eval_batches(data.val, batch_size=2))


# ---- damage ------------------------------------------------------------------------------------


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.REGTYPE, "a.cls")):
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(member)
    return buffer.getvalue()


def device() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.cls")
        member.type = tarfile.CHRTYPE
        archive.addfile(member)
    return buffer.getvalue()


def changed(change: Callable[[bytearray], None]) -> bytes:
    content = bytearray(tarred(samples(2)))
    change(content)
    return bytes(content)


def flip_header(content: bytearray) -> None:
    content[3] ^= 1


def negative_size(content: bytearray) -> None:
    content[124:136] = b"-0000000001\0"


def absurd_size(content: bytearray) -> None:
    content[124] = 0x80
    content[125:136] = b"\x7f" * 11
    total = sum(content[:512]) - sum(content[148:156]) + 256
    content[148:156] = f"{total:06o}\0 ".encode()


DAMAGED = {
    "nothing": (b"", "it is cut short"),
    "text": (b"these are not the bytes of a tar archive" * 40, "it is no tar archive, or damaged"),
    "no samples": (tarred({"readme.txt": b"x"}), "it holds no image"),
    "cut": (tarred(samples(3))[:-11000], "it is cut short"),
    "without end": (tarred({"a.png": b"", "a.cls": b"1"})[:1536], "it is cut short"),
    "appended": (tarred(samples(2)) + tarred(samples(2, first=5)), "goes on after its end"),
    "header": (changed(flip_header), "it is no tar archive, or damaged"),
    "negative": (changed(negative_size), "it is no tar archive, or damaged"),
    "absurd": (changed(absurd_size), "it is cut short"),
    "no label": (tarred({"b/a.png": b"x"}), "b/a.png has no b/a.cls with its class"),
    "no image": (tarred({"a.cls": b"1", "a.jp2": b"x"}), "a.cls has no image beside it"),
    "word": (tarred({"a.png": b"x", "a.cls": b"cat"}), "a.cls does not hold the number"),
    "minus": (tarred({"a.png": b"x", "a.cls": b"-1"}), "a.cls does not hold the number"),
    "empty": (tarred({"a.png": b"x", "a.cls": b""}), "a.cls does not hold the number"),
    "long": (tarred({"a.png": b"x", "a.cls": b"1" * 99}), "a.cls does not hold the number"),
    "twice": (tarred({"a.png": b"x", "a.jpg": b"x", "a.cls": b"1"}), "the key a has two"),
    "link": (linked(), "a.png is a link or a device"),
    "device": (device(), "a.cls is a link or a device"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_with_its_shard(case, tmp_path, capsys):
    content, reason = DAMAGED[case]
    root = write_shards(tmp_path, train=[tarred(samples(2)), content])
    with pytest.raises(DataError) as caught:
        opened(root)
    assert str(caught.value).startswith("the shard train/1.tar cannot be used: ")
    assert reason in str(caught.value)
    assert main(["index", str(root)]) == 1
    assert reason in capsys.readouterr().err
    assert not (root / INDEX).exists()


def test_an_archive_that_is_cut_anywhere_is_refused():
    content = tarred(samples(2), tarfile.GNU_FORMAT)
    end = len(content.rstrip(b"\0"))
    end += -end % 512
    for length in range(0, end + 1, 256):
        with pytest.raises(DataError, match=r"cut short|no image|has no"):
            read_shard(io.BytesIO(content[:length]), length, "a.tar")
    assert len(read_shard(io.BytesIO(content[: end + 512]), end + 512, "a.tar").names) == 2


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_archive_is_a_data_error_or_read(data):
    content = bytearray(tarred(samples(2), data.draw(st.sampled_from([0, 1, 2]))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        shard = read_shard(io.BytesIO(content), len(content), "a.tar")
    except DataError:
        return
    for offset, size in zip(shard.offsets, shard.sizes, strict=True):
        assert 0 <= offset <= offset + size <= len(content)


def pax_bomb(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("x")
    member.type = kind
    header = bytearray(member.tobuf())
    header[124:136] = f"{size:011o}\0".encode()
    total = sum(header) - sum(header[148:156]) + 256
    header[148:156] = f"{total:06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize("kind", [b"L", b"x", b"g", b"K"])
def test_a_name_of_gigabytes_takes_no_memory(kind):
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size <= 2**20
            return super().read(size)

    content = pax_bomb(kind, 2**32)
    with pytest.raises(DataError, match="a name of more than 1 MiB"):
        read_shard(Endless(content), 2**40, "a.tar")


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"GNU.sparse.major": "1"}, "it holds a sparse file"),
        ({"size": "99999999999999999999"}, "it has a damaged pax header"),
        ({"size": "-5"}, "it has a damaged pax header"),
    ],
)
def test_pax_headers_that_mislead_are_refused(headers, reason):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = headers
        archive.addfile(member)
    content = buffer.getvalue()
    with pytest.raises(DataError, match=reason):
        read_shard(io.BytesIO(content), len(content), "a.tar")


# ---- labels and classes ------------------------------------------------------------------------


def test_classes_are_numbers_unless_they_are_named(tmp_path):
    root = write_shards(tmp_path, train=[tarred(samples(6, classes=3))])
    assert opened(root).classes == ("0", "1", "2")
    (root / "classes.txt").write_text("cat\ndog\nemu\nfox\n\n")
    assert opened(root).classes == ("cat", "dog", "emu", "fox")


@pytest.mark.parametrize(
    ("labels", "classes", "reason"),
    [
        ((0, 2, 0), None, r"no training image .* is of class 1, and some are of class 2"),
        ((0, 999999999, 0), None, r"no training image .* of class 1, and some are of class 999999"),
        ((0, 1, 5), None, r"v\.png in the shard val/0\.tar is of class 5, of which there is no"),
        ((0, 2, 0), "a\nb\n", r"1\.png in the shard train/0\.tar is of class 2, and .* 2 classes"),
        ((0, 0, 2), "a\nb\n", r"v\.png in the shard val/0\.tar is of class 2, and .* 2 classes"),
        ((0, 1, 0), "a\na\n", "name a class on every line, and each class once"),
        ((0, 1, 0), "a\n\nb\n", "name a class on every line, and each class once"),
        ((0, 1, 0), "", "name a class on every line, and each class once"),
        ((0, 1, 0), b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_a_label_that_is_no_class(tmp_path, labels, classes, reason):
    one, other, val = (str(label).encode() for label in labels)
    files = {"0.png": b"x", "0.cls": one, "1.png": b"x", "1.cls": other}
    root = write_shards(tmp_path, train=[tarred(files)], val=tarred({"v.png": b"x", "v.cls": val}))
    if classes is not None:
        text = classes if isinstance(classes, bytes) else classes.encode()
        (root / "classes.txt").write_bytes(text)
    with pytest.raises(DataError, match=reason):
        opened(root)


def test_shards_that_are_sorted_by_class_are_warned_about(tmp_path, caplog):
    sorted_shards = [
        tarred({f"{label}.png": encoded(label), f"{label}.cls": str(label).encode()})
        for label in range(5)
    ]
    root = write_shards(tmp_path, train=sorted_shards)
    opened(root, shuffle_shards=3)
    assert not caplog.records
    opened(root, shuffle_shards=2)
    assert "no shard has images of more than 1 of the 5 classes" in caplog.text


# ---- index -------------------------------------------------------------------------------------


def test_an_index_says_what_the_headers_say(copied, monkeypatch):
    with_index = opened(copied)
    (copied / INDEX).unlink()
    without = opened(copied)
    assert with_index.identity == without.identity
    for half in ("train", "val"):
        one, other = getattr(with_index, half).index, getattr(without, half).index
        assert one.shards == other.shards
        for name in ("shard_bytes", "first", "offsets", "sizes", "labels", "names", "name_ends"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_opening_with_an_index_reads_no_shard(copied):
    expected = opened(copied).identity
    for path in copied.glob("*/*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert opened(copied).identity == expected


def test_an_index_takes_less_than_80_bytes_an_image_of_imagenet():
    files = {}
    for number in range(200):
        files[f"n01440764/n01440764_{number:05}.JPEG"] = b"x" * 10
        files[f"n01440764/n01440764_{number:05}.cls"] = b"0"
    content = tarred(files)
    shard = read_shard(io.BytesIO(content), len(content), "a.tar")
    from compress.data.shards.index import index_of

    index = index_of([shard] * 5)
    held = (index.offsets, index.sizes, index.labels, index.names, index.name_ends)
    assert all(isinstance(array, np.ndarray) for array in held)
    assert sum(array.nbytes for array in held) < 80 * len(index) == 80 * 1000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: (root / "train" / "train-000001.tar").unlink(), "1.tar .* and is gone"),
        (
            lambda root: shutil.copy(root / "val" / "val-000000.tar", root / "train" / "new.tar"),
            "new.tar .* is not in its index",
        ),
        (
            lambda root: (root / "val" / "val-000001.tar").write_bytes(b"x" * 512),
            "val-000001.tar .* has 512 bytes, and its index says",
        ),
    ],
)
def test_shards_that_changed_since_they_were_indexed(copied, change, reason):
    change(copied)
    with pytest.raises(DataError, match=f"{reason}.*python -m compress.data.shards index"):
        opened(copied)


def tampered(root: Path, **arrays: np.ndarray) -> bytes:
    tensors = safetensors.numpy.load((root / INDEX).read_bytes())
    return safetensors.numpy.save({**tensors, **arrays})


def some(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    "arrays",
    [
        {"version": some(2)},
        {"offsets": some(0)},
        {"offsets": np.full(45, -1)},
        {"offsets": np.full(45, 2**62)},
        {"sizes": np.full(45, 2**62)},
        {"sizes": np.full(45, -5)},
        {"labels": np.full(45, -1)},
        {"labels": np.full(45, 2**40)},
        {"labels": np.zeros(45, dtype=np.int32)},
        {"offsets": np.zeros((5, 9), dtype=np.int64)},
        {"name_ends": np.arange(45)[::-1].copy()},
        {"first": np.zeros(11, dtype=np.int64)},
        {"shard_bytes": some(1)},
        {"shards": np.frombuffer(b"\n".join([b"train/../../x.tar"] * 10), dtype=np.uint8)},
    ],
)
def test_an_index_that_contradicts_itself_is_refused(copied, arrays):
    assert len(parsed_index((copied / INDEX).read_bytes(), "it")) == 45
    (copied / INDEX).write_bytes(tampered(copied, **arrays))
    with pytest.raises(DataError, match=r"index\.safetensors is damaged or of another version"):
        opened(copied)


@pytest.mark.parametrize("name", ["/etc/shadow", "../out.tar", "train/../../out.tar", "a\\b.tar"])
def test_an_index_cannot_point_outside_the_root(copied, name):
    names = [f"train/{number}.tar" for number in range(9)] + [name]
    shards = np.frombuffer("\n".join(names).encode(), dtype=np.uint8)
    with pytest.raises(DataError, match="damaged"):
        parsed_index(tampered(copied, shards=shards), "it")


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 4000), garbage=st.binary(max_size=40))
def test_bytes_that_are_no_index_are_refused(packed, cut, garbage):
    whole = (packed / INDEX).read_bytes()
    assume(cut < len(whole))
    with pytest.raises(DataError, match="damaged or of another version"):
        parsed_index(whole[:cut] + garbage, "it")


def test_halves_must_be_found_and_differ(packed):
    with pytest.raises(DataError, match=r"no shard under .* matches data\.val_shards = 'x/\*'"):
        opened(packed, val_shards="x/*")
    with pytest.raises(ConfigError, match=r"both match train/train-000000\.tar"):
        opened(packed, val_shards="train/*0.tar")
    with pytest.raises(DataError, match="nowhere does not exist"):
        opened(packed / "nowhere")
    assert len(opened(packed, train_shards="train/train-00000[0-2].tar").train) == 15


def test_a_pattern_takes_no_shard_of_deeper_folders(copied):
    (copied / "train" / "more").mkdir()
    shutil.copy(copied / "val" / "val-000000.tar", copied / "train" / "more" / "x.tar")
    assert len(opened(copied).train) == 33


def test_many_shards_without_an_index_are_worth_a_hint(tmp_path, caplog):
    content = tarred(samples(2))
    root = write_shards(tmp_path, train=[content] * 64)
    assert len(opened(root).train) == 128
    assert "reading the headers of 64 shards; python -m compress.data.shards index" in caplog.text


# ---- tools -------------------------------------------------------------------------------------


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_packing_again_writes_the_same_bytes(folder, packed, tmp_path):
    elsewhere = Path(shutil.copytree(folder, tmp_path / "moved"))
    (elsewhere / "val" / "cat" / "00.png").touch()
    assert main(["pack", str(elsewhere), str(tmp_path / "again"), "--images-per-shard", "5"]) == 0
    assert contents(tmp_path / "again") == contents(packed)
    assert set(contents(packed)) == {
        "classes.txt",
        INDEX,
        *(f"train/train-{number:06}.tar" for number in range(7)),
        *(f"val/val-{number:06}.tar" for number in range(3)),
    }


def test_packed_training_shards_hold_mixed_classes(packed):
    index = opened(packed).train.index
    mixed = [len(set(index.labels[a:b].tolist())) for a, b in pairwise(index.first)]
    assert sum(count > 1 for count in mixed) >= 6


def test_a_dot_in_a_name_survives_packing(folder, tmp_path):
    source = Path(shutil.copytree(folder, tmp_path / "images"))
    for name in ("a.b.png", "a%2Eb.png"):
        (source / "val" / "cat" / name).write_bytes(encoded(7))
    assert main(["pack", str(source), str(tmp_path / "shards")]) == 0
    assert len(opened(tmp_path / "shards").val) == 14


def test_packing_into_a_folder_that_holds_something(folder, tmp_path, capsys):
    (tmp_path / "notes").write_text("x")
    assert main(["pack", str(folder), str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["pack", str(folder), str(tmp_path / "empty")]) == 0


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path, capsys):
    with no_file_beyond(20000):
        assert main(["pack", str(folder), str(tmp_path / "shards")]) == 1
    assert list(tmp_path.iterdir()) == []
    assert "cannot write" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_behind(folder, tmp_path, capsys, monkeypatch):
    def pressed(file: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.data.shards.pack._content", pressed)
    assert main(["pack", str(folder), str(tmp_path / "shards")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "stopped\n"


def test_a_file_that_cannot_be_read_stops_packing(folder, tmp_path, capsys):
    source = Path(shutil.copytree(folder, tmp_path / "images"))
    (source / "train" / "cat" / "broken.png").symlink_to("nowhere")
    assert main(["pack", str(source), str(tmp_path / "shards")]) == 1
    assert "broken.png (No such file or directory): mend or remove it" in capsys.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_indexing_says_what_it_found(copied, capsys):
    before = (copied / INDEX).read_bytes()
    (copied / INDEX).unlink()
    assert main(["index", str(copied)]) == 0
    assert (copied / INDEX).read_bytes() == before
    assert capsys.readouterr().err == f"{copied / INDEX}: 45 images in 10 shards\n"


def test_indexing_a_folder_without_shards(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 1
    assert "there is no *.tar under" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["index"], ["pack", "a"], ["melt", "a"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_log_is_quiet_when_all_is_well(packed, caplog):
    with caplog.at_level(logging.INFO):
        list(eval_batches(opened(packed).val, batch_size=8))
    assert not caplog.records
