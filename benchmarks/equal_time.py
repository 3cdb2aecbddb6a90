"""Accuracy at equal measured time: latency budgets, MACs budgets and Torch-Pruning.

    python benchmarks/equal_time.py RUN [RUN ...] --data FOLDER --output DIR
    python benchmarks/equal_time.py --smoke

Every RUN holds a dense network, one for each seed, all of one architecture. One loop prunes and
finetunes for all three: same minibatches, learning rates and lengths; only what is removed differs.
Every network is exported and measured against its dense one, in turn in one process, as the gate
does. Accuracy at a share of the dense time lies between the two points next to it; means are over
the seeds, with 95 % intervals (Student), and so are the differences, each within one seed. What is
complete in DIR is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from smoke import finished_run, parsed
from torch import nn
from torch.nn import functional as F

from bench.stopwatch import stopwatch_for
from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.permission import Permission
from compress.config import RunConfig
from compress.data.batches import ImageData, TrainBatches
from compress.data.datasets import load_data
from compress.errors import TableError
from compress.latency.times import Times, network_milliseconds
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph
from compress.pruning.pruner import Pruner
from compress.runs.loop import accuracy_of
from compress.runs.rundirectory import RunDirectory
from compress.training.recalibration import reestimate_batchnorm

PEER_INTERVALS = 3
"""Times as many minibatches between two steps of Torch-Pruning, and as few steps: whoever uses it
makes a new optimizer after each, whose momentum begins at nothing."""
AT = (0.4, 0.35, 0.3, 0.2)
"""Shares of the dense time at which ways are compared."""


@dataclass(frozen=True)
class Way:
    """What is asked of whom."""

    name: str
    budget: float
    """Share of the dense network's time, or of its MACs."""
    multiple: int

    def __str__(self) -> str:
        return f"{self.name}-{self.budget:g}-x{self.multiple}"


WAYS = (
    *(Way("latency", share, 8) for share in (0.5, 0.36, 0.26, 0.18)),
    *(Way(name, *at) for name in ("macs", "torch-pruning") for at in ((0.3, 8), (0.16, 8))),
    *(Way(name, 0.04, 4) for name in ("macs", "torch-pruning")),
)
"""Widths in multiples of eight cannot reach small MACs: there, of four."""
STYLES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("o", {"color": "#0b5394", "alpha": 0.6}, "-"),
    ("s", {"color": "#b45f06", "alpha": 0.6}, "--"),
    ("^", {"color": "#444444", "alpha": 0.6}, ":"),
)
SMOKE = (Way("latency", 0.9, 8), Way("macs", 0.6, 8), Way("torch-pruning", 0.9, 8))


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


class Race:
    """Networks of one architecture pruned in several ways by one loop.

    Args:
        run: of the dense network.
        options: the command line.
    """

    def __init__(self, run: RunDirectory, options: argparse.Namespace, seed: int) -> None:
        config = run.saved_config()
        data = config.data.model_copy(update={"root": options.data or config.data.root})
        self.config: RunConfig = config.model_copy(update={"data": data})
        self.data: ImageData = load_data(self.config.data)
        self.options, self.seed = options, seed
        permission = Permission(config.model)
        self.checkpoint = load_checkpoint(run.dense, permission)
        self.dense = self.checkpoint.model.eval()
        self.graph = analyse(self.dense, self.checkpoint.input_size)
        found = stopwatch_for(self.config)
        assert found is not None
        self.stopwatch = found
        self.batches = TrainBatches(
            self.data, batch_size=config.data.batch_size, seed=seed, workers=0
        )

    def table(self, folder: Path) -> Times:
        """Return the latency table, measured unless it is in the folder."""
        return self.stopwatch.table(self.dense, self.graph, self.checkpoint.input_size, folder)

    def point(self, way: Way, table: Times) -> Point:
        """Prune one network, finetune and measure it."""
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.dense).train()
        loop = Loop(model, self.options, self.batches)
        prune = _by_peer if way.name == "torch-pruning" else _by_us
        prune(loop, way, self, table)
        reestimate_batchnorm(
            model, (Example.of(b.images) for b in islice(self.batches.epoch(0), 50))
        )
        loop.finetune()
        model.eval()
        found = self.stopwatch.compare(self.dense, model, self.checkpoint.input_size)
        smaller = analyse(model, self.checkpoint.input_size)
        macs = cost.macs(smaller, smaller.everything())
        return Point(
            way.name,
            self.seed,
            way.budget,
            way.multiple,
            macs / cost.macs(self.graph, self.graph.everything()),
            len(self.graph.removable) - len([b for b in smaller.removable if not b.gone]),
            *(found.ratio, found.low, found.high),
            self.predicted(smaller, table),
            accuracy_of(model, self.data, self.config).top1,
        )

    def predicted(self, smaller: ChannelGraph, table: Times) -> float | None:
        """Return the share of the dense time that a table predicts.

        None where it knows nothing of a shrunk network by itself: a depthwise convolution of fewer
        channels is another layer to it, and only of the dense one does it know how they shrink.
        """
        try:
            small, dense = (
                network_milliseconds(graph, table, graph.everything())
                for graph in (smaller, self.graph)
            )
        except TableError:
            return None
        return small / dense


class Loop:
    """The training loop that is the same for all.

    Args:
        model: the network; it is trained, and pruned by whoever is asked between the steps.
        options: the command line.
        batches: of the data.
    """

    def __init__(
        self, model: nn.Module, options: argparse.Namespace, batches: TrainBatches
    ) -> None:
        self.model, self.options, self.batches, self.steps = model, options, batches, 0
        self.renew()

    def renew(self) -> None:
        """Make the optimizer, of the parameters that there are."""
        parameters: list[nn.Parameter] = list(self.model.parameters())
        weights = [p for p in parameters if p.dim() > 1]
        others = [p for p in parameters if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=1e-4
        )

    def run(
        self,
        steps: int,
        lr_at: Callable[[int], float],
        judge: Callable[[], None] = lambda: None,
        after: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train for so many steps.

        Args:
            steps: at most.
            lr_at: learning rate of a step.
            judge: called between backward pass and step.
            after: called after the step; True ends it.
        """
        done = 0
        while done < steps:
            for batch in self.batches.epoch(self.steps // len(self.batches)):
                for group in self.optimizer.param_groups:
                    group["lr"] = lr_at(done)
                logits = self.model(batch.images)
                self.optimizer.zero_grad()
                loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
                loss.backward()  # type: ignore[no-untyped-call]
                judge()
                self.optimizer.step()
                done, self.steps = done + 1, self.steps + 1
                if after() or done == steps:
                    return

    def prune(self, judge: Callable[[], None], after: Callable[[], bool]) -> None:
        """Train while somebody prunes."""
        warm = max(1, len(self.batches) // 2)
        lr = self.options.lr
        self.run(10**6, lambda step: lr * min(1.0, (step + 1) / warm), judge, after)

    def finetune(self) -> None:
        """Train what is left, the learning rate falling to zero by a cosine."""
        self.renew()
        steps = max(1, self.options.epochs * len(self.batches))
        lr = self.options.lr
        self.run(steps, lambda step: lr / 2 * (1 + math.cos(math.pi * step / steps)))


def _by_us(loop: Loop, way: Way, race: Race, table: Times) -> None:
    by_time = way.name == "latency"
    pruner = Pruner(
        loop.model,
        next(iter(loop.batches.epoch(0))).images[:1],
        optimizer=loop.optimizer,
        table=table if by_time else None,
        budget=f"{way.name}={way.budget}",
        rank="importance" if by_time else "importance-per-mac",
        channel_multiple=way.multiple,
        steps=loop.options.steps,
        interval=loop.options.interval,
        seed=race.seed,
    )
    loop.prune(pruner.score, pruner.step)


def _by_peer(loop: Loop, way: Way, race: Race, table: Times) -> None:
    """Torch-Pruning: Taylor importance, all layers together, until the MACs fit."""
    import torch_pruning

    images = next(iter(loop.batches.epoch(0))).images[:1]
    classifiers = [m for m in loop.model.modules() if isinstance(m, nn.Linear)]
    steps = max(1, loop.options.steps // PEER_INTERVALS)
    dense = macs = torch_pruning.utils.count_ops_and_params(loop.model, images)[0]
    pruner = torch_pruning.pruner.BasePruner(
        loop.model,
        images,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.95,
        iterative_steps=12 * steps,
        ignored_layers=classifiers,
        round_to=way.multiple,
    )
    loop.model.train()  # counting leaves it in evaluation mode
    taken = 0

    def limit() -> float:
        return float(dense) * (1 - (1 - way.budget) * min(1.0, (taken + 1) / steps))

    def after() -> bool:
        nonlocal macs, taken
        if loop.steps % (PEER_INTERVALS * loop.options.interval):
            return False
        while macs > limit() and pruner.current_step < pruner.iterative_steps:
            pruner.step()
            macs = torch_pruning.utils.count_ops_and_params(loop.model, images)[0]
        loop.model.train()
        taken += 1
        loop.renew()
        return taken >= steps

    loop.prune(lambda: None, after)


def at_share(points: Sequence[Point], share: float) -> float | None:
    """Return the accuracy at a share of the time, on the line between the points next to it."""
    known = sorted({p.time: p.top1 for p in points}.items())
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


def tell(points: Sequence[Point], seeds: Sequence[int]) -> None:
    """Print all points, then ways beside each other at equal time."""
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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories")
    parser.add_argument("--data", help="data set, default that of the run")
    parser.add_argument("--output", type=Path, help="of the points; default none are kept")
    parser.add_argument("--ways", help="comma-separated, default all three")
    parser.add_argument("--plots", type=Path, help="folder for two pictures; default none")
    parser.add_argument("--steps", type=int, default=30, help="pruning steps")
    parser.add_argument("--interval", type=int, default=5, help="minibatches between them")
    parser.add_argument("--epochs", type=int, default=2, help="of finetuning")
    parser.add_argument("--lr", type=float, default=0.05)
    options = parsed(parser, arguments, steps=3, interval=1, epochs=0)
    if not options.runs and not options.smoke:
        parser.error("RUN is missing: give the directories of dense networks")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.runs:
        race(options, options.runs)
        return
    with finished_run(None) as path:
        race(options, [path])


def race(options: argparse.Namespace, runs: Sequence[Path]) -> None:
    """Prune the dense network of every run in every way, and print the tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "points.jsonl"
        points = [Point(**json.loads(line)) for line in _lines(file)]
        ways = [w for w in WAYS if not options.ways or w.name in options.ways.split(",")]
        for seed, path in enumerate(runs):
            one = Race(RunDirectory(path), options, seed)
            table = one.table(folder)
            for way in SMOKE if options.smoke else ways:
                if any(
                    (p.way, p.budget, p.multiple, p.seed)
                    == (way.name, way.budget, way.multiple, seed)
                    for p in points
                ):
                    continue
                print(f"{way}, seed {seed}", file=sys.stderr, flush=True)
                points.append(one.point(way, table))
                with file.open("a") as lines:
                    lines.write(json.dumps(asdict(points[-1])) + "\n")
        tell(points, range(len(runs)))
        if options.plots:
            plot_accuracy(options.plots / "accuracy-over-time.svg", points)
            plot_prediction(options.plots / "predicted-over-measured.svg", points)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
