"""Words beside the points of a picture, none over another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.runs.plots import FAINT

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

SIZE = 7
"""Of the words, in points."""
DISTANCES = (7, 18, 30, 44)
"""From a point to its words, in points; from the second on a line joins the two."""
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (-1, 1), (1, -1), (1, 1), (-1, -1))
HORIZONTAL = {-1: "right", 0: "center", 1: "left"}
VERTICAL = {-1: "top", 0: "center", 1: "bottom"}
MARKER = 4
"""Half the width of a point, in points."""


@dataclass(frozen=True)
class Label:
    """Words for one point."""

    text: str
    at: tuple[float, float]
    colour: str
    half: float = MARKER
    """Half the width of the point, in points."""


@dataclass(frozen=True)
class _Place:
    """Where the words of a point may stand."""

    distance: float
    direction: tuple[int, int]
    box: Bbox
    """In pixels."""
    line: Path
    """From the point to the words, in pixels."""
    joined: bool
    """Whether the line is drawn: they are not right beside it."""


def place_labels(
    figure: Figure, labels: Sequence[tuple[Axes, Sequence[Label]]], size: float = SIZE
) -> None:
    """Write words beside points where they hide neither points nor other words.

    Of several free places the nearest counts, one on a curve or a bar only if there is no other.
    Words for which there is none are left out.

    Args:
        figure: everything else is drawn on it.
        labels: for each panel, the most important first.
        size: of the words, in points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # now it is known where the panels lie
    for axes, its in labels:
        _place_in(axes, its, size, figure.dpi / 72)


def _place_in(axes: Axes, labels: Sequence[Label], size: float, scale: float) -> None:
    from matplotlib.transforms import Bbox

    points = axes.transData.transform([label.at for label in labels])
    halves = [label.half * scale for label in labels]
    markers = [
        Bbox.from_extents(x - half, y - half, x + half, y + half)
        for (x, y), half in zip(points, halves, strict=True)
    ]
    words: list[Bbox] = []
    curves = _curves_of(axes)
    for label, (x, y) in zip(labels, points, strict=True):
        free = [
            place
            for place in _places(x, y, *_size_of(axes, label.text, size), scale, label.half)
            if place.box.count_overlaps([*markers, *words]) == 0
            and _holds(axes.bbox, place.box)
            and not (place.joined and any(_crosses(place.line, box) for box in words))
        ]
        beside = (
            p for p in free if not any(_crosses(curve, p.box.padded(scale)) for curve in curves)
        )
        best = next(beside, free[0] if free else None)
        if best is not None:
            _write(axes, label, best, size)
            words.append(best.box)
            if best.joined:
                curves.append(best.line)


def _curves_of(axes: Axes) -> list[Path]:
    """Return what is drawn in lines, in pixels."""
    from matplotlib.collections import LineCollection

    paths = [line.get_path() for line in axes.lines]
    for each in axes.collections:
        if isinstance(each, LineCollection):
            paths += each.get_paths()
    return [path.transformed(axes.transData) for path in paths]


def _crosses(line: Path, box: Bbox) -> bool:
    return bool(line.intersects_bbox(box, filled=False))


def _size_of(axes: Axes, text: str, size: float) -> tuple[float, float]:
    """Return width and height of words in pixels."""
    words = axes.text(0, 0, text, fontsize=size, parse_math=False)
    box = words.get_window_extent()
    words.remove()
    return box.width, box.height


def _places(
    x: float, y: float, width: float, height: float, scale: float, half: float
) -> Iterator[_Place]:
    """Yield places around a point in pixels, the nearest first."""
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    for nearness, clear in enumerate(DISTANCES):
        distance = clear - MARKER + half
        for across, up in DIRECTIONS:
            end = x + across * distance * scale, y + up * distance * scale
            left, bottom = end[0] + (across - 1) / 2 * width, end[1] + (up - 1) / 2 * height
            box = Bbox.from_bounds(left, bottom, width, height)
            yield _Place(distance, (across, up), box, Path([(x, y), end]), joined=nearness > 0)


def _holds(outer: Bbox, inner: Bbox) -> bool:
    """Whether a box lies in another."""
    return bool(
        outer.x0 <= inner.x0
        and inner.x1 <= outer.x1
        and outer.y0 <= inner.y0
        and inner.y1 <= outer.y1
    )


def _write(axes: Axes, label: Label, place: _Place, size: float) -> None:
    across, up = place.direction
    line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    note = axes.annotate(
        label.text,
        label.at,
        (across * place.distance, up * place.distance),
        textcoords="offset points",
        ha=HORIZONTAL[across],
        va=VERTICAL[up],
        arrowprops=line if place.joined else None,
    )
    note.set(fontsize=size, color=label.colour, in_layout=False, parse_math=False)
