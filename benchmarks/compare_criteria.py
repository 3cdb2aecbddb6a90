"""Accuracy of pruning criteria at equal MACs after equal finetuning, as one Markdown table.

    python benchmarks/compare_criteria.py --config small-images-resnet20 --data FOLDER --output DIR
    python benchmarks/compare_criteria.py --smoke

Trains one dense network, then prunes it once per criterion, budget and seed with the commands of
the tool, and prints mean and standard deviation over the seeds. A criterion may carry settings of
its own: ``taylor-gate:prune.residual_gate=block``. Runs that are complete in DIR are not repeated,
so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from smoke import SETTINGS, parsed

import cli
from compress.checkpoints.description import read_description

STAGES = ("masked", "pruned", "finetuned")


def compress(*arguments: str) -> None:
    """Run one command of the tool; its JSON document is not wanted."""
    print("compress", *arguments, file=sys.stderr, flush=True)
    with redirect_stdout(io.StringIO()):
        code = cli.app([*arguments, "--json"], prog_name="compress", standalone_mode=False)
    if code:
        sys.exit(code)


def once(path: Path, command: list[str]) -> dict[str, Any]:
    """Run a command unless its result is there already; return the metrics of the result."""
    if not path.is_file():
        compress(*command, "--output", str(path.parent), "--overwrite")
    description = read_description(path)
    assert description is not None
    return description.metrics


def spread(values: list[float]) -> str:
    """Mean and standard deviation of a sample."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def row(budget: str, criterion: str, metrics: list[dict[str, Any]]) -> str:
    """One row of the table: a criterion at a budget over all seeds."""
    dense = metrics[0]["dense"]
    macs, params = (
        statistics.mean(m["finetuned"][cost] / dense[cost] for m in metrics)
        for cost in ("macs", "params")
    )
    accuracy = [spread([m[stage]["top1"] for m in metrics]) for stage in STAGES]
    return f"| {' | '.join([budget, criterion, f'{macs:.3f}', f'{params:.3f}', *accuracy])} |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="small-images-resnet20")
    parser.add_argument("--data", help="data set, default that of the configuration")
    parser.add_argument("--output", type=Path, help="of all runs; default none are kept")
    parser.add_argument("--criteria", default="taylor-gate,weight-norm,random")
    parser.add_argument("--budgets", default="macs=0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    return parsed(
        *(parser, arguments),
        config="digits-resnet20",
        criteria="taylor-gate,random",
        budgets="macs=0.7",
        seeds="0",
        settings=list(SETTINGS),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, options.output or Path(scratch))


def compare(options: argparse.Namespace, output: Path) -> None:
    """Train, prune by every criterion and print the table."""
    common = ["--config", options.config]
    if options.data:
        common += ["--data", options.data]
    for setting in options.settings:
        common += ["--set", setting]
    dense_path = output / "dense" / "dense.safetensors"
    dense = once(dense_path, ["train", *common])
    table = [
        f"dense: {dense['accuracy']['top1']:.2f} % top-1\n",
        "| budget | criterion | MACs | parameters | masked | after BatchNorm | finetuned |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in options.seeds.split(","):  # seed by seed, so that a stopped grid compares fairly
        for budget in options.budgets.split(","):
            for criterion in options.criteria.split(","):
                name, *extra = criterion.split(":")
                command = ["prune", *common, "--checkpoint", str(dense_path), "--budget", budget]
                for setting in (f"prune.criterion={name}", f"seed={seed}", *extra):
                    command += ["--set", setting]
                folder = f"{budget}-{criterion}-{seed}".replace(":", "-")
                path = output / folder / "pruned.safetensors"
                runs.setdefault((budget, criterion), []).append(once(path, command))
    table += [row(budget, criterion, metrics) for (budget, criterion), metrics in runs.items()]
    print("\n".join(table))


if __name__ == "__main__":
    main()
