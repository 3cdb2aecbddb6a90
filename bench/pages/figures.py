"""The plots of the page: what is drawn of a report, and the sentences that say how to read it.

Drawn through matplotlib's objects, never through pyplot; ``bench.pages.svg`` puts it into the
page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import units
from bench.pages import bars, pareto
from bench.pages.svg import PAPER, WIDTH
from bench.reports.schema import LatencyRecord, NetworkRecord, Report
from bench.reports.summary import pruned_name, reference_name
from bench.statistics.stats import QUANTILES
from compress.runs.plots import BLUE, FAINT, GREEN, VERMILION

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.measuring.layer_records import LayerTimes

_STEPS = 100 * QUANTILES  # percent
_WIDE = 4.0  # times the fastest call, from which an axis of latencies is logarithmic
_WIDEST = 1e4  # times the left end of such an axis, at most; a coarse clock reads 0 at times


@dataclass(frozen=True)
class Plot:
    """One or more figures under one title."""

    key: str
    """Names it within the page."""
    title: str
    caption: str
    """How to read it."""
    figures: tuple[Figure, ...]
    numbered: tuple[str, ...] = ()
    """What the numbers in the figures stand for, from 1."""
    notes: tuple[str, ...] = ()
    """Sentences on what the figures show."""


def plots(report: Report, others: Sequence[Report] = ()) -> Iterator[Plot]:
    """Yield what can be drawn of a report; to be called inside ``bench.pages.svg.default_style``.

    Args:
        report: what is drawn.
        others: reports whose networks join the plots of accuracy against cost.
    """
    compared = pareto.comparable(report, others)
    yield from _accuracy_against_latency(report, compared)
    yield from _accuracy_against_macs(report, compared)
    if report.comparison.latency:
        yield _distributions(report)
        yield _course(report)
    if times := [found for found in report.layers if found.layers]:
        yield _layers(times, (reference_name(report), pruned_name(report)))
    if report.groups:
        yield _channels(report)


# Accuracy against cost


def _accuracy_against_latency(report: Report, others: Sequence[Report]) -> Iterator[Plot]:
    panels = {}
    for comparison in report.comparison.latency:
        size = comparison.batch_size
        if found := pareto.points(report, others, size, reference_name(report)):
            panels[f"batch {size}"] = found
    if panels:
        absent = sum(not pareto.same_machine(report, other) for other in others)
        apart = f" Left out here: {absent} measured on another machine." if absent else ""
        yield Plot(
            "accuracy-latency",
            "Accuracy against latency",
            _how_to_read(report, others) + apart,
            (_draw_pareto(panels, "median latency of a call (ms)", "{:g}".format),),
            pareto.describe(report, others),
        )


def _accuracy_against_macs(report: Report, others: Sequence[Report]) -> Iterator[Plot]:
    if found := pareto.points(report, others, None, reference_name(report)):
        yield Plot(
            "accuracy-macs",
            "Accuracy against MACs",
            _how_to_read(report, others),
            (_draw_pareto({"": found}, "multiply-adds per image", units.count),),
            pareto.describe(report, others),
        )


def _how_to_read(report: Report, others: Sequence[Report]) -> str:
    numbers = "; numbers stand for other reports, named below" if others else ""
    return (
        f"Up and to the left is better: full circles are pruned, open ones references{numbers}. "
        f"Bars are {units.level(report.config.confidence)} intervals of the difference from the "
        "reference, and the line joins the networks that no other one beats."
    )


def _draw_pareto(
    panels: dict[str, tuple[pareto.Point, ...]], label: str, write: Callable[[float], str]
) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, column = _panels(len(panels), 2.4)
    for axes, (title, found) in zip(column, panels.items(), strict=True):
        right = 1.12 * max(max(point.cost, *(point.cost_bar or (0,))) for point in found)
        _draw_frontier(axes, pareto.frontier(found), right)
        for point in found:
            _draw_point(axes, point)
        axes.set_title(title)
        axes.set_xlim(0, right)
        axes.margins(y=0.25)  # room for the names
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
        axes.set_ylabel("top-1 (%)")
        axes.grid()
    column[-1].set_xlabel(label)
    return figure


def _draw_frontier(axes: Axes, best: Sequence[pareto.Point], right: float) -> None:
    costs = [*(point.cost for point in best), right]
    accuracies = [*(point.top1 for point in best), best[-1].top1]
    axes.step(costs, accuracies, where="post", color=FAINT, linewidth=1.0, zorder=1.5)


def _draw_point(axes: Axes, point: pareto.Point) -> None:
    pruned = point.role == "pruned"
    colour = GREEN if not point.ours else VERMILION if pruned else BLUE
    axes.errorbar(
        point.cost,
        point.top1,
        xerr=_reach(point.cost, point.cost_bar),
        yerr=_reach(point.top1, point.top1_bar),
        marker="o",
        markersize=7 if point.ours else 10.5,
        markeredgewidth=1.5,
        color=colour,
        markerfacecolor=colour if pruned else PAPER,
        elinewidth=1.2,
        zorder=3 if point.ours else 2.5,
    )
    if not point.ours:
        style = {"ha": "center", "va": "center_baseline", "fontsize": 8}
        _write(axes, point, (0, 0), color=PAPER if pruned else colour, **style)
    elif pruned:
        _write(axes, point, (7, -6), ha="left", va="top", color=colour)
    else:
        _write(axes, point, (0, 8), ha="center", va="bottom", color=colour)


def _reach(middle: float, bar: tuple[float, float] | None) -> list[list[float]] | None:
    """Return how far a bar goes to either side, as matplotlib wants it."""
    return None if bar is None else [[max(middle - bar[0], 0)], [max(bar[1] - middle, 0)]]


def _write(axes: Axes, point: pareto.Point, offset: tuple[float, float], **style: Any) -> None:
    where = (point.cost, point.top1)
    label = axes.annotate(point.label, where, offset, textcoords="offset points", **style)
    label.set(zorder=4, in_layout=False)


# Latency


def _distributions(report: Report) -> Plot:
    networks, longest = report.networks, 0.0
    sizes = [found.batch_size for found in report.comparison.latency]
    figure, column = _panels(len(sizes), 2.4)
    for axes, size in zip(column, sizes, strict=True):
        shown = [
            (reference_name(report), BLUE, _latency(networks.reference, size)),
            (pruned_name(report), VERMILION, _latency(networks.pruned, size)),
        ]
        _draw_distributions(axes, shown)
        axes.set_title(f"batch {size}", pad=34)  # the legend has two lines
        longest = max(longest, *(record.summary.max_ms for _, _, record in shown))
    column[-1].set_xlabel("latency of a call (ms)")
    return Plot(
        "latency",
        "Latency of single calls",
        "The share of calls that took at most so long: further left is faster, steeper is "
        "steadier. Dots mark the median and p99, and the axis ends past p99; the slowest call of "
        f"all took {units.milliseconds(longest)}.",
        (figure,),
    )


def _draw_distributions(axes: Axes, shown: Sequence[tuple[str, str, LatencyRecord]]) -> None:
    for name, colour, record in shown:
        found = record.summary
        text = f"{name}: median {units.milliseconds(found.median_ms)}"
        text += f", p99 {units.milliseconds(found.p99_ms)}"
        axes.step(found.quantiles_ms, _STEPS, where="post", color=colour, linewidth=1.5, label=text)
        axes.plot([found.median_ms, found.p99_ms], [50, 99], "o", color=colour, markersize=4.5)
    fastest = min(record.summary.min_ms for _, _, record in shown)
    slowest = max(record.summary.p99_ms for _, _, record in shown)
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
    figure, column = _panels(len(report.comparison.latency), 1.5)
    for axes, comparison in zip(column, report.comparison.latency, strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        size = comparison.batch_size
        for label, colour, blocks in (
            (f"{name} again", FAINT, comparison.control_block_medians_ms),
            (name, BLUE, _latency(networks.reference, size).block_medians_ms),
            (pruned_name(report), VERMILION, _latency(networks.pruned, size).block_medians_ms),
        ):
            change = 100 * (np.asarray(blocks) / np.median(blocks) - 1)
            rounds = np.arange(1, len(blocks) + 1)
            axes.plot(rounds, change, ".-", color=colour, linewidth=1, markersize=3, label=label)
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


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.25 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


# Channels and layers


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
        bars.draw_channels(groups),
    )


def _layers(times: Sequence[LayerTimes], names: tuple[str, str]) -> Plot:
    from bench.measuring.layers import explain

    return Plot(
        "layers",
        "Time per layer",
        "The slowest layers first, each with its MACs per image: where both bars are alike, MACs "
        "were saved but no time.",
        tuple(bars.draw_layers(found, names) for found in times),
        notes=tuple(f"Batch {found.batch_size}: {explain(found)}" for found in times),
    )
