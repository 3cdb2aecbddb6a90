"""A measured latency table: data, lookup, and a file that is checked.

The milliseconds of a network are ``fixed``, plus those of every layer by its two widths, plus what
its weights cost as a whole: from some size on they no longer lie in a cache between two calls. That
last part is a curve over the bytes of all weights, which are a sum over layers, so near any one
network it is a straight line and the whole is a sum over layers: ``around`` gives it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import TableError
from compress.files.atomic import write_json
from compress.files.documents import parsed_json
from compress.latency.fingerprint import AGAIN, Fingerprint, network_digest
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.layers import LayerCall, LayerShape

SCHEMA_VERSION = 1
MOST_BYTES = 2**26
"""Largest file; that of a ResNet-152 has a hundredth of it."""
MOST = 1e12
"""Of bytes, of milliseconds, and of all else that a table counts."""
LEAST = 1e-9
"""Milliseconds of a network."""
WEIGHT_BYTES = 4.0
"""Of one weight; a curve over bytes is measured in this unit, whatever the precision."""

Widths = NDArray[np.int64]
Milliseconds = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Milliseconds of a layer at some of its widths; a width between two costs what the next does.

    Of a layer whose groups go whole what is written follows from what is read: ``written`` is empty
    and ``milliseconds`` has one dimension.
    """

    read: Widths
    """Ascending."""
    written: Widths
    """Ascending."""
    milliseconds: Milliseconds
    """(read, written); NaN where no layer has both widths."""

    def at(self, read: Widths, written: Widths) -> Milliseconds:
        """Return the time at widths, NaN where they are not covered."""
        rows, outside = _stair(self.read, read)
        if self.milliseconds.ndim == 1:
            return np.where(outside, np.nan, self.milliseconds[rows])
        columns, beyond = _stair(self.written, written)
        return np.where(outside | beyond, np.nan, self.milliseconds[rows, columns])


def _stair(axis: Widths, widths: Widths) -> tuple[Widths, NDArray[np.bool_]]:
    """Return the place of the next larger width on an axis, and where there is none."""
    places = np.searchsorted(axis, widths)
    outside = (places == len(axis)) | (np.asarray(widths) < 1)
    return np.minimum(places, len(axis) - 1), outside


@dataclass(frozen=True)
class Curve:
    """Milliseconds over the bytes of all weights: straight between points, and on beyond them."""

    weights: tuple[float, ...] = (0.0, 1.0)
    """In bytes; ascending from 0."""
    milliseconds: tuple[float, ...] = (0.0, 0.0)

    def tangent(self, weights: float) -> tuple[float, float]:
        """Return value and slope at a number of bytes."""
        after = int(np.searchsorted(self.weights, weights, side="right"))
        after = min(max(after, 1), len(self.weights) - 1)
        (left, right), (low, high) = (
            each[after - 1 : after + 1] for each in (self.weights, self.milliseconds)
        )
        slope = (high - low) / (right - left)
        return low + slope * (weights - left), slope


@dataclass(frozen=True)
class Error:
    """How far predictions lie from measurements of whole networks that had no part in the table."""

    pairs: tuple[tuple[float, float], ...]
    """Predicted and measured milliseconds."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """|predicted - measured| / measured, network by network."""
        predicted, measured = np.array(self.pairs, dtype=float).reshape(-1, 2).T
        return np.abs(predicted / measured - 1)

    @property
    def mean(self) -> float:
        """Mean share."""
        return float(self.shares.mean())

    @property
    def largest(self) -> float:
        """Largest share."""
        return float(self.shares.max())


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of the layers of one network; a ``Times``."""

    fingerprint: Fingerprint
    intercept: float
    """Milliseconds of a network without layers and weights."""
    grids: Mapping[LayerShape, Grid]
    curve: Curve
    error: Error
    spread: float
    """Share by which two halves of the measurements differ; 90 % of the networks differ by less."""
    multiple: int
    """The widths of its grids are multiples of it, but for those that never shrink."""
    dense_ms: float
    """Milliseconds of the dense network, measured."""
    dense_weights: float
    """Bytes of all weights of the dense network."""
    near: float | None = None
    """Bytes of weights of the networks that it is asked about; None for half of the dense one's."""

    @property
    def fixed(self) -> float:
        """See ``Times``: what no width changes, for networks near ``near``."""
        value, slope = self._tangent
        return self.intercept + value - slope * self._near

    def milliseconds(self, shape: LayerShape, read: Widths, written: Widths) -> Milliseconds:
        """See ``Times``.

        Raises:
            TableError: the table does not cover the layer, or wider ones than were measured.
        """
        read, written = np.asarray(read), np.asarray(written)
        grid = self.grids.get(shape)
        if grid is None:
            raise TableError(f"the latency table has no {shape}: {AGAIN}")
        found = grid.at(read, written)
        if np.isnan(found).any():
            pairs = np.broadcast_arrays(read, written)
            where = tuple(np.argwhere(np.isnan(found))[0])
            asked = " to ".join(str(int(side[where])) for side in pairs)
            most = " to ".join(
                str(int(axis[-1])) for axis in (grid.read, grid.written) if len(axis)
            )
            raise TableError(
                f"the latency table has no {shape} of {asked} channels; it goes up to {most}"
            )
        return found + self._tangent[1] * weight_bytes(shape, read, written)

    def around(self, graph: ChannelGraph, kept: Mask) -> LatencyTable:
        """Return the table as a sum over layers that is exact for networks as large as this one."""
        return replace(self, near=network_weight_bytes(graph.layers, kept))

    def require_network(self, graph: ChannelGraph, what: str) -> None:
        """Refuse the layers of another network.

        Args:
            graph: of the dense network.
            what: name of the table, for the message.

        Raises:
            TableError: it was measured for another network.
        """
        found = replace(self.fingerprint, network=network_digest(graph))
        self.fingerprint.require(found, what)

    @property
    def _near(self) -> float:
        return self.dense_weights / 2 if self.near is None else self.near

    @property
    def _tangent(self) -> tuple[float, float]:
        return self.curve.tangent(self._near)


def weight_bytes(shape: LayerShape, read: Widths, written: Widths) -> NDArray[np.float64]:
    """Return the bytes of a layer's weights, in float32."""
    groups = read // shape.group_width if shape.group_width else np.asarray(shape.groups)
    each = WEIGHT_BYTES * math.prod(shape.kernel)
    return np.asarray(each * read * written / np.maximum(groups, 1), dtype=np.float64)


def network_weight_bytes(layers: Sequence[LayerCall], kept: Mask) -> float:
    """Return the bytes of all weights that layers hold under a mask."""
    total = 0.0
    for layer in layers:
        read, written = layer.widths(kept)
        if read and written:
            total += float(weight_bytes(layer.shape, np.array(read), np.array(written)))
    return total


def table_name(runtime: str, precision: str, batch: int, threads: int) -> str:
    """Return the name of a table's file: ``onnxruntime-cpu-fp32-b1-t1.json``."""
    return f"{runtime}-{precision}-b{batch}-t{threads}.json"


def write_table(table: LatencyTable, path: Path) -> None:
    """Write a table, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_json(path, document_of(table))


def document_of(table: LatencyTable) -> dict[str, Any]:
    """Return a table as plain data; docs/latency.md describes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": asdict(table.fingerprint),
        "channel_multiple": table.multiple,
        "fixed_ms": table.intercept,
        "layers": [
            {
                "shape": asdict(shape),
                "read": grid.read.tolist(),
                "written": grid.written.tolist(),
                "ms": _rounded(grid.milliseconds),
            }
            for shape, grid in table.grids.items()
        ],
        "weights": {"bytes": table.curve.weights, "ms": table.curve.milliseconds},
        "dense": {"ms": table.dense_ms, "weight_bytes": table.dense_weights},
        "error": {
            "mean": table.error.mean,
            "largest": table.error.largest,
            "pairs_ms": table.error.pairs,
        },
        "spread": table.spread,
    }


def _rounded(values: Milliseconds) -> Any:
    """Return numbers of four digits, None for NaN."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in values]


def read_table(path: Path) -> LatencyTable:
    """Read a table.

    Raises:
        TableError: the file is missing, damaged or of another version.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise TableError(
            f"cannot read the latency table {path}: {error.strerror or error}"
        ) from error
    try:
        document = parsed_json(data if len(data) <= MOST_BYTES else b"")
        version = document["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(f"{path} is damaged or is not a latency table: {AGAIN}") from error
    if version != SCHEMA_VERSION:
        raise TableError(
            f"{path} is a latency table of version {version!r} and {SCHEMA_VERSION} is read here: "
            f"{AGAIN}"
        )
    try:
        return table_of(document)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TableError(f"{path} is damaged: {AGAIN}") from error


def table_of(document: Mapping[str, Any]) -> LatencyTable:
    """Return the table of a document that ``document_of`` made.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    facts = document["fingerprint"]
    fingerprint = Fingerprint(**facts)
    for each in fields(Fingerprint):
        if type(facts[each.name]).__name__ != each.type:
            raise TypeError(each.name)
    weights, curve, dense = document["weights"], document["weights"]["bytes"], document["dense"]
    if len(curve) != len(weights["ms"]) or curve[0] != 0 or min(np.diff(curve)) < 1:
        raise ValueError("weights")
    pairs = [tuple(map(_number, pair)) for pair in document["error"]["pairs_ms"]]
    if not pairs or not all(min(pair) >= LEAST for pair in pairs):
        raise ValueError("error")
    return LatencyTable(
        fingerprint=fingerprint,
        intercept=_number(document["fixed_ms"]),
        grids={_shape_of(each["shape"]): _grid_of(each) for each in document["layers"]},
        curve=Curve(*(tuple(map(_number, weights[key])) for key in ("bytes", "ms"))),
        error=Error(tuple((predicted, measured) for predicted, measured in pairs)),
        spread=_number(document["spread"]),
        multiple=int(_number(document["channel_multiple"])),
        dense_ms=_number(dense["ms"]),
        dense_weights=_number(dense["weight_bytes"]),
    )


def _shape_of(facts: Mapping[str, Any]) -> LayerShape:
    told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    shape = LayerShape(**told)
    words, numbers = (shape.kind, *shape.then), (shape.groups, shape.group_width)
    sizes = (shape.kernel, shape.stride, shape.dilation, shape.input_size, shape.output_size)
    if not all(isinstance(word, str) for word in words) or not all(
        type(number) is int and 0 <= number <= MOST for number in itertools.chain(numbers, *sizes)
    ):
        raise TypeError("shape")
    return shape


def _grid_of(facts: Mapping[str, Any]) -> Grid:
    read, written = (np.array(facts[key], dtype=np.int64) for key in ("read", "written"))
    times = np.array(facts["ms"], dtype=np.float64)  # None is NaN
    shape = (len(read), len(written)) if len(written) else (len(read),)
    known = times[~np.isnan(times)]
    if times.shape != shape or not len(known) or not ((known > 0) & (known <= MOST)).all():
        raise ValueError("ms")
    for axis in (read, written):
        if (np.diff(axis) <= 0).any() or (axis < 1).any() or (axis > MOST).any():
            raise ValueError("widths")
    return Grid(read, written, times)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= MOST:  # nor NaN
        raise ValueError("a number")
    return float(value)
