"""At which widths layers are measured, and which whole networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compress.latency.table import Widths, weight_bytes
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.layers import LayerCall, LayerShape

MOST_POINTS = 64
"""Of an axis of the grid; a wide layer has them at a multiple of the channel multiple."""
HOT_BYTES = 4e6
"""Weights of a layer that is measured by itself: they must stay in a cache between two calls, as
what is lost beyond it is lost by whole networks, and is told by them."""

_ROWS = 5  # widths that are read, of those measured
_COLUMNS = 9  # widths that are written, for each of these
_BRANCHES_LOST = 0.25


@dataclass(frozen=True)
class Span:
    """The widths that layers of one shape may have: both sides of layers that are alike."""

    read: Widths
    """Ascending; one alone where it never shrinks."""
    written: Widths
    """Ascending; of a layer whose groups go whole, those that belong to ``read``."""
    paired: bool = False
    """Whether the width that is written follows from the one that is read."""

    @property
    def cells(self) -> tuple[Widths, Widths]:
        """All pairs of widths."""
        if self.paired:
            return self.read, self.written
        read, written = np.meshgrid(self.read, self.written, indexing="ij")
        return read.ravel(), written.ravel()


def spans_of(graph: ChannelGraph, multiple: int) -> dict[LayerShape, tuple[Span, ...]]:
    """Return the widths that pruning in multiples can give to the layers of a network.

    Layers of one shape of which some have a side that never shrinks, as the first has, are spans of
    their own.
    """
    found: dict[LayerShape, dict[tuple[int, ...], Span]] = {}
    for layer in graph.layers:
        span = _span(graph, layer, multiple)
        kind = tuple(0 if len(side) > 1 else int(side[0]) for side in (span.read, span.written))
        spans = found.setdefault(layer.shape, {})
        spans[kind] = _joined(spans[kind], span) if kind in spans else span
    return {shape: tuple(spans.values()) for shape, spans in found.items()}


def _span(graph: ChannelGraph, layer: LayerCall, multiple: int) -> Span:
    frozen = np.zeros(graph.num_units, dtype=bool)
    for group in graph.frozen:
        frozen[group.units] = True
    dense = layer.widths(graph.everything())
    sides = (layer.reads, layer.writes)
    moves = [not isinstance(side, int) and not frozen[side].all() for side in sides]
    shape = layer.shape
    if shape.group_width:
        step = math.lcm(multiple, shape.group_width)
        read = _axis(dense[0], step) if moves[0] else np.array([dense[0]])
        read = read[read % shape.group_width == 0]
        return Span(read, read * dense[1] // dense[0], paired=True)
    step = math.lcm(multiple, shape.groups)
    read, written = (
        _axis(width, step) if free else np.array([width])
        for width, free in zip(dense, moves, strict=True)
    )
    return Span(read, written)


def _axis(dense: int, multiple: int) -> Widths:
    """Return multiples up to the dense width, which is always one of the points."""
    step = multiple
    while dense > MOST_POINTS * step:
        step *= 2
    return np.unique([min(multiple, dense), *range(step, dense + 1, step), dense])


def _joined(one: Span, other: Span) -> Span:
    if one.paired:
        return max(one, other, key=lambda span: int(span.read[-1]))
    return Span(np.union1d(one.read, other.read), np.union1d(one.written, other.written))


def sampled(shape: LayerShape, span: Span, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return the pairs of widths at which a layer is measured by itself.

    They lie dense where layers are narrow and stairs are steep, and hold every pair of a small
    layer. Of a large one those are left out whose weights no cache keeps.
    """
    read, written = span.cells
    small = weight_bytes(shape, read, written) <= HOT_BYTES
    if not small.any():
        small[np.argmin(weight_bytes(shape, read, written))] = True
    read, written = read[small], written[small]
    pairs: list[tuple[int, int]] = []
    for row in _spread(np.unique(read), _ROWS * (_COLUMNS if span.paired else 1)):
        columns = np.unique(written[read == row])
        pairs += [(int(row), int(column)) for column in _drawn(columns, rng)]
    return pairs


def _spread(values: Widths, count: int) -> Widths:
    """Return so many values or fewer, the smallest and the largest, in equal ratios between."""
    wanted = np.geomspace(values[0], values[-1], min(count, len(values)))
    return values[np.unique(np.abs(values[:, None] - wanted).argmin(0))]


def _drawn(values: Widths, rng: np.random.Generator) -> Widths:
    """Return the smallest and the largest value, and others at random, the small ones more often"""
    if len(values) < _COLUMNS:
        return values
    wanted = np.exp(rng.uniform(np.log(values[0]), np.log(values[-1]), _COLUMNS - 2))
    inner = values[np.abs(values[:, None] - wanted).argmin(0)]
    return np.unique([values[0], values[-1], *inner])


def smallest_mask(graph: ChannelGraph, multiple: int) -> Mask:
    """Return the mask of the smallest network in multiples."""
    return _mask(graph, multiple, dict.fromkeys((g.name for g in graph.prunable), 0.0), None)


def random_mask(graph: ChannelGraph, multiple: int, rng: np.random.Generator) -> Mask:
    """Return the mask of a random network in multiples.

    Its groups keep shares between half and one and a half times of one share, itself between 0.1
    and 1: networks of a sweep differ as much in size as in form. Every second network loses
    branches as well, one in four.
    """
    share = rng.uniform(0.1, 1.0)
    shares = {group.name: share * rng.uniform(0.5, 1.5) for group in graph.prunable}
    kept = _mask(graph, multiple, shares, rng)
    lost = _BRANCHES_LOST if rng.random() < 0.5 else 0.0
    for branch in graph.removable:
        kept[branch.unit] = rng.random() >= lost
    return graph.closed(kept)


def _mask(
    graph: ChannelGraph,
    multiple: int,
    shares: Mapping[str, float],
    rng: np.random.Generator | None,
) -> Mask:
    kept = graph.everything()
    for group in graph.prunable:
        step = group.units_per_multiple(multiple)
        steps = group.size // step
        fewest = max(1, math.ceil(group.fewest / step))
        if steps < fewest:
            continue
        left = step * int(np.clip(round(steps * shares[group.name]), fewest, steps))
        if left == step * steps:
            continue  # also what is more than a multiple stays
        units = group.units if rng is None else rng.permutation(group.units)
        kept[units[left:]] = False
    return kept
