"""From options to a run: everything is checked before the first file is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoint import load_weights
from compress.config import DEFAULT_CONFIG, RunConfig, load_config
from compress.data import ImageData, load_data
from compress.errors import ConfigError, InterruptedRunError
from compress.models import build_model
from compress.session import RunDirectory, Session
from compress.training import pick_device

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
    as it was.

    Raises:
        ConfigError: options contradict each other, or the configuration or the directory is unfit.
        InterruptedRunError: the user stopped.
    """
    _check_request(request)
    name = request.config or DEFAULT_CONFIG
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = RunDirectory(request.output or Path("runs") / f"{Path(name).stem}-{stamp}")
    if request.resume:
        config = run.saved_config()
    else:
        config = load_config(name, with_flags(request.settings, request.model, request.data))
        run.check_new(overwrite=request.overwrite)
    check_folder(config, request.data)
    data = load_data(config.data)
    pick_device(config.device)
    for check in checks:
        check(config, data)
    if checkpoint is not None and request.overwrite:
        _check_checkpoint(checkpoint, config, data, run)
    if not request.resume:
        run.begin(config)
    try:
        yield Started(config, data, Session(run))
    except KeyboardInterrupt as error:
        run.discard_if_bare()
        advice = f"; go on with --resume --output {run.path}" if run.config.is_file() else ""
        raise InterruptedRunError(f"stopped{advice}") from error
    finally:
        run.discard_if_bare()
        if request.output is None:
            with suppress(OSError):  # other runs lie beside it
                run.path.parent.rmdir()


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


def with_flags(settings: list[str] | None, model: str | None, data: Path | None) -> list[str]:
    """Return the settings that --set, --model and --data stand for."""
    found = list(settings or [])
    if model:
        found.append(f"model.name={model}")
    if data:
        found.append(f"data.root={data.expanduser().resolve()}")
    return found


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
    if not request.resume:
        return
    if request.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    if request.output is None:
        raise ConfigError("--resume needs --output DIR, the directory of the run to go on with")
    if request.config or request.settings or request.model or request.data:
        raise ConfigError("--resume goes on with the configuration of the run: give no other")
