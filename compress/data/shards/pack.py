"""How an image folder becomes tar shards, the same bytes every time."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from compress.data.imagefolder import scan
from compress.data.shards.dataset import CLASSES, read_shards
from compress.data.shards.index import INDEX, index_bytes, index_of
from compress.data.shards.store import Folder
from compress.errors import ConfigError, DataError, writing
from compress.files.atomic import temporary_name, write_atomically
from compress.terminal.progress import Bar, bar

SHUFFLE_SEED = 2019
Sample = tuple[str, int]


def pack_folder(source: Path, root: Path, *, images_per_shard: int = 1000) -> None:
    """Write the images of an image folder as shards, with their index and class names.

    Training images are put into a random order, always the same: a few shards at a time are mixed
    while training, and each of them must hold images of every kind. Validation images keep the
    order of the folder, and so the identity of the data set.

    Raises:
        ConfigError: the root exists.
        DataError: the folder is no image folder, or a file cannot be read.
        OutputError: the shards cannot be written; nothing is left behind.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"{root} exists and is not empty: name a folder to make")
    listing = scan(source)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(listing.train))
    halves = {"train": [listing.train[at] for at in order], "val": list(listing.val)}
    with _staged_folder(root) as staging, bar("pack", sum(map(len, halves.values()))) as shown:
        names = []
        for half, samples in halves.items():
            packed = _Half(source / half, staging, half, images_per_shard)
            names += packed.write(samples, shown)
        write_atomically(staging / CLASSES, "".join(f"{name}\n" for name in listing.classes))
        index = index_of(read_shards(Folder(staging), names))
        write_atomically(staging / INDEX, index_bytes(index))


class _Half:
    """Writes the shards of one half of an image folder."""

    def __init__(self, source: Path, staging: Path, half: str, images_per_shard: int) -> None:
        self.source, self.staging, self.half = source, staging, half
        self.images_per_shard = images_per_shard
        self.done = 0

    def write(self, samples: Sequence[Sample], shown: Bar) -> list[str]:
        """Write the shards; return their names."""
        with writing(self.staging):
            (self.staging / self.half).mkdir()
        names = []
        for number, first in enumerate(range(0, len(samples), self.images_per_shard)):
            names.append(f"{self.half}/{self.half}-{number:06}.tar")
            self._write_shard(names[-1], samples[first : first + self.images_per_shard])
            shown.at(self.done)
        return names

    def _write_shard(self, name: str, samples: Sequence[Sample]) -> None:
        path = self.staging / name
        with writing(path), path.open("wb") as stream:
            with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for file, label in samples:
                    key, extension = _key(Path(file).relative_to(self.source))
                    _add(archive, f"{key}.{extension}", _content(file))
                    _add(archive, f"{key}.cls", str(label).encode())
                    self.done += 1
            stream.flush()
            os.fsync(stream.fileno())


def _key(path: Path) -> tuple[str, str]:
    """Return the key and the extension of a sample; a key ends at the first dot of its name."""
    stem = path.stem.replace("%", "%25").replace(".", "%2E")
    return (path.parent / stem).as_posix(), path.suffix[1:]


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {file} ({error.strerror or error}): mend or remove it"
        ) from error


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owned by nobody, made in 1970: the same bytes everywhere
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


@contextmanager
def _staged_folder(root: Path) -> Iterator[Path]:
    """Yield a folder beside ``root`` that takes its name if the block succeeds."""
    staging = temporary_name(root)
    with writing(root):
        staging.mkdir(parents=True)
    try:
        yield staging
        with writing(root):
            staging.replace(root)
    finally:
        with suppress(OSError):
            shutil.rmtree(staging)
