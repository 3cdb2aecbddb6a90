"""One picture of ``compress oracle``: criteria compared, one against the truth, and by layer.

Drawn through matplotlib's objects, never through pyplot, so nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.networks.groups import ChannelGraph
from compress.oracle.correlation import Values
from compress.oracle.report import by_spearman
from compress.runs.plots import BLUE, FAINT, GREEN, ORANGE, write_figure

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BARS = {"layers": ("mean over layers", BLUE), "all": ("all layers", GREEN)}
WIDTH = 13.0
"""In inches; heights are in inches as well."""
ROW = 0.28
"""Height of one criterion."""
MOST_LABELS = 60
"""Layers that are named one by one."""


def plot_oracle(
    path: Path,
    criteria: Mapping[str, Any],
    graph: ChannelGraph,
    changes: Values,
    importances: Mapping[str, Values],
) -> None:
    """Draw bars, scatter and heat map, and write a PNG atomically.

    Args:
        path: the file.
        criteria: coefficients by criterion, as in ``correlation.json``.
        graph: the channel graph.
        changes: change of the loss by unit.
        importances: of each criterion, by unit.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    write_figure(path, draw_oracle(criteria, graph, changes, importances))


def draw_oracle(
    criteria: Mapping[str, Any],
    graph: ChannelGraph,
    changes: Values,
    importances: Mapping[str, Values],
) -> Figure:
    """Return the figure of ``plot_oracle``."""
    from matplotlib.figure import Figure

    names = by_spearman(criteria)
    shown = "taylor-gate" if "taylor-gate" in importances else names[0]
    height = max(3.6, 1.2 + 1.3 * ROW * len(names)), 2.2 + ROW * len(names)
    figure = Figure(figsize=(WIDTH, sum(height)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=height)
    _bars(figure.add_subplot(grid[0, 0]), criteria, names)
    _scatter(figure.add_subplot(grid[0, 1]), graph, np.square(changes), importances[shown], shown)
    _heat(figure.add_subplot(grid[1, :]), criteria, names)
    return figure


def _bars(axes: Axes, criteria: Mapping[str, Any], names: list[str]) -> None:
    rows = np.arange(len(names))
    for offset, (scope, (label, colour)) in zip((-0.2, 0.2), BARS.items(), strict=True):
        values = [criteria[name]["spearman"][scope] or 0.0 for name in names]
        axes.barh(rows + offset, values, height=0.38, color=colour, label=label)
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("Spearman's correlation with the squared change of the loss", fontsize=8)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.set_title("Criteria", loc="left", fontsize=10)


def _scatter(
    axes: Axes, graph: ChannelGraph, squares: Values, importance: Values, name: str
) -> None:
    hidden = 0
    for residual, label, colour in ((False, "not residual", BLUE), (True, "residual", ORANGE)):
        found = [group.units for group in graph.prunable if group.residual == residual]
        units = np.concatenate([np.zeros(0, np.int64), *found])
        positive = (squares[units] > 0) & (importance[units] > 0)  # others have no logarithm
        hidden += int(np.count_nonzero(~positive))
        units = units[positive]
        if len(units):
            x, y = squares[units], importance[units]
            axes.scatter(x, y, s=12, alpha=0.7, color=colour, linewidths=0, label=label)
    if axes.collections:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    axes.set_xlabel("squared change of the loss", fontsize=8)
    axes.set_ylabel("importance", fontsize=8)
    left_out = f" ({hidden} units at or below zero are not shown)" if hidden else ""
    axes.set_title(f"{name}, one point a unit{left_out}", loc="left", fontsize=10)


def _heat(axes: Axes, criteria: Mapping[str, Any], names: list[str]) -> None:
    from matplotlib import colormaps

    layers = list(criteria[names[0]]["spearman"]["by_layer"])
    values = np.array(
        [
            [np.nan if (v := criteria[n]["spearman"]["by_layer"][x]) is None else v for x in layers]
            for n in names
        ],
        dtype=np.float64,
    )
    colours = colormaps["BrBG"].with_extremes(bad="#BBBBBB")
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=-1, vmax=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    every = -(-len(layers) // MOST_LABELS)
    axes.set_xticks(
        range(0, len(layers), every), layers[::every], fontsize=7, rotation=45, ha="right"
    )
    if len(layers) <= 24:
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            ink = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axes.figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01)
    axes.set_title("Spearman's correlation by layer (grey: not defined)", loc="left", fontsize=10)
