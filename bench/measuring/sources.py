"""Where inputs come from: a data set, a folder of images, or whatever else a caller gives.

Images have labels by their folders, or none where they lie in one folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measuring.inputs import (
    Batch,
    Inputs,
    array_inputs,
    as_array,
    as_arrays,
    batch_inputs,
    file_inputs,
    parts_of,
    random_inputs,
)
from bench.measuring.wiring import Wiring
from compress.config import DataConfig
from compress.errors import DataError
from export.runners import TensorSpec

if TYPE_CHECKING:
    from bench.measuring.subject import Pair
    from bench.measuring.wiring import Specs
    from compress.data.batches import ImageData

Facts = dict[str, Any]

_BYTE = 255.0


@dataclass(frozen=True)
class GivenData:
    """Whatever a caller gives to compare two networks on; called for what both read."""

    data: Any
    labels: Any
    pair: Pair
    images: DataConfig
    seed: int
    random_count: int

    def __call__(self, wiring: Wiring) -> Inputs:
        """Return what both networks are fed.

        Raises:
            DataError: it is nothing that they read.
        """
        data = Path(self.data) if isinstance(self.data, str) else self.data
        if isinstance(data, Path):
            return self._from_path(data, wiring)
        if data is None and "dataset" in self.images.model_fields_set:
            from compress.data.datasets import load_data

            found = load_data(self.images.prepared(self._known()))
            return dataset_inputs(found, wiring, self.images)
        if data is None:
            side = self.images.image_size
            return random_inputs(wiring, seed=self.seed, side=side, count=self.random_count)
        if isinstance(data, Mapping) or _is_array(data):
            return array_inputs(as_arrays(data, wiring), self.labels, wiring)
        if self.labels is not None:
            raise DataError("batches bring their own labels: leave labels away")
        return batch_inputs(data, wiring)

    def _from_path(self, path: Path, wiring: Wiring) -> Inputs:
        if path.is_dir():
            facts = [subject.facts for subject in self.pair]
            return folder_inputs(path, wiring, config=self.images, facts=facts)
        if path.suffix in (".npz", ".npy"):
            return file_inputs(path, wiring)
        raise DataError(
            f"{path} is neither a folder of images nor a file of arrays, *.npz or *.npy"
        )

    def _known(self) -> dict[str, Any]:
        facts = self.pair.reference.facts
        return {key: tuple(facts[key]) for key in ("mean", "std") if key in facts}


def given_specs(data: Any) -> Specs | None:
    """Return what arrays say of the inputs that they are for; None of anything else."""
    if data is None or isinstance(data, str | Path):
        return None
    if not isinstance(data, Mapping) and not _is_array(data):
        data = parts_of(next(iter(data), None))[0]
    named = data if isinstance(data, Mapping) else {"input": data}
    arrays = {str(name): as_array(value) for name, value in named.items() if value is not None}
    return tuple(
        TensorSpec(name, _usual_type(array), (None, *array.shape[1:]))
        for name, array in arrays.items()
    )


def dataset_inputs(data: ImageData, wiring: Wiring, config: DataConfig) -> Inputs:
    """Take the validation images of a data set, with their labels.

    Args:
        data: the data set.
        wiring: the inputs; one of them, and that alone, is of images.
        config: how the data set is read.

    Raises:
        DataError: the networks do not read such images.
    """
    spec = image_input(wiring)
    _require_size(spec, data.input_size)
    if spec.dtype == "uint8":
        raise DataError(f"the networks read {spec}, and a data set is normalised: name a folder")
    return _inputs(data.val, spec, data.identity, config, classes=data.classes)


def folder_inputs(
    folder: Path, wiring: Wiring, *, config: DataConfig, facts: Sequence[Facts]
) -> Inputs:
    """Read images from a folder: of train/ and val/, of class folders, or of images themselves.

    Args:
        folder: the folder.
        wiring: the inputs; one of them, and that alone, is of images.
        config: how images are prepared, as far as it says.
        facts: what is known of either network, the reference first.

    Raises:
        DataError: it holds no images, or the networks read something else.
    """
    from compress.data.datasets import evaluated, load_data
    from compress.data.imagefolder import identity_of, list_classes, list_files
    from compress.data.walking import class_folders

    spec = image_input(wiring)
    prepared, notes = prepared_for(spec, config, facts)
    _require_size(spec, (3, prepared.image_size or 0, prepared.image_size or 0))
    try:
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            whole = prepared.model_copy(update={"dataset": "imagefolder", "root": str(folder)})
            data = load_data(whole)
            args = (data.val, spec, data.identity, config)
            return _inputs(*args, classes=data.classes, notes=notes)
        labelled = bool(class_folders(folder))
        classes, files = list_classes(folder) if labelled else ((), list_files(folder))
        identity = identity_of(files)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
    if not len(files):
        raise DataError(f"{folder} holds no image: name a folder of images, or a file of arrays")
    images = evaluated(files, prepared)
    return _inputs(images, spec, identity, config, classes=classes, notes=notes)


def image_input(wiring: Wiring) -> TensorSpec:
    """Return the input that images are fed to, which must be the only one.

    Raises:
        DataError: there are several inputs, or the one is not of images.
    """
    spec = wiring.inputs[0]
    rank = None if spec.shape is None else len(spec.shape)
    kind = np.dtype(spec.dtype)
    if (
        len(wiring.inputs) > 1
        or rank not in (None, 4)
        or not (kind.kind == "f" or kind == np.uint8)
    ):
        reads = ", ".join(map(str, wiring.inputs))
        raise DataError(
            f"images are fed to one input of shape (N, C, H, W), and the networks read {reads}: "
            "give the inputs as arrays by name"
        )
    return spec


def prepared_for(
    spec: TensorSpec, config: DataConfig, facts: Sequence[Facts]
) -> tuple[DataConfig, tuple[str, ...]]:
    """Return how images are prepared, and what had to be assumed.

    What the configuration says comes first, then what is known of the networks, then the file's
    own shape.

    Raises:
        DataError: nothing tells the size of the images.
    """
    known: Facts = {}
    for one in reversed(facts):
        known |= {key: one[key] for key in ("mean", "std", "input_size") if one.get(key)}
    sides = [size for size in (spec.shape or ())[2:] if isinstance(size, int)]
    side = config.image_size or (sides or list(known.get("input_size", ()))[1:] or [None])[0]
    if side is None:
        raise DataError(f"the networks read {spec}, whose sizes are open: set data.image_size")
    if np.dtype(spec.dtype) == np.uint8:
        scale = {"mean": (0.0,) * 3, "std": (1 / _BYTE,) * 3}
        return config.model_copy(update={**scale, "image_size": side}), ()
    notes: tuple[str, ...] = ()
    if not (config.mean and config.std) and "mean" not in known:
        notes = (
            "Images are normalised by the mean and deviation of ImageNet, since nothing tells "
            "others (data.mean, data.std).",
        )
    found = {
        "image_size": side,
        "mean": config.mean or tuple(known.get("mean", ())) or None,
        "std": config.std or tuple(known.get("std", ())) or None,
    }
    return config.model_copy(update=found), notes


def _inputs(
    images: Any,
    spec: TensorSpec,
    identity: str,
    config: DataConfig,
    *,
    classes: tuple[str, ...],
    notes: tuple[str, ...] = (),
) -> Inputs:
    """Return image files as inputs; without classes they have no labels."""
    from compress.data.readable import Readable

    def read(size: int) -> Iterator[Batch]:
        from compress.data.batches import eval_batches

        for batch in eval_batches(images, batch_size=size, workers=config.workers):
            pixels = batch.images.numpy()
            whole = np.rint(pixels) if np.dtype(spec.dtype) == np.uint8 else pixels
            labels = batch.labels.numpy() if classes else None
            feeds = {spec.name: np.ascontiguousarray(whole, dtype=spec.dtype)}
            yield Batch(feeds, len(pixels), labels, batch.skipped)

    readable = Readable.of(images, classes, config.max_skipped)
    return Inputs(
        "labelled" if classes else "images",
        readable.images,
        read,
        lambda: identity,
        notes,
        readable,
    )


def _require_size(spec: TensorSpec, size: tuple[int, int, int]) -> None:
    """Refuse images of another size than the networks read."""
    wanted = (spec.shape or (None,) * 4)[1:]
    if any(isinstance(a, int) and a != b for a, b in zip(wanted, size, strict=True)):
        raise DataError(
            f"the images are {'x'.join(map(str, size))} and the networks read {spec}: set "
            "data.image_size, or give the inputs as arrays"
        )


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray) or hasattr(data, "detach")


def _usual_type(array: np.ndarray) -> str:
    """Return the type in which an array is fed to a network in memory: floats in single."""
    return "float32" if array.dtype == np.float64 else array.dtype.name
