"""A race of networks: pruned in several ways by one loop, exported and measured; for programs.

One loop prunes and finetunes for all: same minibatches, learning rates and lengths; only what is
removed differs, and who removes it (``pruners.py``). Every network is exported and measured against
its dense one, in turn in one process, as the gate does. What is complete in the output folder is
not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from smoke import finished_run
from standings import Point
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
from compress.runs.loop import accuracy_of
from compress.runs.rundirectory import RunDirectory
from compress.training.recalibration import reestimate_batchnorm


@dataclass(frozen=True)
class Way:
    """What is asked of whom."""

    name: str
    """Of who prunes."""
    budget: float
    """Share of the dense network's time, MACs or parameters, whichever who prunes counts."""
    multiple: int
    """Of channels; 1 leaves widths as they come."""

    def __str__(self) -> str:
        return f"{self.name}-{self.budget:g}-x{self.multiple}"


Prune = Callable[["Loop", Way, "Race", Times], None]
"""Trains with the loop while it prunes the loop's network, in the end to about what a way asks."""


class Race:
    """Networks of one architecture pruned in several ways by one loop.

    Args:
        run: of the dense network.
        options: the command line.
        seed: of the minibatches.
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

    def point(self, way: Way, prune: Prune, table: Times) -> Point:
        """Prune one network, finetune and measure it."""
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.dense).train()
        loop = Loop(model, self.options, self.batches)
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
            found.dense_ms,
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


def race_parser(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every program that races is asked.

    Args:
        about: the docstring of the program.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories")
    parser.add_argument("--data", help="data set, default that of the run")
    parser.add_argument("--output", type=Path, help="of the points; default none are kept")
    parser.add_argument("--ways", help="comma-separated, default all")
    parser.add_argument("--plots", type=Path, help="folder for pictures; default none")
    parser.add_argument("--steps", type=int, default=30, help="pruning steps")
    parser.add_argument("--interval", type=int, default=5, help="minibatches between them")
    parser.add_argument("--epochs", type=int, default=2, help="of finetuning")
    parser.add_argument("--lr", type=float, default=0.05)
    return parser


SMALLEST = {"steps": 3, "interval": 1, "epochs": 0}
"""Of these, for ``--smoke``."""


def race(
    options: argparse.Namespace,
    ways: Sequence[Way],
    pruners: Mapping[str, Prune],
    may_fail: Collection[str] = (),
) -> list[Point]:
    """Prune the dense network of every run in every way.

    Args:
        options: the command line; without runs, one on digits that lasts seconds is made.
        ways: what is tried; ``options.ways`` names some of them.
        pruners: by the name of a way.
        may_fail: names of ways that are left out, with a word, where they fail.
    """
    torch.set_num_threads(1)
    if not options.runs:
        with finished_run(None) as path:
            given = argparse.Namespace(**{**vars(options), "runs": [path]})
            return race(given, ways, pruners, may_fail)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "points.jsonl"
        points = [Point(**json.loads(line)) for line in _lines(file)]
        known = {(p.way, p.budget, p.multiple, p.seed) for p in points}
        for seed, path in enumerate(options.runs):
            one = Race(RunDirectory(path), options, seed)
            table = one.table(folder)
            for way in ways:
                if options.ways and way.name not in options.ways.split(","):
                    continue
                if (way.name, way.budget, way.multiple, seed) in known:
                    continue
                print(f"{way}, seed {seed}", file=sys.stderr, flush=True)
                try:
                    points.append(one.point(way, pruners[way.name], table))
                except Exception as error:  # whatever another library raises is its answer
                    if way.name not in may_fail:
                        raise
                    print(f"{way}, seed {seed} failed: {error!r}", file=sys.stderr, flush=True)
                    continue
                with file.open("a") as lines:
                    lines.write(json.dumps(asdict(points[-1])) + "\n")
    return points


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
