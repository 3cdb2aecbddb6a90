"""The picture of ``compress sweep``: accuracy against MACs and parameters, as in Molchanov 2019.

Drawn through matplotlib's objects, never through pyplot, so nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.runs.plots import BLUE, FAINT, INK, VERMILION, plain_axes, short_count, write_figure
from compress.sweep.document import ON_FRONT, top1_of

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (11.0, 4.4)
"""In inches."""
TITLES = {"macs": "MACs", "params": "parameters"}


def plot_sweep(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the finished networks of a sweep, and write a PNG atomically; nothing if there are none.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    if any(row["status"] == "done" for row in document["points"]):
        write_figure(path, draw_sweep(document))


def draw_sweep(document: Mapping[str, Any]) -> Figure:
    """Return the figure of ``plot_sweep``: one panel for each cost."""
    from matplotlib.figure import Figure

    done = [row for row in document["points"] if row["status"] == "done"]
    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(1, len(ON_FRONT), sharey=True)
    for axes, cost in zip(panels, ON_FRONT, strict=True):
        _draw_panel(axes, document["dense"], done, cost)
    panels[0].set_ylabel("top-1 after finetuning (%)", fontsize=8)
    config = document["asked"]["config"]
    title = f"{config['model']['name']}, {config['prune']['criterion']}: accuracy against cost"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def _draw_panel(
    axes: Axes, dense: Mapping[str, Any], done: Sequence[Mapping[str, Any]], cost: str
) -> None:
    from matplotlib.ticker import FuncFormatter

    key = ON_FRONT[cost]
    front = sorted((row[cost], top1_of(row)) for row in (dense, *done) if row[key])
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.3, label="Pareto front", zorder=1)
    for label, on_front, style in (("pruned", True, BLUE), ("pruned, beaten", False, FAINT)):
        shown = [(row[cost], top1_of(row)) for row in done if row[key] == on_front]
        if shown:
            costs, top1 = zip(*shown, strict=True)
            axes.scatter(costs, top1, s=26, color=style, label=label, zorder=2)
    at = dense[cost], top1_of(dense)
    axes.scatter([at[0]], [at[1]], s=44, marker="s", color=VERMILION, label="dense", zorder=2)
    for row in (dense, *done):
        place = (row[cost], top1_of(row))
        name = axes.annotate(
            row.get("budget", "dense"), place, (0, 6), textcoords="offset points", ha="center"
        )
        name.set(fontsize=7, color=INK if row[key] else FAINT)
    axes.set_xlim(0, 1.1 * dense[cost])
    axes.margins(y=0.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel(TITLES[cost], fontsize=8)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    plain_axes(axes, "y")
