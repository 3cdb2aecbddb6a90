"""What ``compress oracle`` is asked for, and what it reads: checked before a file is written."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from compress.checkpoints.checkpoint import Checkpoint, load_checkpoint
from compress.checkpoints.description import read_description
from compress.config import RunConfig, load_config
from compress.data import loading
from compress.data.batches import ImageData, require_images
from compress.data.workers import batches
from compress.errors import CheckpointError, ConfigError, writing
from compress.files.atomic import real_name
from compress.oracle.scores import check_names
from compress.runs.launch import check_folder, config_name, settings_for
from compress.runs.request import OracleRequest
from compress.runs.rundirectory import (
    RunDirectory,
    check_directory,
    check_resumable,
    entries_of,
)
from compress.training.compute import pick_device

log = logging.getLogger("compress")


@dataclass(frozen=True)
class OracleFiles:
    """The files that are written, by name."""

    path: Path

    @property
    def changes(self) -> Path:
        """The change of the loss for every unit, by batch of images."""
        return self.path / "oracle.jsonl"

    @property
    def pair_changes(self) -> Path:
        """The same for pairs."""
        return self.path / "pairs.jsonl"

    @property
    def units(self) -> Path:
        """One row for each unit."""
        return self.path / "units.csv"

    @property
    def correlation(self) -> Path:
        """All coefficients, and where they come from."""
        return self.path / "correlation.json"

    @property
    def plot(self) -> Path:
        """The picture."""
        return self.path / "oracle.png"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a directory that must not be written.

        Raises:
            ConfigError: it is a file, not empty, or holds nothing to go on with or to overwrite.
        """
        if resume:
            check_resumable(self.changes)
            return
        marker = self.changes
        own = {file.name for file in self._own}
        held = [path for path in entries_of(self.path) if real_name(path.name) not in own]
        if marker.is_file() and not overwrite:
            return  # it says itself whether it is of what is measured now
        check_directory(self.path, held, marker=marker, holds=marker.name, overwrite=overwrite)

    def clear(self) -> None:
        """Remove the files of an earlier measurement, and only those."""
        with writing(self.path):
            for file in self._own:
                file.unlink(missing_ok=True)

    @property
    def _own(self) -> tuple[Path, ...]:
        figures = (self.units, self.correlation, self.correlation.with_suffix(".md"), self.plot)
        return (self.changes, self.pair_changes, *figures)


@dataclass(frozen=True)
class ImageSample:
    """The images that everything is measured on."""

    images: torch.Tensor
    """(N, C, H, W), normalised."""
    labels: torch.Tensor
    """(N,)."""
    sha256: str
    """Of both."""


def seed_of(request: OracleRequest, config: RunConfig) -> int:
    """Return the seed of the choice of images."""
    return config.seed if request.seed is None else request.seed


def read_sample(request: OracleRequest, config: RunConfig, data: ImageData) -> ImageSample:
    """Read the first images of a seeded permutation, without augmentation.

    Raises:
        DataError: not one can be read.
    """
    images = loading.image_set(data.train if request.split == "train" else data.val)
    order = np.random.default_rng(seed_of(request, config)).permutation(len(images))
    chosen = order[: request.images]
    if len(chosen) < request.images:
        log.warning(
            "--images %d asks for more than the %d of --split %s: all of them are used",
            request.images,
            len(chosen),
            request.split,
        )
    size = config.data.eval_batch_size
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    requests = [loading.Draw(part, None) for part in parts]
    read = list(batches(images, requests, workers=config.data.workers))
    pixels, labels = torch.cat([b.images for b in read]), torch.cat([b.labels for b in read])
    require_images(len(labels), sum(b.skipped for b in read), purpose="compress oracle")
    digest = hashlib.sha256(f"{tuple(pixels.shape)}".encode())
    digest.update(pixels.numpy().tobytes())
    digest.update(labels.numpy().tobytes())
    return ImageSample(pixels, labels, digest.hexdigest())


def check_options(request: OracleRequest) -> None:
    """Refuse options that cannot be understood before anything is loaded.

    Raises:
        ConfigError: one of them.
    """
    if request.images < 1:
        raise ConfigError(f"--images {request.images} is no number of images: give 1 or more")
    if request.batch_size is not None and request.batch_size < 1:
        raise ConfigError(f"--batch-size {request.batch_size}: give 1 or more")
    if request.split not in ("train", "val"):
        raise ConfigError(f"--split {request.split}: there are train and val")
    check_names(request.criteria)


def opened(request: OracleRequest) -> tuple[Path, RunConfig]:
    """Return the file of weights and the configuration.

    Raises:
        ConfigError: no such configuration, or two of them.
        CheckpointError: the file is missing or damaged.
    """
    settings = settings_for(replace(request, model=None))
    if request.checkpoint.is_dir():
        run = RunDirectory(request.checkpoint)
        run.saved_config()
        if request.config:
            raise ConfigError(
                f"{request.checkpoint} is a run directory and brings its own configuration: "
                "leave --config away"
            )
        path, config = run.dense, load_config(str(run.config), settings)
    else:
        path = request.checkpoint
        own = read_description(path)
        model = own.architecture if own else request.model
        name = config_name(request, model)
        config = load_config(name, settings)
        if own:
            seen = {"image_size": own.input_size[1], "mean": own.mean, "std": own.std}
            config = config.model_copy(update={"data": config.data.prepared(seen)})
    check_folder(config, request.data)
    return path, config


def loaded(path: Path, request: OracleRequest, config: RunConfig) -> Checkpoint:
    """Return the dense network on the configured device.

    Raises:
        CheckpointError: the file is missing, damaged or of a pruned network.
        EnvironmentUnfitError: the device is not there.
    """
    dense = load_checkpoint(path, request.permission)
    if dense.description.recipe:
        raise CheckpointError(f"{path} is pruned already: measure its dense parent instead")
    dense.model.to(pick_device(config.device))
    return dense


def check_data(dense: Checkpoint, data: ImageData, path: Path) -> None:
    """Refuse data of other classes or of another image size than the network's.

    Raises:
        CheckpointError: the data does not fit.
    """
    if dense.classes != data.classes:
        raise CheckpointError(
            f"{path} was trained on {dense.num_classes} classes and the data has "
            f"{data.num_classes}, or other ones: give --data, or --config, of its classes"
        )
    if dense.input_size != data.input_size:
        there, here = ("x".join(map(str, size)) for size in (dense.input_size, data.input_size))
        raise CheckpointError(
            f"{path} takes images of {there} and the data gives {here}: "
            "add --set data.image_size, or give the --config that it was trained with"
        )
