"""Which images a set of tar shards holds, and at which bytes.

A sample is the files of one key, as WebDataset defines it: ``KEY.jpg`` and ``KEY.cls``, where the
key is the name up to the first dot of its last part. Everything is held in flat arrays, about sixty
bytes an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from torchvision.datasets.folder import IMG_EXTENSIONS

from compress.data.order import Int64s
from compress.data.shards.tar import Member, members
from compress.data.walking import is_data_path
from compress.errors import DataError

VERSION = 1
INDEX = "index.safetensors"
"""Its name beside the shards."""
LABEL = b"cls"
LONGEST_LABEL = 32
"""Bytes of a label file."""
IMAGES = frozenset(extension.lstrip(".").encode() for extension in IMG_EXTENSIONS)


class Shard(NamedTuple):
    """The images of one shard, in the order of the archive."""

    name: str
    """Relative to the root of the shards."""
    length: int
    """Bytes of the archive."""
    names: list[bytes]
    """Of the image files."""
    offsets: list[int]
    """Of the first byte of each image in the archive."""
    sizes: list[int]
    """Bytes of each image."""
    labels: list[int]


@dataclass(frozen=True)
class ShardIndex:
    """The images of many shards, one after the other."""

    shards: tuple[str, ...]
    """Names relative to the root."""
    shard_bytes: Int64s
    """(S,) size of every archive."""
    first: Int64s
    """(S + 1,) position of the first image of every shard, and the number of images."""
    offsets: Int64s
    """(N,) first byte of every image in its archive."""
    sizes: Int64s
    """(N,) in bytes."""
    labels: Int64s
    """(N,)"""
    names: npt.NDArray[np.uint8]
    """The names of the image files, joined."""
    name_ends: Int64s
    """(N,) where each name ends in ``names``."""

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def images(self) -> Int64s:
        """Return (S,) the number of images of every shard."""
        return np.diff(self.first)

    def shard_of(self, image: int) -> int:
        """Return the shard of an image."""
        return int(np.searchsorted(self.first, image, side="right")) - 1

    def shards_of(self, images: Int64s) -> Int64s:
        """Return the shards of images, in an array of the same shape."""
        return np.searchsorted(self.first, images, side="right") - 1

    def name_of(self, image: int) -> bytes:
        """Return the name of an image file."""
        start = self.name_ends[image - 1] if image else 0
        return self.names[start : self.name_ends[image]].tobytes()

    def identity(self) -> str:
        """Return the sha256, hexadecimal, over name, size in bytes and label of every image."""
        digest = hashlib.sha256()
        for image in range(len(self)):
            line = b"%s\0%d\0%d\n" % (self.name_of(image), self.sizes[image], self.labels[image])
            digest.update(line)
        return digest.hexdigest()

    def matching(self, pattern: str) -> ShardIndex:
        """Return the part whose shards match a pattern; ``*`` does not match a slash."""
        found = [at for at, name in enumerate(self.shards) if matches(name, pattern)]
        return _joined([self._shard_arrays(at) for at in found], [self.shards[at] for at in found])

    def _shard_arrays(self, shard: int) -> _Arrays:
        images = slice(int(self.first[shard]), int(self.first[shard + 1]))
        ends = self.name_ends[images]
        begin = int(self.name_ends[images.start - 1]) if images.start else 0
        end = int(ends[-1]) if len(ends) else begin
        return _Arrays(
            int(self.shard_bytes[shard]),
            self.offsets[images],
            self.sizes[images],
            self.labels[images],
            self.names[begin:end],
            ends - begin,
        )


class _Arrays(NamedTuple):
    """What a ShardIndex holds of one shard."""

    length: int
    offsets: Int64s
    sizes: Int64s
    labels: Int64s
    names: npt.NDArray[np.uint8]
    name_ends: Int64s


def matches(name: str, pattern: str) -> bool:
    """Return whether a relative name matches a pattern, part by part."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def read_shard(stream: BinaryIO, length: int, name: str) -> Shard:
    """List the images of one archive of ``length`` bytes.

    Raises:
        DataError: naming the shard, which is damaged, or the sample that is not whole.
        OSError: it cannot be read.
    """
    images: dict[bytes, Member] = {}
    labels: dict[bytes, int] = {}
    try:
        for member in members(stream, length):
            if not is_data_path(_shown(member.name)):
                continue
            key, extension = _key(member.name)
            if extension in IMAGES:
                _add(images, key, member, member)
            elif extension == LABEL:
                _add(labels, key, member, _label(stream, member))
        _check_pairs(images, labels)
    except ValueError as error:
        raise DataError(f"the shard {name} cannot be used: {error}; replace it") from error
    found = images.values()
    return Shard(
        name,
        length,
        [member.name for member in found],
        [member.offset for member in found],
        [member.size for member in found],
        [labels[key] for key in images],
    )


def index_of(shards: Iterable[Shard]) -> ShardIndex:
    """Join the lists of shards into one index."""
    names, arrays = [], []
    for shard in shards:
        names.append(shard.name)
        arrays.append(_arrays(shard))
    return _joined(arrays, names)


def index_bytes(index: ShardIndex) -> bytes:
    """Return an index as the bytes of a safetensors file."""
    shards = np.frombuffer("\n".join(index.shards).encode("utf-8", "surrogateescape"), np.uint8)
    arrays = {name: getattr(index, name) for name in _INT64S}
    version = np.array([VERSION], dtype=np.int64)
    return safetensors.numpy.save(
        {**arrays, "names": index.names, "shards": shards, "version": version}
    )


def parsed_index(data: bytes, source: str) -> ShardIndex:
    """Read an index and check it, so that whoever wrote it cannot point outside the shards.

    Raises:
        DataError: it is none, of another version, or contradicts itself.
    """
    try:
        tensors = safetensors.numpy.load(data)
        if tensors["version"].tolist() != [VERSION]:
            raise ValueError("another version")
        shards = tensors["shards"].tobytes().decode("utf-8", "surrogateescape")
        index = ShardIndex(
            shards=tuple(shards.split("\n")) if shards else (),
            names=_of_type(tensors, "names", np.uint8),
            **{name: _of_type(tensors, name, np.int64) for name in _INT64S},
        )
        _check(index)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is damaged or of another version: make it again with "
            "python -m compress.data.shards index ROOT"
        ) from error
    return index


_INT64S = ("shard_bytes", "first", "offsets", "sizes", "labels", "name_ends")


def _key(name: bytes) -> tuple[bytes, bytes]:
    """Return the key of a member, and what follows its first dot, in small letters."""
    folder, slash, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension.lower()


def _add(found: dict[bytes, Any], key: bytes, member: Member, value: object) -> None:
    if not member.is_file:
        raise ValueError(f"{_shown(member.name)} is a link or a device, without contents")
    if key in found:
        raise ValueError(f"the key {_shown(key)} has two files of one kind")
    found[key] = value


def _label(stream: BinaryIO, member: Member) -> int:
    content = b""
    if member.is_file and member.size <= LONGEST_LABEL:
        stream.seek(member.offset)
        content = stream.read(member.size).strip()
    if member.is_file and not (content.isdigit() and len(content) <= 9):
        raise ValueError(f"{_shown(member.name)} does not hold the number of a class")
    return int(content or b"0")


def _check_pairs(images: dict[bytes, Member], labels: dict[bytes, int]) -> None:
    for key in images.keys() - labels.keys():
        raise ValueError(f"{_shown(images[key].name)} has no {_shown(key)}.cls with its class")
    for key in labels.keys() - images.keys():
        raise ValueError(f"{_shown(key)}.cls has no image beside it, such as {_shown(key)}.jpg")
    if not images:
        raise ValueError("it holds no image")


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _arrays(shard: Shard) -> _Arrays:
    offsets, sizes, labels = (
        np.array(values, dtype=np.int64) for values in (shard.offsets, shard.sizes, shard.labels)
    )
    names = np.frombuffer(b"".join(shard.names), dtype=np.uint8)
    ends = np.cumsum([len(name) for name in shard.names], dtype=np.int64)
    return _Arrays(shard.length, offsets, sizes, labels, names, ends)


def _joined(arrays: Sequence[_Arrays], shards: Sequence[str]) -> ShardIndex:
    empty = _Arrays(0, *(np.empty(0, dtype=np.int64),) * 3, np.empty(0, np.uint8), np.empty(0, int))
    parts = arrays or [empty]
    counts = [len(part.offsets) for part in arrays]
    before = np.cumsum([0, *(len(part.names) for part in parts)])
    return ShardIndex(
        shards=tuple(shards),
        shard_bytes=np.array([part.length for part in arrays], dtype=np.int64),
        first=np.cumsum([0, *counts], dtype=np.int64),
        offsets=np.concatenate([part.offsets for part in parts]),
        sizes=np.concatenate([part.sizes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        names=np.concatenate([part.names for part in parts]),
        name_ends=np.concatenate(
            [part.name_ends + start for part, start in zip(parts, before, strict=False)]
        ),
    )


def _of_type(tensors: dict[str, Any], name: str, dtype: type) -> Any:
    array = tensors[name]
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{name} is {array.dtype} {array.shape}")
    return array


def _check(index: ShardIndex) -> None:
    """Refuse arrays that do not belong together."""
    images, shards = len(index.offsets), len(index.shards)
    ends = np.concatenate([[0], index.name_ends])
    sound = (
        len(index.first) == shards + 1
        and len(index.shard_bytes) == shards
        and {len(index.sizes), len(index.labels), len(index.name_ends)} == {images}
        and index.first[0] == 0
        and index.first[-1] == images
        and (np.diff(index.first) > 0).all()
        and (np.diff(ends) >= 0).all()
        and ends[-1] == len(index.names)
        and not any(_leaves(name) for name in index.shards)
        and len(set(index.shards)) == shards
        and _within(index)
    )
    if not sound:
        raise ValueError("arrays that contradict each other")


def _within(index: ShardIndex) -> bool:
    """Return whether every image lies inside its archive; no sum can overflow."""
    limits = np.repeat(index.shard_bytes, index.images)
    return bool(
        (index.sizes >= 0).all()
        and (index.sizes <= limits).all()
        and (index.offsets >= 0).all()
        and (index.offsets <= limits - index.sizes).all()
        and (index.labels >= 0).all()
        and (index.labels < 10**9).all()
    )


def _leaves(name: str) -> bool:
    """Return whether the name of a shard could lead out of the root."""
    return name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/")
