"""What ``compress profile`` does: find the network, and measure its table unless it is there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, ConfigError, InterruptedRunError, TableError
from compress.latency.fingerprint import Fingerprint
from compress.latency.table import LatencyTable, read_table, write_table
from export.latency.building import Plan, Profile, build_table
from export.latency.serving import Serving

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoints.permission import Permission
    from compress.config import RunConfig
    from export.request import ProfileRequest

_ENDS = {"mnist": (1, 10), "fashion-mnist": (1, 10), "cifar10": (3, 10), "cifar100": (3, 100)}
_MULTIPLE = 8
_PHOTOGRAPHS = (3, 1000)
"""Channels of images and classes, where the images themselves are not there to tell."""


@dataclass(frozen=True)
class Profiled:
    """The table of a network."""

    table: LatencyTable
    path: Path
    measured: bool
    """Whether it was measured now, and not found there."""


@dataclass(frozen=True)
class _Subject:
    """A dense network, and how its run wants it."""

    model: nn.Module
    input_size: tuple[int, int, int]
    folder: Path | None
    """Where its tables are kept."""
    config: RunConfig | None = None


def profile_asked_for(request: ProfileRequest) -> Profiled:
    """Measure the latency table that is asked for, unless it lies there already.

    Raises:
        ConfigError: options that name no network, two, or what no table is measured for.
        CheckpointError: weights that are missing, damaged, or of a pruned network.
        TableError: the machine is too noisy, or a layer cannot be measured by itself.
        InterruptedRunError: the user stopped; what was measured is kept.
        EnvironmentUnfitError: the runtime or its device is not there.
    """
    from compress.networks.trial import tried_graph

    subject = _subject(request)
    config = subject.config
    serving = Serving(
        runtime=request.runtime,  # type: ignore[arg-type]  # it refuses what is none
        precision=request.precision,  # type: ignore[arg-type]
        batch=request.batch,
        threads=request.threads,
        target=config.export.target if config else "cpu",
    )
    multiple = request.channel_multiple
    if multiple is None:
        multiple = config.prune.channel_multiple if config else _MULTIPLE
    if multiple < 1:
        raise ConfigError(f"channel_multiple = {multiple} is none; it is 1 or more")
    path = request.output or _place(subject, serving)
    graph = tried_graph(subject.model, subject.input_size)
    profile = Profile(subject.model, graph, subject.input_size, Plan(multiple=multiple))
    return profiled(profile, serving, path, overwrite=request.overwrite)


def profiled(profile: Profile, serving: Serving, path: Path, *, overwrite: bool) -> Profiled:
    """Measure a table, unless it lies there already.

    Args:
        profile: the network, and how much is measured.
        serving: what serves it.
        path: the file; what is measured so far lies beside it.
        overwrite: measure again.

    Raises:
        TableError: the machine is too noisy, or a layer cannot be measured by itself.
        InterruptedRunError: the user stopped; what was measured is kept.
        EnvironmentUnfitError: the runtime or its device is not there.
    """
    from compress.terminal.console import say
    from compress.terminal.progress import percent_bar

    if not overwrite:
        found = _kept(path, serving.fingerprint(profile.graph), profile.plan.multiple, say)
        if found is not None:
            return Profiled(found, path, measured=False)
    partial = path.with_name(f"{path.stem}.partial.json")
    with _going_on(partial), percent_bar("measuring") as show:
        table = build_table(profile, serving, partial=partial, progress=show)
    write_table(table, path)
    partial.unlink(missing_ok=True)
    return Profiled(table, path, measured=True)


def _kept(
    path: Path, fingerprint: Fingerprint, multiple: int, say: Callable[[str], None]
) -> LatencyTable | None:
    """Return the table that lies there, if it holds here and is no coarser than asked."""
    if not path.exists():
        return None
    try:
        table = read_table(path)
        table.fingerprint.require(fingerprint, str(path))
        if multiple % table.multiple:
            raise TableError(
                f"{path} has widths in multiples of {table.multiple} and {multiple} is asked for"
            )
    except TableError as error:
        say(f"measuring again: {error}")
        return None
    return table


@contextmanager
def _going_on(partial: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        if not partial.is_file():
            raise InterruptedRunError("stopped before anything was measured") from error
        raise InterruptedRunError(
            f"stopped; what was measured is kept in {shlex.quote(str(partial))}, and the same "
            "command goes on"
        ) from error


def _place(subject: _Subject, serving: Serving) -> Path:
    if subject.folder is None:
        raise ConfigError("a network that is no run's needs --output FILE.json for its table")
    return subject.folder / serving.table_name


def _subject(request: ProfileRequest) -> _Subject:
    """Return the network that is asked for.

    Raises:
        ConfigError: none is, or two.
    """
    if (request.run is None) == (request.config is None):
        raise ConfigError(
            "compress profile measures one network: give a run directory, weights, or --config NAME"
        )
    if request.run is None:
        return _configured(request)
    if request.run.is_dir():
        return _of_run(request, request.run)
    return _loaded(request.run, request.run.parent / "latency", request.permission)


def _of_run(request: ProfileRequest, path: Path) -> _Subject:
    from compress.config import load_config
    from compress.runs.rundirectory import RunDirectory

    run = RunDirectory(path)
    run.saved_config()
    config = load_config(str(run.config), request.settings)
    return _loaded(run.dense, run.latency, request.permission, config)


def _loaded(
    path: Path, folder: Path, permission: Permission, config: RunConfig | None = None
) -> _Subject:
    from compress.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path, permission)
    if checkpoint.description.recipe:
        raise CheckpointError(
            f"{path} is pruned already: a latency table is measured for its dense parent"
        )
    return _Subject(checkpoint.model, checkpoint.input_size, folder, config)


def _configured(request: ProfileRequest) -> _Subject:
    """Build the network of a configuration; the images need not be there."""
    from compress.data.datasets import load_data
    from compress.networks.models import build_network
    from compress.runs.launch import asked_config
    from compress.runs.request import RunRequest

    asked = RunRequest(
        settings=request.settings, model=request.model, data=request.data, config=request.config
    )
    _, config = asked_config(asked)
    if config.data.dataset == "digits" or config.data.root is not None:
        data = load_data(config.data)
        size, classes = data.input_size, len(data.classes)
    else:
        channels, classes = _ENDS.get(config.data.dataset, _PHOTOGRAPHS)
        pixels = config.data.image_size or (224 if config.data.photographs else 32)
        size = (config.data.channels or channels, pixels, pixels)
    model = build_network(config.model, num_classes=classes, in_channels=size[0])
    return _Subject(model.eval(), size, None, config)
