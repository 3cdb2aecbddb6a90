"""The plots of the page: what is drawn of a report, and the sentences that say how to read it.

Drawn through matplotlib's objects, never through pyplot; ``bench.pages.svg`` puts it into the
page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import units
from bench.measuring.records import GroupRecord, LayerFigures, LayerRecord, LayerTimes
from bench.pages.pareto import pareto_plots
from bench.pages.svg import PAPER, WIDTH, Plot, fitted, stacked_panels
from bench.reports.schema import LatencyRecord, NetworkRecord, Report
from bench.reports.summary import explain_layers, pruned_name, reference_name
from bench.statistics.latency_ratios import QUANTILES
from compress.runs.plots import BLUE, FAINT, GREEN, INK, ORANGE, VERMILION, GroupWidths, draw_kept

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 28
"""Groups of one figure; more go into several of equal length, to be set side by side."""
MOST_LAYERS = 25
"""Layers that are drawn one by one; the others are summed."""
_ROW = 0.33  # height of one row, in inches
_AROUND_CHANNELS, _AROUND_LAYERS = 0.55, 0.95  # what stands above and below the rows
_TEXT = -0.24  # where a row has its line of text, in rows from its middle
_ARROW = " \N{RIGHTWARDS ARROW} "
_BAR = 0.34  # height of a bar, in rows
_BELOW = 0.19  # where the bars of a row have their middle
# A frame beside a filled bar, as both colours are one grey on paper.
_FRAME: dict[str, Any] = {"facecolor": PAPER, "edgecolor": BLUE, "linewidth": 0.9}
_STEPS = 100 * QUANTILES  # percent
_WIDE = 4.0  # times the fastest call, from which an axis of latencies is logarithmic
_WIDEST = 1e4  # times the left end of such an axis, at most; a coarse clock reads 0 at times


def plots(report: Report, reports: Mapping[str, Report] | None = None) -> Iterator[Plot]:
    """Yield what can be drawn of a report; to be called inside ``bench.pages.svg.default_style``.

    Args:
        report: what is drawn.
        reports: it and others that it is compared with, by name, itself first; None for it alone.
    """
    yield from pareto_plots(reports or {pruned_name(report): report})
    if report.comparison.latency:
        yield _distributions(report)
        yield _course(report)
    if times := [found for found in report.layers if found.layers]:
        yield _layers(report, times)
    if report.groups:
        yield _channels(report)


# Latency


def _distributions(report: Report) -> Plot:
    networks, longest = report.networks, 0.0
    sizes = [found.batch_size for found in report.comparison.latency]
    figure, column = stacked_panels(len(sizes), 2.4)
    for axes, size in zip(column, sizes, strict=True):
        shown = [
            (reference_name(report), BLUE, "--", _latency(networks.reference, size)),
            (pruned_name(report), VERMILION, "-", _latency(networks.pruned, size)),
        ]
        _draw_distributions(axes, shown)
        axes.set_title(f"batch {size}", pad=34)  # the legend has two lines
        longest = max(longest, *(record.summary.max_ms for *_, record in shown))
    column[-1].set_xlabel("latency of a call (ms)")
    return Plot(
        "latency",
        "Latency of single calls",
        "The share of calls that took at most so long: further left is faster, steeper is "
        "steadier. Dots mark the median and p99, and the axis ends past p99; the slowest call of "
        f"all took {units.milliseconds(longest)}.",
        (figure,),
    )


def _draw_distributions(axes: Axes, shown: Sequence[tuple[str, str, str, LatencyRecord]]) -> None:
    for name, colour, dashes, record in shown:
        found = record.summary
        text = f"{name}: median {units.milliseconds(found.median_ms)}"
        text += f", p99 {units.milliseconds(found.p99_ms)}"
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.5}
        axes.step(found.quantiles_ms, _STEPS, where="post", label=text, **style)
        axes.plot([found.median_ms, found.p99_ms], [50, 99], "o", color=colour, markersize=4.5)
    fastest = min(record.summary.min_ms for *_, record in shown)
    slowest = max(record.summary.p99_ms for *_, record in shown)
    _scale_latency(axes, fastest, slowest)
    axes.set_ylim(0, 104)
    axes.set_yticks([0, 25, 50, 75, 99])
    axes.set_ylabel("calls (%)")
    axes.grid()
    legend = axes.legend(loc="lower left", borderaxespad=0, borderpad=0, handlelength=1.2)
    legend.set_bbox_to_anchor((0, 1.04), transform=axes.transAxes)  # above the curves


def _scale_latency(axes: Axes, fastest: float, slowest: float) -> None:
    """Show from the fastest call to just past p99; logarithmic where that is far."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if slowest > _WIDE * fastest:
        fastest = max(fastest, slowest / _WIDEST)
        axes.set_xscale("log")
        axes.set_xlim(fastest / 1.1, slowest * 1.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        spare = 0.06 * (slowest - fastest) or 0.05 * slowest
        axes.set_xlim(fastest - spare, slowest + spare)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _course(report: Report) -> Plot:
    from matplotlib.ticker import MaxNLocator

    networks, name = report.networks, reference_name(report)
    figure, column = stacked_panels(len(report.comparison.latency), 1.5)
    for axes, comparison in zip(column, report.comparison.latency, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        size = comparison.batch_size
        for label, colour, dashes, blocks in (
            (f"{name} again", FAINT, ":", comparison.control_block_medians_ms),
            (name, BLUE, "--", _latency(networks.reference, size).block_medians_ms),
            (pruned_name(report), VERMILION, "-", _latency(networks.pruned, size).block_medians_ms),
        ):
            change = 100 * (np.asarray(blocks) / np.median(blocks) - 1)
            rounds = np.arange(1, len(blocks) + 1)
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": label}
            axes.plot(rounds, change, marker=".", linewidth=1, markersize=3, **style)
        axes.set_title(f"batch {size}")
        axes.set_ylabel("change (%)")
        axes.grid(axis="y")
    handles, labels = column[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1.2)
    column[-1].set_xlabel("round")
    return Plot(
        "course",
        "Latency over the measurement",
        "How far the median of each block lay from the median of all blocks of its network: a "
        "slope is drift, and what moves all lines alike cancels in the ratio.",
        (figure,),
    )


def _latency(network: NetworkRecord, size: int) -> LatencyRecord:
    return next(record for record in network.latency if record.batch_size == size)


# Channels and layers: a row is a line of text with its bars below, so that long names leave the
# bars their width.


def _channels(report: Report) -> Plot:
    groups = report.groups
    dense, kept = sum(group.dense for group in groups), sum(group.kept for group in groups)
    residual = ", green in a residual stream," if any(group.residual for group in groups) else ""
    return Plot(
        "channels",
        "Channels kept per group",
        "A row is a group of channels that are pruned together, in the order of the network: the "
        f"frame is dense and the filled part{residual} was kept. Kept of all: {kept:,} of "
        f"{dense:,} channels, {units.share(kept / dense)}.",
        draw_channels(groups),
    )


def _layers(report: Report, times: Sequence[LayerTimes]) -> Plot:
    names = (reference_name(report), pruned_name(report))
    return Plot(
        "layers",
        "Time per layer",
        f"The slowest layers first, each with its MACs per image; the frame is {names[0]}, the "
        f"filled bar {names[1]}. Where both are alike, MACs were saved but no time.",
        tuple(draw_layers(found, names) for found in times),
        notes=tuple(
            f"Batch {found.batch_size}: {explain_layers(report, found)}" for found in times
        ),
    )


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
    patches = [Patch(**_FRAME, label=names[0]), Patch(color=VERMILION, label=names[1])]
    figure.legend(handles=patches, loc="outside upper left", ncols=2, handlelength=1.2)
    return figure


def _draw_channels(groups: Sequence[GroupRecord], widest: int) -> Figure:
    figure, axes = _rows(len(groups), _AROUND_CHANNELS)
    rows = [row + _BELOW for row in range(len(groups))]
    widths = [GroupWidths(g.name, g.dense, g.kept, g.residual) for g in groups]
    kept = draw_kept(axes, rows, widths, height=_BAR, colours=(VERMILION, GREEN))
    for row, (group, beside) in enumerate(zip(groups, kept, strict=True)):
        # Also in words, as green and vermilion are one grey on paper.
        name = fitted(group.name, 22) if group.residual else fitted(group.name)
        mark = "residual, " if group.residual else ""
        _write_row(axes, row, name, mark + beside, color=INK)
    axes.set_xlim(0, widest)
    axes.set_xlabel("channels")
    return figure


def _draw_times(axes: Axes, row: int, reference: float, pruned: float) -> None:
    half = _BAR / 2
    (frame,) = axes.barh(row + _BELOW - half / 2, reference, height=half, **_FRAME)
    if not reference:
        frame.set_linewidth(0)  # the line around nothing would be a bar
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
