"""Whether a baseline that was measured beside other programs makes the quality gate cry wolf.

    python benchmarks/gate_against_baselines.py RUN [--runs 4] [--batch 1] [--limit 1.03]
    python benchmarks/gate_against_baselines.py --smoke

The pruned network of a finished run is measured against its dense one by ``compress bench``, each
time in a process of its own, and so is the same network with one convolution more that passes its
input through. The machine is in one of three states: it does nothing else; a process computes and
rests by chance; a process streams through memory without a rest. Then every report is judged by
``latency.max_regression`` against every other one of the network as a baseline: where the same
network was measured a FAIL is a false alarm, and for the longer one it is what should be found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from gate_on_this_machine import SMALLEST, exported, gate_parser, others_at_work
from rich.console import Console
from rich.table import Table
from smoke import finished_run, parsed_with_run

from bench.judging.baseline import change_against
from bench.judging.quality_gate import judge
from bench.reports.report import REPORT, load_report
from bench.reports.schema import Report
from compress.errors import CompressError
from export.request import ExportRequest
from export.stage import export_existing


def stream(_: int) -> None:
    """Read and write more memory than caches hold, without an end."""
    one, other = np.ones(1 << 25), np.ones(1 << 25)
    while True:
        one += other


STATES: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
    "alone": nullcontext,
    "computing": lambda: others_at_work(1),
    "streaming": lambda: others_at_work(1, stream),
}


def measured(reference: Path, candidate: Path, output: Path, options: argparse.Namespace) -> Report:
    """Run ``compress bench`` in a process of its own and return its report."""
    command = [sys.executable, "-m", "cli", "bench", str(reference), str(candidate)]
    command += ["--batch", str(options.batch), "--output", str(output)]
    for setting in ("bench.layer_calls=0", *options.settings):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return load_report(output / REPORT)


def reports(
    run: Path, scratch: Path, options: argparse.Namespace
) -> dict[tuple[str, str], list[Report]]:
    """Measure, by (state, network), the states in turn."""
    networks = {
        name: folder / "export" / "pruned.onnx"
        for name, folder in exported(run, scratch, options).items()
    }
    _, folder = export_existing(
        ExportRequest(run=run, data=options.data, output=scratch / "both", precision="fp32")
    )
    found: dict[tuple[str, str], list[Report]] = defaultdict(list)
    for number, state, name in product(range(options.runs), options.states, ("network", "longer")):
        with STATES[state]():
            output = scratch / f"{state}-{name}-{number}"
            report = measured(folder / "dense.onnx", networks[name], output, options)
        found[state, name].append(report)
        (latency,) = report.comparison.latency
        (dense,) = report.networks.reference.latency
        ratio = latency.ratio
        print(
            f"{state}, {name}: {ratio.ratio:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], dense "
            f"{dense.summary.median_ms:.4f} ms",
            file=sys.stderr,
        )
    return found


def verdict(now: Report, then: Report, limit: float) -> str:
    """Return the status of the change of one report from another."""
    compared = now.model_copy(update={"change": change_against(now, then)})
    (found,) = judge(compared, {"latency": {"max_regression": limit}})
    return found.status


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = gate_parser(__doc__ or "", "latency.max_regression", 4)
    parser.add_argument("--states", nargs="+", choices=tuple(STATES), default=tuple(STATES))
    return parsed_with_run(parser, arguments, **SMALLEST, states=("alone",))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, judge every pair, print the counts."""
    options = parse(arguments)
    with finished_run(options.run) as run, tempfile.TemporaryDirectory() as scratch:
        try:
            found = reports(run, Path(scratch), options)
        except CompressError as error:
            sys.exit(str(error))
        tell(found, options.limit)


def tell(found: Mapping[tuple[str, str], Sequence[Report]], limit: float) -> None:
    """Print how often each verdict came, by the states of baseline and report."""
    table = Table("baseline", "now", "pairs", "the same network", "one convolution more")
    table.title = f"latency.max_regression = {limit}"
    states = dict.fromkeys(state for state, _ in found)
    for then, now in product(states, states):
        counts = {
            name: Counter(
                verdict(is_, was, limit)
                for was, is_ in product(found[then, "network"], found[now, name])
                if was is not is_
            )
            for name in ("network", "longer")
        }
        written = (
            ", ".join(f"{count} {status}" for status, count in sorted(of.items()))
            for of in counts.values()
        )
        table.add_row(then, now, str(sum(counts["network"].values())), *written)
    Console(width=120).print(table)
    ratios = {
        name: median(
            report.comparison.latency[0].ratio.ratio for report in found[next(iter(states)), name]
        )
        for name in ("network", "longer")
    }
    print(f"one convolution more takes x {ratios['longer'] / ratios['network']:.3f} of the time")


if __name__ == "__main__":
    main()
