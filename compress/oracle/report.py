"""What ``compress oracle`` shows: tables, for the terminal and as Markdown, and one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from compress.networks.groups import ChannelGraph
from compress.oracle.blocks import ESTIMATES
from compress.oracle.correlation import COEFFICIENTS, Values
from compress.runs.plots import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    SMALL,
    new_figure,
    plain_axes,
    plain_legend,
    title_axes,
    write_figure,
)
from compress.terminal.sheet import Sheet, fill, markdown_lines
from compress.terminal.table import TextTable
from compress.terminal.text import markdown

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCOPE_TITLES = {
    "layers": "mean over layers",
    "all": "all layers",
    "residual": "residual",
    "other": "not residual",
}
MEANING = {
    "spearman": "Spearman's rank correlation with the squared change of the loss",
    "kendall": "Kendall's tau-b with the squared change of the loss",
    "pearson": "Pearson's correlation with the squared change of the loss",
}
UNDEFINED = "-"

BARS = {"layers": ("mean over layers", BLUE), "all": ("all layers", GREEN)}
WIDTH = 13.0
"""In inches; heights are in inches as well."""
ROW = 0.28
"""Height of one criterion."""
MOST_LABELS = 60
"""Layers that are named one by one."""


def render_tables(document: Mapping[str, Any]) -> RenderableType:
    """Return what ``compress oracle`` prints."""
    parts: list[RenderableType] = [Text(_headline(document)), Text(_costs(document))]
    for sheet in _sheets(document):
        table = TextTable(
            title=sheet.title,
            title_justify="left",
            caption=Text("\n".join(sheet.notes)) if sheet.notes else None,
            caption_justify="left",
        )
        fill(table, sheet)
        parts += [Text(), table]
    return Stack(*parts)


def render_markdown(document: Mapping[str, Any]) -> str:
    """Return the same tables as a page."""
    lines = [f"# {markdown(_headline(document))}", "", markdown(_costs(document)), ""]
    for sheet in _sheets(document):
        lines += [*markdown_lines(sheet), ""]
        lines += [line for note in sheet.notes for line in (markdown(note), "")]
    return "\n".join(lines)


def units_csv(graph: ChannelGraph, changes: Values, importances: Mapping[str, Values]) -> str:
    """Return one row for each unit: its change of the loss, and its importance by each criterion.

    Args:
        graph: the channel graph.
        changes: change of the loss by unit.
        importances: of each criterion, by unit.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "unit", "residual", "loss_change", *importances])
    for group in graph.prunable:
        for index, unit in enumerate(group.units.tolist()):
            numbers = [changes[unit], *(values[unit] for values in importances.values())]
            row = [group.name, index, int(group.residual), *(f"{x:.9g}" for x in numbers)]
            writer.writerow(row)
    return text.getvalue()


def by_spearman(criteria: Mapping[str, Any]) -> list[str]:
    """Return the names of the criteria, the highest mean over layers first."""

    def place(name: str) -> float:
        value = criteria[name]["spearman"]["layers"]
        return np.inf if value is None else -value

    return sorted(criteria, key=place)


def _headline(document: Mapping[str, Any]) -> str:
    images = document["images"]
    return (
        f"{document['architecture']}: importance against the true change of the loss, "
        f"{images['count']:,} images ({images['split']})"
    )


def _costs(document: Mapping[str, Any]) -> str:
    cost = document["cost"]
    return (
        f"{cost['units']:,} units removed one at a time, at the cost of "
        f"{cost['forward_passes']:,.0f} forward passes per image; "
        f"loss of the dense network {document['dense_loss']:.4g}"
    )


def _sheets(document: Mapping[str, Any]) -> list[Sheet]:
    criteria = document["criteria"]
    names = by_spearman(criteria)
    header = ("criterion", *SCOPE_TITLES.values())
    sheets = []
    for coefficient in COEFFICIENTS:
        found = {name: criteria[name][coefficient] for name in names}
        rows = tuple(
            (name, *(_number(found[name][scope]) for scope in SCOPE_TITLES)) for name in names
        )
        sheets.append(Sheet(MEANING[coefficient], header, rows, _notes(found)))
    if document.get("blocks"):
        sheets.append(_block_sheet(document["blocks"]))
    if document["pairs"]:
        sheets.append(_pair_sheet(document["pairs"]))
    return sheets


def _notes(found: Mapping[str, Any]) -> tuple[str, ...]:
    missing = {
        name: sum(value is None for value in each["by_layer"].values())
        for name, each in found.items()
    }
    left_out = ", ".join(f"{n} of {name}" for name, n in missing.items() if n)
    notes = []
    if any(each[scope] is None for each in found.values() for scope in SCOPE_TITLES):
        notes.append(f"{UNDEFINED}: not defined, because there are under 3 units or all are equal.")
    if left_out:
        notes.append(f"Left out of the mean, for the same reason: {left_out} layers.")
    return tuple(notes)


def _block_sheet(blocks: Mapping[str, Any]) -> Sheet:
    rows = tuple(
        (
            block["name"],
            f"{block['loss_change']:+.3g}",
            f"{block['loss_change'] ** 2:.3g}",
            *(f"{block[name]:.3g}" for name in ESTIMATES),
        )
        for block in blocks["blocks"]
    )
    notes = [
        f"{title}: Spearman {_number(found['spearman'])}, the squared change is "
        f"{_times(found['scale'])} it (median)."
        for name, title in ESTIMATES.items()
        for found in (blocks["estimates"][name],)
    ]
    scales = blocks["scales"]
    if "halves" in scales:
        notes.append(
            f"Of single channels the squared change is {_times(scales['channels'])} taylor-gate's "
            f"importance, of the lesser half of a group {_times(scales['halves'])} its sum."
        )
    if "halves_of_parts" in scales:
        notes.append(
            f"Of the lesser half of a group it is {_times(scales['halves_of_parts'])} the squared "
            "sum of taylor-parts, which that of blocks compares with: the currency in which both "
            "compete."
        )
    header = ("block", "change of the loss", "squared", *ESTIMATES)
    return Sheet("Blocks: the change of the loss, and what foresees it", header, rows, tuple(notes))


def _times(scale: float | None) -> str:
    return UNDEFINED if scale is None else f"{scale:.3g} times"


def _pair_sheet(pairs: Mapping[str, Any]) -> Sheet:
    several = pairs["scope"] == "all"
    rows = tuple(
        (
            pick["by"],
            " + ".join(
                f"{group} {unit}" if several else f"{unit}" for group, unit in pick["units"]
            ),
            f"{pick['loss_change']:+.3g}",
            f"{pick['regret']:.3g}",
            f"{pick['rank']:,}",
        )
        for pick in (pairs["best"], *pairs["picks"])
    )
    note = (
        "The sum of the two single changes against the change of the pair: Pearson "
        f"{_number(pairs['sum_pearson'])}, Spearman {_number(pairs['sum_spearman'])}."
    )
    title = f"The best of {pairs['count']:,} pairs ({pairs['scope']}), and who would choose what"
    header = ("chosen by", "units", "change of the loss", "regret", "rank")
    return Sheet(title, header, rows, (note,))


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


# The picture


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
    names = by_spearman(criteria)
    shown = "taylor-gate" if "taylor-gate" in importances else names[0]
    height = max(3.6, 1.2 + 1.3 * ROW * len(names)), 2.2 + ROW * len(names)
    figure = new_figure(WIDTH, sum(height))
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
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("Spearman's correlation with the squared change of the loss")
    plain_legend(axes, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    title_axes(axes, "Criteria")
    plain_axes(axes, "x")


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
        plain_legend(axes, loc="upper left")
    axes.set_xlabel("squared change of the loss")
    axes.set_ylabel("importance")
    left_out = f" ({hidden} units at or below zero are not shown)" if hidden else ""
    title_axes(axes, f"{name}, one point a unit{left_out}")
    plain_axes(axes, "both")


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
    axes.set_yticks(range(len(names)), names, fontsize=SMALL)
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
    title_axes(axes, "Spearman's correlation by layer (grey: not defined)")
