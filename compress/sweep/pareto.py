"""Which networks no other one beats. A pure function."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether no other is at least as good in both and better in one.

    Args:
        points: (cost, accuracy) of each network: less cost and more accuracy are better. Of equal
            points either all or none are on the front.
    """
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] >= point[1]
