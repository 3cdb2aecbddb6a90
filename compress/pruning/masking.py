"""Choose the units to remove: importance and a budget in, a mask out. Pure functions of arrays."""

from __future__ import annotations

import fnmatch
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.config import PruneConfig
from compress.errors import BudgetError, ConfigError, nearest
from compress.networks.groups import ChannelGraph, Mask, Removable, Units

Scores = NDArray[np.float64]
CostFunction = Callable[[Mask], float]

MOST_FINER = 32
"""How often at most a large chunk is left out to come closer to the limit."""


@dataclass(frozen=True)
class Candidate:
    """A group that may lose units: in chunks of ``chunk``, down to ``floor``; or a branch."""

    group: Removable
    floor: int
    chunk: int


def candidates(graph: ChannelGraph, limits: PruneConfig) -> tuple[Candidate, ...]:
    """Return the groups, and the branches, that may be pruned under the limits.

    The floor is the larger of both limits, rounded up so that widths stay multiples.

    Raises:
        ConfigError: a pattern of ``keep_dense`` or ``only`` matches no group and no branch.
    """
    names = [group.name for group in graph.groups] + [branch.name for branch in graph.branches]
    for key in ("keep_dense", "only"):
        for pattern in getattr(limits, key):
            if not fnmatch.filter(names, pattern):
                raise ConfigError(f"{key}: no group matches {pattern!r}: {nearest(pattern, names)}")

    def allowed(each: Removable) -> bool:
        wanted = not limits.only or _matches(each, limits.only)
        return wanted and not _matches(each, limits.keep_dense)

    found = []
    for group in filter(allowed, graph.prunable):
        chunk = group.units_per_multiple(limits.channel_multiple)
        floor = max(
            group.fewest,
            math.ceil(limits.min_channels / group.width),
            math.ceil(limits.min_share * group.size - 1e-9),
        )
        found.append(Candidate(group, min(group.size, math.ceil(floor / chunk) * chunk), chunk))
    branches = graph.removable if limits.with_blocks else ()
    return (*found, *(Candidate(branch, 0, 1) for branch in filter(allowed, branches)))


def _matches(group: Removable, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(group.name, pattern) for pattern in patterns)


def weighed_by_depth(scores: Scores, kept: Mask, graph: ChannelGraph) -> Scores:
    """Return scores in which a branch counts for more, the fewer are left.

    The change of the loss when a branch goes is foreseen well enough. What training brings back
    is not: the others take over what one of many did, and nothing takes over what the last one did
    (docs/milliseconds.md). So a branch counts for its importance times all branches by those left.

    Args:
        scores: (units,) importance.
        kept: the present mask.
        graph: of the dense network.
    """
    units = [branch.unit for branch in graph.removable]
    weighed = scores.copy()
    weighed[units] *= len(units) / max(1, int(np.count_nonzero(kept[units])))
    return weighed


def prune_to(
    scores: Scores,
    kept: Mask,
    allowed: Iterable[Candidate],
    *,
    cost_of: CostFunction,
    limit: float,
    least: float = 0.0,
) -> Mask:
    """Remove the least important chunks of all groups together until the cost fits.

    A chunk with which the cost would fall below ``least`` is left out, and those above it of its
    group, unless the limit cannot be held otherwise. What the last chunk made needless comes back.

    Args:
        scores: importance of every unit; units already removed are ignored.
        kept: the present mask.
        allowed: where units may be removed.
        cost_of: a cost that never rises when a unit is removed.
        limit: the largest cost allowed.
        least: costs below are not wanted.

    Returns:
        The mask with the fewest removals, in order of importance, whose cost is at most ``limit``.

    Raises:
        BudgetError: the cost stays above ``limit`` when everything that may go is gone.
    """
    ranking = _ranking(scores, kept, allowed)
    best, last = _within(ranking, kept, cost_of, limit)
    for _ in range(MOST_FINER):
        if last is None or cost_of(best) >= least:
            break
        ranking = ranking.without(last)
        try:
            found, last = _within(ranking, kept, cost_of, limit)
        except BudgetError:
            break
        best = max(best, found, key=cost_of)
    return best


def _within(
    ranking: _Ranking, kept: Mask, cost_of: CostFunction, limit: float
) -> tuple[Mask, int | None]:
    """Return a mask within the limit, and which chunk was the last that had to go."""

    def without(chunks: int) -> Mask:
        return ranking.mask(kept, chunks)

    everything = len(ranking.group)
    if (closest := cost_of(without(everything))) > limit:
        raise BudgetError(
            f"the cost cannot fall to {limit:g}: with every group at its floor it is {closest:g}"
        )
    # The cost is monotone in the number of chunks removed.
    removed = bisect_left(
        range(everything), True, key=lambda chunks: cost_of(without(chunks)) <= limit
    )
    if not removed:
        return without(0), None
    last = removed - 1
    needed = bisect_left(
        range(last), True, key=lambda chunks: cost_of(ranking.mask(kept, chunks, last)) <= limit
    )
    return ranking.mask(kept, needed, last), last


def smallest(graph: ChannelGraph, allowed: Iterable[Candidate]) -> Mask:
    """Return a mask with every group at its floor: the closest that any budget can come."""
    kept = graph.everything()
    for candidate in allowed:
        kept[candidate.group.units[candidate.floor :]] = False
    return graph.closed(kept)


@dataclass(frozen=True)
class _Ranking:
    """What may go, in chunks, the least important first."""

    units: Units
    chunk: Units
    """(units,) the number of each unit's chunk, ascending."""
    group: Units
    """(chunks,) the number of each chunk's group."""

    def mask(self, kept: Mask, chunks: int, last: int | None = None) -> Mask:
        """Return a mask without the first chunks, and without one more and those before it.

        Args:
            kept: the present mask.
            chunks: how many go.
            last: which chunk goes besides, with the less important ones of its group.
        """
        gone = np.arange(len(self.group)) < chunks
        if last is not None:
            gone[: last + 1] |= self.group[: last + 1] == self.group[last]
        mask = kept.copy()
        mask[self.units[gone[self.chunk]]] = False
        return mask

    def without(self, chunk: int) -> _Ranking:
        """Return the same without a chunk and the more important ones of its group."""
        stays = self.group != self.group[chunk]
        stays[:chunk] = True
        units = stays[self.chunk]
        number = np.cumsum(stays) - 1
        return _Ranking(self.units[units], number[self.chunk[units]], self.group[stays])


def _ranking(scores: Scores, kept: Mask, allowed: Iterable[Candidate]) -> _Ranking:
    """Return what may go. A chunk's importance is the mean of its units'."""
    units, chunks, means, groups = [], [], [], []
    first_chunk = 0
    for number, candidate in enumerate(allowed):
        present = candidate.group.units[kept[candidate.group.units]]
        starts = chunk_bounds(len(present), candidate)
        ascending = present[np.argsort(scores[present], kind="stable")][: starts[-1]]
        sizes = np.diff(starts)
        if len(sizes):
            sums = np.add.reduceat(scores[ascending], starts[:-1])
            # Rounding must not swap equal chunks: a ragged width would stay ragged.
            ranks = np.maximum.accumulate(sums / sizes)
            units.append(ascending)
            chunks.append(np.repeat(np.arange(len(sizes)) + first_chunk, sizes))
            means.append(ranks)
            groups.append(np.full(len(sizes), number))
            first_chunk += len(sizes)
    if not units:
        return _Ranking(*(np.zeros(0, np.int64) for _ in range(3)))
    order = np.argsort(np.concatenate(means), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    chunk = place[np.concatenate(chunks)]
    sorted_units = np.argsort(chunk, kind="stable")
    group = np.concatenate(groups)[order]
    return _Ranking(np.concatenate(units)[sorted_units], chunk[sorted_units], group)


def chunk_bounds(present: int, candidate: Candidate) -> NDArray[np.int64]:
    """Return where each chunk that may go begins and ends; a ragged width is squared first."""
    removable = present - candidate.floor
    first = present % candidate.chunk or candidate.chunk
    return np.append(0, np.arange(first, removable + 1, candidate.chunk))
