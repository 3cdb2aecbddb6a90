"""Grids of log milliseconds: looked up between nodes, made monotone, packed into few bytes."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Grid = NDArray[np.float64]
"""Natural logarithms of milliseconds, NaN where nothing near was measured."""

BEYOND = 1.25
"""How far past the last node a value may lie; the slope of the last step goes on there."""
STEP = 0.01
"""Of packed logarithms: half of it, 0.5 %, is the most that packing changes."""
_ZERO = -7.0  # the logarithm of a microsecond: packed codes count from there
_TOLERANCE = 0.1  # by so much a smaller layer may be slower and still be taken for noise
_ROUNDS = 60  # of pooling neighbours; what is left is settled exactly


def interpolated(grid: Grid, nodes: Sequence[NDArray], at: Sequence[NDArray]) -> NDArray:
    """Return a grid's values between its nodes, linear in the logarithms of all.

    A value below the first node counts as the first. So a grid that never falls along its axes
    gives values that never fall, either.

    Args:
        grid: one axis for each of ``nodes``.
        nodes: ascending positions along each axis.
        at: positions, one array for each axis; they are broadcast.

    Returns:
        NaN where a node that counts is NaN, or more than ``BEYOND`` past the last node.
    """
    corners = [_corner(known, np.asarray(where)) for known, where in zip(nodes, at, strict=True)]
    total: NDArray = np.zeros(np.broadcast_shapes(*(np.shape(where) for where in at)))
    for number in range(2 ** len(corners)):
        weight: NDArray = np.ones(())
        index = []
        for axis, (below, share) in enumerate(corners):
            upper = number >> axis & 1
            weight = weight * (share if upper else 1 - share)
            index.append(below + upper)
        total = total + np.where(weight == 0, 0.0, weight * grid[tuple(index)])
    return total


def _corner(nodes: NDArray, at: NDArray) -> tuple[NDArray, NDArray]:
    """Return the node below each position, and the share of the way to the next."""
    logs, where = np.log(nodes), np.log(np.maximum(at, nodes[0]))
    below = np.clip(np.searchsorted(logs, where, side="right") - 1, 0, len(nodes) - 2)
    share = (where - logs[below]) / (logs[below + 1] - logs[below])
    too_far = at > nodes[-1] * BEYOND
    return below, np.where(too_far, np.nan, share)


def never_falling(grid: Grid, axes: Sequence[int]) -> Grid:
    """Return a grid that never falls along some axes.

    A node that is slower than a larger one by more than noise gets the time of the larger, which
    padding reaches; smaller violations are pooled, as isotonic regression does.
    """
    known = ~np.isnan(grid)
    found = np.where(known, np.minimum(grid, _least_of_larger(grid, axes) + _TOLERANCE), np.nan)
    for _ in range(_ROUNDS):
        for axis in axes:
            _pool(np.moveaxis(found, axis, 0))
    low = np.where(known, found, -np.inf)
    for axis in axes:
        low = np.maximum.accumulate(low, axis)
    high = _least_of_larger(found, axes)
    return np.add(low, high, out=np.full(grid.shape, np.nan), where=known) / 2


def _least_of_larger(grid: Grid, axes: Sequence[int]) -> Grid:
    high = np.where(np.isnan(grid), np.inf, grid)
    for axis in axes:
        high = np.flip(np.minimum.accumulate(np.flip(high, axis), axis), axis)
    return high


def _pool(lines: Grid) -> None:
    """Give neighbours along the first axis that fall their mean, in place, first odd, then even."""
    for first in (0, 1):
        pairs = (len(lines) - first) // 2
        below, above = lines[first::2][:pairs], lines[first + 1 :: 2][:pairs]
        falls = below > above
        mean = (below + above) / 2
        below[falls], above[falls] = mean[falls], mean[falls]


def pack(grid: Grid) -> bytes:
    """Return a grid in few bytes; where it is NaN, ``unpack`` will give any number."""
    flat = _filled(grid.reshape(-1, grid.shape[-1]))
    codes = np.rint((flat - _ZERO) / STEP).astype(np.int16)
    steps = np.diff(codes, axis=1, prepend=np.int16(0)).astype("<i2")
    planes = steps.reshape(-1).view(np.uint8).reshape(-1, 2).T  # low bytes, then high ones
    return lzma.compress(planes.tobytes(), preset=9)


def unpack(data: bytes, shape: Sequence[int]) -> Grid:
    """Return a grid from what ``pack`` returned.

    Raises:
        ValueError: damaged, or of another shape.
    """
    count = int(np.prod(shape))
    try:
        planes = lzma.LZMADecompressor().decompress(data, 2 * count + 1)
    except lzma.LZMAError as error:
        raise ValueError("packed numbers are damaged") from error
    if len(planes) != 2 * count:
        raise ValueError(f"there are {len(planes)} bytes of numbers where {2 * count} belong")
    steps = np.frombuffer(planes, np.uint8).reshape(2, count).T.copy().view("<i2")
    codes = np.cumsum(steps.reshape(-1, shape[-1]), axis=1, dtype=np.int16)
    return codes.reshape(tuple(shape)).astype(np.float64) * STEP + _ZERO


def _filled(rows: NDArray) -> NDArray:
    """Return rows with each NaN replaced by the value before it, at the start by that after it."""
    index = np.where(np.isnan(rows), 0, np.arange(rows.shape[1]))
    forward = np.take_along_axis(rows, np.maximum.accumulate(index, axis=1), axis=1)
    first = np.argmin(np.isnan(rows), axis=1)
    start = np.take_along_axis(rows, first[:, None], axis=1)
    return np.nan_to_num(np.where(np.isnan(forward), start, forward), nan=_ZERO)
