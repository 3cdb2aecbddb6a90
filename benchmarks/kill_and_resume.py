"""A run on digits, killed with SIGKILL again and again and resumed, against one left alone.

    python benchmarks/kill_and_resume.py [--kills 20] [--starts 30] [--seed 0] [--output DIR]
    python benchmarks/kill_and_resume.py --smoke

The moments are drawn by lot and spread over all phases: between training steps of dense training,
of pruning and of finetuning, and in the middle of what is done with files, where the process is
held until it is dead. At the end both runs must hold the same files, the same weights to the last
bit, the same history and the same curves, and no temporary file.

Then `compress prune --checkpoint` is killed so many times at moments from its first millisecond to
its end, more of them early, every second time twice. It goes on with --resume where there is
something to resume, or with the same command, in turn.

Prints Markdown tables; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from killed import Runs, drawn
from smoke import parsed

LIMITS = "[macs]\nmax_ratio = 0.9\n"
"""Judged by counting, so the run ends the same way on any machine."""
SETTINGS = {
    "device": "cpu",
    "data.image_size": "8",
    "data.batch_size": "128",
    "save.every_steps": "2",
    "train.epochs": "3",
    "train.ema": "0.9",
    "prune.steps": "6",
    "prune.interval": "3",
    "prune.shrink_at": "0.1",
    "prune.bn_batches": "2",
    "finetune.epochs": "3",
    "finetune.ema": "0.9",
    "finetune.distill": "0.5",
    "export.parity_batches": "[1, 2]",
    "bench.batch_sizes": "[1]",
    "bench.block_ms": "1",
    "bench.min_blocks": "4",
    "bench.max_seconds": "0.3",
}
SHORT = ("train.epochs=1", "prune.steps=3", "prune.interval=2", "finetune.epochs=1")
"""What makes of it a run of seconds."""


def command(output: Path, settings: dict[str, str]) -> list[str]:
    """Return the command that begins a run, or goes on with what lies there."""
    if (output / "config.toml").is_file():
        return ["run", "--resume", "--output", str(output)]
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["run", "--output", str(output), *options]


def pruning(output: Path, checkpoint: Path, settings: dict[str, str], *, same: bool) -> list[str]:
    """Return the command that prunes a checkpoint, or goes on with what lies there.

    Args:
        output: the run directory.
        checkpoint: dense weights.
        settings: of the run.
        same: give the same command, whatever lies there.
    """
    if not same and (output / "config.toml").is_file():
        return ["prune", "--resume", "--output", str(output)]
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["prune", "--checkpoint", str(checkpoint), "--output", str(output), *options]


def tensors_sha256(file: Path) -> str:
    """Return the SHA-256 of all tensors in a file, by name."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def curves(run: Path) -> dict[str, list[tuple[str, int, float]]]:
    """Return the points that TensorBoard draws of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resume
    found = {}
    for folder in sorted((run / "tensorboard").iterdir()):
        read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        found[folder.name] = [
            (tag, point.step, point.value)
            for tag in sorted(read.Tags()["scalars"])
            for point in read.Scalars(tag)
        ]
    return found


def files_of(run: Path) -> set[str]:
    """Return the names of all files of a run, but for TensorBoard's: a resume begins another."""
    names = (path.relative_to(run) for path in run.rglob("*") if not path.is_dir())
    return {str(name) for name in names if name.parts[0] != "tensorboard"}


def differences(expected: Path, actual: Path) -> list[str]:
    """Return in what two runs that have ended differ."""
    found = []
    for name in ("dense.safetensors", "pruned.safetensors"):
        if (expected / name).read_bytes() != (actual / name).read_bytes():
            found.append(name)
    if (expected / "history.jsonl").read_text() != (actual / "history.jsonl").read_text():
        found.append("the history")
    if curves(expected) != curves(actual):
        found.append("the curves")
    if files_of(expected) != files_of(actual):
        found.append(f"the files {sorted(files_of(expected) ^ files_of(actual))}")
    return found


def steps_of(run: Path) -> dict[str, int]:
    """Return the training steps of dense training, and of pruning with finetuning."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    trained = [line["step"] for line in lines if line.get("phase") == "train"]
    return {
        "train": max(trained),
        "prune": max(line.get("step", 0) for line in lines[len(trained) :]),
    }


def left_in(run: Path) -> str:
    """Return what a kill left that a finished run has not."""
    names = [f"{path.parent.name}/{path.name}" for path in run.rglob(".*")]
    states = [path.name for path in (run / "state").glob("*.safetensors") if path.name[0] != "."]
    return ", ".join([*sorted(states), *(name.removeprefix(f"{run.name}/") for name in names)])


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        path.mkdir(parents=True, exist_ok=True)
        yield path


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="keep both runs here; it must be empty")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="of both runs")
    return parsed(parser, arguments, kills=2, starts=2, settings=list(SHORT))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rng, start = random.Random(options.seed), time.monotonic()
    with _folder(options.output) as folder, Runs() as runs:
        (folder / "limits.toml").write_text(LIMITS)
        settings = SETTINGS | {"bench.limits": str(folder / "limits.toml")}
        settings |= {key: value for key, _, value in (s.partition("=") for s in options.settings)}
        alone, killed = folder / "alone", folder / "killed"
        if runs.run(command(alone, settings)):
            sys.exit(runs.said())
        print("| kill | at | left behind |\n|---|---|---|")
        for number, moment in enumerate(drawn(options.kills, steps_of(alone), rng), 1):
            delay = rng.uniform(0, 0.05) if moment.action == "step" else 0
            runs.run(command(killed, settings), moment, delay)
            print(f"| {number} | {moment} | {left_in(killed)} |", flush=True)
        if runs.run(command(killed, settings)):
            sys.exit(runs.said())
        found = differences(alone, killed)
        print(f"\n{options.kills} kills, {time.monotonic() - start:.0f} s.", end=" ")
        if found:
            print(f"What differs: {'; '.join(found)}.")
            sys.exit(1)
        print(
            "Weights of both networks, history, curves and files are those of the run left alone."
        )
        for name in ("dense", "pruned"):
            print(f"{name}: {tensors_sha256(killed / f'{name}.safetensors')}")
        from_the_start(runs, folder, settings, options.starts, rng)


def from_the_start(
    runs: Runs, folder: Path, settings: dict[str, str], starts: int, rng: random.Random
) -> None:
    """Kill ``compress prune --checkpoint`` from its first millisecond on; exit where it matters."""
    checkpoint, alone = folder / "alone" / "dense.safetensors", folder / "pruned-alone"
    start = time.monotonic()
    if runs.run(pruning(alone, checkpoint, settings, same=True)):
        sys.exit(runs.said())
    whole = time.monotonic() - start
    print(f"\n| start | killed after, of {whole:.1f} s | goes on by | left behind |")
    print("|---|---|---|---|")
    wrong = []
    for number in range(starts):
        killed, same = folder / f"pruned-{number}", number % 4 < 2
        # Evenly spread on a scale of powers, so that half of all come in the first tenth.
        moments = [0.001 * (1000 * whole) ** (number / max(1, starts - 1))]
        moments += [rng.uniform(0.001, whole)] * (number % 2)
        left = []
        for moment in moments:
            runs.killed_after(pruning(killed, checkpoint, settings, same=same), moment)
            left.append(left_in(killed) or "nothing")
        if runs.run(pruning(killed, checkpoint, settings, same=same)):
            wrong.append(f"start {number + 1} cannot go on: {runs.said().splitlines()[-1]}")
        elif found := differences(alone, killed):
            wrong.append(f"start {number + 1}: {'; '.join(found)}")
        after = ", ".join(f"{1000 * moment:.0f} ms" for moment in moments)
        how = "the same command" if same else "--resume"
        print(f"| {number + 1} | {after} | {how} | {'; '.join(left)} |", flush=True)
    if wrong:
        print(f"\n{len(wrong)} of {starts} differ. {'. '.join(wrong)}.")
        sys.exit(1)
    print(f"\n{starts} of {starts} ended with the files, to the last byte, of the run left alone.")


if __name__ == "__main__":
    main()
