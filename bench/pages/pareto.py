"""Accuracy against cost: the points of one report and of others, and which of them are best.

Only what compares is put side by side: accuracy on the same images, latency on the same machine.
Which networks no other one beats is decided as in a sweep, by ``pareto_front``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bench import units
from bench.pages.svg import PAPER, Plot, stacked_panels
from bench.reports.schema import NetworkRecord, Report
from bench.reports.summary import reference_name
from compress.runs.plots import BLUE, FAINT, GREEN, VERMILION
from compress.sweep.plan import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = int | None
"""A batch size, whose median latency in milliseconds is the cost; None for MACs per image."""


def pareto_plots(report: Report, others: Sequence[Report]) -> Iterator[Plot]:
    """Yield accuracy against latency and against MACs, where both are known.

    Args:
        report: what is drawn.
        others: reports whose networks join it.
    """
    compared = comparable(report, others)
    yield from _accuracy_against_latency(report, compared)
    yield from _accuracy_against_macs(report, compared)


@dataclass(frozen=True)
class Point:
    """One network: what it costs and what share of the images it gets right."""

    label: str
    """``dense`` and ``pruned`` of the report itself; a number for those of other reports."""
    role: Literal["reference", "pruned"]
    ours: bool
    """Whether it is of the report itself."""
    cost: float
    top1: float
    """In percent, as both ends of its bar are."""
    cost_bar: tuple[float, float] | None = None
    """Interval of the cost, by that of the ratio to the reference measured beside it."""
    top1_bar: tuple[float, float] | None = None
    """Interval of the accuracy, by that of the drop from the reference on the same images."""


def comparable(report: Report, others: Sequence[Report]) -> tuple[Report, ...]:
    """Return the other reports on the same validation images, without the report itself."""
    images = report.validation.identity
    return tuple(o for o in others if o.validation.identity == images and o != report)


def same_machine(report: Report, other: Report) -> bool:
    """Return whether latencies of two reports may stand in one plot."""
    return _machine(report) == _machine(other)


def points(
    report: Report, others: Sequence[Report], cost: Cost, reference_name: str
) -> tuple[Point, ...]:
    """Return every network with a cost and an accuracy; other reports count from 1.

    A reference that several reports share is one point.
    """
    drawn: set[tuple[object, ...]] = set()
    found: list[Point] = []
    for number, each in enumerate((report, *others)):
        if cost is not None and not same_machine(report, each):
            continue
        ours = "candidate" if report.against == "file" else "pruned"
        names = (ours, reference_name) if number == 0 else (str(number), str(number))
        reference = each.networks.reference
        key = (
            reference.onnx_sha256 or reference.weights_sha256,
            None if cost is None else (each.runtime, each.config.cuda_graph),
        )
        found += _pruned(each, cost, names[0], ours=number == 0)
        if key not in drawn:
            drawn.add(key)
            found += _reference(reference, cost, names[1], ours=number == 0)
    return tuple(found)


def frontier(found: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats, the cheapest first, one of equal ones."""
    unbeaten = pareto_front([(point.cost, point.top1) for point in found])
    best = {(p.cost, p.top1): p for p, is_best in zip(found, unbeaten, strict=True) if is_best}
    return tuple(best[place] for place in sorted(best))


def describe(report: Report, others: Sequence[Report]) -> tuple[str, ...]:
    """Return what tells each other report from the rest: MACs, and whatever else differs."""
    everyone = (report, *others)
    facts = list(zip(*map(_facts, everyone), strict=True))
    telling = [column for column in facts if len(set(column)) > 1]
    texts = [_share_of_macs(each) for each in everyone]
    texts = [", ".join((text, *rest)) for text, *rest in zip(texts, *telling, strict=True)]
    repeated = Counter(texts)
    return tuple(
        f"{text}, measured {each.created:%Y-%m-%d %H:%M:%S}" if repeated[text] > 1 else text
        for each, text in zip(everyone, texts, strict=True)
    )[1:]


def _machine(report: Report) -> tuple[object, ...]:
    found = report.environment
    return found.cpu, (found.gpu or {}).get("name"), found.threads


def _pruned(report: Report, cost: Cost, label: str, *, ours: bool) -> Iterator[Point]:
    network, reference = report.networks.pruned, report.networks.reference
    spent = _cost(network, cost)
    if spent is None or network.top1 is None:
        return
    yield Point(
        label=label,
        role="pruned",
        ours=ours,
        cost=spent,
        top1=100 * network.top1,
        cost_bar=_latency_bar(report, cost),
        top1_bar=_accuracy_bar(report, reference),
    )


def _reference(network: NetworkRecord, cost: Cost, label: str, *, ours: bool) -> Iterator[Point]:
    spent = _cost(network, cost)
    if spent is not None and network.top1 is not None:
        yield Point(label, "reference", ours, spent, 100 * network.top1)


def _cost(network: NetworkRecord, cost: Cost) -> float | None:
    if cost is None:
        return network.macs
    medians = {record.batch_size: record.summary.median_ms for record in network.latency}
    return medians.get(cost)


def _latency_bar(report: Report, cost: Cost) -> tuple[float, float] | None:
    for found in report.comparison.latency:
        if cost is not None and found.batch_size == cost:
            pruned = _cost(report.networks.pruned, cost)
            assert pruned is not None
            scale = pruned / found.ratio.ratio  # so that the point lies where the ratio does
            return found.ratio.low * scale, found.ratio.high * scale
    return None


def _accuracy_bar(report: Report, reference: NetworkRecord) -> tuple[float, float] | None:
    accuracy = report.comparison.accuracy
    if accuracy is None or reference.top1 is None:
        return None
    dense = 100 * reference.top1
    return dense - accuracy.drop.high_pp, dense - accuracy.drop.low_pp


def _share_of_macs(report: Report) -> str:
    ratio = report.comparison.macs_ratio
    return "MACs unknown" if ratio is None else f"{units.share(ratio)} of the MACs"


def _facts(report: Report) -> tuple[str, ...]:
    graph = ", CUDA graph" if report.config.cuda_graph else ""
    return (
        report.architecture or "unnamed",
        f"for {report.target}" if report.target else "for no target",
        report.precision or "unknown precision",
        f"{report.runtime}{graph}",
        f"against {report.against}",
        f"{report.environment.threads} threads",
    )


# Drawing


def _accuracy_against_latency(report: Report, others: Sequence[Report]) -> Iterator[Plot]:
    panels = {}
    for comparison in report.comparison.latency:
        size = comparison.batch_size
        if found := points(report, others, size, reference_name(report)):
            panels[f"batch {size}"] = found
    if panels:
        absent = sum(not same_machine(report, other) for other in others)
        apart = f" Left out here: {absent} measured on another machine." if absent else ""
        yield Plot(
            "accuracy-latency",
            "Accuracy against latency",
            _how_to_read(report, others) + apart,
            (_draw_pareto(panels, "median latency of a call (ms)", "{:g}".format),),
            describe(report, others),
        )


def _accuracy_against_macs(report: Report, others: Sequence[Report]) -> Iterator[Plot]:
    if found := points(report, others, None, reference_name(report)):
        yield Plot(
            "accuracy-macs",
            "Accuracy against MACs",
            _how_to_read(report, others),
            (_draw_pareto({"": found}, "multiply-adds per image", units.count),),
            describe(report, others),
        )


def _how_to_read(report: Report, others: Sequence[Report]) -> str:
    numbers = "; numbers stand for other reports, named below" if others else ""
    return (
        f"Up and to the left is better: full circles are pruned, open ones references{numbers}. "
        f"Bars are {units.level(report.config.confidence)} intervals of the difference from the "
        "reference, and the line joins the networks that no other one beats."
    )


def _draw_pareto(
    panels: dict[str, tuple[Point, ...]], label: str, write: Callable[[float], str]
) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, column = stacked_panels(len(panels), 2.4)
    for axes, (title, found) in zip(column, panels.items(), strict=True):
        right = 1.12 * max(max(point.cost, *(point.cost_bar or (0,))) for point in found)
        _draw_frontier(axes, frontier(found), right)
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


def _draw_frontier(axes: Axes, best: Sequence[Point], right: float) -> None:
    costs = [*(point.cost for point in best), right]
    accuracies = [*(point.top1 for point in best), best[-1].top1]
    axes.step(costs, accuracies, where="post", color=FAINT, linewidth=1.0, zorder=1.5)


def _draw_point(axes: Axes, point: Point) -> None:
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


def _write(axes: Axes, point: Point, offset: tuple[float, float], **style: Any) -> None:
    where = (point.cost, point.top1)
    label = axes.annotate(point.label, where, offset, textcoords="offset points", **style)
    label.set(zorder=4, in_layout=False)
