"""How good the choice of widths and branches is, and how long it takes.

    python benchmarks/choice_quality.py [--networks 300] [--multiple 8]
    python benchmarks/choice_quality.py --smoke

Small random networks (streams with projections, concatenations, branches in branches) have random
tables of milliseconds: stairs, floors, and wider layers that are faster. All their masks are tried.
Beside the choice stands what removing the least important chunks until the limit holds would lose.

Large networks are pruned in seven steps to 0.3 of their time under a table of stairs, with random
importance. No choice loses less than the bound, which the best one need not reach; where the
choice is proven, none loses less than it does.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torchvision
from numpy.typing import NDArray
from smoke import parsed

from compress.config import PruneConfig
from compress.errors import BudgetError
from compress.latency.times import Milliseconds, Times, network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.groups import Branch, ChannelGraph, Group, Mask, Units
from compress.networks.layers import LayerCall, LayerShape
from compress.networks.models import build_model
from compress.networks.programs import Gate
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import Candidate, Scores, candidates, prune_to

Rng = np.random.Generator

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)


class RandomTimes:
    """A table that wants to mislead: of every shape, stairs of random heights, with a floor."""

    def __init__(self, rng: Rng, shapes: Sequence[LayerShape], widest: int) -> None:
        self.fixed = float(rng.random())
        self.tables = {shape: self._table(rng, widest + 1) for shape in shapes}

    @staticmethod
    def _table(rng: Rng, widths: int) -> Milliseconds:
        steps = np.ceil(np.arange(widths) / rng.integers(1, 4))
        rising = np.outer(steps, np.ceil(np.arange(widths) / rng.integers(1, 4)))
        noise = rng.lognormal(0, rng.choice([0, 0.1, 0.5]), rising.shape)
        return np.maximum(rising * noise, rng.choice([0, 2, 5])) * rng.random()

    def milliseconds(
        self, shape: LayerShape, read: NDArray[np.int64], written: NDArray[np.int64]
    ) -> Milliseconds:
        """Return the times of one shape."""
        if np.any(read < 1) or np.any(written < 1):
            raise AssertionError("a table is not asked for layers without channels")
        return self.tables[shape][read, written]


class Stairs:
    """Multiply-adds in blocks of channels as a GPU computes them, with a floor for each layer."""

    fixed = 0.05

    def milliseconds(
        self, shape: LayerShape, read: NDArray[np.int64], written: NDArray[np.int64]
    ) -> Milliseconds:
        """Return the times of one shape; some widths are odder than others."""
        area = math.prod(shape.kernel) * math.prod(shape.output_size)
        blocks = np.ceil(read / 16) * 16 * np.ceil(written / 32) * 32
        odd = 1 + 0.1 * np.sin(0.7 * read) + 0.1 * np.cos(1.3 * written)
        groups = np.maximum(1, np.asarray(shape.groups_at(read)))  # type: ignore[arg-type]
        return np.maximum(0.005, 1e-9 * area * blocks / groups * odd)


@dataclass
class Small:
    """A network of a few groups and branches, built layer by layer."""

    rng: Rng
    groups: list[Group] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    layers: list[LayerCall] = field(default_factory=list)
    units: int = 0

    def group(self) -> Units:
        """Return the units of another group."""
        size = int(self.rng.integers(2, 7))
        units = np.arange(self.units, self.units + size)
        self.groups.append(Group(f"group{len(self.groups)}", units, (), ()))
        self.units += size
        return units

    def branch(self, *inner: Units) -> int:
        """Return the unit of another branch."""
        unit = self.units
        within = np.concatenate([np.zeros(0, np.int64), *inner])
        name = f"block{len(self.branches)}"
        self.branches.append(Branch(name, unit, "", None, 0, 0, Gate(()), inner=within))
        self.units += 1
        return unit

    def layer(self, reads: Units | int, writes: Units | int, *needs: int) -> None:
        """Append a layer; some have the shape of one before."""
        number = int(self.rng.integers(0, len(self.layers) + 1))
        shape = LayerShape("conv2d", (3, 3), input_size=(number, number))
        self.layers.append(LayerCall("", shape, reads, writes, needs=needs))

    @property
    def graph(self) -> ChannelGraph:
        """The channel graph."""
        return ChannelGraph(
            *((), tuple(self.groups), self.units, (), ()),
            layers=tuple(self.layers),
            branches=tuple(self.branches),
        )


@dataclass(frozen=True)
class Trial:
    """A small network with all that a choice depends on."""

    graph: ChannelGraph
    times: Times
    scores: Scores
    allowed: tuple[Candidate, ...]

    @property
    def branches(self) -> list[Branch]:
        """The branches that may go."""
        return [c.group for c in self.allowed if isinstance(c.group, Branch)]

    def masks(self, kept: Mask) -> Iterator[Mask]:
        """Yield every mask that may be chosen."""
        ways = []
        for candidate in self.allowed:
            if isinstance(candidate.group, Branch):
                continue
            units = candidate.group.units[kept[candidate.group.units]]
            ascending = units[np.argsort(self.scores[units])]
            widths = [
                width
                for width in range(candidate.floor, len(units))
                if width % candidate.chunk == 0
            ]
            ways.append([ascending[: len(units) - width] for width in (len(units), *widths)])
        ways += [
            [np.zeros(0, np.int64), np.append(b.inner, b.unit)]
            for b in self.branches
            if kept[b.unit]
        ]
        for choice in itertools.product(*ways):
            mask = kept.copy()
            mask[np.concatenate(choice)] = False
            yield mask

    def lost(self, kept: Mask, mask: Mask) -> float:
        """Return the importance of what goes, without what goes because a branch does."""
        gone = kept & ~mask
        for branch in self.branches:
            if gone[branch.unit]:
                gone[branch.inner] = False
        return float(self.scores[gone].sum())

    def milliseconds(self, mask: Mask) -> float:
        """Return the time under a mask."""
        return network_milliseconds(self.graph, self.times, mask)

    def greedy(self, kept: Mask, limit: float) -> float:
        """Return what is lost when the least important goes first until the limit holds."""
        try:
            mask = prune_to(
                self.scores,
                kept,
                self.allowed,
                cost_of=lambda m: self.milliseconds(self.graph.closed(m)),
                limit=limit,
            )
        except BudgetError:
            return math.inf
        return self.lost(kept, self.graph.closed(mask))


def streams(net: Small) -> None:
    """Two blocks on one stream."""
    stream, first, second = net.group(), net.group(), net.group()
    one, other = net.branch(first), net.branch(second)
    net.layer(3, stream)
    for unit, inner in ((one, first), (other, second)):
        net.layer(stream, inner, unit)
        net.layer(inner, stream, unit)
    net.layer(stream, 10)


def projection(net: Small) -> None:
    """A block with a projection from one stream to the next, and one behind it."""
    stream, wider, first, second = net.group(), net.group(), net.group(), net.group()
    one, other = net.branch(first), net.branch(second)
    net.layer(3, stream)
    net.layer(stream, first, one)
    net.layer(first, wider, one)
    net.layer(stream, wider)
    net.layer(wider, second, other)
    net.layer(second, wider, other)
    net.layer(wider, 10)


def concatenation(net: Small) -> None:
    """Two groups are read as one; a branch of one layer has no units of its own."""
    left, right, after = net.group(), net.group(), net.group()
    block = net.branch()
    net.layer(3, left)
    net.layer(3, right)
    net.layer(np.concatenate([left, right, left]), after)
    net.layer(after, after, block)
    net.layer(np.repeat(after, 2), 10)


def nested(net: Small) -> None:
    """A branch in a branch, and a layer that reads a part of a group."""
    stream, outer, deep = net.group(), net.group(), net.group()
    within = net.branch(deep)
    around = net.branch(outer, deep, np.array([within]))
    net.layer(3, stream)
    net.layer(stream, outer, around)
    net.layer(outer, deep, within, around)
    net.layer(deep, outer, within, around)
    net.layer(outer, stream, around)
    net.layer(stream[: len(stream) // 2], 10)


KINDS = (streams, projection, concatenation, nested)


def trial_of(seed: int) -> Trial:
    """Return a random small network; every seed gives another."""
    rng = np.random.default_rng(seed)
    net = Small(rng)
    KINDS[seed % len(KINDS)](net)
    graph = net.graph
    shapes = list(dict.fromkeys(layer.shape for layer in graph.layers))
    allowed: list[Candidate] = []
    for group in graph.groups:
        chunk = int(rng.choice([1, 1, 2]))
        floor = math.ceil(int(rng.integers(1, group.size + 1)) / 2 / chunk) * chunk
        allowed.append(Candidate(group, min(group.size, floor), chunk))
    scores = rng.exponential(size=graph.num_units) ** int(rng.integers(1, 4))
    for branch in net.branches:  # worth about as much as its channels
        scores[branch.unit] += rng.random() * scores[branch.inner].sum()
    allowed += [Candidate(branch, 0, 1) for branch in net.branches]
    return Trial(graph, RandomTimes(rng, shapes, 20), scores, tuple(allowed))


@dataclass(frozen=True)
class Quality:
    """How a choice compares with all that could have been chosen."""

    choices: int
    limit: float
    milliseconds: float
    best: float
    lost: float
    greedy: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """What is lost beyond the best, as a share of that."""
        return max(0.0, self.lost / self.best - 1) if self.lost > self.best else 0.0


def qualities(seed: int, steps: int = 2) -> Iterator[Quality]:
    """Prune a small network in steps, each to a random limit, and try all masks at each."""
    rng, trial = np.random.default_rng(seed), trial_of(seed)
    chooser = Chooser(trial.graph, trial.times, trial.allowed)
    kept = trial.graph.everything()
    for _ in range(steps):
        found = [(trial.milliseconds(m), trial.lost(kept, m)) for m in trial.masks(kept)]
        reached = np.unique([ms for ms, _ in found if ms <= trial.milliseconds(kept)])
        limit = float(rng.choice(reached[: max(1, len(reached) * 3 // 4)]))
        best = min(lost for ms, lost in found if ms <= limit)
        chosen = chooser.choose(trial.scores, kept, limit)
        yield Quality(
            len(found),
            limit,
            trial.milliseconds(chosen.mask),
            best,
            trial.lost(kept, chosen.mask),
            trial.greedy(kept, limit),
            chosen.bound,
            chosen.proven,
        )
        kept = chosen.mask


@dataclass(frozen=True)
class Large:
    """A network that is pruned as in practice."""

    name: str
    size: int
    own: bool = False


LARGE = (
    Large("resnet20", 32, own=True),
    Large("resnet56", 32, own=True),
    Large("resnet50", 224),
    Large("mobilenet_v2", 224),
)


def steps_of(large: Large, multiple: int) -> Iterator[tuple[float, float, bool]]:
    """Yield of each step its seconds, what is lost beyond the bound, and whether it must be."""
    build = build_model if large.own else torchvision.models.get_model
    graph = analyse(build(large.name, num_classes=10), (3, large.size, large.size))
    limits = PruneConfig(channel_multiple=multiple, min_channels=multiple, blocks=True)
    rng = np.random.default_rng(0)
    scores = rng.exponential(size=graph.num_units) ** 2
    for branch in graph.removable:
        scores[branch.unit] = scores[branch.inner].sum() * rng.random()
    chooser = Chooser(graph, Stairs(), candidates(graph, limits))
    kept = graph.everything()
    dense = network_milliseconds(graph, Stairs(), kept)
    for share in SHARES:
        limit = max(share * dense, chooser.fastest(kept))
        start = time.perf_counter()
        chosen = chooser.choose(scores, kept, limit)
        seconds = time.perf_counter() - start
        above = chosen.lost / chosen.bound - 1 if chosen.bound > 0 else 0.0
        yield seconds, above, chosen.proven
        kept = chosen.mask
        scores = scores * rng.uniform(0.9, 1.1, len(scores))


def show_small(networks: int) -> None:
    """Print how the choice compares with the best of all masks."""
    print("| networks | choices | exact | proven | mean gap | largest gap | greedy |")
    print("|---|---|---|---|---|---|---|")
    for kind, builder in enumerate(KINDS):
        found = [q for seed in range(kind, networks, len(KINDS)) for q in qualities(seed)]
        gaps = np.array([q.gap for q in found])
        greedy = [q.greedy / q.best - 1 for q in found if q.best and math.isfinite(q.greedy)]
        print(
            f"| {builder.__name__} | {sum(q.choices for q in found)} | {np.mean(gaps < 1e-9):.1%} "
            f"| {np.mean([q.proven for q in found]):.1%} | {gaps.mean():.3%} | {gaps.max():.3%} "
            f"| {np.median(greedy or [0]):.1%} |"
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--networks", type=int, default=400, help="small ones")
    parser.add_argument("--multiple", type=int, default=8, help="of channels, in large ones")
    return parsed(parser, arguments, networks=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print."""
    options = parse(arguments)
    show_small(options.networks)
    print("\n| network | multiple | seconds a step | longest | above the bound | proven |")
    print("|---|---|---|---|---|---|")
    for large in LARGE[:1] if options.smoke else LARGE:
        seconds, above, proven = zip(*steps_of(large, options.multiple), strict=True)
        print(
            f"| {large.name} | {options.multiple} | {np.mean(seconds):.3f} | {max(seconds):.3f} "
            f"| {np.mean(above):.2%} | {np.mean(proven):.0%} |"
        )


if __name__ == "__main__":
    main()
