"""What a sweep decides by figures alone: which budgets come next, who is beaten. Pure functions.

The search is bisection over the share of the dense cost that is kept. Where several points are
tried at a time it cuts its interval into that many parts and one, instead of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from compress.config import Budget
from compress.files.documents import Section

DECIMALS = 4
"""Of the shares that a search tries."""
ROUNDING = 1e-9
"""A drop this far above the largest that is allowed comes from the subtraction, in points."""
RECORDED = 1e-4
"""Share by which figures of time in a run's header may be off: they have five digits."""


class Search(Section):
    """The smallest network whose accuracy falls no further than allowed."""

    model_config = ConfigDict(allow_inf_nan=False)

    max_drop: float = Field(ge=0, le=100)
    """Largest drop of the validation top-1 from the dense network's, in percentage points."""
    kind: Literal["macs", "params", "channels", "latency"] = "macs"
    """The cost whose share is searched."""
    lowest: float = Field(default=0.1, gt=0, lt=1)
    """The share below which nothing is tried."""
    tolerance: float = Field(default=0.02, ge=0.001, lt=1)
    """The search ends when the share is known this closely."""
    points: int | None = Field(default=None, ge=1)
    """Most networks that are pruned; default as many as the tolerance needs."""
    at_once: int = Field(default=1, ge=1)
    """Networks that are pruned at a time; fixed for the whole search, so that it can be resumed."""

    @model_validator(mode="after")
    def _check(self) -> Search:
        if self.tolerance >= 1 - self.lowest:
            raise ValueError(
                f"tolerance = {self.tolerance:g} is as wide as all shares from lowest = "
                f"{self.lowest:g} to 1: there is nothing to search"
            )
        return self

    def within(self, dense_top1: float, top1: float) -> bool:
        """Whether a network's accuracy is good enough; both in percent."""
        return dense_top1 - top1 <= self.max_drop + ROUNDING

    def budget(self, share: float) -> Budget:
        """Return the budget that a share stands for."""
        return Budget(kind=self.kind, value=share)


@dataclass(frozen=True)
class SearchState:
    """Where a search stands."""

    failed: float
    """The largest share that is known, or at first assumed, to be too small."""
    passed: float
    """The smallest share that is known to be enough; 1 is the dense network."""
    tried: tuple[float, ...]
    """The shares of all rounds that are complete, in their order."""
    next: tuple[float, ...]
    """The shares of the round that is not; none when the search is over."""


def search_state(search: Search, within: Mapping[float, bool]) -> SearchState:
    """Replay a search over what is known: the same facts give the same round, whatever happened.

    Args:
        search: what is searched for.
        within: for each share that was tried, whether the network is good enough.
    """
    failed, passed = search.lowest, 1.0
    tried: tuple[float, ...] = ()
    most = math.inf if search.points is None else search.points
    while passed - failed > search.tolerance + ROUNDING and len(tried) < most:
        shares = _cuts(failed, passed, search, most - len(tried))
        if not all(share in within for share in shares):
            return SearchState(failed, passed, tried, shares)
        tried += shares
        passed = min((share for share in shares if within[share]), default=passed)
        too_small = [share for share in shares if share < passed and not within[share]]
        failed = max(too_small, default=failed)
    return SearchState(failed, passed, tried, ())


def _cuts(failed: float, passed: float, search: Search, left: float) -> tuple[float, ...]:
    """Return shares that cut an interval evenly, no finer than the tolerance asks for."""
    width = passed - failed
    needed = math.ceil(width / search.tolerance - ROUNDING) - 1
    count = max(1, int(min(search.at_once, left, needed)))
    return tuple(
        round(passed - width * index / (count + 1), DECIMALS) for index in range(1, count + 1)
    )


def misses(budget: Budget, latency: Mapping[str, Any] | None) -> bool:
    """Whether a network was measured to take more than its budget of time, as its run judges.

    Args:
        budget: what was asked.
        latency: what its run records of its time; None where the budget is another cost.
    """
    if not latency or "measured_interval" not in latency:
        return False
    most = latency["measured_interval"][1]
    if budget.absolute:
        most *= latency["measured_ms"] / latency["measured_share"]
    return most > budget.value * (1 + RECORDED)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each point whether no other is at least as good in both and better in one.

    Args:
        points: (cost, accuracy) of each network: less cost and more accuracy are better. Of equal
            points either all or none are on the front.
    """
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(other: tuple[float, float], point: tuple[float, float]) -> bool:
    return other != point and other[0] <= point[0] and other[1] >= point[1]
