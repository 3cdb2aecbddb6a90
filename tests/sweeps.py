"""What tests of sweeps share: stand-ins for its processes, and what they have noted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sweep_stand_in import COMMAND, DENSE_TOP1, orders_of

import cli
from compress.config import RunConfig
from compress.runs.request import SweepRequest
from compress.runs.rundirectory import RunDirectory
from compress.sweep import processes, run, sweep
from compress.sweep.flips import Flips, ShareInterval
from compress.sweep.points import point_metrics
from compress.sweep.sweep import Say


def flips_of(dense: Path, others: Mapping[str, Path], config: RunConfig) -> dict[str, Flips]:
    """Stand in for counting: a thousand images, of which none has become right."""
    assert config.device != "auto"
    return {name: _flips(RunDirectory(pruned.parent)) for name, pruned in others.items()}


def _flips(run: RunDirectory) -> Flips:
    metrics = point_metrics(run)
    assert metrics is not None
    return Flips(round(10 * (DENSE_TOP1 - metrics["finetuned"]["top1"])), 0, 1000)


def install(patch: pytest.MonkeyPatch) -> None:
    """Have ``compress sweep`` start stand-ins, and check and draw nothing."""
    real = run.run_sweep

    def run_sweep(
        request: SweepRequest, say: Say, command: Sequence[str], interval: ShareInterval
    ) -> dict[str, Any]:
        assert command == (sys.executable, cli.__file__)
        return real(request, say, COMMAND, interval)

    patch.setattr(run, "run_sweep", run_sweep)
    patch.setattr(run, "check_budget", lambda *_: None)  # TestRefused has the real ones
    patch.setattr(run, "check_logits", lambda *_: None)
    patch.setattr(sweep, "plot_sweep", lambda *_: None)
    patch.setattr(sweep, "count_flips", flips_of)
    patch.setattr(processes, "POLL", 0.02)


def calls(folder: Path) -> list[tuple[str, str, int]]:
    """Return what the stand-in noted: word, point and process."""
    file = orders_of(folder) / "calls"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    lines = (line.split() for line in whole.splitlines())
    return [(word, name, int(pid)) for word, name, pid in lines]


def started(folder: Path, word: str = "prune") -> list[str]:
    return [name for found, name, _ in calls(folder) if found == word]


def ordered(folder: Path, *marks: str) -> Path:
    """Tell the stand-ins of a sweep that will write to a directory what to do."""
    orders_of(folder).mkdir(exist_ok=True)
    for mark in marks:
        (orders_of(folder) / mark).touch()
    return folder


def ordered_no_longer(folder: Path, mark: str) -> None:
    (orders_of(folder) / mark).unlink()


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that finds the modules of the tests."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
