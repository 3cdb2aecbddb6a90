"""The shipped table of the V100: against its source, never falling, and refusing what it lacks."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module, resources
from pathlib import Path

import numpy as np
import pytest
from torchvision.models.resnet import Bottleneck, ResNet

from compress.errors import TableError
from compress.latency.fitted import FittedTable, shipped_names, shipped_table, table_from
from compress.latency.times import network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.layers import LayerShape

FOLDER = resources.files("configs") / "latency"
MEASURED = (  # rows of the source that configs/latency/NOTICE names, by eye from all over it
    ("fp16", "regular", 128, 512, 56, 512, 1, 1, 1, 2.76449),
    ("fp16", "regular", 128, 64, 26, 256, 3, 1, 1, 0.320307),
    ("fp16", "regular", 128, 64, 14, 256, 3, 1, 0, 0.104038),
    ("fp16", "regular", 32, 64, 26, 64, 1, 2, 0, 0.0150528),
    ("fp16", "regular", 128, 256, 56, 64, 3, 2, 1, 0.45527),
    ("fp16", "regular", 1, 3, 214, 64, 7, 2, 0, 0.0313344),
    ("fp16", "depthwise", 64, 384, 56, 384, 3, 1, 0, 0.543437),
    ("int8", "regular", 1, 64, 56, 256, 3, 2, 1, 0.0278528),
    ("int8", "regular", 128, 512, 56, 512, 1, 1, 0, 3.61318),
    ("int8", "regular", 128, 512, 56, 256, 1, 1, 0, 1.82282),
    ("fp32", "regular", 64, 256, 50, 512, 1, 2, 1, 0.932762),
    ("fp32", "regular", 64, 256, 28, 512, 5, 1, 1, 21.5455),
    ("fp32", "regular", 64, 256, 28, 512, 3, 1, 1, 5.17202),
    ("fp32", "regular", 64, 256, 16, 512, 1, 2, 0, 0.10455),
)
"""precision, conv, batch, in_channels, height, out_channels, kernel, stride, fused_add, ms."""


@pytest.fixture(scope="module")
def table() -> FittedTable:
    return shipped_table("v100")


def convolution(
    size: int = 56, kernel: int = 3, stride: int = 1, adds: bool = False, depthwise: bool = False
) -> LayerShape:
    output = -(-size // stride)
    return LayerShape(
        "conv2d",
        kernel=(kernel, kernel),
        stride=(stride, stride),
        dilation=(1, 1),
        input_size=(size, size),
        output_size=(output, output),
        group_width=int(depthwise),
        then=("add", "relu") if adds else ("relu",),
    )


def test_it_is_small_and_says_where_it_comes_from(table: FittedTable) -> None:
    files = [entry for entry in FOLDER.iterdir() if entry.name.startswith("v100.")]
    assert len(files) == 2
    assert sum(len(entry.read_bytes()) for entry in files) <= 500_000
    said = table.document
    assert "alibaba/lightweight-neural-architecture-search" in said.source
    assert said.licence == "Apache-2.0"
    assert "alibaba/lightweight-neural" in (FOLDER / "NOTICE").read_text(encoding="utf-8")
    assert shipped_names() == ("v100",)


def test_its_errors_are_those_of_rows_of_the_source(table: FittedTable) -> None:
    missed = []
    for precision, kind, batch, read, size, written, kernel, stride, adds, measured in MEASURED:
        shape = convolution(size, kernel, stride, bool(adds), kind == "depthwise")
        found = table.times(precision, batch).milliseconds(shape, np.array(read), np.array(written))
        missed.append(abs(float(found) / table.document.correction.scale / measured - 1))
    stated = table.document.held_out["all"]
    assert np.median(missed) < 2 * stated.median
    assert np.mean(np.array(missed) <= stated.p90) >= 0.8


def test_what_is_larger_in_every_way_is_never_predicted_faster(table: FittedTable) -> None:
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(120):
        kernel, stride, depthwise = rng.choice([1, 3, 5, 7]), rng.choice([1, 2]), rng.random() < 0.2
        precision = str(rng.choice(["fp32", "fp16", "int8"]))
        size, batch = int(rng.integers(2, 80)), int(rng.integers(1, 100))
        larger = (int(size * rng.uniform(1, 2)), int(batch * rng.uniform(1, 1.28)))
        read, written = rng.integers(4, 500, size=(2, 20))
        if depthwise:
            written = read
        more = [(one * rng.uniform(1, 2, size=20)).astype(int) for one in (read, written)]
        more = [more[0]] * 2 if depthwise else more
        small = convolution(size, kernel, stride, False, depthwise)
        large = convolution(larger[0], kernel, stride, not depthwise, depthwise)
        try:
            slower = table.times(precision, larger[1]).milliseconds(large, *more)
        except TableError:
            continue
        faster = table.times(precision, batch).milliseconds(small, read, written)
        assert np.all(faster <= slower * (1 + 1e-9)), (small, large, precision)
        compared += 1
    assert compared > 40


def test_widths_are_priced_as_the_next_multiple_of_eight(table: FittedTable) -> None:
    times = table.times("fp16", 1)
    odd, even = np.array([57, 61, 64]), np.array([121, 127, 128])
    found = times.milliseconds(convolution(), odd, even)
    assert found == pytest.approx(np.full(3, found[-1]))
    assert times.milliseconds(convolution(), np.array(64), np.array(129)) > found[-1]


def test_fewer_places_are_fewer_images_and_a_linear_layer_is_a_convolution(
    table: FittedTable,
) -> None:
    widths = np.array(256), np.array(512)
    whole = table.times("fp32", 8).milliseconds(convolution(4, 1), *widths)
    quarters = table.times("fp32", 32).milliseconds(convolution(2, 1), *widths)
    rows = LayerShape("linear", input_size=(4,), output_size=(4,))
    assert quarters == pytest.approx(whole)
    assert table.times("fp32", 32).milliseconds(rows, *widths) == pytest.approx(whole)


def test_batch_8_is_as_many_places_in_fewer_images(table: FittedTable) -> None:
    widths = np.array(256), np.array(256)
    for precision in table.precisions:
        eight = table.times(precision, 8).milliseconds(convolution(28), *widths)
        thirty_two = table.times(precision, 32).milliseconds(convolution(14), *widths)
        assert eight == pytest.approx(thirty_two, rel=0.25)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (replace(convolution(), kernel=(11, 11)), "11x11"),
        (replace(convolution(), kernel=(1, 7)), "1x7"),
        (replace(convolution(), stride=(4, 4)), "stride 4x4"),
        (replace(convolution(), dilation=(2, 2)), "dilation 2x2"),
        (replace(convolution(), groups=32), "32 groups"),
        (replace(convolution(), group_width=4), "groups of 4"),
        (replace(convolution(), kind="conv_transpose2d"), "conv_transpose2d"),
        (replace(convolution(), kind="conv1d", kernel=(3,), output_size=(9,)), "conv1d"),
    ],
)
def test_other_layers_are_refused_by_name(
    table: FittedTable, changed: LayerShape, named: str
) -> None:
    with pytest.raises(TableError, match=rf"does not cover .*{named}"):
        table.times("fp16", 1).milliseconds(changed, np.array(64), np.array(64))


@pytest.mark.parametrize(
    ("shape", "read", "written"),
    [
        (convolution(), 8192, 64),
        (convolution(), 64, 8192),
        (convolution(800), 64, 64),
        (convolution(400), 2048, 2048),
        (convolution(depthwise=True), 64, 128),
    ],
)
def test_what_is_far_larger_is_refused(
    table: FittedTable, shape: LayerShape, read: int, written: int
) -> None:
    with pytest.raises(TableError, match=f"{read} channels read and {written} written at batch 64"):
        table.times("fp16", 64).milliseconds(shape, np.array([8, read]), np.array([8, written]))


def test_other_batches_precisions_and_targets_are_refused(table: FittedTable) -> None:
    with pytest.raises(TableError, match="does not cover batch 256: it covers 1 to 128"):
        table.times("fp16", 256)
    with pytest.raises(TableError, match="has no bf16: it has fp16, fp32, int8"):
        table.times("bf16", 1)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="for v101: did you mean 'v100'"):
        shipped_table("v101")


def test_a_damaged_table_is_refused() -> None:
    document = (FOLDER / "v100.json").read_text(encoding="utf-8")
    numbers = (FOLDER / "v100.safetensors").read_bytes()
    for text, data in (("{}", numbers), ("[", numbers), (document, numbers[:99]), (document, b"")):
        with pytest.raises(TableError, match="v100 is damaged"):
            table_from("v100", text, data)


@pytest.mark.slow
def test_the_comparison_with_published_latencies_is_that_of_the_table(table: FittedTable) -> None:
    graph = analyse(ResNet(Bottleneck, [3, 4, 6, 3]), (3, 224, 224))
    assert len(table.document.published) == 6
    for one in table.document.published:
        times = table.times(one.precision, one.batch)
        found = network_milliseconds(graph, times, graph.everything())
        assert found == pytest.approx(one.predicted_ms, rel=2e-3)
        assert abs(one.left_out_ms / one.published_ms - 1) < 0.3


def test_at_its_nodes_a_table_says_what_scikit_learn_predicts(tmp_path: Path) -> None:
    program = import_module("v100_table")
    program.write_smallest(tmp_path / "rows.csv.gz")
    rows = program.read_rows(tmp_path / "rows.csv.gz")
    rows = rows.where(
        (rows.precision == "fp16") & (rows.kernel == 3) & (rows.stride == 1) & (rows.adds == 0)
    )
    counts = program.covered(rows)
    grids = program.fitted_grids(rows, counts, iterations=5)
    table = FittedTable("small", program.document({}, program.UNCORRECTED), grids)
    found = table.times("fp16", 32).milliseconds(convolution(56), np.array(64), np.array(256))
    wide = rows.where(rows.read > 3)
    batch, side, read, written = 32.0, 56.0, 64.0, 256.0
    places, weights = batch * side**2, read * 9 * written
    inputs, outputs = places * read, places * written
    waves = (
        np.ceil(np.ceil(places / tall) * np.ceil(written / across) / 80)
        for tall, across in ((128, 128), (128, 64), (64, 32))
    )
    work = (places * weights, inputs, outputs, inputs + outputs + weights, *waves)
    features = np.log([[batch, side, places, read, written, *work]])
    trees = program.Fit(wide, 5).trees
    assert float(found) == pytest.approx(np.exp(trees.predict(features)[0]))
