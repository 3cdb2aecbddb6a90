"""Whether the quality gate cries wolf or sleeps on the machine that it runs on.

    python benchmarks/gate_on_this_machine.py RUN [--runs 20] [--batch 1] [--limit 1.03] [--busy 1]
    python benchmarks/gate_on_this_machine.py --smoke

The pruned network of a finished run is exported three times: as it is, as it is once more, and with
one convolution added that passes its input through (a Dirac kernel), so it answers the same and
takes longer. Then ``compress bench`` measures, each time in a process of its own with the default
settings: the copy against the network, where a FAIL is a false alarm, and the slower one against
the network, where anything but a FAIL is a miss. Both are judged by ``latency.max_ratio``.

``--busy`` processes run beside it all the while: each computes for up to half a second, rests for
as long, and begins anew, by chance.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from smoke import SETTINGS, finished_run, parsed_with_run
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint, load_checkpoint
from compress.config.targets import load_target
from compress.errors import CompressError
from compress.runs.launch import existing
from compress.runs.request import Request
from export.checkpoint_to_onnx import export_checkpoint, samples_of


def with_one_more_convolution(model: nn.Module, after: str, kernel: int) -> nn.Module:
    """Return a copy with a convolution that passes through what the module ``after`` returns."""
    longer = copy.deepcopy(model)
    before = dict(model.named_modules())[after]
    channels = [m.out_channels for m in before.modules() if isinstance(m, nn.Conv2d)][-1]
    added = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    nn.init.dirac_(added.weight)
    parent, _, name = after.rpartition(".")
    setattr(longer.get_submodule(parent), name, nn.Sequential(before, added))
    return longer.eval()


def exported(run: Path, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Write three run directories whose pruned networks are compared."""
    directory, config, data = existing(run, Request(data=options.data))
    checkpoint = load_checkpoint(directory.pruned)
    longer = with_one_more_convolution(checkpoint.model, options.after, options.kernel)
    networks: dict[str, Checkpoint] = {
        "network": checkpoint,
        "copy": checkpoint,
        "longer": replace(checkpoint, model=longer),
    }
    for name, network in networks.items():
        (folder / name / "export").mkdir(parents=True)
        copyfile(directory.pruned, folder / name / "pruned.safetensors")
        copyfile(directory.config, folder / name / "config.toml")
        export_checkpoint(
            network,
            folder / name / "export" / "pruned.onnx",
            target=load_target(config.export.target),
            config=config.export.model_copy(update={"precision": "fp32"}),
            samples=samples_of(data, config),
        )
    return {name: folder / name for name in networks}


def compute_and_rest(seed: int) -> None:
    """Compute and rest by chance, without an end."""
    chance = random.Random(seed)
    torch.set_num_threads(1)
    matrix = torch.rand(256, 256)
    while True:
        end = time.monotonic() + chance.uniform(0, 0.5)
        while time.monotonic() < end:
            matrix = torch.softmax(matrix @ matrix, dim=1)
        time.sleep(chance.uniform(0, 0.5))


@contextmanager
def others_at_work(count: int, work: Callable[[int], None] = compute_and_rest) -> Iterator[None]:
    """Run processes that do some work without an end; each is given its number."""
    workers = [multiprocessing.Process(target=work, args=(n,), daemon=True) for n in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def judged(measured: Path, against: Path, folder: Path, options: argparse.Namespace) -> Any:
    """Run ``compress bench`` in a process of its own and return its only verdict."""
    limits = folder / "limits.toml"
    limits.write_text(f"[latency]\nmax_ratio = {options.limit}\n", encoding="utf-8")
    command = [sys.executable, "-m", "cli", "bench", str(measured), "--against", str(against)]
    command += ["--precision", "fp32", "--batch", str(options.batch), "--limits", str(limits)]
    command += ["--output", str(folder / "reports"), "--json", "--set", "bench.layer_calls=0"]
    for setting in options.settings:
        command += ["--set", setting]
    if options.data:
        command += ["--data", str(options.data)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 3, 4, 5):
        sys.exit(done.stderr)
    (verdict,) = json.loads(done.stdout)["verdicts"]
    return verdict


def gate_parser(about: str, limit: str, runs: int) -> argparse.ArgumentParser:
    """Return what every program takes that gates a network and a longer one.

    Args:
        about: docstring of the program.
        limit: what they are judged by.
        runs: how often by default.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--runs", type=int, default=runs, help="of each network")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.03, help=limit)
    parser.add_argument("--after", default="layer1.0", help="module that the layer is added to")
    parser.add_argument("--kernel", type=int, default=3, help="of the added convolution")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of the bench")
    return parser


SMALLEST = {"runs": 1, "settings": [each for each in SETTINGS if each.startswith("bench.")]}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = gate_parser(__doc__ or "", "latency.max_ratio", 20)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    return parsed_with_run(parser, arguments, **SMALLEST)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print every verdict."""
    options = parse(arguments)
    table = Table("", "ratio", "at least", "at most", "verdict", title=f"limit {options.limit}")
    counts: dict[str, Counter[str]] = {"copy": Counter(), "longer": Counter()}
    with (
        finished_run(options.run) as run,
        tempfile.TemporaryDirectory() as scratch,
        others_at_work(options.busy),
    ):
        try:
            runs = exported(run, Path(scratch), options)
        except CompressError as error:
            sys.exit(str(error))
        for number in range(options.runs):
            for name, count in counts.items():
                verdict = judged(runs[name], runs["network"], Path(scratch), options)
                count[verdict["status"]] += 1
                found = (verdict["measured"], *(verdict["interval"] or (None, None)))
                figures = ("-" if value is None else f"{value:.3f}" for value in found)
                table.add_row(f"{name} {number + 1}", *figures, verdict["status"])
                print(f"{name} {number + 1}: {verdict['sentence']}", file=sys.stderr)
    Console().print(table)
    load = f"{options.busy} busy processes, load {os.getloadavg()[0]:.1f}"
    print(f"{load}; a copy: {dict(counts['copy'])}; one more layer: {dict(counts['longer'])}")


if __name__ == "__main__":
    main()
