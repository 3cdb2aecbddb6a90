"""What tests of the command line share: how to run a command, and what a run leaves."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cli

SMALL = {
    "data.image_size": "8",
    "data.batch_size": "256",
    "train.epochs": "1",
    "prune.steps": "2",
    "prune.interval": "1",
    "prune.bn_batches": "1",
    "finetune.epochs": "1",
    "export.parity_batches": "[1, 2]",
    "bench.batch_sizes": "[1]",
    "bench.block_ms": "1",
    "bench.min_blocks": "4",
    "bench.max_seconds": "0.3",
}
COUNTED = "[macs]\nmax_ratio = 0.6\n[parity]\nmax_relative_error = 1e-4\n"
"""Budgets whose verdict does not depend on what else the machine does."""
CALIBRATION = ("--set", "export.calibration_images=8")
RUN_FILES = {
    *("config.toml", "dense.safetensors", "pruned.safetensors", "history.jsonl"),
    *("export/dense.onnx", "export/dense.json", "export/pruned.onnx", "export/pruned.json"),
    *("report.json", "report.md", "report.html", "report.xml", "history.png", "pruning.png"),
}


def small(**changes: str) -> list[str]:
    """Return --set options for a run of seconds; data_image_size="32" changes data.image_size."""
    settings = SMALL | {key.replace("_", ".", 1): value for key, value in changes.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def invoke(*arguments: object) -> Result:
    """Run a command in this process; a bug shows as the exception that it is."""
    return CliRunner().invoke(
        cli.app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def refused(*arguments: object, code: int, says: str) -> None:
    """Run a command that must end in one sentence on stderr and nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1:] == said, result.stderr
    assert says in said[0], said


def document(result: Result) -> Any:
    """Return the one JSON document on stdout."""
    return json.loads(result.stdout)


def files_in(folder: Path) -> set[str]:
    """Return what lies in a folder, but for TensorBoard's files: there may be any number."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("tensorboard/")}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Start the command as a process of its own, with more environment variables."""
    return subprocess.Popen(
        [sys.executable, "-c", "import cli; cli.main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent)} | variables,
    )


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Make it fail to write larger files, in the middle of the file as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def onnx_files(precision: str) -> set[str]:
    """Return the files of an export without engines."""
    middle = "" if precision == "fp32" else f".{precision}"
    return {f"{name}{middle}.{end}" for name in ("dense", "pruned") for end in ("onnx", "json")}


def full_for(monkeypatch: pytest.MonkeyPatch, module: str, suffix: str) -> None:
    """Make the disk full for files of a suffix, after half of the file."""

    def write(path: Path, data: bytes) -> None:
        if path.suffix != suffix:
            path.write_bytes(data)
            return
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(f"{module}.write_flushed", write)


def interrupted_in(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Press Ctrl-C when a function, by its full name, is called."""
    module, _, name = moment.rpartition(".")
    real = getattr(import_module(module), name)

    def pressed(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(moment, pressed)
