"""From options to a run: everything is checked before the first file is written."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from compress.checkpoints.permission import Permission
from compress.config import DEFAULT_CONFIG, RunConfig, load_config, register_reader
from compress.config.location import root_setting
from compress.data.batches import ImageData
from compress.data.datasets import load_data
from compress.distributed.torchrun import started_again
from compress.distributed.world import World, joined, launched
from compress.errors import ConfigError, InterruptedRunError
from compress.files.documents import section_of
from compress.networks.models import SMALL_IMAGE_MODELS
from compress.networks.registries import usual_images
from compress.runs.dense import check_logits, import_dense, is_import_of
from compress.runs.lock import locked
from compress.runs.request import PruneRequest, Request, RunRequest
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.seed2019.settings import run_document
from compress.training.compute import pick_device

log = logging.getLogger("compress")

register_reader(".json", run_document)

Check = Callable[[RunConfig, ImageData], object]
"""Finds what a later stage would refuse before an earlier one has cost any time."""


@dataclass(frozen=True)
class Weights:
    """Somebody's dense weights."""

    file: Path
    key: str | None = None
    """Of them, where the file holds several sets."""


def weights_of(request: PruneRequest) -> Weights | None:
    """Return the dense weights that a request names.

    Raises:
        ConfigError: it names a set of weights and no file, or a file for a run that has its own.
    """
    if request.checkpoint is None:
        if request.weights is not None:
            raise ConfigError("--weights names a set in the --checkpoint: give that as well")
        return None
    if request.resume:
        raise ConfigError("--resume goes on with the network of the run: give no --checkpoint")
    return Weights(request.checkpoint, request.weights)


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

    @property
    def permission(self) -> Permission:
        """Leave to build the run's network, which was asked for when it was started."""
        return Permission(self.config.model)


@contextmanager
def started(
    request: RunRequest, checks: Sequence[Check] = (), weights: Weights | None = None
) -> Iterator[Started]:
    """Check everything that can be checked before the first file is written, then start.

    A command that fails before it has done anything leaves no directory behind, and an earlier run
    as it was. Until the end no other process may work in the directory. Weights of somebody else
    are read and measured first: a run that can be seen can be gone on with.

    Raises:
        ConfigError: options contradict each other, or the configuration or the directory is unfit.
        CheckpointError: the checkpoint does not fit the architecture or the classes of the data.
        InterruptedRunError: the user stopped.
    """
    _check_request(request)
    config, run, resumed = _configured(request)
    data = load_data(config.data)
    device = pick_device(config.device)
    for check in (check_logits, *checks):
        check(config, data)
    if weights is not None:
        _check_weights(weights, run, resumed=resumed)
    begun = resumed
    try:
        with joined(device) as world:
            resumed = world.first(resumed)
            world.require_same("the configuration", config.model_dump_json().encode())
            world.require_same("the validation set", data.identity.encode())
            if resumed and not request.resume and world.main:
                log.warning("started again: going on with the run in %s", run.path)
            with _taken(run, resumed=resumed):
                world.wait()
                _begin(run, config, data, weights, world, resumed=resumed)
                begun = True
                yield Started(config, data, Session(run), resumed)
    except KeyboardInterrupt as error:
        output = shlex.quote(str(run.path))
        advice = f"; go on with --resume --output {output}" if begun and run.is_begun else ""
        raise InterruptedRunError(f"stopped{advice}") from error
    finally:
        if request.output is None:
            with suppress(OSError):  # other runs lie beside it
                run.path.parent.rmdir()


def _configured(request: RunRequest) -> tuple[RunConfig, RunDirectory, bool]:
    """Return the configuration, the directory, and whether a run lies there to go on with.

    The command that began a run goes on with it when it is given again; where a scheduler gives it,
    because its machine was taken away, ``overwrite`` belongs to the first time.
    """
    if request.resume and request.output:
        run = RunDirectory(request.output)
        config = run.saved_config()
        request.permission.require(config.model, run.settings)
        return config, run, True
    name, config = asked_config(request)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run = RunDirectory(request.output or Path("runs") / f"{Path(name).stem}-{stamp}")
    if run.is_begun and (started_again() or not request.overwrite):
        saved = run.saved_config()
        if saved.model_dump() == config.model_dump():
            return saved, run, True
    if launched().main:
        run.check_new(overwrite=request.overwrite)
    return config, run, False


def asked_config(request: RunRequest) -> tuple[str, RunConfig]:
    """Return the name of the configuration that is asked for, and what the options make of it.

    Where nothing says how photographs are prepared, it is as the network's published weights saw
    them.

    Raises:
        ConfigError: options that cannot be understood, or that name no network that a file names.
        ModelError, EnvironmentUnfitError: a registry does not know the network, or is missing.
    """
    allowed = request.permission.typed
    typed = allowed.name if allowed else None
    name = config_name(request, typed)
    asked = load_config(name, settings_for(request))
    if ":" in asked.model.name and typed != asked.model.name:
        raise ConfigError(
            f"the configuration names {asked.model.name}, whose code would be imported: "
            f"pass --model {asked.model.name} to allow it"
        )
    check_folder(asked, request.data)
    prepared = asked.data.prepared(usual_images(asked.model.name))
    return name, asked.model_copy(update={"data": prepared})


def settings_for(request: Request) -> list[str]:
    """Return the settings that a request stands for, its network and its data set among them."""
    model = [f"model.name={request.model}"] if request.model else []
    return [*request.asked, *model, *([root_setting(request.data)] if request.data else [])]


def config_name(request: RunRequest, model: str | None) -> str:
    """Return the name of the configuration that is asked for, where the network is known.

    Without --config a folder is one of images: small ones for networks that are meant for them,
    and for the default; photographs for every other network.
    """
    said = section_of(request.asked, "data")
    if request.config is None and request.data is not None and "dataset" not in said:
        small = model is None or model in SMALL_IMAGE_MODELS
        return "small-images-resnet20" if small else "image-folder"
    return request.config or DEFAULT_CONFIG


@contextmanager
def _taken(run: RunDirectory, *, resumed: bool) -> Iterator[None]:
    """Have the directory for this run alone, ready to go on in.

    Of several processes the main one takes it for all of them.
    """
    if not launched().main:
        yield
        return
    try:
        with locked(run.lock) as alone:
            if resumed:
                Session(run).mend(locked=alone)
            yield
    finally:
        run.discard_if_bare()


def _begin(
    run: RunDirectory,
    config: RunConfig,
    data: ImageData,
    weights: Weights | None,
    world: World,
    *,
    resumed: bool,
) -> None:
    """Begin a run, with the network of a checkpoint if one is given; all processes together."""
    wanted = not resumed or not world.first(world.main and run.dense.is_file())
    try:
        if weights is not None and wanted:
            import_dense(config, data, weights.file, run.imported, weights.key)
        if world.main and not resumed:
            run.begin(config)
        elif world.main:
            run.adopt()
    finally:
        if world.main and not run.beginning.is_file():
            run.imported.unlink(missing_ok=True)
    world.wait()


def existing(path: Path, request: Request) -> tuple[RunDirectory, RunConfig, ImageData]:
    """Open a run that another command has written, with the settings of a request on top.

    Raises:
        ConfigError: there is none, or the settings do not fit it.
    """
    run = RunDirectory(path)
    run.saved_config()
    config = load_config(str(run.settings), settings_for(replace(request, model=None)))
    check_folder(config, request.data)
    return run, config, load_data(config.data)


def reading(run: RunDirectory) -> AbstractContextManager[bool]:
    """Keep a run that is only read, and the files that are made of it, from being changed.

    Raises:
        ConfigError: a process is working on it.
    """
    return locked(run.lock, shared=True)


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


def _check_weights(weights: Weights, run: RunDirectory, *, resumed: bool) -> None:
    """Refuse the weights of the run that is replaced, and a run of other weights to go on with.

    Raises:
        ConfigError: they are.
        CheckpointError: a file of weights is missing or damaged.
    """
    if not resumed:
        if weights.file.resolve() == run.dense.resolve():
            raise ConfigError(f"{weights.file} would be overwritten: give another --output")
        return
    trains = run.state.is_file() and not run.dense.is_file()
    own = run.imported if run.beginning.is_file() else run.dense
    if trains or (own.is_file() and not is_import_of(own, weights.file, weights.key)):
        raise ConfigError(
            f"{run.path} holds a run of other weights than {weights.file}: use --overwrite to "
            "start anew, or another --output"
        )


def _check_request(request: RunRequest) -> None:
    if request.output is None and not launched().alone:
        raise ConfigError("several processes need --output DIR, which every one of them can read")
    if not request.resume:
        return
    if request.output is None:
        raise ConfigError("--resume needs --output DIR, the directory of the run to go on with")
    beside = [setting for setting in request.asked if not setting.startswith("model.")]
    if request.config or beside or request.data:
        raise ConfigError("--resume goes on with the configuration of the run: give no other")
