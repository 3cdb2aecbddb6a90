"""Inputs from arrays, files of arrays, batches of the user's own, or chance."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.measuring.wiring import Wiring
from compress.errors import DataError
from export.runners import TensorSpec

if TYPE_CHECKING:
    from compress.data.readable import Readable

Kind = Literal["labelled", "images", "arrays", "random"]
Arrays = dict[str, np.ndarray]

LABELS = "labels"
"""Name of the labels in a file of arrays, unless an input is called so."""
RANDOM_INPUTS = 256
"""How many are drawn: enough to show that 98.9 % of the answers are the same, if all are."""


@dataclass(frozen=True)
class Batch:
    """Some inputs, by the names of the reference."""

    feeds: Arrays
    count: int
    """Inputs in it."""
    labels: np.ndarray | None = None
    """(count,) class indices."""
    skipped: int = 0
    """Inputs that could not be read and are not among them."""

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Inputs:
    """What both networks are fed, in order."""

    kind: Kind
    count: int | None
    """How many there are; None where only reading tells."""
    read: Callable[[int], Iterator[Batch]]
    """Returns all of them anew in batches of at most so many."""
    identity: Callable[[], str]
    """Returns their digest, once they were read."""
    notes: tuple[str, ...] = ()
    """What was assumed of them, one sentence each."""
    readable: Readable | None = None
    """How many of them must be readable; None where all are."""

    def first(self, size: int, wiring: Wiring) -> Arrays:
        """Return one batch of real inputs, repeated if there are fewer.

        Raises:
            DataError: there is no input at all.
        """
        found: list[Batch] = []
        for batch in self.read(size):
            found += [batch] if len(batch) else []
            if sum(map(len, found)) >= size:
                break
        if not found:
            raise DataError("latency is measured on inputs, and none could be read")
        joined = {
            name: np.concatenate([batch.feeds[name] for batch in found])
            if name in wiring.batched
            else array
            for name, array in found[0].feeds.items()
        }
        return wiring.repeated(joined, size)


def random_inputs(
    wiring: Wiring, *, seed: int, side: int | None = None, count: int = RANDOM_INPUTS
) -> Inputs:
    """Draw inputs of the declared shapes and types.

    Floats are normal with mean 0 and deviation 1, bytes any of 256, other integers 0 or 1, which
    are indices into any table.

    Args:
        wiring: the inputs.
        seed: of the generator; an input follows from it and its number alone.
        side: height and width of images where the files leave them open.
        count: how many inputs.

    Raises:
        DataError: a size is open, or a type cannot be drawn.
    """
    rows = {
        spec.name: _row_shape(spec, spec.name in wiring.batched, side) for spec in wiring.inputs
    }

    def row(spec: TensorSpec, index: int) -> np.ndarray:
        return _drawn(np.random.default_rng([seed, index]), rows[spec.name], spec)

    def read(size: int) -> Iterator[Batch]:
        for start in range(0, count, size):
            indices = range(start, min(start + size, count))
            yield Batch(
                {
                    spec.name: np.stack([row(spec, index) for index in indices])
                    if spec.name in wiring.batched
                    else row(spec, 0)
                    for spec in wiring.inputs
                },
                len(indices),
            )

    facts = repr(
        (seed, count, [(spec.name, spec.dtype, rows[spec.name]) for spec in wiring.inputs])
    )
    digest = hashlib.sha256(facts.encode()).hexdigest()
    note = f"The inputs are {count} random ones, so agreement on real ones may be another."
    return Inputs("random", count, read, lambda: digest, (note,))


def array_inputs(arrays: Mapping[str, np.ndarray], labels: Any, wiring: Wiring) -> Inputs:
    """Take arrays by the names of either network's inputs, one row an input.

    Raises:
        DataError: an input is missing or too many, or has another shape or type; or there is not
            one label for each.
    """
    fed = _named(arrays, wiring)
    feeds = {spec.name: _fitted(fed[spec.name], spec, wiring) for spec in wiring.inputs}
    lengths = {name: len(feeds[name]) for name in feeds if name in wiring.batched}
    if len(set(lengths.values())) > 1 or not min(lengths.values(), default=1):
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"arrays hold as many rows each, at least one, and there are {told}")
    count = next(iter(lengths.values()), 1)
    known = _labels(labels, count)

    def read(size: int) -> Iterator[Batch]:
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield Batch(
                {
                    name: array[part] if name in wiring.batched else array
                    for name, array in feeds.items()
                },
                part.stop - start,
                None if known is None else known[part],
            )

    digest = _digest(feeds if known is None else {**feeds, LABELS: known})
    return Inputs("arrays" if known is None else "labelled", count, read, lambda: digest)


def file_inputs(path: Path, wiring: Wiring) -> Inputs:
    """Read arrays by name from an ``.npz``, or the one input from an ``.npy``.

    Raises:
        DataError: it cannot be read, or as ``array_inputs``.
    """
    found = _read_arrays(path)
    if isinstance(found, np.ndarray):
        return array_inputs(_alone(found, wiring), None, wiring)
    reads = {spec.name for spec in wiring.inputs} | set(wiring.names.values())
    labels = found.pop(LABELS) if LABELS in found and LABELS not in reads else None
    try:
        return array_inputs(found, labels, wiring)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def batch_inputs(batches: Iterable[Any], wiring: Wiring) -> Inputs:
    """Take batches of the user's own: (inputs, labels), or inputs alone.

    Raises:
        DataError: they can be read only once, or there is none.
    """
    if iter(batches) is batches:
        raise DataError(
            "inputs are read several times, and an iterator is used up by the first: give a list "
            "or a loader of batches"
        )
    first = next(iter(batches), None)
    if first is None:
        raise DataError("networks are compared on inputs, and there is no batch of them")
    digests: list[str] = []  # of the readings that came to the end

    def read(size: int) -> Iterator[Batch]:
        seen = hashlib.sha256()
        for batch in batches:
            inputs, labels = parts_of(batch)
            part = array_inputs(as_arrays(inputs, wiring), labels, wiring)
            seen.update(part.identity().encode())
            yield from part.read(size)
        digests.append(seen.hexdigest())

    labelled = parts_of(first)[1] is not None
    return Inputs("labelled" if labelled else "arrays", None, read, lambda: digests[0])


def parts_of(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the labels of a batch of the user's own; None where it has none."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    return (batch[0], batch[1]) if pair else (batch, None)


def as_arrays(data: Any, wiring: Wiring) -> Mapping[str, np.ndarray]:
    """Return what a user gives as arrays by name: a mapping, or the array of the one input."""
    if isinstance(data, Mapping):
        return {str(name): as_array(value) for name, value in data.items()}
    return _alone(data, wiring)


def as_array(data: Any) -> np.ndarray:
    """Return a tensor of any device, an array or a list as an array."""
    if not hasattr(data, "detach"):
        return np.asarray(data)
    tensor = data.detach().cpu()
    return np.asarray(tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor)


def _alone(data: Any, wiring: Wiring) -> Arrays:
    if len(wiring.inputs) != 1:
        names = ", ".join(spec.name for spec in wiring.inputs)
        raise DataError(f"one array was given, and the networks read {names}: give them by name")
    return {wiring.inputs[0].name: as_array(data)}


def _read_arrays(path: Path) -> np.ndarray | Arrays:
    """Read a file of numpy; nothing pickled is loaded."""
    try:
        with path.open("rb") as stream:  # numpy leaves one of its own open where it fails
            found = np.load(stream, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            with found:
                return {name: found[name] for name in found.files}
    except Exception as error:  # a damaged header can fail in any way
        reason = getattr(error, "strerror", None) or "it is damaged, or holds what is no array"
        raise DataError(f"cannot read {path}: {reason}") from error


def _named(arrays: Mapping[str, np.ndarray], wiring: Wiring) -> Arrays:
    """Return arrays by the names of the reference."""
    named = {}
    for ours, theirs in wiring.names.items():
        found = arrays.get(ours, arrays.get(theirs))
        if found is None:
            there = ", ".join(arrays) or "nothing"
            raise DataError(f"there is no array {ours!r} for the input of that name, but {there}")
        named[ours] = found
    unused = arrays.keys() - wiring.names.keys() - set(wiring.names.values())
    if unused:
        reads = ", ".join(wiring.names)
        raise DataError(f"{', '.join(sorted(unused))} is no input: the networks read {reads}")
    return named


def _fitted(array: np.ndarray, spec: TensorSpec, wiring: Wiring) -> np.ndarray:
    """Return an array in the type of its input, refusing one of another kind or shape."""
    wanted, kind = np.dtype(spec.dtype), array.dtype.kind
    whole = kind in "iu" and wanted.kind in "iu"
    if array.dtype != wanted and not (kind == wanted.kind == "f" or whole):
        raise DataError(f"{spec.name} is {array.dtype} and the networks read {spec}")
    cast = array.astype(wanted, copy=False)
    if whole and not np.array_equal(cast, array):
        raise DataError(f"{spec.name} holds numbers that {spec.dtype} does not")
    shape = spec.shape
    skip = 1 if spec.name in wiring.batched else 0
    if shape is not None and (
        array.ndim != len(shape)
        or any(
            isinstance(size, int) and size != there
            for size, there in list(zip(shape, array.shape, strict=True))[skip:]
        )
    ):
        raise DataError(f"{spec.name} is of shape {array.shape} and the networks read {spec}")
    return np.ascontiguousarray(cast)


def _labels(labels: Any, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    found = as_array(labels)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise DataError(
            f"labels are one class index for each of {count} inputs, not {found.dtype} of shape "
            f"{found.shape}"
        )
    return found.astype(np.int64)


def _row_shape(spec: TensorSpec, batched: bool, side: int | None) -> tuple[int, ...]:
    shape = spec.shape or ()
    images = len(shape) == 4 and batched
    sizes = tuple(
        side if images and place > 1 and side and not isinstance(size, int) else size
        for place, size in enumerate(shape)
    )[1 if batched else 0 :]
    known = tuple(size for size in sizes if isinstance(size, int))
    if spec.shape is None or len(known) < len(sizes):
        mend = "set data.image_size" if images else "give the inputs as arrays"
        raise DataError(f"the networks read {spec}, whose sizes are open: {mend}")
    return known


def _drawn(rng: np.random.Generator, shape: tuple[int, ...], spec: TensorSpec) -> np.ndarray:
    kind = np.dtype(spec.dtype)
    if kind.kind == "f":
        return np.asarray(rng.standard_normal(shape)).astype(kind)
    if kind.kind in "iub":
        return np.asarray(rng.integers(0, 256 if kind == np.uint8 else 2, shape)).astype(kind)
    raise DataError(f"random numbers cannot be drawn for {spec}: give the inputs as arrays")


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
