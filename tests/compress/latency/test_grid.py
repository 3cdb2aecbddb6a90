"""Grids: between their nodes as scipy has it, levelled as isotonic regression, packed and back."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator
from sklearn.isotonic import isotonic_regression

from compress.latency.grid import BEYOND, STEP, interpolated, never_falling, pack, unpack

NODES = [np.array(axis, float) for axis in ((1, 8, 32), (4, 7, 14, 28), (8, 16, 64, 96, 128))]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_between_nodes_it_is_what_scipy_finds_in_logarithms(rng: np.random.Generator) -> None:
    grid = rng.normal(size=[len(axis) for axis in NODES])
    at = [rng.uniform(axis[0], axis[-1], 200) for axis in NODES]
    theirs = RegularGridInterpolator([np.log(axis) for axis in NODES], grid)
    assert interpolated(grid, NODES, at) == pytest.approx(theirs(np.log(np.stack(at, axis=1))))


def test_ends_are_held_below_and_go_on_a_little_above() -> None:
    line, nodes = np.array([0.0, 1.0]), [np.array([8.0, 16.0])]
    most = 16 * BEYOND
    found = interpolated(line, nodes, [np.array([1.0, 8.0, most, most + 0.1])])
    assert found[:3] == pytest.approx([0, 0, 1 + np.log(BEYOND) / np.log(2)])
    assert np.isnan(found[3])


def test_a_node_that_does_not_count_may_be_unknown() -> None:
    line, nodes = np.array([0.0, 1.0, np.nan]), [np.array([8.0, 16.0, 32.0])]
    found = interpolated(line, nodes, [np.array([12.0, 16.0, 17.0])])
    assert np.isnan(found).tolist() == [False, False, True]


def test_small_falls_are_pooled_as_isotonic_regression_does(rng: np.random.Generator) -> None:
    noisy = np.linspace(0, 1, 60) + rng.normal(scale=0.02, size=60)
    found = never_falling(noisy, [0])
    assert np.all(np.diff(found) >= 0)
    assert np.abs(found - isotonic_regression(noisy)).max() < 0.02


def test_what_never_falls_is_left_as_it_is(rng: np.random.Generator) -> None:
    steady = np.cumsum(np.cumsum(rng.uniform(size=(5, 6)), axis=0), axis=1)
    assert never_falling(steady, [0, 1]) == pytest.approx(steady)


def test_a_slow_node_takes_the_time_of_a_larger_one() -> None:
    found = never_falling(np.array([0.0, 5.0, 1.0, 2.0]), [0])
    assert found[0] == 0
    assert found[1] == pytest.approx(1.0, abs=0.1)
    assert np.all(np.diff(found) >= 0)


def test_no_axis_falls_and_what_is_unknown_stays_so(rng: np.random.Generator) -> None:
    wild = rng.normal(size=(4, 5, 6))
    wild[2:, 3:, 1] = np.nan
    found = never_falling(wild, [0, 2])
    assert np.array_equal(np.isnan(found), np.isnan(wild))
    for axis in (0, 2):
        steps = np.diff(found, axis=axis)
        assert np.all(steps[~np.isnan(steps)] >= -1e-12)


def test_packing_changes_half_a_step_at_most(rng: np.random.Generator) -> None:
    grid = rng.uniform(-5, 5, size=(3, 4, 7))
    grid[0, 1, 3:] = np.nan
    back = unpack(pack(grid), grid.shape)
    known = ~np.isnan(grid)
    assert np.abs(back - grid)[known].max() <= STEP / 2 + 1e-9
    assert np.isfinite(back).all()


@pytest.mark.parametrize("data", [b"", b"nothing", pack(np.zeros((2, 3)))[:20]])
def test_damaged_numbers_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="numbers"):
        unpack(data, (2, 3))


def test_numbers_of_another_shape_are_refused() -> None:
    for shape in ((2, 2), (2, 4)):
        with pytest.raises(ValueError, match="bytes of numbers"):
            unpack(pack(np.zeros((2, 3))), shape)
