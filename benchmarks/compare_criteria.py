"""Accuracy of pruning criteria at equal MACs after equal finetuning, as one Markdown table.

    python benchmarks/compare_criteria.py --config small-images-resnet20 --data FOLDER --output DIR

Trains one dense network, then prunes it once per criterion, budget and seed with the commands of
the tool. Runs that are complete in DIR are not repeated, so the command can be stopped and given
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def compress(*arguments: str) -> dict[str, Any]:
    """Run one command of the tool and return its JSON document."""
    command = [sys.executable, "-c", "import cli; cli.main()", *arguments, "--json"]
    print("compress", *arguments, file=sys.stderr)
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def once(path: Path, command: list[str]) -> dict[str, Any]:
    """Run a command unless its result is there already."""
    if path.is_file():
        return compress("inspect", str(path))
    return compress(*command, "--output", str(path.parent), "--overwrite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="small-images-resnet20")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--criteria", default="taylor-gate,weight-norm,random")
    parser.add_argument("--budgets", default="macs=0.5,macs=0.25")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()

    common = ["--config", options.config, "--data", options.data]
    dense_path = options.output / "dense" / "dense.safetensors"
    dense = once(dense_path, ["train", *common])
    print(f"dense: {dense['metrics']['accuracy']['top1']:.2f} % top-1\n")
    print("| MACs | criterion | seed | MACs got | pruned | after BatchNorm | finetuned |")
    print("|---|---|---|---|---|---|---|")
    grid = itertools.product(
        options.budgets.split(","), options.criteria.split(","), options.seeds.split(",")
    )
    for budget, criterion, seed in grid:
        name = f"{budget}-{criterion}-{seed}"
        settings = ["--set", f"prune.criterion={criterion}", "--set", f"seed={seed}"]
        command = ["prune", *common, "--checkpoint", str(dense_path), "--budget", budget]
        result = once(options.output / name / "pruned.safetensors", [*command, *settings])
        metrics = result["metrics"]
        share = metrics["finetuned"]["macs"] / metrics["dense"]["macs"]
        accuracy = [f"{metrics[stage]['top1']:.2f}" for stage in ("masked", "pruned", "finetuned")]
        print(
            "|", " | ".join([budget, criterion, seed, f"{share:.3f}", *accuracy]), "|", flush=True
        )


if __name__ == "__main__":
    main()
