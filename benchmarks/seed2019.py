"""A run by the published settings on generated images, checked line by line.

    python benchmarks/seed2019.py [--output DIR] [--steps 10] [--batch 4]
    python benchmarks/seed2019.py --smoke

Writes a folder of JPEGs with random shapes on random backgrounds, prunes a ResNet-50 with random
weights by `configs/imagenet_resnet50_prune72.toml` on it, and compares the history with what the
settings promise: when pruning happens, how many channels go, and the learning rate. Only the batch
size, the workers and the number of pruning steps are smaller than published (with ``--smoke`` the
network and the images too). Prints seconds per step and peak memory. The accuracy means nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from smoke import parsed

from compress.config import RunConfig, load_config
from compress.data.datasets import load_data
from compress.runs.dense import train_dense
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import State

CLASSES = ("circle", "square", "bar")


class Timed(Session):
    """A session that keeps the time of every step."""

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run)
        self.times = [time.perf_counter()]

    def after_step(self, snapshot: Callable[[], State]) -> None:
        self.times.append(time.perf_counter())


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """Draw one shape of 60 to 180 pixels on a noisy 256x320 background."""
    noise = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((320, 256), Image.Resampling.BICUBIC)
    size = int(rng.integers(60, 180))
    left, top = int(rng.integers(0, 320 - size)), int(rng.integers(0, 256 - size))
    colour = tuple(int(c) for c in rng.integers(0, 256, 3))
    pen = ImageDraw.Draw(image)
    if kind == "circle":
        pen.ellipse((left, top, left + size, top + size), fill=colour)
    else:
        height = size if kind == "square" else size // 5
        pen.rectangle((left, top, left + size, top + height), fill=colour)
    return image


def generate(folder: Path, train: int, val: int) -> None:
    """Write an image folder unless it is there."""
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        rng = np.random.default_rng(seed)
        for number in range(count):
            kind = CLASSES[number % len(CLASSES)]
            path = folder / split / kind / f"{number:05d}.jpg"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(kind, rng).save(path, quality=90)


def check(config: RunConfig, history: list[dict[str, Any]], dense: int) -> list[str]:
    """Compare the history with the settings; return what was checked, in words."""
    prune_settings, finetune = config.prune, config.finetune
    steps = [line for line in history if line["event"] == "prune_step"]
    interval, size = prune_settings.interval, prune_settings.step_size
    assert (interval, size) == (30, 100)
    first = interval + prune_settings.first_interval_extra
    assert [line["step"] for line in steps] == [first + interval * n for n in range(len(steps))]
    left = [dense, *(line["channels"] for line in steps)]
    assert [a - b for a, b in pairwise(left)] == [size] * len(steps)
    assert {line["lr"] for line in steps} == {1e-3}
    assert all("conv1" not in line["widths"] for line in steps)
    assert all(min(line["widths"].values()) >= 1 for line in steps)
    epochs = [line for line in history if line["event"] == "epoch"]
    assert len(epochs) == finetune.epochs
    # Recorded at the end of an epoch is the rate of the next one; the decays are at 10 and 20.
    rates = [1e-3 * 0.1 ** ((epoch + 1) // 10) for epoch in range(1, finetune.epochs + 1)]
    assert np.allclose([line["lr"] for line in epochs], rates, rtol=1e-6)
    differences = [line["difference"] for line in history if line["event"] == "shrink"]
    assert differences
    assert max(differences) < 1e-9
    return [
        f"{len(steps)} pruning steps, one every {interval} minibatches",
        f"each removes {size} channels: {left[0]} -> {left[-1]} (with the dense stem)",
        f"{len(differences)} shrinks, masked = shrunk to {max(differences):.1e}",
        f"{len(epochs)} epochs of finetuning, rate divided by 10 from epochs 10 and 20 on",
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="of images and run; default none are kept")
    parser.add_argument("--steps", type=int, default=10, help="pruning steps; published: 32")
    parser.add_argument("--batch", type=int, default=4, help="images per step; published: 256")
    parser.add_argument("--images", type=int, default=48, help="training images")
    parser.add_argument("--epochs", type=int, default=25, help="of finetuning; published: 25")
    parser.add_argument("--model", default="resnet50", help="published: resnet50")
    parser.add_argument("--size", type=int, default=224, help="of the crops; published: 224")
    return parsed(
        parser, arguments, steps=1, batch=2, images=32, epochs=2, size=64, model="resnet34"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        run_and_check(options, options.output or Path(scratch))


def run_and_check(options: argparse.Namespace, output: Path) -> None:
    """Prune by the published settings and print what was checked and measured."""
    folder = output / "images"
    generate(folder, options.images, 12)
    config = load_config(
        "imagenet_resnet50_prune72",
        [
            f"data.root={folder.resolve()}",
            f"model.name={options.model}",
            f"data.batch_size={options.batch}",
            f"data.image_size={options.size}",
            "data.workers=0",
            f"prune.max_steps={options.steps}",
            f"finetune.epochs={options.epochs}",
            "train.epochs=0",
            "tensorboard=false",
        ],
    )
    run = RunDirectory(output / "run")
    if run.path.is_dir():
        shutil.rmtree(run.path)
    run.begin(config)
    data = load_data(config.data)
    train_dense(config, data, Session(run))
    session = Timed(run)
    prune(config, data, session)

    history = [json.loads(line) for line in run.history.read_text().splitlines()]
    pruned = next(line for line in history if line["event"] == "pruned")
    dense = pruned["channels"] + 100 * sum(line["event"] == "prune_step" for line in history)
    for words in check(config, history, dense):
        print("ok:", words)
    seconds = np.diff(session.times)
    pruning = options.steps * config.prune.interval + config.prune.first_interval_extra
    print(f"seconds per step while pruning (median): {statistics.median(seconds[:pruning]):.3f}")
    print(f"seconds per step of finetuning (median): {statistics.median(seconds[pruning:]):.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process: {peak:.0f} MiB")
    print(f"MACs left: {pruned['macs'] / 1e9:.3f} G, parameters: {pruned['params'] / 1e6:.2f} M")


if __name__ == "__main__":
    main()
