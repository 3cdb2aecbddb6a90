"""Stands in for the command line in the processes of a sweep: quick, and it can go wrong.

What it does is decided by files in a directory beside that of the sweep: ``fail-POINT``, ``slow``,
``stubborn``, ``pair``, and ``miss-POINT`` for a network that takes more time than it may. It
appends to ``calls`` there what happens: a word, the point or the file of the latency table, its
process.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from compress.terminal.signals import hold_on

PROGRAM = f"import sys; sys.path[:] = {sys.path!r}; import sweep_stand_in; sweep_stand_in.main()"
COMMAND = (sys.executable, "-c", PROGRAM)
LIFETIME = 600
"""Most seconds that a stand-in lives."""
DENSE_TOP1 = 98.0
COSTS = {"macs": 1000, "params": 2000, "channels": 100}
DENSE_MS = 2.0
MISSED = 0.8
"""Share of the time that a network takes which misses its budget."""


def top1_of(share: float) -> float:
    """The accuracy of a network of which this share is kept: down in proportion, to 88 %."""
    return DENSE_TOP1 - 10 * (1 - share)


def orders_of(folder: Path) -> Path:
    """Return where the stand-ins of a sweep that writes to a directory find their orders."""
    return folder.with_name(folder.name + ".orders")


def main() -> None:
    hold_on()
    command, *options = sys.argv[1:]
    path = Path(options[options.index("--output") + 1])
    orders = orders_of(path.parent.parent if command == "profile" else path.parent)
    orders.mkdir(exist_ok=True)
    calls = orders / "calls"

    def note(word: str) -> None:
        with calls.open("a") as stream:
            stream.write(f"{word} {path.name} {os.getpid()}\n")

    if command != "profile":
        assert options == ["--resume", "--output", str(path)]
    asked = {name: (orders / name).exists() for name in ("slow", "stubborn", "pair")}

    def stop(number: int, frame: FrameType | None) -> None:
        note("told")
        if not asked["stubborn"]:
            note("saved")
            sys.exit(130)

    signal.signal(signal.SIGTERM, stop)
    signal.alarm(LIFETIME)  # whatever becomes of the test
    note(command)
    print("working", flush=True)
    if (orders / f"fail-{path.name}").exists():
        print("error: it went wrong", flush=True)
        sys.exit(1)
    if command == "profile":
        while asked["slow"]:
            time.sleep(0.05)
        profile(path)
    elif command == "prune":
        while asked["slow"] or asked["stubborn"]:
            time.sleep(0.05)
        while asked["pair"] and calls.read_text().count("prune") < 2:
            time.sleep(0.05)
        prune(path, missed=(orders / f"miss-{path.name}").exists())
    else:
        write(path / "dense.safetensors", {"accuracy": {"top1": DENSE_TOP1, "top5": 100.0}})
    note("end")


def profile(path: Path) -> None:
    """Write a latency table that covers no layer; nothing looks one up."""
    serving = {"runtime": "onnxruntime-cpu", "precision": "fp32", "batch": 1, "threads": 1}
    about = {"machine": "a machine", "version": "1", "network": "0123456789abcdef"}
    document = {"schema_version": 1, "fingerprint": {**serving, **about}, "channel_multiple": 8}
    document |= {"fixed_ms": 0.1, "layers": [], "weights": {"bytes": [0, 1], "ms": [0, 0]}}
    document |= {"dense": {"ms": DENSE_MS, "weight_bytes": 1}, "spread": 0.01}
    document |= {"error": {"pairs_ms": [[1.01, 1.0], [1.0, 1.0]]}}
    path.write_text(json.dumps(document))


def time_of(share: float) -> dict[str, Any]:
    """Return what a run records of a network that takes this share of the time."""
    ms, bounds = round(share * DENSE_MS, 5), [round(share + off, 5) for off in (-0.01, 0.01)]
    taken = {"predicted_ms": ms, "predicted_share": share, "measured_ms": ms}
    taken |= {"measured_dense_ms": DENSE_MS, "measured_share": share}
    return {**taken, "measured_interval": bounds}


def prune(path: Path, *, missed: bool) -> None:
    found = re.search(r'^budget = "(\w+)=([\d.]+)"$', (path / "config.toml").read_text(), re.M)
    assert found
    share = float(found[2])
    now = {key: round(share * cost) for key, cost in COSTS.items()}
    accuracy = {"top1": top1_of(share), "top5": 99.0}
    metrics = {"dense": {**COSTS, "top1": DENSE_TOP1}, "masked": {"top1": 20.0, "top5": 60.0}}
    metrics |= {"pruned": {**now, "top1": 50.0, "top5": 80.0}, "finetuned": {**now, **accuracy}}
    if found[1] == "latency":
        metrics["latency"] = time_of(MISSED if missed else round(share - 0.02, 5))
    write(path / "pruned.safetensors", metrics)
    if missed:
        print("error: the budget is missed", flush=True)
        sys.exit(1)


def write(file: Path, metrics: dict[str, Any]) -> None:
    """Write a safetensors file without tensors: the length of its header, and the header."""
    description = {
        "format_version": 1,
        "architecture": "resnet20",
        "classes": ["a", "b"],
        "input_size": [1, 8, 8],
        "mean": [0.5],
        "std": [0.5],
        "metrics": metrics,
    }
    header = json.dumps({"__metadata__": {"compress": json.dumps(description)}}).encode()
    temporary = file.with_suffix(".part")
    temporary.write_bytes(len(header).to_bytes(8, "little") + header)
    temporary.replace(file)
