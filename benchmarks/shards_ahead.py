"""What fetching shards ahead saves: how long training waits for shards behind a slow line.

    python benchmarks/shards_ahead.py [--shards 24] [--images 200] [--workers 2] [--repeats 3]
    python benchmarks/shards_ahead.py --smoke

Packs generated JPEGs into shards, serves them from memory through fsspec at so many bytes a second
and connection that fetching a window takes a worker most of the time that training on it takes, and
reads epochs of an empty cache with a pause in place of every training step. Shards on disk, with
room in the cache to fetch ahead and without it are measured in turn. Prints a Markdown table:
seconds of an epoch (median, least and most) and the longest wait for a batch.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from smoke import parsed

from compress.config import DataConfig
from compress.data.batches import TrainBatches
from compress.data.datasets import load_data
from compress.data.shards.__main__ import main as shards

BATCH_SIZE = 50
WINDOW = 4
STEP_SECONDS = 0.1
"""Of the pause that stands for a training step."""
LOAD = 0.8
"""Time of fetching a window by one connection for each worker, as a share of training on it."""


class SlowLine(MemoryFileSystem):
    """Files in memory whose every connection passes ``rate`` bytes a second."""

    protocol = "slowline"
    rate = 1.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("slowline://"))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        stream = super().open(path, mode, **options)
        if mode == "rb" and path.endswith(".tar"):
            size = len(stream.getbuffer())
            time.sleep(size / self.rate)
        return stream


def write_images(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for half, number in (("train", count), ("val", 10)):
        for image in range(number):
            folder = root / half / str(image % 10)
            folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
            (folder / f"{image}.jpg").write_bytes(buffer.getvalue())


def epoch(config: DataConfig, workers: int, number: int) -> tuple[float, float]:
    """Return the seconds of one epoch and of its longest wait after the first batch."""
    batches = TrainBatches(load_data(config), batch_size=BATCH_SIZE, seed=number, workers=workers)
    reading = batches.epoch(0)
    next(reading)  # the first window is waited for whatever is done
    longest, start = 0.0, time.perf_counter()
    while True:
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        if next(reading, None) is None:
            break
        longest = max(longest, time.perf_counter() - asked)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds, longest


def measure(options: argparse.Namespace, scratch: Path) -> None:
    write_images(scratch / "images", options.shards * options.images)
    packing = ["pack", str(scratch / "images"), str(scratch / "shards")]
    assert shards([*packing, "--images-per-shard", str(options.images)]) == 0
    fsspec.register_implementation("slowline", SlowLine, clobber=True)
    system = fsspec.filesystem("slowline")
    for path in sorted((scratch / "shards").rglob("*")):
        if path.is_file():
            name = path.relative_to(scratch / "shards").as_posix()
            system.pipe_file(f"/bucket/{name}", path.read_bytes())
    sizes = [path.stat().st_size for path in (scratch / "shards" / "train").glob("*.tar")]
    steps = WINDOW * options.images / BATCH_SIZE
    SlowLine.rate = WINDOW * max(sizes) / options.workers / (LOAD * steps * STEP_SECONDS)
    common = {"dataset": "shards", "image_size": 32, "augment": "none", "shuffle_shards": WINDOW}
    line = {"root": "slowline://bucket", "schemes": ["slowline"]}
    cases: dict[str, dict[str, Any]] = {
        "on disk": {"root": scratch / "shards"},
        "fetched ahead": {**line, "cache_gib": 3 * WINDOW * max(sizes) / 2**30},
        "fetched when read": {**line, "cache_gib": 2 * WINDOW * max(sizes) / 2**30},
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(options.repeats):
        for name, keys in cases.items():
            cache = scratch / "cache" / f"{number} {name}"
            config = DataConfig.model_validate({**common, **keys, "cache": cache})
            found[name].append(epoch(config, options.workers, number))
    train = options.shards * options.images // BATCH_SIZE
    print(
        f"{options.shards} shards of {max(sizes) / 1e6:.1f} MB, {WINDOW} mixed, {train} steps of "
        f"{STEP_SECONDS} s, {options.workers} workers, {SlowLine.rate / 1e6:.2f} MB/s each\n"
    )
    print("| shards | epoch, s | longest wait, s |\n|---|---|---|")
    for name, results in found.items():
        seconds = [each for each, _ in results]
        waits = statistics.median(wait for _, wait in results)
        middle = statistics.median(seconds)
        print(f"| {name} | {middle:.1f} ({min(seconds):.1f}-{max(seconds):.1f}) | {waits:.2f} |")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--images", type=int, default=200, help="of a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    return parsed(parser, arguments, shards=6, images=BATCH_SIZE, workers=1, repeats=1)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        measure(options, Path(scratch))


if __name__ == "__main__":
    main()
