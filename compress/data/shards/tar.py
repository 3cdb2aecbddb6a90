"""Where the files of a tar archive lie, read from its headers alone.

Formats: ustar and pax (POSIX.1-2017, utility ``pax``), GNU long names, numbers in base 256. Nothing
is ever written to disk, and names are never used as paths. Unlike Python's tarfile this reader
takes no damaged or cut archive for a short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LONGEST_EXTENSION = 2**20
"""Bytes of a long name or of pax records; more is damage, and would take memory."""

FILES = (b"0", b"\0", b"7")
DIRECTORY = b"5"
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, directories and pipes."""
LONG_NAME = b"L"
EXTENSIONS = (LONG_NAME, b"K", b"x", b"g")
SPARSE = b"S"


class Member(NamedTuple):
    """One entry of an archive."""

    name: bytes
    """As stored; it may be absolute or hold ``..``."""
    offset: int
    """Of its first byte in the archive."""
    size: int
    """In bytes."""
    is_file: bool
    """False for links, devices and whatever else has no contents of its own."""


class _Said(NamedTuple):
    """What extension headers say of the member after them."""

    name: bytes | None = None
    size: int | None = None


def members(stream: BinaryIO, length: int) -> Iterator[Member]:
    """Yield the members of an archive of ``length`` bytes but for its directories.

    Raises:
        ValueError: it is damaged or cut short; the message is a phrase about "it".
    """
    position, said = 0, _Said()
    while any(header := _read(stream, position, BLOCK, length)):
        _check_sum(header)
        kind = header[156:157]
        if kind == SPARSE:
            raise ValueError("it holds a sparse file")
        size = _number(header[124:136]) if said.size is None else said.size
        start = position + BLOCK
        position = start if kind in WITHOUT_DATA else start + -(-size // BLOCK) * BLOCK
        if kind in EXTENSIONS:
            content = _read(stream, start, _small(size), length)
            said = _extended(said, kind, content)
            continue
        if start + size > length and kind not in WITHOUT_DATA:
            raise ValueError("it is cut short")
        name, said = said.name or _name(header), _Said()
        # Before ustar a directory was a file whose name ends in a slash.
        if kind != DIRECTORY and not name.endswith(b"/"):
            yield Member(name, start, size, kind in FILES)
    _check_end(stream, position, length)


def _read(stream: BinaryIO, position: int, size: int, length: int) -> bytes:
    if position + size > length:
        raise ValueError("it is cut short")
    stream.seek(position)
    content = stream.read(size)
    if len(content) < size:
        raise ValueError("it is cut short")
    return content


def _check_sum(header: bytes) -> None:
    """Compare a header with its sum, for which the eight bytes of the sum count as blanks."""
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("it is no tar archive, or damaged")


def _number(field: bytes) -> int:
    """Read a number: octal digits, or binary where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not all(ord("0") <= digit <= ord("7") for digit in digits):
        raise ValueError("it is no tar archive, or damaged")
    return int(digits or b"0", 8)


def _small(size: int) -> int:
    if size > LONGEST_EXTENSION:
        raise ValueError("it holds a name of more than 1 MiB")
    return size


def _name(header: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    # GNU's header has other fields at the place of the prefix.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _extended(said: _Said, kind: bytes, content: bytes) -> _Said:
    if kind == LONG_NAME:
        return said._replace(name=content.rstrip(b"\0"))
    if kind not in (b"x", b"g"):
        return said
    records = dict(_records(content))
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise ValueError("it holds a sparse file")
    path, size = records.get(b"path"), records.get(b"size")
    if kind == b"g" and (path is not None or size is not None):
        raise ValueError("it gives one name or size to all its files")
    if path is not None:
        said = said._replace(name=path)
    return said if size is None else said._replace(size=_decimal(size))


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pairs of pax records, each ``LENGTH KEY=VALUE\\n`` with its length in all."""
    while content.strip(b"\0"):
        digits, blank, _ = content.partition(b" ")
        length = _decimal(digits)
        record = content[len(digits) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not blank or not equals or not value.endswith(b"\n"):
            raise ValueError("it has a damaged pax header")
        yield key, value[:-1]
        content = content[length:]


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise ValueError("it has a damaged pax header")
    return int(digits)


def _check_end(stream: BinaryIO, position: int, length: int) -> None:
    """Refuse an archive that goes on after its end: readers differ in whether they go on too."""
    while position < length:
        content = _read(stream, position, min(2**20, length - position), length)
        if any(content):
            raise ValueError("it goes on after its end: archives cannot be joined by appending")
        position += len(content)
