"""What may be chosen from a mask: how many chunks of each group, and which branches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.latency.times import Times
from compress.networks.groups import Mask, Units
from compress.networks.layers import LayerShape
from compress.pruning.choice.elimination import MOST_JOINT, RULE, TIME, Choice, Table, Values
from compress.pruning.masking import Candidate, Scores, chunk_bounds

Counts = NDArray[np.int64]
Channels = tuple[int, Mapping[int, Counts]]
"""How many there are in any case, and by variable how many more at each option."""

MOST_KEPT = 2**17
"""Entries of a layer's table that is written out once, and not at every question."""


@dataclass(frozen=True)
class Ladder:
    """The options of one group: each loses one chunk more than that before it."""

    units: Units
    """Those that may go, the least important first."""
    places: Counts
    """Where they stand in the group."""
    ends: Counts
    """How many of them are gone at each option."""
    losses: Values
    """Importance that is gone at each option."""

    def __len__(self) -> int:
        return len(self.ends)


def ladder_of(candidate: Candidate, scores: Scores, kept: Mask, held: Mask) -> Ladder:
    """Return the options of a group at a mask; its chunks end before a unit that is held."""
    units = candidate.group.units
    present = np.flatnonzero(kept[units])
    places = present[np.argsort(scores[units[present]], kind="stable")]
    ends = chunk_bounds(len(present), candidate)
    ends = ends[ends <= np.argmax(np.append(held[units[places]], True))]
    places = places[: ends[-1]]
    lost = np.append(0.0, np.cumsum(scores[units[places]]))
    return Ladder(units[places], places, ends, lost[ends])


class Side:
    """The channels that a layer reads, or writes: how many are there at each option.

    Args:
        units: the unit of each channel, or how many there are.
        owner: (units,) the number of the group that each unit may go with, or -1.
        place: (units,) where it stands in that group.
        sizes: of the groups.
    """

    def __init__(self, units: Units | int, owner: Counts, place: Counts, sizes: Sequence[int]):
        self.number = units if isinstance(units, int) else 0
        listed = np.zeros(0, np.int64) if isinstance(units, int) else units
        self.lasting = listed[owner[listed] < 0]
        self.channels = {
            int(g): np.bincount(place[listed[owner[listed] == g]], minlength=sizes[g])
            for g in np.unique(owner[listed])
            if g >= 0
        }
        """By group: how many channels each of its units is."""

    def counts(
        self, kept: Mask, groups: Sequence[Units], ladders: Sequence[Ladder]
    ) -> tuple[int, dict[int, Counts]]:
        """Return how many are there in any case, and by group how many more at each option."""
        always = self.number + int(np.count_nonzero(kept[self.lasting]))
        counts = {}
        for g, channels in self.channels.items():
            ladder = ladders[g]
            gone = np.append(0, np.cumsum(channels[ladder.places]))[ladder.ends]
            counts[g] = int(channels[kept[groups[g]]].sum()) - gone
            if len(ladder) == 1:
                always += int(counts.pop(g)[0])
        return always, counts


class LayerTime:
    """The time of a layer as a factor of the groups that it runs through and its branches.

    Args:
        times: the table.
        shape: of the layer.
        read: channels that it reads in any case, and by variable at each option.
        written: the same of those that it writes.
        branches: variables, before those of groups, whose second option takes the layer away.
    """

    part = TIME

    def __init__(
        self,
        times: Times,
        shape: LayerShape,
        read: Channels,
        written: Channels,
        branches: tuple[int, ...],
    ) -> None:
        self.table_of, self.shape, self.branches = times, shape, branches
        self.read, self.written = read, written
        options = {v: len(counts) for side in (read, written) for v, counts in side[1].items()}
        self.scope = (*branches, *sorted(options))
        self._small = math.prod(options.values()) <= MOST_KEPT

    def table(self, free: tuple[int, ...], at: Choice) -> Values:
        """Return milliseconds by the options of the free variables."""
        return self._full.table(free, at) if self._small else self._values(free, at)

    @cached_property
    def _full(self) -> Table:
        nowhere = np.zeros(max(self.scope, default=0) + 1, np.int64)
        return Table(self.scope, self._values(self.scope, nowhere), TIME)

    def _values(self, free: tuple[int, ...], at: Choice) -> Values:
        widths = [v for v in free if v not in self.branches]
        read = _added(self.read, widths, at)
        written = _added(self.written, widths, at)
        values = self.table_of.milliseconds(self.shape, *np.broadcast_arrays(read, written))
        for branch in reversed(self.branches):
            if branch in free:
                values = np.stack([values, np.zeros_like(values)])
            elif at[branch]:
                values = np.zeros_like(values)
        return values


def _added(side: Channels, free: Sequence[int], at: Choice) -> Counts:
    """Return the channels of one side, with one dimension for each free variable."""
    total = np.full([1] * len(free), side[0])
    for v, counts in side[1].items():
        if v in free:
            total = total + counts.reshape([-1 if u == v else 1 for u in free])
        else:
            total = total + counts[at[v]]
    return total


class Totals:
    """Sums of the channels of several groups as variables of their own.

    What reads a concatenation depends on the sum alone: with the sum as a variable, the table of
    such a layer has two dimensions, and not one for each group. Sums grow by one group at a time,
    so that those of a dense block share what they have in common.

    Args:
        first: the number of the first variable that is free.
    """

    def __init__(self, first: int) -> None:
        self.next = first
        self.sizes: list[int] = []
        self.rules: list[Table] = []
        self._parts: list[tuple[int, int, Choice]] = []
        self._known: dict[tuple[int, bytes, int, bytes], tuple[int, Counts]] = {}

    def side(self, channels: Channels) -> Channels:
        """Return the channels of one side with a sum in the place of several variables."""
        always, by_variable = channels
        if len(by_variable) < 2:
            return channels
        (total, counts), *others = by_variable.items()
        for v, more in others:
            key = (total, counts.tobytes(), v, more.tobytes())
            if key not in self._known:
                found = self._sum(total, counts, v, more)
                if found is None:  # too many different sums
                    return channels
                self._known[key] = found
            total, counts = self._known[key]
        return always, {total: counts}

    def _sum(
        self, left: int, counts: Counts, right: int, more: Counts
    ) -> tuple[int, Counts] | None:
        sums = counts[:, None] + more
        values, option = np.unique(-sums, return_inverse=True)  # the first: nothing is gone
        if sums.size * len(values) > MOST_JOINT:
            return None
        option = option.reshape(sums.shape)
        new, self.next = self.next, self.next + 1
        rule = np.where(option[..., None] == np.arange(len(values)), 0.0, np.inf)
        if left > right:
            rule = np.swapaxes(rule, 0, 1)
        self.rules.append(Table((*sorted((left, right)), new), rule, RULE))
        self.sizes.append(len(values))
        self._parts.append((left, right, option))
        return new, -values

    def completed(self, choice: Choice) -> Choice:
        """Return a choice of the other variables with the options of the sums behind it."""
        options = choice.tolist()
        for left, right, option in self._parts:
            options.append(int(option[options[left], options[right]]))
        return np.array(options, np.int64)


def unless_gone(variable: int, losses: Values, branches: Sequence[int]) -> Table:
    """Return the losses of a variable's options; there are none when a branch around it is gone."""
    scope, values = [variable], losses
    for branch in branches:
        scope.append(branch)
        values = np.stack([values, np.zeros_like(values)], axis=-1)
    order = np.argsort(scope)
    return Table(tuple(scope[i] for i in order), np.transpose(values, order))
