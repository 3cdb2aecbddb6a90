"""Widths and branches chosen together under a limit of milliseconds. Pure functions of arrays.

The time of a layer depends on both its widths, with stairs and floors, so what a channel saves
depends on all the others, and removing the least important ones until the limit holds is not the
best choice. Here every group is a variable (how many chunks go, the least important first), every
branch one (there or gone), and every layer a factor of those that it reads, writes and lies in.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import BudgetError
from compress.latency.remembered import Remembered
from compress.latency.times import Times, network_milliseconds
from compress.networks.groups import Branch, ChannelGraph, Mask
from compress.networks.layers import LayerShape
from compress.pruning.choice.elimination import TIME, Choice, Factor, Table, plan
from compress.pruning.choice.lagrange import Problem, Solution
from compress.pruning.choice.options import (
    Channels,
    Counts,
    Ladder,
    LayerTime,
    Side,
    Totals,
    ladder_of,
    unless_gone,
)
from compress.pruning.masking import Candidate, Scores

RESOLUTIONS = (256, 128, 64, 32, 16, 8)
"""Widths of a group that are tried at first; fewer where tables would be too large."""
HELD_RESOLUTION = 16
"""The same where some variables are held whatever it is."""
MOST_WORK = 2**24
"""Entries of all tables of one elimination, which takes about 50 ms."""
ROUNDING = 1e-9
MOST_TRIES = 32
"""Choices made at most to come closer to a limit."""


@dataclass(frozen=True)
class Chosen:
    """A mask within a limit."""

    mask: Mask
    lost: float
    """Importance that it loses."""
    milliseconds: float
    bound: float
    """No mask within the limit loses less; minus infinity where that is not known."""
    proven: bool
    """No other mask within the limit loses less."""


class Chooser:
    """The choice for one network and one table, made again at every pruning step.

    What the table has answered is kept, and the price of time at which a search ends is where the
    next begins.

    Args:
        graph: the channel graph, with its layers.
        times: milliseconds of each layer; or any cost that layers have by their widths.
        allowed: the groups that may lose units, and the branches that may go.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        times: Times,
        allowed: Sequence[Candidate],
    ) -> None:
        self.graph = graph
        self.branches = [c.group for c in allowed if isinstance(c.group, Branch)]
        self.allowed = [c for c in allowed if not isinstance(c.group, Branch)]
        self.times = Remembered(times)
        self.price = 0.0
        self.groups = [candidate.group.units for candidate in self.allowed]
        owner, place = np.full((2, graph.num_units), -1)
        for number, units in enumerate(self.groups):
            owner[units], place[units] = number, np.arange(len(units))
        sizes = [len(units) for units in self.groups]
        self.sides = [
            tuple(Side(units, owner, place, sizes) for units in (layer.reads, layer.writes))
            for layer in graph.layers
        ]

    def fastest(self, kept: Mask, scores: Scores | None = None) -> float:
        """Return the fewest milliseconds found that can be reached from a mask.

        Args:
            kept: the mask.
            scores: (units,) importance, in whose order units go; it matters only where a layer
                reads a part of a group.
        """
        if scores is None:
            scores = np.zeros(self.graph.num_units)
        situation = _Situation(self, scores, kept)
        return self.milliseconds(situation.mask(situation.search(-math.inf, 0.0)[0]))

    def choose(
        self,
        scores: Scores,
        kept: Mask,
        limit: float,
        *,
        least: float = 0.0,
        towards: Mask | None = None,
    ) -> Chosen:
        """Return the mask of least lost importance whose milliseconds are at most ``limit``.

        A group loses its least important chunks. What goes with a branch counts as the branch
        alone.

        Args:
            scores: (units,) importance, of branches as well; not negative.
            kept: the present mask; what is gone stays gone.
            limit: the most milliseconds.
            least: fewer than these are not wanted: nothing goes in one piece that takes more time
                with it, unless the limit cannot be held otherwise.
            towards: a mask of which nothing goes.

        Raises:
            BudgetError: the limit cannot be reached; the message names the fastest found.
            TableError: the table does not cover one of the layers.
        """
        situation = _Situation(self, scores, kept, towards)
        first = self._chosen(situation, limit)
        # What is slow enough lacks a piece of each choice that is not: always the least loss first.
        waiting, tries, best = [(first.lost, 0, first, situation)], 1, first
        while waiting:
            _, _, found, situation = heapq.heappop(waiting)
            if found.milliseconds >= least:
                return found
            best = max(best, found, key=lambda chosen: chosen.milliseconds)
            for finer in situation.without_one(found.mask):
                if tries == MOST_TRIES:
                    break
                tries += 1
                with suppress(BudgetError):
                    chosen = self._chosen(finer, limit)
                    heapq.heappush(waiting, (chosen.lost, tries, chosen, finer))
        return best

    def _chosen(self, situation: _Situation, limit: float) -> Chosen:
        for most in (limit, limit * (1 - ROUNDING)):  # sums in another order may be above it
            choice, solution = situation.search(most, self.price)
            mask = situation.mask(choice)
            found = self.milliseconds(mask)
            if found <= limit:
                self.price = solution.price
                point = solution.point
                return Chosen(mask, point.loss, found, solution.bound, solution.proven)
        raise BudgetError(
            f"{limit:.4g} ms cannot be reached: the fastest choice found takes "
            f"{math.ceil(found * 1e4) / 1e4:.4f} ms; lower min_channels, min_share or "
            "channel_multiple"
        )

    def milliseconds(self, mask: Mask) -> float:
        """Return what a network takes, as the table says."""
        return network_milliseconds(self.graph, self.times, mask)


class _Situation:
    """What may be chosen from one mask with one set of scores.

    Variables are the branches that are there, then the groups that may lose something.

    Args:
        chooser: of the network.
        scores: (units,) importance.
        kept: the mask.
        held: (units,) what may not go, though it is there and may go by the limits.
    """

    def __init__(
        self, chooser: Chooser, scores: Scores, kept: Mask, held: Mask | None = None
    ) -> None:
        self.chooser, self.scores, self.kept = chooser, scores, kept
        self.held = np.zeros_like(kept) if held is None else held
        self.branches = [b for b in chooser.branches if kept[b.unit] and not self.held[b.unit]]
        self.branch_of = {branch.unit: v for v, branch in enumerate(self.branches)}
        ladders = [ladder_of(candidate, scores, kept, self.held) for candidate in chooser.allowed]
        groups = [g for g, ladder in enumerate(ladders) if len(ladder) > 1]
        self.variable_of = {g: v for v, g in enumerate(groups, len(self.branches))}
        self.ladders = [ladders[g] for g in groups]
        self.options = [*(2 for _ in self.branches), *map(len, self.ladders)]
        self.floors = [c.floor // c.chunk for c in (chooser.allowed[g] for g in groups)]
        self.losses = [
            *(np.array([0.0, scores[branch.unit]]) for branch in self.branches),
            *(ladder.losses for ladder in self.ladders),
        ]
        ones = [*self.branch_of, *(int(ladder.units[0]) for ladder in self.ladders)]
        self.around = [
            {self.branch_of[b.unit] for b in self.branches if unit in b.inner} for unit in ones
        ]
        """By variable: those of the branches in which it is."""
        self.layers = list(self._layers(ladders))

    def _layers(self, ladders: Sequence[Ladder]) -> Iterator[_Layer]:
        for layer, sides in zip(self.chooser.graph.layers, self.chooser.sides, strict=True):
            if not all(self.kept[unit] for unit in layer.needs):
                continue
            inmost = {self.branch_of[unit] for unit in layer.needs if unit in self.branch_of}
            within = inmost.union(*(self.around[v] for v in inmost))
            both = []
            for side in sides:
                always, counts = side.counts(self.kept, self.chooser.groups, ladders)
                both.append((always, {self.variable_of[g]: n for g, n in counts.items()}))
            yield _Layer(layer.shape, both[0], both[1], tuple(sorted(within)))

    def mask(self, choice: Choice) -> Mask:
        """Return the mask that a choice stands for."""
        mask = self.kept.copy()
        for branch, gone in zip(self.branches, choice, strict=False):
            if gone:
                mask[branch.unit] = False
                mask[branch.inner] = False
        for ladder, option in zip(self.ladders, choice[len(self.branches) :], strict=True):
            mask[ladder.units[: ladder.ends[option]]] = False
        return mask

    def without_one(self, mask: Mask) -> Iterator[_Situation]:
        """Yield the same without the last piece of each group, or one branch, of a choice.

        Args:
            mask: the choice.
        """
        gone = [branch for branch in self.branches if not mask[branch.unit]]
        pieces = [branch.unit for branch in gone]
        inner = np.concatenate([np.zeros(0, np.int64), *(branch.inner for branch in gone)])
        for ladder in self.ladders:
            option = np.searchsorted(ladder.ends, np.count_nonzero(~mask[ladder.units]))
            if option and ladder.units[0] not in inner:
                pieces.append(int(ladder.units[ladder.ends[option - 1]]))
        for unit in pieces:
            held = self.held.copy()
            held[unit] = True
            yield _Situation(self.chooser, self.scores, self.kept, held)

    def search(self, limit: float, price: float) -> tuple[Choice, Solution]:
        """Return the best choice within a limit, or the fastest found where there is none.

        Where tables of all widths would be too large, some are tried first, at multiples of a
        larger number, and then those around the best.
        """
        model, most = self._model()
        exact = max(model.strides, default=1) == 1
        best: Choice | None = None
        while True:
            problem = Problem(model.sizes, model.factors)
            found = Solution(
                problem.fastest() if best is None else problem.point(model.at(best)), price
            )
            if found.point.time > limit and best is not None:
                found = Solution(problem.fastest(), price)
            if found.point.time <= limit:
                found = problem.within(limit, found.point, found.price)
                price = found.price
            best = model.chosen(found.point.choice)
            if max(model.strides, default=1) == 1:
                break
            model = _Model(self, *self._closer(best, model.strides, most), model.summed)
        if not exact:
            found = replace(found, bound=-math.inf, proven=False)
        return best, found

    def _model(self) -> tuple[_Model, int]:
        """Return the options that are tried at first, and how many of a variable those are."""
        for most in RESOLUTIONS:
            model = self._coarse(most, summed=True)
            planned = plan(model.sizes, [factor.scope for factor in model.factors])
            if not planned.held and planned.work <= MOST_WORK:
                return model, most
        return self._coarse(HELD_RESOLUTION, summed=False), HELD_RESOLUTION

    def _coarse(self, most: int, *, summed: bool) -> _Model:
        strides = [2 ** max(0, math.ceil(math.log2((n - 1) / most))) for n in self.options]
        floors = [*(0 for _ in self.branches), *self.floors]
        grids = [
            _aligned(n, stride, floor)
            for n, stride, floor in zip(self.options, strides, floors, strict=True)
        ]
        return _Model(self, grids, strides, summed)

    def _closer(
        self, best: Choice, strides: Sequence[int], most: int
    ) -> tuple[list[Counts], list[int]]:
        """Return the options around the best ones, at smaller strides."""
        grids, closer = [], []
        for n, option, stride in zip(self.options, best, strides, strict=True):
            if stride == 1 and n <= most:
                grids.append(np.arange(n))
                closer.append(1)
                continue
            next_stride = math.ceil(2 * stride / most)
            near = option + np.arange(-stride, stride + 1, next_stride)
            grids.append(np.unique(np.clip(np.concatenate([near, [0, option]]), 0, n - 1)))
            closer.append(next_stride)
        return grids, closer


class _Model:
    """Some of the options of every variable, and the factors between them.

    Args:
        situation: with all options.
        grids: by variable, which of its options.
        strides: by variable, how far apart these are.
        summed: whether sums of several groups are variables of their own.
    """

    def __init__(
        self, situation: _Situation, grids: list[Counts], strides: list[int], summed: bool
    ) -> None:
        self.grids, self.strides, self.summed = grids, strides, summed
        times = situation.chooser.times
        self.totals = Totals(len(grids))
        self.factors: list[Factor] = [Table((), np.array(times.fixed), TIME)]
        for v, grid in enumerate(grids):
            losses = situation.losses[v][grid]
            self.factors.append(unless_gone(v, losses, sorted(situation.around[v])))
        for layer in situation.layers:
            sides = []
            for always, by_variable in (layer.read, layer.written):
                side = always, {v: counts[grids[v]] for v, counts in by_variable.items()}
                sides.append(self.totals.side(side) if summed else side)
            self.factors.append(LayerTime(times, layer.shape, sides[0], sides[1], layer.branches))
        self.factors += self.totals.rules
        self.sizes = [*map(len, grids), *self.totals.sizes]

    def at(self, options: Choice) -> Choice:
        """Return where options stand in the grids, with those of the sums."""
        places = [np.searchsorted(g, o) for g, o in zip(self.grids, options, strict=True)]
        return self.totals.completed(np.array(places, np.int64))

    def chosen(self, choice: Choice) -> Choice:
        """Return the options that a choice of the grids stands for."""
        return np.array([g[o] for g, o in zip(self.grids, choice, strict=False)], np.int64)


@dataclass(frozen=True)
class _Layer:
    """A layer that is there, by variables."""

    shape: LayerShape
    read: Channels
    written: Channels
    branches: tuple[int, ...]


def _aligned(options: int, stride: int, floor: int) -> Counts:
    """Return the options whose widths are multiples of so many chunks, the first and the last.

    Args:
        options: how many there are; each has one chunk less than that before it.
        stride: how many chunks each of those returned has less than that before it.
        floor: chunks of the last option.
    """
    widths = floor + np.arange(options - 1, -1, -1)
    found = widths % stride == 0
    found[[0, -1]] = True
    return np.flatnonzero(found)
