"""Tar shards and their index: whatever they hold, a sentence or images inside the archive."""

from __future__ import annotations

import io
import tarfile

from hypothesis import given
from mutations import damaged, fuzzed, refused_in_a_sentence

from compress.data.shards.index import index_bytes, index_of, parsed_index, read_shard


def archive(form: int) -> bytes:
    """Return a shard of three samples, one with a name that needs an extension header."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as tar:
        for key, label in (("a", 0), ("folder/" + "b" * 120, 1), ("c", 2)):
            for extension, content in (("jpg", b"\xff\xd8 pixels"), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


GNU, PAX = archive(tarfile.GNU_FORMAT), archive(tarfile.PAX_FORMAT)
INDEX = index_bytes(index_of([read_shard(io.BytesIO(PAX), len(PAX), "train/a.tar")]))


def use_shard(data: bytes) -> None:
    shard = read_shard(io.BytesIO(data), len(data), "train/a.tar")
    for offset, size in zip(shard.offsets, shard.sizes, strict=True):
        assert 0 <= offset <= offset + size <= len(data)
    assert all(0 <= label < 10**9 for label in shard.labels)


def use_index(data: bytes) -> None:
    index = parsed_index(data, "index.safetensors")
    for image in range(len(index)):
        length = index.shard_bytes[index.shard_of(image)]
        assert 0 <= index.offsets[image] <= index.offsets[image] + index.sizes[image] <= length
        index.name_of(image)
    index.matching("train/*.tar").identity()


@fuzzed
@given(data=damaged(GNU, head=1536))
def test_a_shard_with_long_names_of_any_bytes(data: bytes) -> None:
    refused_in_a_sentence(lambda: use_shard(data))


@fuzzed
@given(data=damaged(PAX, head=1536))
def test_a_shard_with_pax_headers_of_any_bytes(data: bytes) -> None:
    refused_in_a_sentence(lambda: use_shard(data))


@fuzzed
@given(data=damaged(INDEX, head=len(INDEX) // 2))
def test_an_index_of_any_bytes(data: bytes) -> None:
    refused_in_a_sentence(lambda: use_index(data))


def test_what_is_whole_is_accepted() -> None:
    for data in (GNU, PAX):
        assert not refused_in_a_sentence(lambda data=data: use_shard(data))
    assert not refused_in_a_sentence(lambda: use_index(INDEX))
    assert refused_in_a_sentence(lambda: use_shard(PAX[:-2000]))
    assert refused_in_a_sentence(lambda: use_index(INDEX[:-1]))
