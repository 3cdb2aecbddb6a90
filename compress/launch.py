"""From options to a run: everything is checked before the first file is written."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoints.checkpoint import load_weights
from compress.config import DEFAULT_CONFIG, RunConfig, load_config
from compress.config.location import root_setting
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.distributed.torchrun import started_again
from compress.distributed.world import asked, joined
from compress.documents import apply_setting
from compress.errors import ConfigError, InterruptedRunError
from compress.networks.models import build_model, is_custom
from compress.runs.lock import locked
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.training.compute import pick_device

log = logging.getLogger("compress")

Check = Callable[[RunConfig, ImageData], object]
"""Finds what a later stage would refuse before an earlier one has cost any time."""


@dataclass(frozen=True)
class Request:
    """The options that every command which starts a run shares."""

    config: str | None
    settings: list[str]
    output: Path | None
    model: str | None
    data: Path | None
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class Started:
    """A run whose configuration, data and directory are known to be good."""

    config: RunConfig
    data: ImageData
    session: Session
    resumed: bool
    """Whether it goes on with what an earlier process began."""

    @property
    def run(self) -> RunDirectory:
        """The run's files."""
        return self.session.run


@contextmanager
def started(
    request: Request, checks: Sequence[Check] = (), checkpoint: Path | None = None
) -> Iterator[Started]:
    """Check everything that can be checked before the first file is written, then start.

    A command that fails before it has done anything leaves no directory behind, and an earlier run
    as it was. Until the end no other process may work in the directory.

    Raises:
        ConfigError: options contradict each other, or the configuration or the directory is unfit.
        InterruptedRunError: the user stopped.
    """
    _check_request(request)
    name = request.config or DEFAULT_CONFIG
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = RunDirectory(request.output or Path("runs") / f"{Path(name).stem}-{stamp}")
    config, resumed = _configured(request, name, run)
    require_typed(config, request.settings, request.model)
    check_folder(config, request.data)
    data = load_data(config.data)
    device = pick_device(config.device)
    for check in checks:
        check(config, data)
    if checkpoint is not None and request.overwrite and not resumed:
        _check_checkpoint(checkpoint, config, data, run)
    try:
        with joined(device) as world:
            resumed = world.first(resumed)
            world.require_same("the configuration", config.model_dump_json().encode())
            world.require_same("the validation set", data.identity.encode())
            if resumed and not request.resume and world.main:
                log.warning("started again: going on with the run in %s", run.path)
            with _taken(run, config, resumed=resumed):
                world.wait()
                yield Started(config, data, Session(run), resumed)
    except KeyboardInterrupt as error:
        output = shlex.quote(str(run.path))
        advice = f"; go on with --resume --output {output}" if run.config.is_file() else ""
        raise InterruptedRunError(f"stopped{advice}") from error
    finally:
        if request.output is None:
            with suppress(OSError):  # other runs lie beside it
                run.path.parent.rmdir()


def _configured(request: Request, name: str, run: RunDirectory) -> tuple[RunConfig, bool]:
    """Return the configuration of the run, and whether the run lies there to go on with.

    A scheduler that starts a command again, because its machine was taken away, gives the options
    of the first time.
    """
    if request.resume:
        return run.saved_config(), True
    config = load_config(name, with_flags(request.settings, request.model, request.data))
    if started_again() and run.config.is_file():
        saved = run.saved_config()
        if saved.model_dump() == config.model_dump():
            return saved, True
    if asked().main:
        run.check_new(overwrite=request.overwrite)
    return config, False


@contextmanager
def _taken(run: RunDirectory, config: RunConfig, *, resumed: bool) -> Iterator[None]:
    """Have the directory for this run alone, ready to go on in or begun anew.

    Of several processes the main one takes it for all of them.
    """
    if not asked().main:
        yield
        return
    try:
        with locked(run.lock) as alone:
            if resumed:
                Session(run).mend(locked=alone)
            else:
                run.begin(config)
            yield
    finally:
        run.discard_if_bare()


def existing(
    path: Path, settings: list[str] | None, data: Path | None
) -> tuple[RunDirectory, RunConfig, ImageData]:
    """Open a run that another command has written.

    Raises:
        ConfigError: there is none, or the settings do not fit it.
    """
    run = RunDirectory(path)
    run.saved_config()
    config = load_config(str(run.config), with_flags(settings, None, data))
    check_folder(config, data)
    return run, config, load_data(config.data)


def reading(run: RunDirectory) -> AbstractContextManager[bool]:
    """Keep a run that is only read, and the files that are made of it, from being changed.

    Raises:
        ConfigError: a process is working on it.
    """
    return locked(run.lock, shared=True)


def with_flags(settings: list[str] | None, model: str | None, data: Path | None) -> list[str]:
    """Return the settings that --set, --model and --data stand for."""
    found = list(settings or [])
    if model:
        found.append(f"model.name={model}")
    if data:
        found.append(root_setting(data))
    return found


def require_typed(config: RunConfig, settings: Sequence[str], model: str | None) -> None:
    """Refuse a network whose code a file names and the command line does not.

    Raises:
        ConfigError: it would be imported unasked, or --model asks for another network.
    """
    typed: dict[str, Any] = {}
    for setting in with_flags(list(settings), model, None):
        apply_setting(typed, setting)
    named = config.model.name
    if model not in (None, named):
        raise ConfigError(f"the run is of {named} and --model asks for {model}: leave it away")
    if is_custom(named) and typed.get("model", {}).get("name") != named:
        raise ConfigError(
            f"the configuration names {named}, whose code would be imported: "
            f"pass --model {named} to allow it"
        )


def check_folder(config: RunConfig, folder: Path | None) -> None:
    """Refuse a --data that would be ignored.

    Raises:
        ConfigError: the data set is embedded.
    """
    if folder is not None and config.data.dataset == "digits":
        raise ConfigError(
            f"--data {folder} would be ignored, because data.dataset = 'digits' is embedded: "
            "add --set data.dataset=imagefolder, or name another --config"
        )


def _check_checkpoint(
    checkpoint: Path, config: RunConfig, data: ImageData, run: RunDirectory
) -> None:
    """Refuse a checkpoint that does not fit while the run that it replaces is still there."""
    if checkpoint.resolve() == run.dense.resolve():
        raise ConfigError(
            f"{checkpoint} would be overwritten before it is pruned: give another --output"
        )
    channels = data.input_size[0]
    network = build_model(config.model.name, num_classes=data.num_classes, in_channels=channels)
    load_weights(checkpoint, network)


def _check_request(request: Request) -> None:
    if request.output is None and not asked().alone:
        raise ConfigError("several processes need --output DIR, which every one of them can read")
    if not request.resume:
        return
    if request.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if request.output is None:
        raise ConfigError("--resume needs --output DIR, the directory of the run to go on with")
    if request.config or request.settings or request.data:
        raise ConfigError("--resume goes on with the configuration of the run: give no other")
