"""How arrays reach the inputs of two networks."""

from __future__ import annotations

import numpy as np
import pytest

from bench.measuring.inputs import array_inputs, random_inputs
from bench.measuring.wiring import Wiring, wired
from compress.errors import ConfigError, DataError
from export.runners import TensorSpec
from export.runners.protocol import Shape

NAMES = ("a", "b")


def spec(name: str, *shape: int | str | None, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def test_by_name_before_by_order() -> None:
    ours = (spec("x", "n", 3), spec("y", "n", 3))
    theirs = (spec("y", "m", 3), spec("x", "m", 3))
    found = wired(ours, theirs, NAMES)
    assert found.names == {"x": "x", "y": "y"}
    renamed = wired(ours, (spec("p", "m", 3), spec("q", "m", 3)), NAMES)
    assert renamed.names == {"x": "p", "y": "q"}
    feeds = {"x": np.ones((2, 3), np.float32), "y": np.zeros((2, 3), np.float32)}
    assert list(renamed.for_pruned(feeds)) == ["p", "q"]
    assert renamed.for_pruned(feeds)["p"] is feeds["x"]


@pytest.mark.parametrize(
    "theirs",
    [
        (spec("x", "n", 4),),
        (spec("x", "n", 3, 1),),
        (spec("x", "n", 3, dtype="int64"),),
        (spec("x", "n", 3), spec("z", "n", 3)),
    ],
)
def test_what_one_array_does_not_serve(theirs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(DataError, match=r"a reads x float32 \(n, 3\) and b reads x"):
        wired((spec("x", "n", 3),), theirs, NAMES)


@pytest.mark.parametrize(
    ("ours", "theirs", "merged"),
    [
        ((None, 3, "h", "w"), ("n", 3, 8, 8), (None, 3, 8, 8)),
        (("n", "c", 8, 8), ("n", 3, "h", "w"), ("n", 3, 8, 8)),
    ],
)
def test_a_size_that_one_of_them_fixes_holds(ours: Shape, theirs: Shape, merged: Shape) -> None:
    (found,) = wired((spec("x", *ours),), (spec("x", *theirs),), NAMES).inputs
    assert found.shape == merged


def test_an_input_without_a_batch_is_fed_as_it_is() -> None:
    specs = (spec("x", "n", 2), spec("anchors", 5, 4))
    found = wired(specs, specs, NAMES)
    assert (found.batched, found.fixed) == ({"x"}, None)
    feeds = {"x": np.arange(6.0, dtype=np.float32).reshape(3, 2), "anchors": np.ones((5, 4))}
    repeated = found.repeated(feeds, 7)
    assert repeated["anchors"].shape == (5, 4)
    np.testing.assert_array_equal(repeated["x"], feeds["x"][[0, 1, 2, 0, 1, 2, 0]])
    drawn = next(random_inputs(found, seed=0).read(4))
    assert {name: array.shape for name, array in drawn.feeds.items()} == {
        "x": (4, 2),
        "anchors": (5, 4),
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "fixed"),
    [
        ((8, 2), ("n", 2), 8),
        (("n", 2), (8, 2), 8),
        ((8, 2), (8, 2), 8),
        (("n", 2), (None, 2), None),
    ],
)
def test_the_batch_that_either_fixes(ours: Shape, theirs: Shape, fixed: int | None) -> None:
    found = wired((spec("x", *ours),), (spec("x", *theirs),), NAMES)
    assert found.fixed == fixed
    assert found.batched == {"x"}
    assert found.batch_sizes(None, (1, 8), NAMES) == ((1, 8) if fixed is None else (8,))
    if fixed is not None:
        with pytest.raises(ConfigError, match="takes batches of 8 alone"):
            found.batch_sizes((1, 8), (1, 8), NAMES)


def test_who_does_not_say_takes_the_other_s() -> None:
    known = (spec("x", "n", 2),)
    for pair in ((None, known), (known, None)):
        assert wired(*pair, NAMES).inputs == known
    with pytest.raises(DataError, match="do not say what they read"):
        wired(None, None, NAMES)


def one(dtype: str = "float32") -> Wiring:
    return wired((spec("x", "n", 2, dtype=dtype),), (spec("x", "n", 2, dtype=dtype),), NAMES)


@pytest.mark.parametrize(
    ("dtype", "array", "words"),
    [
        ("float32", np.zeros((3, 3)), r"of shape \(3, 3\) and the networks read x float32"),
        ("float32", np.zeros((3, 2), int), "is int64 and the networks read x float32"),
        ("uint8", np.full((3, 2), 300), "holds numbers that uint8 does not"),
        ("int64", np.zeros((3, 2)), "is float64"),
        ("float32", np.zeros((0, 2)), "at least one"),
    ],
)
def test_arrays_that_do_not_fit(dtype: str, array: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        array_inputs({"x": array}, None, one(dtype))


@pytest.mark.parametrize("labels", [[0, 1], [0.5, 1, 2], [[0], [1], [2]]])
def test_labels_that_do_not_fit(labels: list[object]) -> None:
    with pytest.raises(DataError, match="one class index for each of 3 inputs"):
        array_inputs({"x": np.zeros((3, 2))}, labels, one())


def test_an_array_that_nobody_reads() -> None:
    with pytest.raises(DataError, match="mask is no input: the networks read x"):
        array_inputs({"x": np.zeros((3, 2)), "mask": np.zeros(3)}, None, one())
    with pytest.raises(DataError, match="there is no array 'x' for the input of that name, but y"):
        array_inputs({"y": np.zeros((3, 2))}, None, one())


def test_what_is_drawn_does_not_depend_on_the_batches() -> None:
    found = random_inputs(one(), seed=3, count=10)
    whole = next(found.read(10)).feeds["x"]
    parts = np.concatenate([batch.feeds["x"] for batch in found.read(4)])
    np.testing.assert_array_equal(whole, parts)
    assert abs(whole.mean()) < 1
    for dtype, most in (("uint8", 255), ("int64", 1), ("bool", 1)):
        drawn = next(random_inputs(one(dtype), seed=3, count=200).read(200)).feeds["x"]
        assert (drawn.dtype, drawn.min(), drawn.max() <= most) == (dtype, 0, True)
        assert drawn.max() > most // 2
