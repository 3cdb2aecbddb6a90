"""Accuracy against cost: the networks of one report and of others, each against its own reference.

Two measurements do not share their milliseconds, so what is drawn is what each of them measured
side by side: the ratio of costs, and the change of accuracy on the same images. Which networks no
other one beats is decided as in a sweep, by ``pareto_front``, where all had one reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bench import units
from bench.pages.beside import facts_of, same_images, same_machine
from bench.pages.svg import PAPER, Plot, fitted, stacked_panels
from bench.reports.schema import Report
from bench.reports.summary import reference_name
from compress.runs.plots import BLUE, FAINT, GREEN, VERMILION
from compress.sweep.labels import Label, place_labels
from compress.sweep.plan import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = int | None
"""A batch size, whose latency is the cost; None for MACs per image."""
Interval = tuple[float, float]

MARKER = 7.0
"""Width of a point, in points."""
RING = 6.0
"""By how much a point is wider than one that it would hide."""
_LETTERS = 16  # of a name in a plot
_WORDS = 8.5


def pareto_plots(reports: Mapping[str, Report]) -> Iterator[Plot]:
    """Yield accuracy against latency and against MACs, where both are known.

    Args:
        reports: what is drawn, by name; the page is about the first.
    """
    report = next(iter(reports.values()))
    alike = {other: each for other, each in reports.items() if same_images(report, each)}
    here = {other: each for other, each in alike.items() if same_machine(report, each)}
    names = {*map(reference_name, alike.values())}
    reference = names.pop() if len(names) == 1 else "reference"
    told = _left_out(len(reports) - len(alike), "on other images")
    panels = {}
    for comparison in report.comparison.latency:
        size = comparison.batch_size
        if found := points(here, size):
            panels[f"batch {size}"] = found
    if panels:
        apart = _left_out(len(alike) - len(here), "on another machine")
        yield _plot("latency", "latency", panels, here, reference, told + apart)
    if found := points(alike, None):
        yield _plot("macs", "MACs", {"": found}, alike, reference, told)


@dataclass(frozen=True)
class Point:
    """One network: what it costs and how many more images it gets right, against its reference."""

    label: str
    role: Literal["reference", "pruned"]
    ours: bool
    """Whether it is of the report that the page is about."""
    cost: float
    """Ratio to that of the reference."""
    gain: float
    """Of top-1, in percentage points."""
    cost_bar: Interval | None = None
    gain_bar: Interval | None = None


def points(reports: Mapping[str, Report], cost: Cost) -> tuple[Point, ...]:
    """Return every network with a ratio of costs and a change of accuracy, by its label."""
    found = [
        Point(label, "pruned", number == 0, ratio[0], gain[0], ratio[1], gain[1])
        for number, (label, report) in enumerate(reports.items())
        if (ratio := _cost(report, cost)) and (gain := _gain(report))
    ]
    return tuple(found)


def frontier(found: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats, the cheapest first, one of equal ones."""
    unbeaten = pareto_front([(point.cost, point.gain) for point in found])
    best = {(p.cost, p.gain): p for p, is_best in zip(found, unbeaten, strict=True) if is_best}
    return tuple(best[place] for place in sorted(best))


def _cost(report: Report, cost: Cost) -> tuple[float, Interval | None] | None:
    """Return a ratio, and its interval where it was measured."""
    if cost is None:
        ratio = report.comparison.macs_ratio
        return None if ratio is None else (ratio, None)
    ratios = {found.batch_size: found.ratio for found in report.comparison.latency}
    found = ratios.get(cost)
    return None if found is None else (found.ratio, (found.low, found.high))


def _gain(report: Report) -> tuple[float, Interval | None] | None:
    networks, accuracy = report.networks, report.comparison.accuracy
    if networks.pruned.top1 is None or networks.reference.top1 is None:
        return None
    if accuracy is None:
        return 100 * (networks.pruned.top1 - networks.reference.top1), None
    drop = accuracy.drop
    return -drop.drop_pp, (-drop.high_pp, -drop.low_pp)


def _joined(reports: Mapping[str, Report]) -> bool:
    """Whether all have one reference in one form, so that equal ratios are equal costs."""
    references = (report.networks.reference for report in reports.values())
    digests = {found.onnx_sha256 or found.weights_sha256 for found in references}
    return len(digests) == 1 and len({*map(facts_of, reports.values())}) == 1


# Drawing


def _plot(
    key: str,
    cost: str,
    panels: dict[str, tuple[Point, ...]],
    reports: Mapping[str, Report],
    reference: str,
    told: str,
) -> Plot:
    origin = Point(reference, "reference", True, 1.0, 0.0)
    shown = {title: (origin, *found) for title, found in panels.items()}
    # One network that beats all others is joined with none.
    joined = _joined(reports) and any(len(frontier(found)) > 1 for found in shown.values())
    figure = _draw_pareto(shown, f"{cost}, ratio to {reference}", joined=joined)
    level = units.level(next(iter(reports.values())).config.confidence)
    several = ": each network against its own, measured beside it" if len(reports) > 1 else ""
    line = " The line joins the networks that no other one beats." if joined else ""
    return Plot(
        f"accuracy-{key}",
        f"Accuracy against {cost}",
        f"Up and to the left is better. The open circle is {reference}{several}. Bars are {level} "
        f"intervals of the difference from it.{line}{told}",
        (figure,),
    )


def _left_out(count: int, why: str) -> str:
    return f" Left out here: {count} measured {why}." if count else ""


def _draw_pareto(panels: dict[str, tuple[Point, ...]], label: str, *, joined: bool) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, column = stacked_panels(len(panels), 2.4)
    drawn = []
    for axes, (title, found) in zip(column, panels.items(), strict=True):
        right = 1.12 * max(max(point.cost, *(point.cost_bar or (0,))) for point in found)
        if joined:
            _draw_frontier(axes, frontier(found), right)
        axes.set_title(title)
        axes.set_xlim(0, right)
        axes.set_ylim(*_gains(found))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.set_ylabel("top-1, change (pp)")
        axes.grid()
        drawn.append((axes, found))
    column[-1].set_xlabel(label)
    figure.draw_without_rendering()  # now it is known which points lie over others
    labels = [
        (axes, [_draw_point(axes, *each) for each in _sized(axes, found)]) for axes, found in drawn
    ]
    place_labels(figure, labels, _WORDS)
    return figure


def _gains(found: Sequence[Point]) -> tuple[float, float]:
    """Return the ends of an axis that holds all gains, with room for the names."""
    ends = [end for point in found for end in (point.gain, *(point.gain_bar or ()))]
    spare = 0.25 * (max(ends) - min(ends)) or 1.0
    return min(ends) - spare, max(ends) + spare


def _sized(axes: Axes, found: Sequence[Point]) -> Iterator[tuple[Point, float]]:
    """Yield each point and its width: wider than those that lie where it does, as a ring."""
    scale = axes.figure.dpi / 72
    places = axes.transData.transform([(point.cost, point.gain) for point in found]) / scale
    widths: list[float] = []
    for number, (point, place) in enumerate(zip(found, places, strict=True)):
        hidden = [
            width
            for width, other in zip(widths, places[:number], strict=True)
            if abs(place - other).max() < (width + MARKER) / 2
        ]
        widths.append(max(hidden) + RING if hidden else MARKER)
        yield point, widths[-1]


def _draw_frontier(axes: Axes, best: Sequence[Point], right: float) -> None:
    """Draw steps, corner by corner, so that names keep clear of what is really drawn."""
    costs = [point.cost for point in best for _ in range(2)][1:]
    gains = [point.gain for point in best for _ in range(2)]
    axes.plot([*costs, right], gains, color=FAINT, linewidth=1.0, zorder=1.5)


def _draw_point(axes: Axes, point: Point, width: float) -> Label:
    """Draw a point with its bars, and return what is to be written beside it."""
    pruned = point.role == "pruned"
    colour = GREEN if not point.ours else VERMILION if pruned else BLUE
    ring = width > MARKER
    axes.errorbar(
        point.cost,
        point.gain,
        xerr=_reach(point.cost, point.cost_bar),
        yerr=_reach(point.gain, point.gain_bar),
        marker="o" if point.ours else "s",
        markersize=width,
        markeredgewidth=1.5,
        color=colour,
        markerfacecolor="none" if ring else colour if pruned else PAPER,
        elinewidth=1.2,
        zorder=3 if point.ours else 2.5,
    )
    return Label(fitted(point.label, _LETTERS), (point.cost, point.gain), colour, width / 2 + 0.75)


def _reach(middle: float, bar: Interval | None) -> list[list[float]] | None:
    """Return how far a bar goes to either side, as matplotlib wants it."""
    return None if bar is None else [[max(middle - bar[0], 0)], [max(bar[1] - middle, 0)]]
