"""Figures of many rows: the channels of every group, and the time of every layer.

A row is a line of text with its bars below, so that long names leave the bars their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import units
from bench.pages.svg import WIDTH, fitted
from bench.reports.schema import GroupRecord
from compress.runs.plots import BLUE, FAINT, GREEN, INK, ORANGE, PALE, VERMILION

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.measuring.layer_records import LayerFigures, LayerRecord, LayerTimes

MOST_ROWS = 28
"""Groups of one figure; more go into several of equal length, to be set side by side."""
MOST_LAYERS = 25
"""Layers that are drawn one by one; the others are summed."""
_ROW = 0.33  # height of one row, in inches
_AROUND_CHANNELS, _AROUND_LAYERS = 0.55, 0.95  # what stands above and below the rows
_TEXT = -0.24  # where a row has its line of text, in rows from its middle
_ARROW = " \N{RIGHTWARDS ARROW} "
_BAR = 0.34
_BELOW = 0.19  # where the bars of a row have their middle  # height of a bar, in rows


def draw_channels(groups: Sequence[GroupRecord]) -> tuple[Figure, ...]:
    """Draw the channels of every group, dense and kept, all figures to one scale."""
    each = math.ceil(len(groups) / math.ceil(len(groups) / MOST_ROWS))
    widest = max(group.dense for group in groups)
    parts = [groups[start : start + each] for start in range(0, len(groups), each)]
    return tuple(_draw_channels(part, widest) for part in parts)


def draw_layers(times: LayerTimes, names: tuple[str, str]) -> Figure:
    """Draw the time of the slowest layers in both networks, and of all others together.

    Args:
        times: of one batch size.
        names: of the reference and the pruned network.
    """
    from matplotlib.patches import Patch

    ordered = sorted(times.layers, key=_longest, reverse=True)
    shown, others = ordered[:MOST_LAYERS], ordered[MOST_LAYERS:]
    figure, axes = _rows(len(shown) + bool(others), _AROUND_LAYERS)
    for row, layer in enumerate(shown):
        _draw_times(axes, row, _milliseconds(layer.reference), _milliseconds(layer.pruned))
        name, beside, colour = _label(layer, times.multiple)
        _write_row(axes, row, name, beside, color=colour)
    if others:
        sums = (
            math.fsum(_milliseconds(layer.reference) for layer in others),
            math.fsum(_milliseconds(layer.pruned) for layer in others),
        )
        # No bars: next to those of a sum, the layers themselves would be too short to compare.
        beside = _ARROW.join(map(units.milliseconds, sums))
        _write_row(axes, len(shown), f"{len(others)} others together", beside, color=INK)
    axes.set_title(f"batch {times.batch_size}")
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds of a call")
    patches = [Patch(color=BLUE, label=names[0]), Patch(color=VERMILION, label=names[1])]
    figure.legend(handles=patches, loc="outside upper left", ncols=2, handlelength=1.2)
    return figure


def _draw_channels(groups: Sequence[GroupRecord], widest: int) -> Figure:
    figure, axes = _rows(len(groups), _AROUND_CHANNELS)
    rows = np.arange(len(groups)) + _BELOW
    colours = [GREEN if group.residual else VERMILION for group in groups]
    frame: dict[str, Any] = {"color": PALE, "edgecolor": FAINT, "linewidth": 0.6}
    axes.barh(rows, [group.dense for group in groups], height=_BAR, **frame)
    axes.barh(rows, [group.kept for group in groups], height=_BAR, color=colours)
    for row, group in enumerate(groups):
        share = 100 * group.kept / group.dense
        beside = f"{group.kept:,} of {group.dense:,}, {share:.0f} %"
        _write_row(axes, row, fitted(group.name), beside, color=INK)
    axes.set_xlim(0, widest)
    axes.set_xlabel("channels")
    return figure


def _draw_times(axes: Axes, row: int, reference: float, pruned: float) -> None:
    half = _BAR / 2
    axes.barh(row + _BELOW - half / 2, reference, height=half, color=BLUE)
    axes.barh(row + _BELOW + half / 2, pruned, height=half, color=VERMILION)


def _label(layer: LayerRecord, multiple: int) -> tuple[str, str, str]:
    """Return the name of a layer, what stands beside it, and the colour of both."""
    sides = (layer.reference, layer.pruned)
    macs = [units.count(side.macs) for side in sides if side and side.macs]
    beside = _ARROW.join(macs) + (" MACs" if macs else "")
    if not layer.misses_multiple:
        return fitted(layer.name), beside, INK
    mark = f"not x{multiple}"
    return fitted(layer.name, 22), ", ".join(filter(None, (mark, beside))), ORANGE


def _longest(layer: LayerRecord) -> float:
    return max(_milliseconds(layer.reference), _milliseconds(layer.pruned))


def _milliseconds(side: LayerFigures | None) -> float:
    return side.milliseconds if side else 0.0


def _rows(count: int, around: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, around + _ROW * count), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylim(count - 0.5, -0.6)
    axes.set_yticks([])
    axes.grid(axis="x")
    return figure, axes


def _write_row(axes: Axes, row: int, left: str, right: str, **style: Any) -> None:
    """Put a name at the left and figures at the right of the line above the bars of a row."""
    style = {
        "transform": axes.get_yaxis_transform(),
        "va": "center_baseline",
        "fontsize": 8.5,
        **style,
    }
    axes.text(0, row + _TEXT, left, ha="left", parse_math=False, **style)
    axes.text(1, row + _TEXT, right, ha="right", parse_math=False, **style)
