"""What in a folder is taken for a class or an image, and what is not."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress.config import DataConfig
from compress.data.imagefolder import list_classes, list_files, scan
from compress.data.shards.__main__ import main as shards
from compress.data.shards.dataset import open_shards
from compress.data.shards.pack import pack_folder
from compress.data.walking import LEFT_BEHIND, is_data, is_data_path
from compress.errors import DataError

LEFT = [
    *(".ipynb_checkpoints", ".git", "._cat", ".DS_Store", "@eaDir", "__MACOSX", "#recycle"),
    *("$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini"),
]


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(path.name)) % 1000)
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: two classes of two images in each half."""
    root = tmp_path / "images"
    for half in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(2):
                save(root / half / label / f"{number}.png")
    return root


def names(root: Path, half: str = "train") -> list[str]:
    return [os.path.relpath(path, root / half) for path, _ in getattr(scan(root), half)]


WHOLE = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]

# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_behind_is_no_class_and_no_image(name: str, folder: Path) -> None:
    for place in (folder, folder / "train", folder / "val", folder / "train" / "cat"):
        save(place / name / "thumbnail.png")
    save(folder / "train" / "cat" / "deep" / name / "thumbnail.png")
    listing = scan(folder)
    assert listing.classes == ("cat", "dog")
    assert names(folder) == names(folder, "val") == WHOLE


@pytest.mark.parametrize("name", ["._0.png", ".0.png", ".hidden.jpg"])
def test_a_file_whose_name_begins_with_a_dot_is_no_image(name: str, folder: Path) -> None:
    for place in ("train/cat", "train/cat/deep", "val/dog", "train", "."):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / name).write_bytes(b"\0\5\x16\7 of another file")
    assert names(folder) == names(folder, "val") == WHOLE
    (folder / "train" / "cat" / "2.png").touch()
    flat = list_files(folder / "train" / "cat")
    assert [flat.name(at) for at in range(len(flat))] == [b"0.png", b"1.png", b"2.png"]


def test_a_class_that_holds_nothing_else_is_empty(folder: Path) -> None:
    for image in (folder / "val" / "dog").iterdir():
        image.rename(image.with_name(f".{image.name}"))
    with pytest.raises(DataError, match="val has no image for class 'dog'"):
        scan(folder)


def test_names_that_only_look_like_those_are_data() -> None:
    assert all(
        map(is_data, ["cat.", "eaDir", "MACOSX", "thumbs", "a.b", "lost and found", "@", "_"])
    )
    assert not any(map(is_data, LEFT))
    assert not any(name.upper() != name and is_data(name.upper()) for name in LEFT_BEHIND)
    assert is_data_path("./train/../train/0.png")
    assert not is_data_path("train/@eaDir/0.png")


# ---- links -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        ".",
        "..",
        "../..",
        "../dog",
        "../../val",
        "../../val/dog",
        "deep",
        "deep/er",
        "../dog/other",
        "../../val/cat/deep",
    ],
)
def test_no_real_folder_is_listed_twice(
    target: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder / "train" / "cat" / "deep" / "er" / "2.png")
    save(folder / "train" / "dog" / "other" / "3.png")
    save(folder / "val" / "cat" / "deep" / "4.png")
    expected = [*WHOLE[:2], "cat/deep/er/2.png", *WHOLE[2:], "dog/other/3.png"]
    assert names(folder) == expected
    assert not caplog.records
    link = folder / "train" / "cat" / "a link"
    link.symlink_to(target)
    assert names(folder) == expected
    (record,) = caplog.records
    assert "links to folders that are listed elsewhere" in record.getMessage()
    assert str(link) in record.getMessage()


def test_links_in_a_circle_end(folder: Path) -> None:
    for number in range(3):
        deep = folder / "train" / "cat" / f"deep{number}"
        deep.mkdir()
        for other in range(3):
            (deep / f"to{other}").symlink_to(f"../deep{other}")
    (folder / "train" / "cat" / "self").symlink_to("self")
    assert names(folder) == WHOLE


def test_a_folder_elsewhere_is_listed_by_the_first_of_its_links(folder: Path) -> None:
    save(folder.parent / "elsewhere" / "9.png")
    for label, name in (("cat", "one"), ("cat", "two"), ("dog", "three")):
        (folder / "train" / label / name).symlink_to(folder.parent / "elsewhere")
    assert names(folder) == [*WHOLE[:2], "cat/one/9.png", *WHOLE[2:]]


@pytest.mark.parametrize("target", [".", "..", "cat"])
def test_a_class_folder_that_is_another_is_refused(target: str, folder: Path) -> None:
    (folder / "train" / "emu").symlink_to(target)
    with pytest.raises(
        DataError, match=r"class folder 'emu' in .* is a link to .*, and no folder is"
    ):
        scan(folder)
    with pytest.raises(DataError, match="'emu'"):
        list_classes(folder / "train")


def test_classes_may_be_links(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for half in ("train", "val"):
        (folder / half / "dog").rename(folder.parent / f"{half} dogs")
        (folder / half / "dog").symlink_to(folder.parent / f"{half} dogs")
    assert names(folder) == names(folder, "val") == WHOLE
    assert not caplog.records


def test_validation_on_the_training_images_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "val")
    (folder / "val").symlink_to("train")
    assert names(folder, "val") == WHOLE
    assert "the validation images are the training images" in caplog.text


def test_a_class_validated_on_its_training_images_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(folder / "val" / "dog")
    (folder / "val" / "dog").symlink_to("../train/dog")
    assert names(folder, "val") == WHOLE
    assert "links join the folders of class 'dog'" in caplog.text


def test_a_folder_that_cannot_be_listed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own walk passes over it."""
    (folder / "train" / "cat" / "secret").mkdir()
    scandir = os.scandir

    def denied(path: str | Path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"cannot list .*: Permission denied"):
        scan(folder)


# ---- what is no regular file -------------------------------------------------------------------


def test_what_is_no_regular_file_is_left_out_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = folder / "train" / "cat" / "pipe.png"
    os.mkfifo(pipe)
    (folder / "train" / "dog" / "linked.png").symlink_to(pipe)
    (folder / "train" / "dog" / "null.png").symlink_to("/dev/null")
    os.mkfifo(folder / "train" / "dog" / "notes.txt")  # not asked for, not worth a word
    with caplog.at_level(logging.WARNING, logger="compress"):
        assert names(folder) == WHOLE
    (record,) = caplog.records
    assert "left out, since they are no regular files" in record.getMessage()
    assert all(name in record.getMessage() for name in ("pipe.png", "linked.png", "null.png"))
    assert "notes" not in record.getMessage()
    flat = list_files(folder / "train" / "cat")
    assert len(flat) == 2


def test_a_class_of_pipes_alone_is_empty(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")
    (folder / "train" / "dog").mkdir()
    os.mkfifo(folder / "train" / "dog" / "0.png")
    with pytest.raises(DataError, match="train has no image for class 'dog'"):
        scan(folder)


# ---- names of classes --------------------------------------------------------------------------


def add_class(folder: Path, name: str | bytes, halves: tuple[str, ...] = ("train", "val")) -> None:
    for half in halves:
        path = folder / half / os.fsdecode(name)
        path.mkdir()
        shutil.copy(folder / half / "cat" / "0.png", path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (b"caf\xe9", r"the class name 'caf\udce9' in .* is not UTF-8: rename it"),
        ("two\nlines", r"the class name 'two\nlines' in .* holds control characters"),
        ("\x1b[31mred", r"the class name '\x1b[31mred' in .* holds control characters"),
    ],
)
def test_a_class_name_that_is_no_text(name: str | bytes, sentence: str, folder: Path) -> None:
    add_class(folder, name)
    with pytest.raises(DataError) as caught:
        scan(folder)
    before, after = sentence.split(".*")
    assert before in str(caught.value)
    assert after in str(caught.value)


ALIKE = [("caf\u00e9", "cafe\u0301"), ("\u212b", "\u00c5"), ("cat", "cat "), ("cat", "c\u200bat")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_class_names_that_look_alike(one: str, other: str, folder: Path) -> None:
    shutil.rmtree(folder / "train" / "cat")
    shutil.rmtree(folder / "val" / "cat")
    (folder / "train" / "dog").rename(folder / "train" / "cat")
    (folder / "val" / "dog").rename(folder / "val" / "cat")
    for name in {one, other} - {"cat"}:
        add_class(folder, name)
    with pytest.raises(DataError) as caught:
        scan(folder)
    sentence = str(caught.value)
    assert ascii(one) in sentence
    assert ascii(other) in sentence
    assert "look the same and are different" in sentence


def test_halves_whose_class_names_look_alike(folder: Path) -> None:
    add_class(folder, "caf\u00e9", ("train",))
    add_class(folder, "cafe\u0301", ("val",))
    with pytest.raises(
        DataError, match=r"only train/ has 'caf\\xe9' and only val/ has 'cafe\\u0301'"
    ):
        scan(folder)


def test_class_names_that_differ_are_left_alone(folder: Path) -> None:
    for name in ("Cat", "caf\u00e9", "cafe", "\u732b", "m2", "m\u00b2", "a b"):
        add_class(folder, name)
    assert len(scan(folder).classes) == 9


# ---- shards ------------------------------------------------------------------------------------


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack_folder(folder, tmp_path / "shards", images_per_shard=2)
    return tmp_path / "shards"


def opened(root: Path):
    return open_shards(DataConfig(dataset="shards", root=root))


@pytest.mark.parametrize("indexed", [False, True])
def test_what_lies_beside_shards_is_no_shard(
    indexed: bool, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = opened(packed)
    (packed / "train" / "._train-000000.tar").write_bytes(b"\0\5\x16\7")
    (packed / "@eaDir").mkdir()
    (packed / "@eaDir" / "x.tar").touch()
    os.mkfifo(packed / "train" / "pipe.tar")
    (packed / "index.safetensors").unlink()
    if indexed:
        assert shards(["index", str(packed)]) == 0
    found = opened(packed)
    assert found.train.shards == expected.train.shards
    assert found.val.identity() == expected.val.identity()
    assert "'train/pipe.tar'" in caplog.text


def test_what_an_archive_brings_along_is_no_image(packed: Path, folder: Path) -> None:
    expected = opened(packed).train.names.tobytes()
    (packed / "index.safetensors").unlink()
    shard = packed / "train" / "train-000000.tar"
    with tarfile.open(shard, "a") as archive:
        for name in ("__MACOSX/x.png", ".ipynb_checkpoints/y.png", "./cat/._0.png", "@eaDir/z.cls"):
            archive.add(folder / "val" / "cat" / "0.png", name)
    assert opened(packed).train.names.tobytes() == expected


def test_class_names_of_shards_that_look_alike(packed: Path) -> None:
    (packed / "classes.txt").write_text("caf\u00e9\ncafe\u0301\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'caf\\xe9' and 'cafe\\u0301' in classes.txt under"):
        opened(packed)
