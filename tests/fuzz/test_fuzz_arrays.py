"""Files of arrays: whatever they hold, a sentence or the inputs of a network."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from mutations import damaged, fuzzed, refused_in_a_sentence

from bench.measuring.inputs import file_inputs
from bench.measuring.wiring import Wiring, wired
from export.runners import TensorSpec

ROWS = np.zeros((5, 2), np.float32)


def one_input() -> Wiring:
    specs = (TensorSpec("x", "float32", ("n", 2)),)
    return wired(specs, specs, ("a", "b"))


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, ROWS)
    return stream.getvalue()


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=ROWS, labels=np.arange(5))
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@fuzzed
@given(data=damaged(npy()))
def test_one_array_of_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "x.npy").write_bytes(data)
    refused_in_a_sentence(lambda: file_inputs(folder / "x.npy", one_input()))


@fuzzed
@given(data=damaged(npz()))
def test_several_arrays_of_any_bytes(folder: Path, data: bytes) -> None:
    (folder / "x.npz").write_bytes(data)
    refused_in_a_sentence(lambda: file_inputs(folder / "x.npz", one_input()))


def test_the_files_that_are_damaged_are_good(folder: Path) -> None:
    for name, data, kind in (("good.npy", npy(), "arrays"), ("good.npz", npz(), "labelled")):
        (folder / name).write_bytes(data)
        found = file_inputs(folder / name, one_input())
        assert (found.count, found.kind) == (5, kind)
