"""The picture of a sweep: accuracy against cost, as in Molchanov 2019, or against measured time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from compress.runs.plots import (
    BLUE,
    FAINT,
    INK,
    VERMILION,
    count_along,
    new_figure,
    plain_axes,
    plain_legend,
    write_figure,
)
from compress.sweep.labels import Label, place_labels
from compress.sweep.report import ON_FRONT, ON_TIME_FRONT, TIME, is_measured, top1_of

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = {1: (7.5, 4.8), 2: (11.0, 4.6)}
"""Of the picture by its panels, in inches."""
LEVEL = 0.95
"""Of the intervals of accuracies, as of those of times."""
BAR: dict[str, Any] = {"linewidth": 3, "alpha": 0.4, "zorder": 1.5}
AXES = {"macs": "MACs", "params": "parameters"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """A cost that networks are compared by."""

    title: str
    front: str
    """The key that says who is on the front."""
    cost_of: Callable[[Row], float]
    counted: bool
    """Whether it is a count and no time."""

    def bar_of(self, row: Row) -> tuple[float, float] | None:
        """Return the interval of a cost that was measured."""
        bounds = None if self.counted else row["latency"].get("measured_interval")
        if not bounds:
            return None
        scale = self.cost_of(row) / row["latency"][TIME]
        return bounds[0] * scale, bounds[1] * scale


def plot_sweep(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the finished networks of a sweep, and write a PNG atomically; nothing if there are none.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    if any(row["status"] == "done" for row in document["points"]):
        write_figure(path, draw_sweep(document))


def draw_sweep(document: Mapping[str, Any]) -> Figure:
    """Return the figure of ``plot_sweep``: time where that was measured, else MACs and parameters.

    Milliseconds are the measured share of the dense network's, which every point was measured
    beside: what slowed the machine for one point does not move it.
    """
    done = [row for row in document["points"] if row["status"] == "done"]
    config = document["asked"]["config"]
    panels = panels_of(document)
    against = "cost" if panels[0].counted else "time"
    title = f"{config['model']['name']}, {config['prune']['criterion']}: accuracy against {against}"
    figure = new_figure(*SIZES[len(panels)], title)
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels = [
        (axes, _draw_panel(axes, document["dense"], done, panel))
        for axes, panel in zip(drawn, panels, strict=True)
    ]
    images = document["dense"].get("images")
    told = f"; bars are {100 * LEVEL:g} % intervals, {images:,} images" if images else ""
    drawn[0].set_ylabel(f"top-1 after finetuning (%){told}")
    place_labels(figure, labels)
    return figure


def panels_of(document: Mapping[str, Any]) -> list[Panel]:
    """Return what is drawn from left to right."""
    if not is_measured(document):
        return [
            Panel(AXES[cost], key, itemgetter(cost), counted=True) for cost, key in ON_FRONT.items()
        ]
    dense_ms = document["dense"]["latency"]["measured_ms"]
    prune = document["asked"]["config"]["prune"]
    served = f"{prune['latency_runtime']}, {prune['latency_precision']}"
    return [
        Panel(
            f"milliseconds of a call, measured ({served}, batch {prune['latency_batch']})",
            ON_TIME_FRONT,
            lambda row: row["latency"][TIME] * dense_ms,
            counted=False,
        )
    ]


def _draw_panel(axes: Axes, dense: Row, done: Sequence[Row], panel: Panel) -> list[Label]:
    """Draw the networks, and return what is to be written beside them."""
    networks = (dense, *done)
    places = {row["name"]: (panel.cost_of(row), top1_of(row)) for row in networks}
    front = sorted(places[row["name"]] for row in networks if row[panel.front])
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.3, label="Pareto front", zorder=1)
    for label, on_front, colour in (("pruned", True, BLUE), ("pruned, beaten", False, FAINT)):
        shown = [row for row in done if row[panel.front] == on_front]
        if shown:
            costs, top1 = zip(*(places[row["name"]] for row in shown), strict=True)
            axes.scatter(costs, top1, s=26, color=colour, label=label, zorder=2)
        for row in shown:
            if bar := panel.bar_of(row):
                axes.hlines(places[row["name"]][1], *bar, **BAR, color=colour)
            _draw_accuracy_bar(axes, places[row["name"]], dense.get("images"), colour)
    at = places[dense["name"]]
    _draw_accuracy_bar(axes, at, dense.get("images"), VERMILION)
    axes.scatter([at[0]], [at[1]], s=44, marker="s", color=VERMILION, label="dense", zorder=2)
    ends = [end for row in done for end in panel.bar_of(row) or ()]
    axes.set_xlim(0, 1.1 * max(*ends, *(cost for cost, _ in places.values())))
    axes.margins(y=0.18)
    if panel.counted:
        count_along(axes.xaxis)
    axes.set_xlabel(panel.title)
    legend = plain_legend(axes, loc="lower left", ncols=4)
    legend.set_bbox_to_anchor((0, 1), transform=axes.transAxes)  # above whatever is drawn
    plain_axes(axes, "y")
    return [
        Label(_name_of(row), places[row["name"]], INK if row[panel.front] else FAINT)
        for row in sorted(networks, key=lambda row: not row[panel.front])
    ]


def _draw_accuracy_bar(
    axes: Axes, at: tuple[float, float], images: int | None, colour: str
) -> None:
    if images:
        low, high = wilson(at[1] / 100, images)
        axes.vlines(at[0], 100 * low, 100 * high, **BAR, color=colour)


def wilson(share: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of a share of so many trials: Wilson, JASA 22 (1927) 209-212."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    reach /= 1 + z * z / count
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def _name_of(row: Row) -> str:
    missed = ", missed" if row.get("missed") else ""
    return f"{row.get('budget', 'dense')}{missed}"
