"""Everything that only a GPU can show, in one command for a machine without a network connection.

    python benchmarks/on_a_gpu.py --output DIR [--only tests,training] [--minutes 10]
    python benchmarks/on_a_gpu.py --smoke

Parts run one after another, each in a process of its own with a time limit, so that what fails or
hangs takes no other part with it: the tests that need a GPU; steps of training, pruning and
finetuning of ResNet-50 at 224 x 224 with AMP and channels_last; dense against pruned ResNet-50
(half of the MACs, random weights) at batch 1, 8 and 32 in torch, ONNX Runtime and TensorRT, in fp32
and fp16. ``on_a_gpu.json`` and ``on_a_gpu.md`` hold chip, driver, versions and what each part said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from smoke import parsed

from compress.config.targets import load_target
from compress.errors import CompressError
from export.nvml import find_gpu

HERE = Path(__file__).resolve()
PARTS = ("tests", "training", "torch", "onnxruntime", "tensorrt")
BATCHES = (1, 8, 32)
KEPT = 6000
"""Characters of what a part said last that are kept."""
SHARE = {"tests": 0.35, "training": 0.25}
"""Of the whole time that a part may take; the others share what is left."""


@dataclass(frozen=True)
class Outcome:
    """What became of one part."""

    part: str
    command: list[str]
    ok: bool
    seconds: float
    said: str


def commands(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield the command of every part that is asked for."""
    python, folder = sys.executable, str(HERE.parent)
    tests = str(HERE.parents[1] / "tests")
    training = ["--batch", str(options.batch), "--workers", "0,4,8", "--device", options.device]
    if options.smoke:
        training = ["--smoke"]
    known = {
        "tests": [python, "-m", "pytest", "-q", tests, "-m", "gpu or tensorrt"],
        "training": [python, f"{folder}/imagenet_throughput.py", *training],
    }
    for part in options.only.split(","):
        ends = ["--size", str(options.size), "--model", options.model, "--device", options.device]
        ends += ["--seconds", str(options.seconds)]
        yield part, known.get(part, [python, str(HERE), "--part", part, *ends])


def run(part: str, command: list[str], seconds: float) -> Outcome:
    """Run one part; whatever becomes of it is its outcome."""
    print(f"{part}: {' '.join(command)}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        ok, said = done.returncode == 0, done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        ok, said = False, f"{said}\nstopped after {seconds:.0f} s"
    except OSError as error:
        ok, said = False, str(error)
    took = time.perf_counter() - start
    return Outcome(part, command, ok, round(took, 1), said.strip()[-KEPT:])


def machine() -> dict[str, object]:
    """Return processor, chip, driver and versions."""
    from bench.measuring.environment import fingerprint

    return fingerprint(threads=os.cpu_count() or 1).model_dump()


def latencies(part: str, options: argparse.Namespace) -> None:
    """Print a table of dense against pruned for one family of runtimes."""
    from bench.stopwatch import RuntimeStopwatch
    from compress.config import BenchConfig
    from compress.networks.analysis import analyse
    from compress.networks.models import build_model
    from compress.networks.shrink import shrink
    from compress.pruning.pieces import choose
    from export.latency.serving import PRECISIONS, Serving

    on_gpu = options.device != "cpu"
    runtime = "tensorrt" if part == "tensorrt" else f"{part}-{'cuda' if on_gpu else 'cpu'}"
    size = (3, options.size, options.size)
    model = build_model(options.model, num_classes=1000).eval()
    graph = analyse(model, size)
    importance = np.random.default_rng(0).random(graph.num_units)
    pruned = shrink(model, graph, choose(graph, importance, budget="macs=0.5", channel_multiple=8))
    bench = BenchConfig(max_seconds=options.seconds)
    heads = "| runtime | precision | batch | dense, ms | pruned, ms | ratio (95 %) |"
    rule = "\n|---|---|---:|---:|---:|---|\n"
    for precision in PRECISIONS if on_gpu else PRECISIONS[:1]:
        for batch in BATCHES if on_gpu else BATCHES[:1]:
            serving = Serving(
                runtime=runtime,  # type: ignore[arg-type]  # it refuses what is none
                precision=precision,  # type: ignore[arg-type]
                batch=batch,
                target=target_here() if on_gpu else "cpu",
            )
            found = RuntimeStopwatch(serving, 8, bench).compare(model, pruned, size)
            ratio = f"{found.ratio:.3f} ({found.low:.3f} to {found.high:.3f})"
            times = f"{found.dense_ms:.3f} | {found.pruned_ms:.3f}"
            print(
                f"{heads}{rule}| {runtime} | {precision} | {batch} | {times} | {ratio} |",
                flush=True,
            )
            heads = rule = ""


def target_here() -> str:
    """Return the target of this machine's GPU: that of its chip, else TensorRT-RTX."""
    gpu = find_gpu()
    of_chips = {load_target(name).sm: name for name in ("v100", "t4", "a100", "h100")}
    return "rtx" if gpu is None else of_chips.get(gpu.sm, "rtx")


def markdown(facts: dict[str, object], outcomes: Sequence[Outcome]) -> str:
    """Return the report for people."""
    lines = ["# On a GPU", "", "| | |", "|---|---|"]
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        lines.append(f"| {key} | {text} |")
    lines += ["", "| part | | seconds |", "|---|---|---:|"]
    lines += [f"| {o.part} | {'ran' if o.ok else 'failed'} | {o.seconds:g} |" for o in outcomes]
    for outcome in outcomes:
        said = (
            outcome.said if outcome.ok and "|---" in outcome.said else f"```\n{outcome.said}\n```"
        )
        shown = " ".join(["python", *outcome.command[1:]]).replace(f"{HERE.parents[1]}/", "")
        lines += ["", f"## {outcome.part}", "", f"    {shown}", "", said]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the report")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128, help="of training")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pair of networks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=PARTS[2:], help=argparse.SUPPRESS)
    smallest = {"only": "training,onnxruntime,tensorrt", "model": "resnet20", "size": 16}
    options = parsed(parser, arguments, device="cpu", seconds=1.0, minutes=5.0, **smallest)
    if unknown := set(options.only.split(",")) - set(PARTS):
        parser.error(f"no part is named {min(unknown)!r}: there are {', '.join(PARTS)}")
    if options.output is None and not options.smoke and options.part is None:
        parser.error("--output is missing: a folder for the report")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.part is not None:
        try:
            latencies(options.part, options)
        except CompressError as error:
            sys.exit(f"{error}")
        return
    parts = list(commands(options))
    rest = 1 - sum(SHARE.get(part, 0.0) for part, _ in parts)
    others = sum(part not in SHARE for part, _ in parts)
    seconds = 60 * options.minutes
    facts, outcomes, text = machine(), list[Outcome](), ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for part, command in parts:
            most = seconds * SHARE.get(part, rest / max(others, 1))
            outcomes.append(run(part, command, most))
            text = markdown(facts, outcomes)  # after each part, in case the machine is taken away
            report = {"machine": facts, "parts": [asdict(outcome) for outcome in outcomes]}
            (folder / "on_a_gpu.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
            (folder / "on_a_gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
