"""Whether an image folder of 100,000 files opens in seconds and stays flat in memory.

    python benchmarks/many_files.py [--files 100000] [--batches 3000] [--workers 2]
    python benchmarks/many_files.py --smoke

Makes an image folder of hard links to a few hundred distinct small JPEGs, opens it as a run does,
reads training batches over as many epochs as it takes, and prints a Markdown table: seconds to open
and to the first batch, then on the way the resident memory of the main process and of its workers,
and in brackets the part that is private. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import io
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from smoke import parsed

from compress.config import load_config
from compress.data.batches import TrainBatches
from compress.data.datasets import load_data
from compress.data.loading import Batch

CLASSES = 100
DISTINCT = 300
VALIDATION_SHARE = 20
"""One image in so many is for validation."""


def write_folder(root: Path, files: int) -> None:
    """Write ``files`` links to a few small JPEGs, over all classes."""
    rng = np.random.default_rng(0)
    sources = []
    for number in range(min(DISTINCT, files)):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "JPEG")
        source = root / f"{number}.jpg"
        source.write_bytes(buffer.getvalue())
        sources.append(source)
    for half, label in itertools.product(("train", "val"), range(CLASSES)):
        (root / half / f"class_{label:03}").mkdir(parents=True)
    for number in range(files):
        # Every class gets both kinds of image.
        half = "val" if number // CLASSES % VALIDATION_SHARE == 0 else "train"
        link = root / half / f"class_{number % CLASSES:03}" / f"image_{number:07}.jpg"
        os.link(sources[number % len(sources)], link)


class Memory(NamedTuple):
    """The memory of a process in MiB."""

    resident: float
    private: float
    """What would be free if the process ended: workers share the rest with the process that
    started them."""

    def __str__(self) -> str:
        return f"{self.resident:.0f} ({self.private:.0f})"


def memory_of(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    fields = {name: text.split() for name, _, text in (line.partition(":") for line in lines[1:])}
    resident, clean, dirty = (
        int(fields[name][0]) / 1024 for name in ("Rss", "Private_Clean", "Private_Dirty")
    )
    return Memory(resident, clean + dirty)


def memories() -> tuple[Memory, list[Memory]]:
    """Return the memory of this process and of each of its workers."""
    workers = sorted(child.pid for child in multiprocessing.active_children() if child.pid)
    return memory_of(os.getpid()), list(map(memory_of, workers))


def endless(batches: TrainBatches) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--batches", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    least = 2 * CLASSES * VALIDATION_SHARE
    options = parsed(parser, arguments, files=least, batches=7, batch=16, workers=1)
    if options.files < least:
        parser.error(f"--files must be at least {least}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), options.files)
        settings = ["data.dataset=imagefolder", f"data.root={folder}", "data.image_size=32"]
        config = load_config("digits-resnet20", settings).data
        print(f"{options.files} files, batches of {options.batch}, {options.workers} workers\n")
        print("| what | seconds |\n|---|---|")
        start = time.perf_counter()
        data = load_data(config)
        print(f"| open: list and identify | {time.perf_counter() - start:.2f} |")
        batches = TrainBatches(
            data, batch_size=options.batch, seed=0, workers=options.workers, prefetch=2
        )
        start = time.perf_counter()
        reading = endless(batches)
        next(reading)
        print(f"| first batch, workers started | {time.perf_counter() - start:.2f} |")
        print("\n| batches read | epoch | main process, MiB (private) | workers, MiB (private) |")
        print("|---|---|---|---|")
        for number in range(1, options.batches + 1):
            if (number - 1) % max(1, options.batches // 6) == 0 or number == options.batches:
                main_process, workers = memories()
                cells = ", ".join(map(str, workers)) or "none"
                epoch = number // len(batches)
                print(f"| {number} | {epoch} | {main_process} | {cells} |", flush=True)
            next(reading)


if __name__ == "__main__":
    main()
