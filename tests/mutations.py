"""Valid documents and files, broken in every way that fuzzing finds useful.

How many cases a test takes is in ``FUZZ_CASES``: few in CI, where the cases are the same every
time, and as many as wanted elsewhere.
"""

from __future__ import annotations

import copy
import os
import string
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from compress.errors import CompressError

CASES = int(os.environ.get("FUZZ_CASES", "200"))
MOST_LETTERS = 1000

fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
"""Decorates every test that takes mutations."""


def refused_in_a_sentence(read: Callable[[], object]) -> bool:
    """Whether an input is refused; anything but a short sentence of ours is a failure."""
    try:
        read()
    except CompressError as error:
        message = str(error)
        assert 10 < len(message) < MOST_LETTERS, len(message)
        assert message.isprintable(), ascii(message)
        return True
    return False


def deep(levels: int) -> Any:
    """Return lists inside each other."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HUGE = st.sampled_from(
    [2**31, 2**63, -(2**63), 2**64, 10**12, 10**30, 10**400, 1e308, 5e-324, -1, 0, -0.0, 0.5]
)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(alphabet=string.printable, max_size=20),
    st.sampled_from(
        [
            *("", "\x00", "\x1b[2J", "\u202e", "../../../etc/passwd", "/dev/zero", "C:\\", "a:b"),
            *("1e999", "nan", "-1", "0x10", "\u00b2", "--5", "macs=", "1,0", "os:abort"),
            *("x" * 100_000, "\U0001f600" * 5000, "a." * 5000, "\\" * 3000, "%s{}" * 9),
        ]
    ),
)
SCALARS = st.one_of(HUGE, NOT_FINITE, TEXTS, st.booleans(), st.none(), st.integers())
SHAPES = st.sampled_from(
    [{}, [], [[]], {"": 1}, {"a": {"a": {}}}, [0] * 10_000, {str(n): n for n in range(3000)}]
)
DEPTHS = st.sampled_from([5, 50, 150]).map(deep)
BOUNDS = st.sampled_from(
    [
        *(0, -1, 0.0, 2**31, 2**53, 2**63, 10**30, 10**400, 1e308, -1e308, 5e-324, 1e-9),
        *(float("nan"), float("inf"), float("-inf"), True, False, None),
        *("7", "0.5", "1e999", "nan", "yes", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00"),
        *("0001-01-01T00:00:00+14:00", "2026-02-30T00:00:00Z", "", " ", "x" * 5000, "\ud800"),
        *("\x1b[2J\x1b]0;owned\x07", "\x00\x9b31m\r\n", "\u202eSSAP\u202c", "\u2066x\u2069"),
        *(
            "# PASS\n\n| judged | verdict |\n|---|---|\n| all | PASS |",
            "![x](https://evil.example)",
        ),
        *("<script>alert(1)</script>", "]]>", "&lt;b&gt;", "[red]PASS[/red] [/]", "$\\frac{"),
    ]
)
"""What a forger puts in place of one text or one number."""
VALUES = st.one_of(BOUNDS, SCALARS, SHAPES.map(copy.deepcopy), DEPTHS)
"""What takes the place of a part of a document."""

DEEPEST_PLACE = 8


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value of a document."""
    entries: Any = ()
    if isinstance(document, dict):
        entries = document.items()
    elif isinstance(document, list):
        entries = enumerate(document[:40])
    found = [path] if path else []
    for key, value in entries if len(path) < DEEPEST_PLACE else ():
        found += places(value, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """Return a copy of a document with one to three of its values dropped, replaced or moved."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        known = places(changed)
        if not known:
            break
        *parents, last = draw(st.sampled_from(known))
        owner = changed
        for key in parents:
            owner = owner[key]
        match draw(st.sampled_from(["drop", "replace", "replace", "nest", "add", "swap"])):
            case "drop":
                del owner[last]
            case "replace":
                owner[last] = draw(VALUES)
            case "nest":
                owner[last] = {str(last): owner[last]} if draw(st.booleans()) else [owner[last]]
            case "add" if isinstance(owner, dict):
                owner[draw(TEXTS)] = draw(VALUES)
            case "add":
                owner.append(draw(VALUES))
            case _:
                source = draw(st.sampled_from(known))
                owner[last] = copy.deepcopy(at(changed, source))
    return changed


def at(document: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path; None where a mutation took it away."""
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return None
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes, *, head: int | None = None) -> bytes:
    """Return bytes that are cut off, flipped, repeated or overwritten in a few places.

    Most changes hit the first ``head`` bytes, where a file says what it is.
    """
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        last = max(len(changed) - 1, 0)
        most = min(last, head or last) if draw(st.integers(0, 3)) else last
        start = draw(st.integers(0, most))
        match draw(st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat"])):
            case "flip" if changed:
                changed[start] ^= 1 << draw(st.integers(0, 7))
            case "set":
                piece = draw(PIECES)
                changed[start : start + len(piece)] = piece
            case "cut":
                del changed[start:]
            case "insert":
                changed[start:start] = draw(PIECES)
            case "remove":
                del changed[start : start + draw(st.integers(1, 64))]
            case _:
                changed[start:start] = changed[start : start + draw(st.integers(1, 64))]
    return bytes(changed)


PIECES = st.one_of(
    st.binary(min_size=1, max_size=16),
    st.sampled_from(
        [
            *(b"\xff" * 8, b"\x00" * 8, b"[" * 2000, b"{" * 2000, b'"', b"\\ud800", b"\\u0000"),
            *(b"1e999", b"NaN", b"-Infinity", b"9" * 5000, b"0x" + b"f" * 5000, b"\xef\xbb\xbf"),
            *(b"=", b"a.b.c = 1\n", b"a." * 3000, b"[[a]]\n", b"\r", b"null", b"true", b"\xed\xa0"),
        ]
    ),
)
