"""The files of a run: their names, and what may be removed of them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoints.permission import remember
from compress.config import RunConfig, load_config, save_config
from compress.errors import CheckpointError, ConfigError, writing
from compress.files.atomic import link_or_copy, real_name, sync_folder

ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file is nobody's where no lock tells; no file takes as long to write."""


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
    def previous_state(self) -> Path:
        """The state before it, for when it is damaged."""
        return self.path / "state" / "previous.safetensors"

    @property
    def lock(self) -> Path:
        """Held by the process that works here."""
        return self.path / "state" / "lock"

    @property
    def beginning(self) -> Path:
        """The configuration of a run that is being begun; all but ``imported`` is an earlier's."""
        return self.path / "state" / "config.toml"

    @property
    def imported(self) -> Path:
        """Somebody's dense network, read and measured, before the run begins that it is for."""
        return self.path / "state" / "imported.safetensors"

    @property
    def settings(self) -> Path:
        """Where the configuration of the run lies, also if its beginning was cut off."""
        return self.beginning if self.beginning.is_file() else self.config

    @property
    def is_begun(self) -> bool:
        """Whether a run lies here that can be gone on with."""
        return self.settings.is_file()

    @property
    def export(self) -> Path:
        """The exported networks."""
        return self.path / "export"

    @property
    def latency(self) -> Path:
        """The latency tables of the dense network."""
        return self.path / "latency"

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
        held = filter(self._holds_something, entries_of(self.path))
        # Without a configuration its folder `export` may be anybody's.
        check_directory(self.path, held, marker=self.config, holds="run", overwrite=overwrite)

    def begin(self, config: RunConfig) -> None:
        """Start a run: remove the files of an earlier one, and only those; write the configuration.

        A network that lies in ``imported`` is its dense one. It is the earlier run until the
        configuration is on the disk, and this one from then on: whoever comes after a kill ends
        what was begun, see ``settle``. A network that is not built in was asked for: the run may go
        on with it.

        Raises:
            OutputError: the directory cannot be written.
        """
        save_config(config, self.beginning)
        remember(config.model, self.beginning.read_bytes())
        self.settle()

    def settle(self) -> None:
        """End a beginning that was cut off; nothing is done where there is none.

        Raises:
            OutputError: the directory cannot be written.
        """
        if self.beginning.is_file():
            self._clear()
            self.adopt()
            with writing(self.config):
                self.beginning.replace(self.config)
                sync_folder(self.path)
        with writing(self.path):
            self.imported.unlink(missing_ok=True)
        with suppress(OSError):  # the lock lies in it, or a state, or it was never made
            self.beginning.parent.rmdir()

    def adopt(self) -> None:
        """Make what lies in ``imported`` the dense network of the run.

        Raises:
            OutputError: the directory cannot be written.
        """
        if self.imported.is_file():
            link_or_copy(self.imported, self.dense)

    def saved_config(self) -> RunConfig:
        """Return the configuration of the run that lies here.

        Raises:
            ConfigError: there is no run here.
        """
        if not self.is_begun:
            raise ConfigError(f"{self.path} is not a run directory: it holds no config.toml")
        return load_config(str(self.settings))

    def events(self) -> list[dict[str, Any]]:
        """Return the history so far; a line that a full disk cut off is left out.

        Raises:
            CheckpointError: it is damaged.
        """
        return [event_of(line, self.history) for line in self.history_lines()]

    def history_text(self) -> str:
        """Return the history as it is written; empty if there is none.

        Raises:
            CheckpointError: it is no text.
        """
        if not self.history.is_file():
            return ""
        try:
            return self.history.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{self.history} cannot be read as text: mend it, or start anew with --overwrite"
            ) from error

    def history_lines(self) -> list[str]:
        """Return the whole lines of the history, each with its end.

        Raises:
            CheckpointError: it is no text.
        """
        return _whole_lines(self.history_text())

    def discard_if_bare(self) -> None:
        """Remove a directory that holds nothing but its configuration: nothing was done in it."""
        if self.path.is_dir() and not {*self.path.iterdir()} - {self.config}:
            self.config.unlink(missing_ok=True)
            self.path.rmdir()

    def remove_strays(self, *, locked: bool) -> None:
        """Remove the temporary files that killed processes left among the files of the run.

        Args:
            locked: whether nobody else can be writing here; if not, only old ones are removed.
        """
        for path in self._strays():
            with suppress(OSError):  # another process may have done it
                if not locked and time.time() - path.lstat().st_mtime < ABANDONED_SECONDS:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _strays(self) -> Iterator[Path]:
        own = {path.name for path in (self.config, *self._files)}
        for folder in (self.path, self.state.parent, self.export):
            if folder.is_symlink() or not folder.is_dir():
                continue
            for path in folder.iterdir():
                name = real_name(path.name)
                # Beside the run's files may lie anybody's; its folders are its own.
                if name is not None and (name in own or folder != self.path):
                    yield path

    def _holds_something(self, path: Path) -> bool:
        """Whether an entry of the directory is more than what a killed start left."""
        if path == self.lock.parent and path.is_dir():
            own = {file.name for file in (self.lock, self.beginning, self.imported)}
            return any((real_name(each.name) or each.name) not in own for each in path.iterdir())
        if self.beginning.is_file() and (real_name(path.name) or path.name) == self.dense.name:
            return False
        return real_name(path.name) != self.config.name

    @property
    def _files(self) -> tuple[Path, ...]:
        """What a run leaves besides its configuration and its folders, the latest first.

        A kill while they are removed in this order leaves a run that can still be gone on with.
        """
        plots = (self.history_plot, self.pruning_plot)
        return (*self.report_views, self.report, *plots, self.pruned, self.dense, self.history)

    def _clear(self) -> None:
        with writing(self.path):
            for folder in (self.export, self.tensorboard):
                if folder.is_dir():
                    shutil.rmtree(folder)
            for file in (*self._files[:-2], self.previous_state, self.state, *self._files[-2:]):
                file.unlink(missing_ok=True)
        self.remove_strays(locked=True)


def entries_of(path: Path) -> Iterator[Path]:
    """Yield what lies in a directory; nothing if it is not there, or is a file."""
    if path.is_dir():
        yield from path.iterdir()


def check_directory(
    path: Path, held: Iterable[Path], *, marker: Path, holds: str, overwrite: bool
) -> None:
    """Refuse a directory that holds anything, unless what lies there may be overwritten.

    Args:
        path: the directory.
        held: what counts of the things in it.
        marker: the file that says that it holds earlier work of the same kind.
        holds: what that work is called.
        overwrite: whether earlier work may be overwritten.

    Raises:
        ConfigError: the directory is not empty, holds nothing to overwrite, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file, not a directory")
    if not any(True for _ in held):
        return
    if not overwrite:
        raise ConfigError(
            f"{path} is not empty: use --resume to go on, --overwrite to start anew, or another "
            "--output"
        )
    if not marker.is_file():
        raise ConfigError(
            f"{path} is not empty and holds no {holds}, so --overwrite leaves it alone: give "
            "another --output"
        )


def check_resumable(marker: Path) -> None:
    """Refuse to go on where nothing was begun.

    Args:
        marker: the file in the directory that says what was.

    Raises:
        ConfigError: the file is not there, or the directory is a file.
    """
    if marker.parent.exists() and not marker.parent.is_dir():
        raise ConfigError(f"{marker.parent} is a file, not a directory")
    if not marker.is_file():
        raise ConfigError(f"{marker.parent} holds no {marker.name}: nothing to resume")


def _whole_lines(text: str) -> list[str]:
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def event_of(line: str, history: Path) -> dict[str, Any]:
    """Return the event that a line of a history tells of.

    Raises:
        CheckpointError: it tells of none.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise CheckpointError(
            f"{history} holds a line that is no event ({line.strip()[:40]!r}): remove the line"
        )
    return event
