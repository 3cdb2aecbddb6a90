"""Two pictures of a run: the channels that every group kept, and its course; and how all are drawn.

Drawn through matplotlib's objects, never through pyplot, so nothing global is touched. The colours
are those of Okabe and Ito, which people who see fewer colours tell apart as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from compress.files.atomic import write_atomically
from compress.networks import cost
from compress.networks.groups import ChannelGraph, Mask
from compress.terminal.sheet import short_count, unit_of

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, FAINT, PALE = "#222222", "#8C8C8C", "#F2F2F2"
SMALL, LARGE = 8, 10
"""Sizes of labels and of titles, in points."""

DPI = 120
MOST_PIXELS = 32_000
"""Highest picture; beyond it the resolution falls."""
WIDTH = 9.0
"""Of both pictures, in inches; heights are in inches as well."""
ROW = 0.2
"""Height of one group."""

MOST_MARKERS = 100
"""Points of a curve, above which they are not marked one by one."""
PHASES = {"train": "dense training", "prune": "pruning", "finetune": "finetuning"}


@dataclass(frozen=True)
class GroupWidths:
    """One group before and after pruning, in channels."""

    name: str
    dense: int
    kept: int
    residual: bool = False


@dataclass(frozen=True)
class Widths:
    """What pruning made of a network: its groups in the order of the network, and its costs."""

    architecture: str
    groups: tuple[GroupWidths, ...]
    dense: Mapping[str, int]
    """Costs of the dense network: ``macs`` of one image, ``params``, ``channels``."""
    now: Mapping[str, int]
    """The same of the pruned network."""


def widths_of(architecture: str, graph: ChannelGraph, kept: Mask) -> Widths:
    """Return what is drawn of a mask on a dense graph, as a run holds both."""
    groups = tuple(
        GroupWidths(
            group.name,
            dense=group.size * group.width,
            kept=int(np.count_nonzero(kept[group.units])) * group.width,
            residual=group.residual,
        )
        for group in graph.prunable
    )
    dense = cost.totals(graph, graph.everything())
    return Widths(architecture, groups, dense, cost.totals(graph, kept))


def plot_widths(path: Path, widths: Widths) -> None:
    """Draw the channels of every group, dense and kept, and write a PNG atomically.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    write_figure(path, draw_widths(widths))


def plot_history(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Draw loss, accuracy and MACs over the steps of a run, and write a PNG atomically.

    Nothing is written if there is nothing to draw.

    Args:
        path: the file.
        events: the lines of ``history.jsonl``.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    course = course_of(events)
    if course.end:
        write_figure(path, draw_history(course))


# Channels kept


def draw_widths(widths: Widths) -> Figure:
    """Return the figure of ``plot_widths``: one row per group, from the input down."""
    groups = widths.groups
    figure = new_figure(WIDTH, 1.7 + ROW * len(groups), _headline(widths))
    axes = figure.add_subplot()
    rows = range(len(groups))
    kept = draw_kept(axes, rows, groups, height=0.72, colours=(BLUE, ORANGE))
    for row, (group, text) in enumerate(zip(groups, kept, strict=True)):
        label = axes.annotate(text, (group.dense, row), (4, 0), textcoords="offset points")
        label.set(va="center", fontsize=7, color=INK, in_layout=False)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    widest = max((group.dense for group in groups), default=1)
    axes.set_xlim(0, 1.22 * widest)  # room for the label of the widest
    axes.set_xlabel("channels")
    _explain_colours(axes, any(group.residual for group in groups))
    plain_axes(axes, "x")
    axes.set_yticks(rows, [group.name for group in groups], fontsize=7)
    return figure


def draw_kept(
    axes: Axes,
    rows: Sequence[float],
    groups: Sequence[GroupWidths],
    *,
    height: float,
    colours: tuple[str, str],
) -> list[str]:
    """Draw a frame for what each group had and a bar for what it kept, and return both in words.

    Args:
        axes: to draw on.
        rows: where the bars of each group have their middle.
        groups: in the order of the network.
        height: of a bar, in rows.
        colours: of a group inside blocks, and of one in a residual stream.
    """
    dense, kept = [group.dense for group in groups], [group.kept for group in groups]
    filled = [colours[group.residual] for group in groups]
    axes.barh(rows, dense, height=height, color=PALE, edgecolor=FAINT, linewidth=0.6)
    axes.barh(rows, kept, height=height, color=filled)
    return [
        f"{group.kept:,} of {group.dense:,}, {100 * group.kept / group.dense:.0f} %"
        for group in groups
    ]


def _explain_colours(axes: Axes, residual: bool) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=BLUE, label="kept"),
        *([Patch(color=ORANGE, label="kept, residual stream")] if residual else []),
        Patch(facecolor=PALE, edgecolor=FAINT, linewidth=0.6, label="dense"),
    ]
    legend = plain_legend(axes, handles=patches, loc="lower left", ncols=3)
    legend.set_bbox_to_anchor((0, 1), transform=axes.transAxes)  # above the bars


def _headline(widths: Widths) -> str:
    names = {"macs": "MACs", "params": "parameters", "channels": "channels"}
    changes = [
        f"{name} {short_count(widths.dense[key])} \N{RIGHTWARDS ARROW} "
        f"{short_count(widths.now[key])} ({100 * widths.now[key] / widths.dense[key]:.1f} %)"
        for key, name in names.items()
        if widths.dense[key]
    ]
    return f"{widths.architecture}: channels kept in each group\n{'     '.join(changes)}"


# The course of a run


@dataclass(frozen=True)
class Course:
    """Curves over the steps of a whole run: those of pruning follow those of dense training.

    A curve is a table from step to value, so steps that a resumed run took twice count once.
    """

    loss: dict[int, float] = field(default_factory=dict)
    top1: dict[int, float] = field(default_factory=dict)
    masked: dict[int, float] = field(default_factory=dict)
    """Top-1 with what is removed set to zero, before BatchNorm statistics are estimated again."""
    macs: dict[int, float] = field(default_factory=dict)
    pruning_steps: set[int] = field(default_factory=set)
    ends: dict[str, int] = field(default_factory=dict)
    """The last step of each phase, in the order of the phases."""

    @property
    def end(self) -> int:
        """The last step of all."""
        return max(self.ends.values(), default=0)

    @property
    def macs_to_the_end(self) -> dict[int, float]:
        """The MACs, and that finetuning leaves them as they are."""
        return {**self.macs, self.end: self.macs[max(self.macs)]} if self.macs else {}


def course_of(events: Sequence[Mapping[str, Any]]) -> Course:
    """Gather the curves from a history; facts that are absent or not finite are left out."""
    course = Course()
    curves = {"loss": course.loss, "top1": course.top1, "macs": course.macs}
    curves["masked_top1"] = course.masked
    trained = max((e.get("step", 0) for e in events if e.get("phase") == "train"), default=0)
    for event in events:
        step = _position(event, trained, course)
        if step is None:
            continue
        for fact, curve in curves.items():
            if math.isfinite(event.get(fact, math.nan)):
                curve[step] = event[fact]
        if event["event"] == "prune_step":
            course.pruning_steps.add(step)
        phase = event.get("phase", "prune")
        course.ends[phase] = max(step, course.ends.get(phase, 0))
    return course


def draw_history(course: Course) -> Figure:
    """Return the figure of ``plot_history``: one panel per curve, over the same steps."""
    panels = [
        Panel("training loss", course.loss, BLUE, "{:.3f}".format),
        Panel("top-1 (%)", course.top1, GREEN, "{:.2f}".format),
        Panel("MACs left", course.macs_to_the_end, VERMILION, short_count),
    ]
    panels = [panel for panel in panels if panel.curve]
    figure = new_figure(WIDTH, 0.8 + 1.9 * len(panels))
    column = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        _shade_phases(axes, course, named=axes is column[0])
        _draw_curve(axes, panel)
        axes.set_ylabel(panel.title)
        plain_axes(axes, "y")
        if panel.curve is course.top1:
            _draw_masked(axes, course)
    if course.macs:
        column[-1].set_ylim(0, 1.1 * max(course.macs.values()))
        count_along(column[-1].yaxis)
    column[-1].set_xlim(0, 1.08 * course.end)  # room for the last values
    marked = "; orange marks are pruning steps" if course.pruning_steps else ""
    column[-1].set_xlabel(f"training steps{marked}", fontsize=SMALL)
    figure.align_ylabels()
    return figure


@dataclass(frozen=True)
class Panel:
    """One curve and how it is drawn."""

    title: str
    curve: Mapping[int, float]
    colour: str
    write: Callable[[float], str]
    """Puts the last value into words."""


def _position(event: Mapping[str, Any], trained: int, course: Course) -> int | None:
    """Return where an event lies on the axis of all steps, or None where it is of no step."""
    if "step" in event:
        return event["step"] + (0 if event.get("phase") == "train" else trained)
    return {"dense": trained, "pruned": course.end}.get(event["event"])


def _shade_phases(axes: Axes, course: Course, *, named: bool) -> None:
    """Shade every second phase, and mark the pruning steps at the bottom."""
    start, across = 0, axes.get_xaxis_transform()
    for number, (phase, end) in enumerate(course.ends.items()):
        if number % 2 == 0:
            axes.axvspan(start, end, color=PALE, linewidth=0, zorder=0)
        if named and end - start > 0.08 * course.end:  # else the name is wider than the phase
            middle, name = (start + end) / 2, PHASES.get(phase, phase)
            words = axes.text(middle, 1.03, name, transform=across, ha="center", color=FAINT)
            words.set_fontsize(SMALL)
        start = end
    marks = sorted(course.pruning_steps)
    axes.vlines(marks, 0, 0.05, transform=across, color=ORANGE, linewidth=1)


def _draw_curve(axes: Axes, panel: Panel) -> None:
    """Draw one curve, with its last value in words."""
    steps = sorted(panel.curve)
    values = [panel.curve[step] for step in steps]
    marker = "o" if len(steps) <= MOST_MARKERS else ""
    axes.plot(steps, values, color=panel.colour, linewidth=1.3, marker=marker, markersize=2.5)
    axes.margins(y=0.1)  # the marks of the pruning steps lie below
    last, text = (steps[-1], values[-1]), panel.write(values[-1])
    label = axes.annotate(text, last, (5, 0), textcoords="offset points")
    label.set(va="center", fontsize=SMALL, color=panel.colour)


def _draw_masked(axes: Axes, course: Course) -> None:
    """Mark the accuracy of the masked network below that of the pruned one at the same step."""
    for step, top1 in course.masked.items():
        above = course.top1.get(step, top1)
        axes.plot([step, step], [above, top1], ":", color=GREEN, linewidth=1.3, zorder=1)
        mark = axes.scatter([step], [top1], s=22, linewidth=1.2, zorder=3)
        mark.set(facecolor="white", edgecolor=GREEN)
        label = axes.annotate(
            f"masked {top1:.2f}", (step, top1), (6, -3), textcoords="offset points"
        )
        label.set(va="top", fontsize=SMALL, color=GREEN)


# How every picture is drawn


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure of a size in inches, with a title at its left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=LARGE, color=INK)
    return figure


def title_axes(axes: Axes, title: str) -> None:
    """Give one panel a title at its left."""
    axes.set_title(title, loc="left", fontsize=LARGE, color=INK)


def plain_axes(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    """Take the frames off, lay a faint grid under what is drawn, and write labels small."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=SMALL)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(SMALL)


def plain_legend(axes: Axes, **options: Any) -> Legend:
    """Say what is drawn, in small words without a frame; options are those of matplotlib."""
    return axes.legend(fontsize=SMALL, frameon=False, **options)


def count_along(axis: Axis) -> None:
    """Write the ticks of an axis as counts, all in the unit of the largest."""
    from matplotlib.ticker import FuncFormatter

    def written(value: float, position: int | None) -> str:
        scale, unit = unit_of(max(axis.get_view_interval()))
        return f"{value / scale:g}{unit}" if value else "0"

    axis.set_major_formatter(FuncFormatter(written))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    dpi = min(DPI, MOST_PIXELS / figure.get_figheight())
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
