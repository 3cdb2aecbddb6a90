"""Images per second of reading, training, pruning and finetuning, as one Markdown table.

    python benchmarks/imagenet_throughput.py [--model resnet50] [--size 224] [--batch 16]
        [--steps 5] [--workers 0,1,2] [--images 256] [--device auto]
    python benchmarks/imagenet_throughput.py --smoke

The images are JPEGs of 500 x 375 pixels and about 100 kB each, noise with the spectrum of
photographs, made for the run. The loader is timed alone, over whole epochs after one that starts
the workers; links to the same files make epochs long enough to keep every worker busy. Training
steps are the product's own, on one batch that lies ready; dense training, pruning (with importance)
and finetuning after the shrink to half of the MACs alternate in one process, so a change of the
machine's speed meets all of them. Figures are medians, with the range of all rounds. Peak memory is
that of a process for each row alone: the largest resident size, on a GPU what torch allocated.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from pruning_cost import (
    SETTINGS,
    Bench,
    alternate,
    peak_memory,
    peaks_from,
    print_peaks,
    trainer_for,
)
from smoke import parsed

from compress.config import ComputeConfig, load_config
from compress.data.batches import TrainBatches
from compress.data.datasets import load_data
from compress.networks.shrink import shrink
from compress.pruning.masking import prune_to
from compress.pruning.pruner import Pruner
from compress.training.compute import computing, pick_device

PHASES = ("dense training", "pruning, with importance", "finetuning at half the MACs")
CLASSES = 2
CLEAR = Path("/proc/self/clear_refs")
BATCHES_EACH = 4
"""Batches of an epoch for each worker, at least: with fewer, some would have nothing to do."""


def photograph(seed: int, *, width: int = 500, height: int = 375) -> bytes:
    """Return a JPEG of noise whose amplitude falls with frequency as that of photographs does.

    Field, "Relations between the statistics of natural images", J. Opt. Soc. Am. A 4 (1987): the
    power falls with the square of the frequency. A slightly steeper slope, muted colours and
    quality 90 give the size of ImageNet's files.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows * height, columns * width)
    frequency[0, 0] = np.inf

    def plane(contrast: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(frequency**-1.2 * phase, s=(height, width))
        return 128 + contrast * values / values.std()

    planes = np.stack([plane(55), plane(14), plane(14)], axis=-1)
    image = Image.fromarray(planes.clip(0, 255).astype(np.uint8), "YCbCr")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_folder(root: Path, images: int) -> float:
    """Write an image folder with as many training images; return their mean size in kB."""
    sizes = []
    for number in range(images):
        data = photograph(number)
        sizes.append(len(data))
        for half in ("train", "val") if number < 2 * CLASSES else ("train",):
            path = root / half / f"class {number % CLASSES}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return statistics.mean(sizes) / 1000


def folder_for(options: argparse.Namespace, workers: int) -> Path:
    """Return a folder that has BATCHES_EACH batches for every worker in an epoch."""
    wanted = BATCHES_EACH * workers * options.batch
    if wanted <= options.images:
        return options.folder
    root = options.folder / f"{workers} workers"
    if not root.exists():
        (root / "train").mkdir(parents=True)
        (root / "val").symlink_to(options.folder / "val")
        files = sorted((options.folder / "train").rglob("*.jpg"))
        for number in range(wanted):
            file = files[number % len(files)]
            link = root / "train" / file.parent.name / f"{number}.jpg"
            link.parent.mkdir(exist_ok=True)
            link.hardlink_to(file)
    return root


def batches_of(options: argparse.Namespace, workers: int, decoder: str) -> TrainBatches:
    """Return the training batches of the generated images, as a run would read them."""
    settings = [
        "data.dataset=imagefolder",
        f"data.root={folder_for(options, workers)}",
        f"data.image_size={options.size}",
        f"data.decoder={decoder}",
    ]
    data = load_data(load_config("digits-resnet20", settings).data)
    on_gpu = pick_device(options.device).type == "cuda"
    return TrainBatches(data, batch_size=options.batch, seed=0, workers=workers, for_gpu=on_gpu)


def loader_rates(options: argparse.Namespace, workers: int, decoder: str) -> list[float]:
    """Return images per second of the loader alone, for each round."""
    batches = batches_of(options, workers, decoder)
    epochs = -(-options.read // (len(batches) * options.batch))
    rates = []
    for number in range(options.rounds + 1):
        start = time.perf_counter()
        read = sum(
            len(batch.labels)
            for epoch in range(number * epochs, (number + 1) * epochs)
            for batch in batches.epoch(epoch)
        )
        if number:  # the first one starts the workers
            rates.append(read / (time.perf_counter() - start))
    return rates


class Phases:
    """The training steps of a run's phases, on one batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.bench = options, Bench(options)
        self.device, self.graph = self.bench.device, self.bench.graph
        self.batch = next(batches_of(options, 0, "pil").epoch(0))
        self.batch = replace(self.batch, skipped=0)

    def dense(self) -> Callable[[], object]:
        trainer = trainer_for(copy.deepcopy(self.bench.model))
        return partial(trainer.step, self.batch)

    def pruning(self) -> Callable[[], object]:
        model = copy.deepcopy(self.bench.model)
        trainer = trainer_for(model)
        pruner = Pruner(
            model,
            self.batch.images[:1],
            optimizer=trainer.optimizer,
            graph=self.graph,
            **{**dict(SETTINGS), "interval": 10**9},
        )

        def step() -> None:
            trainer.step(self.batch, judge=pruner)
            pruner.step()

        return step

    def finetuning(self) -> Callable[[], object]:
        """Shrink by the importance that one step on the batch gives."""
        bench = self.bench
        scores = bench.scores(trainer_for(bench.model))
        kept = prune_to(
            scores,
            self.graph.everything(),
            bench.allowed,
            cost_of=bench.goal.cost_of,
            limit=bench.goal.limit,
        )
        trainer = trainer_for(shrink(bench.model, self.graph, kept))
        return partial(trainer.step, self.batch)

    def works(self) -> dict[str, Callable[[], object]]:
        """Return one step of each phase, by name."""
        return dict(zip(PHASES, (self.dense(), self.pruning(), self.finetuning()), strict=True))

    def seconds(self) -> dict[str, list[float]]:
        """Time the steps of all phases in turn."""
        return alternate(self.works(), self.options.steps, self.device)

    def memory(self, phase: str) -> float:
        """Take two steps of one phase alone; return the peak in MiB."""
        make = dict(zip(PHASES, (self.dense, self.pruning, self.finetuning), strict=True))[phase]
        work = make()
        del self.bench.model  # each phase trains a network of its own
        reset_peak(self.device)
        for _ in range(2):
            work()
        return peak_of(self.device)


def reset_peak(device: torch.device) -> None:
    """Forget what making the networks took; proc(5) has the 5."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak_of(device: torch.device) -> float:
    """Return the peak memory in MiB since ``reset_peak``."""
    if device.type == "cuda" or not CLEAR.exists():
        return peak_memory(device)
    status = CLEAR.with_name("status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def cell(values: list[float], form: str = ".1f") -> str:
    """Return the median and the range of some rounds."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def heading(options: argparse.Namespace, size: float) -> str:
    """Return what the figures hold for."""
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    trainer = trainer_for(torch.nn.Conv2d(1, 1, 1).to(device))
    layout = str(trainer.memory_format).removeprefix("torch.")
    amp = str(trainer.amp_dtype).removeprefix("torch.") if trainer.amp_dtype else "off"
    return (
        f"{options.model} at {options.size} x {options.size}, batch {options.batch}, AMP {amp}, "
        f"{layout}; {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}; "
        f"JPEGs of {size:.0f} kB; {options.steps} rounds of a step, {options.rounds} of the loader"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="rounds of the training steps")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the loader")
    parser.add_argument("--workers", default="0,1,2", help="counts to time, with commas")
    parser.add_argument("--images", type=int, default=256, help="JPEGs to generate")
    parser.add_argument("--device", default="auto")
    about = "images that the loader reads between two looks at the clock, at least"
    parser.add_argument("--read", type=int, default=256, help=about)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    sizes = {"size": 16, "batch": 4, "steps": 1, "rounds": 1, "images": 8, "read": 8}
    options = parsed(parser, arguments, model="resnet20", workers="0,1", **sizes)
    if options.images < options.batch:
        parser.error(f"--images {options.images} must be at least --batch {options.batch}")
    return options


def print_loader(options: argparse.Namespace) -> None:
    print("| the loader alone | images/s (range) |\n|---|---|")
    for decoder in ("pil", "tensor"):
        for workers in map(int, options.workers.split(",")):
            rates = loader_rates(options, workers, decoder)
            print(f"| `{decoder}`, {workers} workers | {cell(rates, '.0f')} |", flush=True)


def print_steps(options: argparse.Namespace) -> None:
    times = Phases(options).seconds()
    memory = peaks_from(__file__, options, "--folder", str(options.folder))
    print("\n| step | images/s (range) | time / dense training (range) | peak memory |")
    print("|---|---|---|---|")
    for phase, seconds in times.items():
        rates = [options.batch / second for second in seconds]
        ratios = [own / dense for own, dense in zip(seconds, times[PHASES[0]], strict=True)]
        figures = f"{cell(rates)} | {cell(ratios, '.3f')} | {memory[phase]:.0f} MiB"
        print(f"| {phase} | {figures} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.memory:
        print_peaks(PHASES, lambda phase: Phases(options).memory(phase))
        return
    with computing(ComputeConfig()):  # as every run does
        measure(options)


def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        print(heading(options, write_folder(options.folder, options.images)) + "\n", flush=True)
        print_loader(options)
        print_steps(options)


if __name__ == "__main__":
    main()
