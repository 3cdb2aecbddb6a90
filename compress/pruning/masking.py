"""Choose the units to remove: importance and a budget in, a mask out. Pure functions of arrays."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.config import PruneConfig
from compress.errors import BudgetError, ConfigError, nearest
from compress.networks.groups import ChannelGraph, Mask, Removable, Units

Scores = NDArray[np.float64]
CostFunction = Callable[[Mask], float]


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


def prune_to(
    scores: Scores,
    kept: Mask,
    allowed: Iterable[Candidate],
    *,
    cost_of: CostFunction,
    limit: float,
) -> Mask:
    """Remove the least important chunks of all groups together until the cost fits.

    Args:
        scores: importance of every unit; units already removed are ignored.
        kept: the present mask.
        allowed: where units may be removed.
        cost_of: a cost that never rises when a unit is removed.
        limit: the largest cost allowed.

    Returns:
        The mask with the fewest removals, in order of importance, whose cost is at most ``limit``.

    Raises:
        BudgetError: the cost stays above ``limit`` when everything that may go is gone.
    """
    units, ends = _ranking(scores, kept, allowed)

    def without(chunks: int) -> Mask:
        mask = kept.copy()
        mask[units[: ends[chunks]]] = False
        return mask

    fewest, most = 0, len(ends) - 1
    if cost_of(without(most)) > limit:
        raise BudgetError(
            f"the cost cannot fall to {limit:g}: with every group at its floor it is "
            f"{cost_of(without(most)):g}"
        )
    while fewest < most:  # the cost is monotone in the number of chunks removed
        middle = (fewest + most) // 2
        if cost_of(without(middle)) <= limit:
            most = middle
        else:
            fewest = middle + 1
    return without(most)


def smallest(graph: ChannelGraph, allowed: Iterable[Candidate]) -> Mask:
    """Return a mask with every group at its floor: the closest that any budget can come."""
    kept = graph.everything()
    for candidate in allowed:
        kept[candidate.group.units[candidate.floor :]] = False
    return graph.closed(kept)


def _ranking(
    scores: Scores, kept: Mask, allowed: Iterable[Candidate]
) -> tuple[Units, NDArray[np.int64]]:
    """Return the removable units, least important chunk first, and where each chunk ends.

    A chunk's importance is the mean of its units'. The first entry of the ends is 0: no chunk.
    """
    units, chunks, means = [], [], []
    first_chunk = 0
    for candidate in allowed:
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
            means.append(np.repeat(ranks, sizes))
            first_chunk += len(sizes)
    if not units:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    chunk = np.concatenate(chunks)
    order = np.lexsort((chunk, np.concatenate(means)))
    last_of_chunk = np.flatnonzero(np.diff(chunk[order], append=-1))
    return np.concatenate(units)[order], np.append(0, last_of_chunk + 1)


def chunk_bounds(present: int, candidate: Candidate) -> NDArray[np.int64]:
    """Return where each chunk that may go begins and ends; a ragged width is squared first."""
    removable = present - candidate.floor
    first = present % candidate.chunk or candidate.chunk
    return np.append(0, np.arange(first, removable + 1, candidate.chunk))
