"""Who came out where in a race: means, intervals, accuracy at equal time, pictures; for programs.

Accuracy at a share of the dense time lies between the two points next to it; means are over the
seeds, with 95 % intervals (Student), and so are the differences, each within one seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

AT = (0.4, 0.35, 0.3, 0.2)
"""Shares of the dense time at which ways are compared."""
STYLES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("o", {"color": "#0b5394", "alpha": 0.6}, "-"),
    ("s", {"color": "#b45f06", "alpha": 0.6}, "--"),
    ("^", {"color": "#444444", "alpha": 0.6}, ":"),
    ("v", {"color": "#38761d", "alpha": 0.6}, "-."),
    ("D", {"color": "#741b47", "alpha": 0.6}, "--"),
    ("P", {"color": "#bf9000", "alpha": 0.6}, ":"),
)
"""Marker, colour and line of a way, in turn."""


@dataclass(frozen=True)
class Point:
    """What came out."""

    way: str
    seed: int
    budget: float
    multiple: int
    macs: float
    blocks: int
    time: float
    """Share of the dense network's, measured."""
    low: float
    high: float
    predicted: float | None
    """What the latency table says of that share."""
    top1: float
    dense_ms: float | None = None
    """Of the same minutes; None in points that were kept before it was."""


def at_share(points: Sequence[Point], share: float) -> float | None:
    """Return the accuracy at a share of the time, on the line between the points next to it."""
    known = sorted({p.time: p.top1 for p in points}.items())
    if not known:
        return None
    times, top1 = zip(*known, strict=True)
    if not times[0] <= share <= times[-1]:
        return None
    return float(np.interp(share, times, top1))


def mean_and_interval(values: Sequence[float]) -> str:
    """Return the mean of a few seeds, and half the width of its 95 % interval (Student)."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def tell(points: Sequence[Point]) -> None:
    """Print all points, then ways beside each other at equal time."""
    seeds = sorted({p.seed for p in points})
    print("| way | budget | multiple | MACs | blocks gone | time | top-1 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for key in dict.fromkeys((p.way, p.budget, p.multiple) for p in points):
        same = [p for p in points if (p.way, p.budget, p.multiple) == key]
        macs, blocks, time = (
            statistics.mean(getattr(p, name) for p in same) for name in ("macs", "blocks", "time")
        )
        top1 = mean_and_interval([p.top1 for p in same])
        asked = f"{key[0]} | {key[1]:g} | {key[2]}"
        print(f"| {asked} | {macs:.3f} | {blocks:.1f} | {time:.3f} | {top1} |")
    known = [p.dense_ms for p in points if p.dense_ms is not None]
    if known:
        print(f"\nThe dense network took {min(known):.3f} to {max(known):.3f} ms.")
    first, *others = ways = list(dict.fromkeys(p.way for p in points))
    ahead = [f"{first} ahead of {way}" for way in others]
    print(f"\n| share of the dense time | {' | '.join([*ways, *ahead])} |")
    print("|---:|" + "---:|" * (len(ways) + len(others)))
    for share in AT:
        found = {
            way: [
                at_share([p for p in points if p.way == way and p.seed == seed], share)
                for seed in seeds
            ]
            for way in ways
        }
        cells = [_cell(found[way]) for way in ways]
        for way in others:
            pairs = zip(found[first], found[way], strict=True)
            cells.append(_cell([None if None in p else p[0] - p[1] for p in pairs]))  # type: ignore[operator]
        print(f"| {share:g} | {' | '.join(cells)} |")


def _cell(values: Sequence[float | None]) -> str:
    """Return mean and interval; a dash where a seed has no network on either side."""
    known = [value for value in values if value is not None]
    return mean_and_interval(known) if len(known) == len(values) else "-"


def plot_accuracy(path: Path, points: Sequence[Point]) -> None:
    """Draw top-1 over the share of the dense time: every network, and the means of each way."""
    with figure(path) as axes:
        for way, style in zip(dict.fromkeys(p.way for p in points), STYLES, strict=False):
            mine = [p for p in points if p.way == way]
            axes.plot([p.time for p in mine], [p.top1 for p in mine], style[0], **style[1], ms=4)
            asked = dict.fromkeys((p.budget, p.multiple) for p in mine)
            same = [[p for p in mine if (p.budget, p.multiple) == at] for at in asked]
            means = sorted(
                (statistics.mean(p.time for p in s), statistics.mean(p.top1 for p in s))
                for s in same
            )
            axes.plot(*zip(*means, strict=True), style[2], color=style[1]["color"], label=way)
        axes.set_xlabel("measured time, share of the dense network's")
        axes.set_ylabel("top-1, %")
        axes.legend(frameon=False)


def plot_prediction(path: Path, points: Sequence[Point]) -> None:
    """Draw what the table predicts over what was measured."""
    with figure(path) as axes:
        points = [p for p in points if p.predicted is not None]
        most = max((max(p.time, p.predicted or 0.0) for p in points), default=1.0) * 1.05
        axes.plot([0, most], [0, most], color="0.7", linewidth=1, zorder=0)
        for way, style in zip(dict.fromkeys(p.way for p in points), STYLES, strict=False):
            mine = [p for p in points if p.way == way]
            axes.plot(
                [p.time for p in mine], [p.predicted for p in mine], style[0], **style[1], label=way
            )
        axes.set_xlabel("measured time, share of the dense network's")
        axes.set_ylabel("predicted by the latency table")
        axes.legend(frameon=False)


@contextmanager
def figure(path: Path) -> Iterator[Any]:
    """Yield the axes of a small figure, which is written at the end."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
