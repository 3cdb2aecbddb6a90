"""Fit the shipped latency table of the V100 to public measurements, and say how far it misses.

    python benchmarks/v100_table.py v100_tensorrt_conv_latency.csv.gz [--output configs/latency]
    python benchmarks/v100_table.py --smoke

The measurements are single convolutions in TensorRT, a row each, with the columns precision, conv,
batch, in_channels, height, width, out_channels, kernel, stride, fused_add, milliseconds. Boosted
trees of log milliseconds are fitted for each kind of convolution and read off at the nodes of a
grid; the grid is made to never fall as a layer grows. Errors are those of grids from four fifths
of the shapes (or of the pairs of widths) on the rest. Without --output nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import tempfile
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from smoke import parsed
from torchvision.models.resnet import Bottleneck, ResNet

from compress.config import Precision
from compress.latency.fitted import (
    FIRST,
    SCHEMA_VERSION,
    Axes,
    Correction,
    Errors,
    FittedTable,
    Place,
    Published,
    TableDocument,
    shapes,
    table_from,
)
from compress.latency.grid import Grid, never_falling, pack
from compress.latency.times import network_milliseconds
from compress.networks.analysis import analyse

SOURCE = (
    "single-convolution latencies of alibaba/lightweight-neural-architecture-search, "
    "tinynas/latency/op_profiler/V100 (https://github.com/alibaba/"
    "lightweight-neural-architecture-search); the TensorRT version is not stated"
)
WIDTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560)
AXES = Axes(
    kernel=(1, 3, 5, 7),
    stride=(1, 2),
    batch=(1, 8, 32, 64, 128),
    size=(4, 5.5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 480),
    read=(*WIDTHS, 3072, 4096),
    written=WIDTHS,
)
BETWEEN = 8
"""A batch that was not measured: its nodes come from as many places in those around it."""
NARROWER = 4.0
"""By how much either width of a node may miss a measured pair of widths."""
PUBLISHED: dict[
    tuple[Precision, int], float
] = {  # NVIDIA, TensorRT 4 on a V100, ResNet-50 at 224, 2018
    ("fp32", 1): 2.68,
    ("fp32", 32): 23.1,
    ("fp32", 128): 80.6,
    ("fp16", 1): 2.08,
    ("fp16", 32): 6.58,
    ("fp16", 128): 21.3,
}
FOLDS = 5
SHAPES, WIDTHS_APART, UNLEVELLED = "shapes", "pairs of widths", ", not levelled"
HELD_OUT = {
    SHAPES: ("depthwise", "read", "written", "size", "kernel", "stride"),
    WIDTHS_APART: ("depthwise", "read", "written"),
}
"""What is held out, by the columns in which rows that stay together are alike."""
SIZE_AXIS = {"regular": 4, "first": 4, "depthwise": 3}
"""Of the grid of each kind of layer."""
COLUMNS = (
    *("precision", "conv", "batch", "in_channels", "height", "width", "out_channels"),
    *("kernel", "stride", "fused_add", "milliseconds"),
)
UNCORRECTED = Correction(scale=1.0, about="none")
CORRECTION = (
    "one factor, fitted to the six published figures below; pooling, reformatting and launching "
    "are in it, and left_out_ms is what the other five alone predict"
)
FIT = (
    "Boosted trees (scikit-learn's HistGradientBoostingRegressor) of log milliseconds by work, "
    "traffic and waves of tiles, one fit for each precision, kernel, stride, fusion and kind.",
    "Read off at the nodes of a grid, and looked up between them, linear in logarithms; batch 8 "
    "from as many places in 1 and in 32 images.",
    "The grid never falls as a layer grows: a node that is slower than a larger one by more than "
    "10 % has the time of the larger, which padding reaches; smaller falls are pooled.",
    "Widths are priced as the next multiple of 8; a layer narrower than any that was measured with "
    "its other width as the narrowest that was.",
)
Cells = dict[tuple[int, int, int], Grid]
"""Grids by kernel, stride and whether an addition is fused."""


class Rows:
    """Measurements, a column each."""

    def __init__(self, columns: dict[str, NDArray]) -> None:
        self.columns = columns

    def __getattr__(self, name: str) -> NDArray:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns["log"])

    def where(self, chosen: NDArray) -> Rows:
        """Return some of the rows."""
        return Rows({name: column[chosen] for name, column in self.columns.items()})

    @cached_property
    def kind(self) -> NDArray:
        """The kind of grid that each row belongs to."""
        return np.where(
            self.depthwise, "depthwise", np.where(self.read <= FIRST, "first", "regular")
        )


def read_rows(path: Path) -> Rows:
    """Read the measurements."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    names = ("batch", "kernel", "stride")
    columns: dict[str, NDArray] = {n: np.array([int(row[n]) for row in found]) for n in names}
    columns["adds"] = np.array([int(row["fused_add"]) for row in found])
    columns["size"] = np.array([int(row["height"]) for row in found], float)
    columns["read"] = np.array([int(row["in_channels"]) for row in found], float)
    columns["written"] = np.array([int(row["out_channels"]) for row in found], float)
    columns["depthwise"] = np.array([row["conv"] == "depthwise" for row in found])
    columns["precision"] = np.array([row["precision"] for row in found])
    columns["log"] = np.log([float(row["milliseconds"]) for row in found])
    return Rows(columns)


class Fit:
    """Boosted trees of log milliseconds for one kernel, stride and fusion."""

    def __init__(self, rows: Rows, iterations: int) -> None:
        self.kernel, self.stride = int(rows.kernel[0]), int(rows.stride[0])
        self.depthwise = bool(rows.depthwise[0])
        self.trees = HistGradientBoostingRegressor(
            max_iter=iterations, early_stopping=False, random_state=0
        )
        self.trees.fit(self._features(rows.batch, rows.size, rows.read, rows.written), rows.log)

    def at(self, *where: Any) -> NDArray:
        """Return log milliseconds at (batch, size, read, written), broadcast."""
        features = self._features(*where)
        flat = self.trees.predict(features.reshape(-1, features.shape[-1]))
        return np.reshape(flat, features.shape[:-1])

    def at_places(self, batch: float, *where: Any) -> NDArray:
        """The same at a batch that was not measured, from as many places in 1 and in 32 images."""
        size, *widths = where
        share = np.log(batch) / np.log(32)
        few, many = size * batch**0.5, size * (batch / 32) ** 0.5
        most, least = AXES.size[-1], AXES.size[0]
        share = np.where(few > most, 1.0, np.where(many < least, 0.0, share))
        one, other = (
            self.at(1, np.minimum(few, most), *widths),
            self.at(32, np.maximum(many, least), *widths),
        )
        return (1 - share) * one + share * other

    def _features(self, *where: Any) -> NDArray:
        """Work, traffic and waves of tiles over the 80 multiprocessors, in logarithms."""
        batch, size, read, written = np.broadcast_arrays(*(np.asarray(w, float) for w in where))
        side = size / self.stride
        places = batch * side**2
        depth = np.where(self.depthwise, 1.0, read) * self.kernel**2
        inputs, outputs, weights = batch * size**2 * read, places * written, depth * written
        waves = [
            np.ceil(np.ceil(places / tall) * np.ceil(written / wide) / 80)
            for tall, wide in ((128, 128), (128, 64), (64, 32))
        ]
        columns = (
            *(batch, side, places, read, written, places * weights, inputs, outputs),
            *(inputs + outputs + weights, *waves),
        )
        return np.log(np.stack(columns, axis=-1))


def covered(rows: Rows) -> dict[str, NDArray]:
    """Return how many of the sizes each kind covers, by the other axes of its grid."""
    counts = {
        kind: np.zeros(np.delete(shape, SIZE_AXIS[kind]), np.uint8)
        for kind, shape in ((key.partition(".")[2], shape) for key, shape in shapes(AXES).items())
    }
    for kind, found in counts.items():
        own = rows.where(rows.kind == kind)
        for (k, kernel), (s, stride), (b, batch) in product(
            enumerate(AXES.kernel), enumerate(AXES.stride), enumerate(AXES.batch)
        ):
            like = (own.kernel == kernel) & (own.stride == stride)
            like &= own.batch == (32 if batch == BETWEEN else batch)
            most = _largest(own.where(like), kind)
            numbers = (np.array(AXES.size) <= most[..., None] * 1.01).sum(axis=-1)
            found[(k, s, b) if kind == "depthwise" else (k, s, slice(None), b)] = numbers
    return counts


def _largest(rows: Rows, kind: str) -> NDArray:
    """Return the largest measured size near each node of widths; less is always covered."""
    read, written = np.array(AXES.read), np.array(AXES.written)
    pairs = {
        "regular": np.meshgrid(read, written, indexing="ij"),
        "first": (np.full(len(written), FIRST), written),
        "depthwise": (read, read),
    }[kind]
    found = np.zeros(pairs[0].shape)
    unique = {(r, w) for r, w in zip(rows.read, rows.written, strict=True)}
    for r, w in sorted(unique):
        size = rows.size[(rows.read == r) & (rows.written == w)].max()
        near = (np.abs(np.log(pairs[0] / r)) <= np.log(NARROWER) + 0.01) & (
            np.abs(np.log(pairs[1] / w)) <= np.log(NARROWER) + 0.01
        )
        smaller = pairs[0] * pairs[1] <= 1.05 * r * w
        found = np.where(near & smaller, np.maximum(found, size), found)
    for axis in range(found.ndim):  # what is narrower than a covered node is padded to it
        found = np.flip(np.maximum.accumulate(np.flip(found, axis), axis), axis)
    return found


def fitted_grids(rows: Rows, counts: dict[str, NDArray], iterations: int) -> dict[str, Grid]:
    """Fit every kind of convolution that the rows have, and read the fits off at the nodes."""
    found = {}
    for key, shape in shapes(AXES).items():
        precision, kind = key.split(".")
        own = rows.where((rows.precision == precision) & (rows.kind == kind))
        grid = np.full(shape, np.nan)
        for index in product(*(range(n) for n in shape[: SIZE_AXIS[kind] - 1])):
            like = (own.kernel == AXES.kernel[index[0]]) & (own.stride == AXES.stride[index[1]])
            if len(index) == 3:
                like &= own.adds == index[2]
            if like.any():
                grid[index] = _at_nodes(Fit(own.where(like), iterations), kind)
        known = np.arange(len(AXES.size)).reshape(-1, *[1] * (grid.ndim - SIZE_AXIS[kind] - 1))
        found[key] = np.where(known < np.expand_dims(counts[kind], SIZE_AXIS[kind]), grid, np.nan)
    return found


def levelled(grids: dict[str, Grid]) -> dict[str, Grid]:
    """Return grids that never fall as a layer of one kernel and stride grows or adds."""
    return {key: never_falling(grid, range(2, grid.ndim)) for key, grid in grids.items()}


def _at_nodes(fit: Fit, kind: str) -> Grid:
    size, read, written = (np.array(getattr(AXES, n), float) for n in ("size", "read", "written"))
    widths = {
        "regular": (read[:, None], written),
        "first": (np.float64(FIRST), written),
        "depthwise": (read, read),
    }[kind]
    sizes = size.reshape(-1, *[1] * (2 if kind == "regular" else 1))
    nodes = (
        fit.at_places(batch, sizes, *widths) if batch == BETWEEN else fit.at(batch, sizes, *widths)
        for batch in AXES.batch
    )
    return np.stack(list(nodes))


def packed(grids: dict[str, Grid], counts: dict[str, NDArray]) -> bytes:
    """Return the numbers of a table as a file holds them."""
    numbers = {key: np.frombuffer(pack(grid), np.uint8) for key, grid in grids.items()}
    return safetensors.numpy.save(
        {**numbers, **{f"covered.{kind}": found for kind, found in counts.items()}}
    )


def held_out(rows: Rows, counts: dict[str, NDArray], iterations: int) -> dict[str, Errors]:
    """Return the errors on shapes, and on pairs of widths, that the fit did not see."""
    found = {}
    for what, columns in HELD_OUT.items():
        fold, missed = _folds(rows, columns), {key: np.zeros(len(rows)) for key in ("", UNLEVELLED)}
        for number in range(FOLDS):
            apart = fold == number
            fitted = fitted_grids(rows.where(~apart), counts, iterations)
            for key, grids in (("", levelled(fitted)), (UNLEVELLED, fitted)):
                table = FittedTable("fit", document({}, UNCORRECTED), grids)
                missed[key][apart] = missed_by(table, rows.where(apart))
        for key, logs in missed.items():
            for label, chosen in classes(rows, logs).items():
                if what == SHAPES or "," not in label:
                    found[f"{what}{key}: {label}"] = errors_of(logs[chosen])
    return {label.removeprefix(f"{SHAPES}: "): errors for label, errors in found.items()}


def errors_of(missed: NDArray) -> Errors:
    """Return the errors of predictions, from logarithms of predicted over measured."""
    relative = np.abs(np.expm1(missed))
    return Errors(
        rows=len(missed),
        median=round(float(np.median(relative)), 4),
        p90=round(float(np.percentile(relative, 90)), 4),
        bias=round(float(np.mean(missed)), 4),
    )


def _folds(rows: Rows, columns: Sequence[str]) -> NDArray:
    """Return a number for each row, the same for all that are alike in these columns."""
    stacked = np.column_stack([rows.columns[name].astype(float) for name in columns])
    _, alike = np.unique(stacked, axis=0, return_inverse=True)
    return np.random.default_rng(0).integers(FOLDS, size=alike.max() + 1)[alike.reshape(-1)]


def missed_by(table: FittedTable, rows: Rows) -> NDArray:
    """Return the logarithm of predicted over measured; NaN of what the table does not cover."""
    found = np.full(len(rows), np.nan)
    keys = ("precision", "depthwise", "kernel", "stride", "adds", "batch", "size")
    stacked = [rows.columns[key] for key in keys]
    order: dict[tuple[Any, ...], list[int]] = {}
    for number, key in enumerate(zip(*(column.tolist() for column in stacked), strict=True)):
        order.setdefault(key, []).append(number)
    for (precision, depthwise, kernel, stride, adds, batch, size), alike in order.items():
        place = Place(depthwise, kernel, stride, bool(adds), float(batch), size)
        found[alike] = table.times(precision, batch).logarithms(
            place, rows.read[alike], rows.written[alike]
        )
    return found - rows.log


def classes(rows: Rows, missed: NDArray) -> dict[str, NDArray]:
    """Return which rows belong to each class of layers that errors are told of."""
    known = ~np.isnan(missed)
    found = {"all": known}
    for precision in ("fp32", "fp16", "int8"):
        own = known & (rows.precision == precision)
        found[precision] = own
        for batch in (1, 32, 64, 128):
            found[f"{precision}, batch {batch}"] = own & (rows.batch == batch)
        for kernel, stride in product(AXES.kernel, AXES.stride):
            whole = own & ~rows.depthwise & (rows.kernel == kernel) & (rows.stride == stride)
            for adds, tail in ((0, ""), (1, " + add")):
                name = f"{precision}, {kernel}x{kernel} stride {stride}{tail}"
                found[name] = whole & (rows.adds == adds)
        found[f"{precision}, depthwise"] = own & rows.depthwise
    return {name: chosen for name, chosen in found.items() if chosen.any()}


def comparison(table: FittedTable, blocks: Sequence[int]) -> tuple[Correction, list[Published]]:
    """Return the correction by the published figures, and how each fares, also without itself."""
    graph = analyse(ResNet(Bottleneck, list(blocks)), (3, 224, 224))
    times = (table.times(precision, batch) for precision, batch in PUBLISHED)
    sums = np.array([network_milliseconds(graph, each, graph.everything()) for each in times])
    known = np.array(list(PUBLISHED.values()))
    scale = _scale(sums, known)
    others = [np.arange(len(sums)) != index for index in range(len(sums))]
    found = [
        Published(
            network="ResNet-50 at 224, TensorRT 4",
            precision=precision,
            batch=batch,
            published_ms=known[index],
            layers_ms=round(sums[index], 3),
            predicted_ms=round(scale * sums[index], 3),
            left_out_ms=round(_scale(sums[others[index]], known[others[index]]) * sums[index], 3),
        )
        for index, (precision, batch) in enumerate(PUBLISHED)
    ]
    return Correction(scale=round(scale, 4), about=CORRECTION), found


def _scale(sums: NDArray, known: NDArray) -> float:
    """Return the factor with the least squared relative error."""
    shares = sums / known
    return float(shares.sum() / (shares**2).sum())


def document(
    errors: dict[str, Errors], correction: Correction, published: Sequence[Published] = ()
) -> TableDocument:
    """Return all of a table but its numbers."""
    return TableDocument(
        schema_version=SCHEMA_VERSION,
        device="NVIDIA V100",
        runtime="TensorRT",
        source=SOURCE,
        licence="Apache-2.0",
        fit=FIT,
        axes=AXES,
        held_out=errors,
        correction=correction,
        published=tuple(published),
    )


def write_smallest(path: Path) -> None:
    """Write measurements of nothing, for trying this program."""
    widths = ((3, 64), (64, 64), (64, 256), (256, 64), (512, 512), (1024, 2048), (2048, 1024))
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.write(f"{','.join(COLUMNS)}\n")
        for precision, kernel, stride, adds, batch, size, (read, written) in product(
            ("fp32", "fp16"), (1, 3, 7), (1, 2), (0, 1), (1, 32, 128), (4, 56, 224), widths
        ):
            work = batch * (size / stride) ** 2 * (read * kernel**2 * written / 1e10 + 1e-6)
            row = (precision, "regular", batch, read, size, size, written, kernel, stride, adds)
            stream.write(f"{','.join(map(str, (*row, 0.01 + work)))}\n")


def show(table: TableDocument, size: int) -> None:
    """Print the errors and the comparison as Markdown."""
    print("| layers | rows | median | 90 % | bias |\n|---|---:|---:|---:|---:|")
    for label, found in table.held_out.items():
        figures = (f"{100 * figure:.1f} %" for figure in (found.median, found.p90, found.bias))
        print(f"| {label} | {found.rows} | {' | '.join(figures)} |")
    print("\n| figure | published | layers | predicted | left out |\n|---|---:|---:|---:|---:|")
    for one in table.published:
        times = (one.published_ms, one.layers_ms, one.predicted_ms, one.left_out_ms)
        print(f"| {one.precision}, batch {one.batch} | {' | '.join(f'{t:.2f}' for t in times)} |")
    print(f"\nscale {table.correction.scale}; {size} bytes of numbers")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="measurements, .csv.gz")
    parser.add_argument("--output", type=Path, help="folder to write the table to")
    parser.add_argument("--iterations", type=int, default=200, help="trees of each fit")
    parser.add_argument("--blocks", type=int, nargs=4, default=(3, 4, 6, 3), help="of the ResNet")
    options = parsed(parser, arguments, iterations=2, blocks=(1, 1, 1, 1))
    if options.file is None and not options.smoke:
        parser.error("the file of measurements is missing")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = options.file or Path(scratch) / "rows.csv.gz"
        if options.file is None:
            write_smallest(path)
        rows = read_rows(path)
    counts = covered(rows)
    grids = levelled(fitted_grids(rows, counts, options.iterations))
    numbers = packed(grids, counts)
    raw = table_from("fit", document({}, UNCORRECTED).model_dump_json(), numbers)
    correction, published = comparison(raw, options.blocks)
    table = document(held_out(rows, counts, options.iterations), correction, published)
    show(table, len(numbers))
    if options.output is not None:
        text = table.model_dump_json(indent=1)
        (options.output / "v100.json").write_text(f"{text}\n", encoding="utf-8")
        (options.output / "v100.safetensors").write_bytes(numbers)


if __name__ == "__main__":
    main()
