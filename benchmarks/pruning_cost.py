"""What pruning costs beside plain training, as one Markdown table.

    python benchmarks/pruning_cost.py [--model resnet50] [--size 224] [--batch 16] [--steps 8]
    python benchmarks/pruning_cost.py --smoke

Prunes with the settings of configs/imagenet-resnet50.toml. Images and labels are random: only time
and memory are measured. Steps that are compared alternate in one process, so a change of the
machine's speed meets both. Times are medians in seconds; peak memory is the largest resident size
of a process of its own (of the GPU where there is one).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from smoke import parsed
from torch import nn

from compress.config import ComputeConfig, TrainConfig, load_config
from compress.data.loading import Batch
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.pruning.decision import prunable
from compress.pruning.goal import goal_for
from compress.pruning.masking import Scores, prune_to
from compress.pruning.pieces import importance
from compress.pruning.pruner import Pruner
from compress.training.compute import computing, pick_device
from compress.training.trainer import Trainer

SETTINGS = load_config("imagenet-resnet50").prune


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, with the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time several pieces of work in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = timed(work, device)
            if number:
                times[name].append(seconds)
    return times


def trainer_for(model: nn.Module) -> Trainer:
    return Trainer(model.train(), TrainConfig(), steps_per_epoch=1000, epochs=None)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Bench:
    """One network, its channel graph and one batch of random images."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, pick_device(options.device)
        torch.manual_seed(0)
        size = (3, options.size, options.size)
        self.model = build_model(options.model, num_classes=1000).to(self.device)
        self.graph = analyse(self.model, size)
        self.batch = Batch(
            torch.randn(options.batch, *size), torch.randint(1000, (options.batch,)), 0
        )
        if self.device.type == "cuda":  # as the loader leaves it, so that copies do not wait
            self.batch = self.batch.pin_memory()
        self.allowed = prunable(self.model, self.graph, SETTINGS)
        self.goal = goal_for(self.graph, SETTINGS.budget, self.allowed)

    def pruner(self, trainer: Trainer, **settings: Any) -> Pruner:
        """Return the pruner of the named configuration around a trainer."""
        wanted = {**dict(SETTINGS), **settings}

        def told(event: str, facts: dict[str, Any]) -> None:
            if event == "shrink":
                trainer.reshaped()

        return Pruner(
            self.model,
            self.batch.images[: SETTINGS.proof_images],
            optimizer=trainer.optimizer,
            callback=told,
            graph=self.graph,
            **wanted,
        )

    def importance_step(self) -> dict[str, list[float]]:
        """Time training steps with and without a pruner around them, and its share alone."""
        trainer = trainer_for(self.model)
        pruner = self.pruner(trainer, interval=10**9)

        def pruned_step() -> None:
            trainer.step(self.batch, judge=pruner)
            pruner.step()

        masking = self.pruner(trainer, interval=1, shrink_at=1.0)
        trainer.step(self.batch, judge=masking)
        masking.step()  # the first of its steps has masked some channels, and the next is far away
        masking.settings = pruner.settings

        def share() -> None:  # gradients are there from the last step
            masking.score()
            masking.step()

        works: dict[str, Callable[[], object]] = {
            "plain": lambda: trainer.step(self.batch),
            "importance": pruned_step,
        }
        times = alternate(works, self.options.steps, self.device)
        return times | alternate({"scoring": share}, 10, self.device)

    def scores(self, trainer: Trainer) -> Scores:
        """Return the importance of every unit after one training step."""
        trainer.step(self.batch)
        return importance(self.model, self.graph)

    def prune_and_shrink(self) -> dict[str, float]:
        """Take all pruning steps of a run to half of the MACs, by one minibatch's gradients."""
        trainer = trainer_for(self.model)
        trainer.step(self.batch)
        pruner = self.pruner(trainer, interval=1)
        while not pruner.done:
            pruner.score()
            pruner.step()
        return pruner.at.seconds

    def finetune_step(self) -> dict[str, list[float]]:
        """Time training steps of the dense network and of one with half of its MACs."""
        dense = trainer_for(self.model)
        kept = prune_to(
            self.scores(dense),
            self.graph.everything(),
            self.allowed,
            cost_of=self.goal.cost_of,
            limit=self.goal.limit,
        )
        pruned = trainer_for(shrink(self.model, self.graph, kept))
        return alternate(
            {
                "dense": lambda: dense.step(self.batch),
                "pruned": lambda: pruned.step(self.batch),
            },
            self.options.steps,
            self.device,
        )

    def memory(self, mode: str) -> float:
        """Train for a few steps, pruning along the way if asked, and return the peak in MiB."""
        if mode == "prune":
            self.prune_and_shrink()
        trainer = trainer_for(self.model)
        pruner = self.pruner(trainer, interval=10**9) if mode == "score" else None
        for _ in range(2):
            trainer.step(self.batch, judge=pruner)
            if pruner is not None:
                pruner.step()
        return peak_memory(self.device)


def peaks_from(script: str, options: argparse.Namespace, *further: str) -> dict[str, float]:
    """Return what a script prints by ``print_peaks`` with ``--memory``."""
    command = [sys.executable, script, *options.arguments, "--memory", *further]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(map(json.loads, done.stdout.splitlines()))


def print_peaks(modes: Iterable[str], peak: Callable[[str], float]) -> None:
    """Print the peak memory in MiB of each mode, of a process of its own.

    They are forked from this one, which has imported everything and computed nothing.
    """
    for mode in modes:
        if pid := os.fork():
            if os.waitpid(pid, 0)[1]:
                sys.exit(f"the process that measures {mode!r} failed")
            continue
        try:
            with computing(ComputeConfig()):
                print(json.dumps([mode, peak(mode)]), flush=True)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    return parsed(parser, arguments, model="resnet20", size=16, batch=4, steps=1)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory:
        print_peaks(("plain", "score", "prune"), lambda mode: Bench(options).memory(mode))
        return
    with computing(ComputeConfig()):  # as every run does
        measure(options)


def measure(options: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{options.model}, batch {options.batch}, {options.size}x{options.size}, torch "
        f"{torch.__version__}, {where}, {torch.get_num_threads()} threads, {options.steps} rounds\n"
    )
    print("| what | figure | bound |\n|---|---|---|")
    times = Bench(options).importance_step()
    ratios = [a / b for a, b in zip(times["importance"], times["plain"], strict=True)]
    print(f"| training step, plain | {statistics.median(times['plain']):.3f} s | |")
    print(f"| training step with a pruner / plain | {statistics.median(ratios):.3f} | 1.02 |")
    share = statistics.median(times["scoring"]) / statistics.median(times["plain"])
    print(f"| score and step alone, share of a plain step | {100 * share:.2f} % | 2 % |")
    seconds = Bench(options).prune_and_shrink()
    for name, value in seconds.items():
        print(f"| {name}, {SETTINGS.steps} pruning steps | {value:.2f} s | |")
    print(f"| pruning and shrinking by half, all of it | {sum(seconds.values()):.2f} s | 2 s |")
    times = Bench(options).finetune_step()
    ratios = [a / b for a, b in zip(times["pruned"], times["dense"], strict=True)]
    print(f"| finetune step, half the MACs / dense | {statistics.median(ratios):.3f} | 0.6 |")
    peaks = peaks_from(__file__, options)
    plain, scored, pruned = (peaks[mode] for mode in ("plain", "score", "prune"))
    print(f"| peak memory of plain training | {plain:.0f} MiB | |")
    print(f"| peak memory of training with a pruner / plain | {scored / plain:.3f} | 1.01 |")
    print(f"| peak memory of pruning / plain | {pruned / plain:.3f} | 1.1 |")


if __name__ == "__main__":
    main()
