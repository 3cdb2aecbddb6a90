"""A run on disk: its directory, its history, its state to resume from, and Ctrl-C."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from compress.config import RunConfig, load_config, save_config
from compress.errors import CheckpointError, ConfigError, InterruptedRunError, writing
from compress.files import write_atomically
from compress.tensorboard import Curves

log = logging.getLogger("compress")

SAVE_SECONDS = 60.0
"""Time between two saves of the state, in seconds."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run, by name."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def dense(self) -> Path:
        """The dense network."""
        return self.path / "dense.safetensors"

    @property
    def pruned(self) -> Path:
        """The pruned network."""
        return self.path / "pruned.safetensors"

    @property
    def history(self) -> Path:
        """One JSON object a line: epochs, pruning decisions, shrinks."""
        return self.path / "history.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same events as curves, for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def history_plot(self) -> Path:
        """The course of the run, drawn."""
        return self.path / "history.png"

    @property
    def pruning_plot(self) -> Path:
        """The channels that every group kept, drawn."""
        return self.path / "pruning.png"

    @property
    def state(self) -> Path:
        """Where an unfinished run goes on."""
        return self.path / "state" / "state.safetensors"

    @property
    def export(self) -> Path:
        """The exported networks."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """The measurements."""
        return self.path / "report.json"

    @property
    def report_views(self) -> tuple[Path, ...]:
        """What is made of the measurements: for people, and for CI."""
        names = ("report.md", "report.html", "report.xml")
        return tuple(self.path / name for name in names)

    def check_new(self, *, overwrite: bool) -> None:
        """Refuse a directory that holds anything, unless an earlier run may be overwritten.

        Raises:
            ConfigError: the directory is not empty, holds no run to overwrite, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file, not a directory")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise ConfigError(
                f"{self.path} is not empty: use --resume to go on, --overwrite to start anew, "
                "or another --output"
            )
        if not self.config.is_file():  # its folder `export` may be anybody's
            raise ConfigError(
                f"{self.path} is not empty and holds no run, so --overwrite leaves it alone: "
                "give another --output"
            )

    def begin(self, config: RunConfig) -> None:
        """Start a run: remove the files of an earlier one, and only those; write the configuration.

        Raises:
            OutputError: the directory cannot be written.
        """
        self._clear()
        save_config(config, self.config)

    def saved_config(self) -> RunConfig:
        """Return the configuration of the run that lies here.

        Raises:
            ConfigError: there is no run here.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path} is not a run directory: it holds no config.toml")
        return load_config(str(self.config))

    def events(self) -> list[dict[str, Any]]:
        """Return the history so far; a line that a full disk cut off is left out."""
        if not self.history.is_file():
            return []
        text = self.history.read_text(encoding="utf-8")
        return [json.loads(line) for line in _whole_lines(text)]

    def discard_if_bare(self) -> None:
        """Remove a directory that holds nothing but its configuration: nothing was done in it."""
        if self.path.is_dir() and [*self.path.iterdir()] == [self.config]:
            self.config.unlink()
            self.path.rmdir()

    def _clear(self) -> None:
        own = (self.dense, self.pruned, self.history, self.report)
        plots = (self.history_plot, self.pruning_plot)
        with writing(self.path):
            for file in (*own, *plots, *self.report_views):
                file.unlink(missing_ok=True)
            for folder in (self.export, self.state.parent, self.tensorboard):
                if folder.is_dir():
                    shutil.rmtree(folder)


@dataclass(frozen=True)
class State:
    """What an unfinished run goes on from."""

    phase: str
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@dataclass
class Session:
    """What a long loop needs from its run: history, curves, state, and whether to stop."""

    run: RunDirectory
    stop: threading.Event = field(default_factory=threading.Event)
    _saved_at: float = field(default_factory=time.monotonic)
    _lines: int = 0

    def __post_init__(self) -> None:
        wanted = self.run.config.is_file() and self.run.saved_config().tensorboard
        self._curves = Curves(self.run.tensorboard) if wanted else None

    def record(self, event: str, **facts: Any) -> None:
        """Append one line to the history, and draw it.

        Raises:
            OutputError: the disk is full.
        """
        line = json.dumps({"event": event, **facts})
        with writing(self.run.history), self.run.history.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self._lines += 1
        if self._curves:
            self._curves.add({"event": event, **facts})

    def after_step(self, snapshot: Callable[[], State]) -> None:
        """Save the state when it is due, and stop when the user asked for it.

        Raises:
            InterruptedRunError: after the state was saved.
        """
        if self.stop.is_set():
            self.save(snapshot())
        self.check_stop()
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save(snapshot())

    def check_stop(self) -> None:
        """Stop when the user asked for it and everything done so far is on disk.

        Raises:
            InterruptedRunError: the user did.
        """
        if self.stop.is_set():
            raise InterruptedRunError(
                "stopped; the state is saved, go on with --resume --output "
                f"{shlex.quote(str(self.run.path))}"
            )

    def save(self, state: State) -> None:
        """Write the state atomically.

        Raises:
            OutputError: it cannot be written; the state before it is kept.
        """
        with writing(self.run.state):
            self.run.state.parent.mkdir(exist_ok=True)
        document = {"phase": state.phase, "lines": self._lines, **state.facts}
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
        data = safetensors.torch.save(tensors, {"state": json.dumps(document)})
        write_atomically(self.run.state, data)
        self._saved_at = time.monotonic()

    def load(self, phase: str) -> State | None:
        """Return the state of a phase, if that is where the run stopped; cut the history to it.

        Raises:
            CheckpointError: the state is damaged.
        """
        self._cut_history()
        if not self.run.state.is_file():
            return None
        try:
            with safe_open(self.run.state, framework="pt") as file:
                facts = json.loads(file.metadata()["state"])
            if facts.pop("phase") != phase:
                return None
            tensors = safetensors.torch.load_file(self.run.state)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.run.state} is damaged: start anew with --overwrite"
            ) from error
        self._cut_history(facts.pop("lines"))
        if self._curves:
            self._curves.resume(phase, facts.get("step", 0))
        return State(phase, facts, tensors)

    def finish(self) -> None:
        """Remove the state of a phase that is complete."""
        self.run.state.unlink(missing_ok=True)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a stop after the step; a second acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop.set()
            for each in previous:
                signal.signal(each, previous[each])
            log.warning("stopping after this step; once more stops at once and loses it")

        previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _cut_history(self, lines: int | None = None) -> None:
        """Forget what happened after the state was saved, and a line that a full disk cut off."""
        if self.run.history.is_file():
            text = self.run.history.read_text(encoding="utf-8")
            whole = _whole_lines(text)[:lines]
            if "".join(whole) != text:
                write_atomically(self.run.history, "".join(whole))
            self._lines = len(whole)


def _whole_lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
