"""Predicted milliseconds from a shipped table that was fitted to other people's measurements.

``configs/latency/v100.json`` says where the measurements come from, what was fitted to them, how
far the fit misses measurements that it did not see, and how whole networks compare with published
figures; ``v100.safetensors`` beside it holds the numbers. Nothing was measured here, so whatever
this module returns is a prediction and is called one. docs/v100.md says more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import ValidationError

from compress.config import Precision
from compress.errors import TableError, nearest
from compress.files.documents import Section, parsed_json
from compress.latency.grid import BEYOND, Grid, interpolated, unpack
from compress.latency.times import Milliseconds
from compress.networks.layers import LayerShape

SCHEMA_VERSION: Literal[1] = 1
FIRST = 3
"""Channels of an image: layers that read no more have a grid of their own."""
ALIGNED = 8
"""Widths are priced as the next multiple of it; no others were measured."""


class Errors(Section):
    """How far predictions miss measurements that the fit did not see."""

    rows: int
    """Measurements that it is about."""
    median: float
    """Of the relative error, without its sign."""
    p90: float
    """90th percentile of that."""
    bias: float
    """Mean of the logarithm of predicted over measured."""


class Published(Section):
    """One published latency of a whole network, beside what the table says of it."""

    network: str
    precision: Precision
    batch: int
    published_ms: float
    layers_ms: float
    """Sum over its layers."""
    predicted_ms: float
    """That with the correction for whole networks."""
    left_out_ms: float
    """The same, of a correction that was fitted to the other figures alone."""


class Correction(Section):
    """From the sum over layers to a whole network."""

    scale: float
    """What every layer is multiplied by, so that ratios do not depend on it."""
    about: str


class Axes(Section):
    """Positions of the nodes."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    batch: tuple[float, ...]
    size: tuple[float, ...]
    """Side of the square that is read."""
    read: tuple[float, ...]
    written: tuple[float, ...]


class TableDocument(Section):
    """All but the numbers."""

    schema_version: Literal[1]
    device: str
    runtime: str
    source: str
    licence: str
    fit: tuple[str, ...]
    """How it was fitted, one sentence each."""
    axes: Axes
    held_out: dict[str, Errors]
    """By class of layers; ``all`` is over all of them."""
    correction: Correction
    published: tuple[Published, ...]


@dataclass
class PredictedTimes:
    """Predicted milliseconds of layers for one precision and batch; satisfies ``Times``.

    Attributes:
        table: what they come from, with source and errors.
        precision: of weights and activations.
        batch: images per call.
        fixed: milliseconds of a network beside its layers.
    """

    table: FittedTable = field(repr=False)
    precision: Precision
    batch: int
    fixed: float = 0.0

    @property
    def held_out(self) -> Errors:
        """How far a single layer is missed at this precision."""
        return self.table.document.held_out[self.precision]

    def milliseconds(
        self, shape: LayerShape, read: NDArray[np.int64], written: NDArray[np.int64]
    ) -> Milliseconds:
        """Return predictions for a layer by its widths, its share of the correction included.

        Raises:
            TableError: such a layer was not measured, or none so large.
        """
        read, written = np.broadcast_arrays(read, written)
        place = self.table.place(shape, self.batch)
        found = self.logarithms(place, read, written)
        if np.isnan(found).any():
            worst = np.flatnonzero(np.isnan(found).reshape(-1))[-1]
            raise self.table.beyond(
                shape, self.batch, read.reshape(-1)[worst], written.reshape(-1)[worst]
            )
        return self.table.document.correction.scale * np.exp(found)

    def logarithms(self, place: Place, read: NDArray, written: NDArray) -> NDArray:
        """Return log milliseconds of a layer alone, NaN where the table ends."""
        grids, axes = self.table.planes(self.precision, place), self.table.axes
        if place.depthwise:
            found = interpolated(grids["depthwise"], [axes["read"]], [_aligned(read)])
            return np.where(read == written, found, np.nan)
        read, written = _aligned(read), _aligned(written)
        wide = interpolated(grids["regular"], [axes["read"], axes["written"]], [read, written])
        first = interpolated(grids["first"], [axes["written"]], [written])
        return np.where(read <= FIRST, first, wide)


@dataclass(frozen=True)
class Place:
    """Where a layer lies in the table, but for its widths."""

    depthwise: bool
    kernel: int
    stride: int
    adds: bool
    batch: float
    size: float


class FittedTable:
    """A shipped table: what it says of itself, and its numbers."""

    def __init__(self, name: str, document: TableDocument, grids: Mapping[str, Grid]) -> None:
        self.name, self.document, self.grids = name, document, grids
        self.axes = {
            key: np.array(getattr(document.axes, key), float)
            for key in ("batch", "size", "read", "written")
        }
        self._planes: dict[tuple[str, Place], dict[str, Grid]] = {}

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that it covers."""
        return tuple(sorted({key.partition(".")[0] for key in self.grids}))

    @property
    def network_error(self) -> float:
        """Mean error of whole networks of which figures are published, each left out of the fit."""
        found = self.document.published
        return sum(abs(p.left_out_ms / p.published_ms - 1) for p in found) / max(1, len(found))

    def times(self, precision: Precision, batch: int) -> PredictedTimes:
        """Return the predictions for one precision and batch.

        Raises:
            TableError: it covers no such precision or batch.
        """
        if precision not in self.precisions:
            raise TableError(
                f"the {self.document.device} table has no {precision}: it has "
                f"{', '.join(self.precisions)}"
            )
        most = int(self.axes["batch"][-1])
        if not 1 <= batch <= most:
            raise TableError(
                f"the {self.document.device} table does not cover batch {batch}: it covers 1 to "
                f"{most}"
            )
        return PredictedTimes(self, precision, batch)

    def place(self, shape: LayerShape, batch: int) -> Place:
        """Return where a layer lies in the table.

        Fewer places than the smallest measured image has are priced as fewer images of that size;
        a linear layer as a 1x1 convolution over its rows.

        Raises:
            TableError: such a layer was not measured.
        """
        axes, linear = self.document.axes, shape.kind == "linear"
        kernel, stride = (1, 1) if linear else (_one(shape.kernel), _one(shape.stride))
        depthwise = shape.group_width == 1
        fits = linear or (
            shape.kind == "conv2d"
            and kernel in axes.kernel
            and stride in axes.stride
            and _one(shape.dilation or (1,)) == 1
            and (depthwise or (shape.group_width == 0 and shape.groups == 1))
        )
        if not fits:
            raise TableError(
                f"the {self.document.device} table does not cover {shape}: it covers linear layers "
                "and square 2-D convolutions, whole or depthwise, of kernel "
                f"{', '.join(map(str, axes.kernel))}, stride {' or '.join(map(str, axes.stride))} "
                "and no dilation"
            )
        size = math.sqrt(math.prod(shape.output_size)) * stride
        least = axes.size[0]
        images = float(batch)
        if size < least:
            images, size = max(1.0, batch * (size / least) ** 2), least
        return Place(depthwise, kernel, stride, "add" in shape.then, images, size)

    def planes(self, precision: str, place: Place) -> dict[str, Grid]:
        """Return the grids over widths alone at a place; they are kept for the next call."""
        key = (precision, place)
        if key not in self._planes:
            self._planes[key] = {
                kind: self._plane(self.grids[f"{precision}.{kind}"], place, kind)
                for kind in (("depthwise",) if place.depthwise else ("regular", "first"))
            }
        return self._planes[key]

    def _plane(self, grid: Grid, place: Place, kind: str) -> Grid:
        kernel = self.document.axes.kernel.index(place.kernel)
        stride = self.document.axes.stride.index(place.stride)
        at = grid[kernel, stride] if kind == "depthwise" else grid[kernel, stride, int(place.adds)]
        return interpolated(
            at,
            [self.axes["batch"], self.axes["size"]],
            [np.array(place.batch), np.array(place.size)],
        )

    def beyond(self, shape: LayerShape, batch: int, read: int, written: int) -> TableError:
        """Return the refusal of a layer that is larger than what was measured."""
        axes = self.document.axes
        return TableError(
            f"the {self.document.device} table does not cover {shape} with {read} channels read "
            f"and {written} written at batch {batch}: it covers up to {axes.read[-1]:.0f} read and "
            f"{axes.written[-1]:.0f} written (depthwise as many), images of up to "
            f"{axes.size[-1]:.0f}x{axes.size[-1]:.0f}, wide layers on smaller ones only, and "
            f"{100 * (BEYOND - 1):.0f} % beyond"
        )


def _one(numbers: tuple[int, ...]) -> int:
    """Return the number that all are, 0 if they differ."""
    return numbers[0] if len(set(numbers)) == 1 else 0


def _aligned(widths: NDArray) -> NDArray:
    """Return the widths that are priced: those of images, else multiples of eight."""
    return np.where(widths <= FIRST, np.maximum(widths, 1), -(-widths // ALIGNED) * ALIGNED)


def shipped_names() -> tuple[str, ...]:
    """Return the targets that a table comes with."""
    folder = resources.files("configs") / "latency"
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name[: -len(".json")] for name in names if name.endswith(".json")))


@lru_cache(maxsize=4)
def shipped_table(name: str) -> FittedTable:
    """Return a table that comes with the tool, by the name of its target.

    Raises:
        TableError: there is none of that name.
    """
    folder, known = resources.files("configs") / "latency", shipped_names()
    if name not in known:
        raise TableError(f"no latency table comes with the tool for {name}: {nearest(name, known)}")
    with resources.as_file(folder / f"{name}.json") as path:
        document = path.read_text(encoding="utf-8")
    with resources.as_file(folder / f"{name}.safetensors") as path:
        return table_from(name, document, path.read_bytes())


def table_from(name: str, document: str, numbers: bytes) -> FittedTable:
    """Return a table from its two files.

    Raises:
        TableError: they are damaged, or do not belong together.
    """
    try:
        read = TableDocument.model_validate(parsed_json(document))
        packed = safetensors.numpy.load(numbers)
        grids = {
            key: _covered(unpack(packed[key].tobytes(), shape), key, packed, shape)
            for key, shape in shapes(read.axes).items()
        }
    except (ValidationError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise TableError(f"the latency table {name} is damaged: {error}") from error
    return FittedTable(name, read, grids)


def shapes(axes: Axes) -> dict[str, tuple[int, ...]]:
    """Return the shape of each grid by its name: precision and kind of layer.

    Its axes are kernel, stride, whether an addition is fused (not of depthwise layers), batch,
    size, and widths: read and written, written alone of first layers, both at once of depthwise
    layers.
    """
    outer = (len(axes.kernel), len(axes.stride))
    inner, widths = (len(axes.batch), len(axes.size)), (len(axes.read), len(axes.written))
    kinds = {
        "regular": (*outer, 2, *inner, *widths),
        "first": (*outer, 2, *inner, widths[1]),
        "depthwise": (*outer, *inner, widths[0]),
    }
    return {f"{p}.{kind}": kinds[kind] for p in ("fp32", "fp16", "int8") for kind in kinds}


def _covered(grid: Grid, key: str, packed: Mapping[str, NDArray], shape: tuple[int, ...]) -> Grid:
    """Return a grid with NaN where the table ends: above so many sizes, by the other axes."""
    kind = key.partition(".")[2]
    size = 4 if kind != "depthwise" else 3
    counts = packed[f"covered.{kind}"]
    known = np.arange(shape[size]).reshape(-1, *[1] * (len(shape) - size - 1))
    return np.where(known < np.expand_dims(counts, size), grid, np.nan)
