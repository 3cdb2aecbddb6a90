"""A latency table answers what was measured, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import TableError
from compress.latency.fingerprint import Fingerprint, network_digest
from compress.latency.table import (
    Curve,
    Error,
    Grid,
    LatencyTable,
    document_of,
    network_weight_bytes,
    read_table,
    write_table,
)
from compress.latency.times import network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.layers import LayerShape

FACTS = Fingerprint(
    machine="a CPU",
    runtime="onnxruntime-cpu",
    version="1.2",
    precision="fp32",
    batch=1,
    threads=1,
    network="0123",
)
CONV = LayerShape("conv2d", (3, 3), (1, 1), (1, 1), (8, 8), (8, 8), then=("relu",))
DEPTHWISE = replace(CONV, group_width=1, groups=16)
LINEAR = LayerShape("linear", input_size=(1,), output_size=(1,))


def widths(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


TABLE = LatencyTable(
    fingerprint=FACTS,
    intercept=0.5,
    grids={
        CONV: Grid(
            widths(3, 8, 16), widths(8, 16), np.array([[1.0, np.nan], [2.0, 3.0], [4.0, 5.0]])
        ),
        DEPTHWISE: Grid(widths(8, 16), widths(), np.array([0.25, 0.5])),
        LINEAR: Grid(widths(8, 16), widths(10), np.array([[0.1], [0.2]])),
    },
    curve=Curve(),
    error=Error(((1.02, 1.0), (0.96, 1.0))),
    spread=0.01,
    multiple=8,
    dense_ms=3.0,
    dense_weights=1000.0,
)


def at(shape: LayerShape, read: Any, written: Any) -> Any:
    return TABLE.milliseconds(shape, np.array(read), np.array(written)).tolist()


def test_a_width_between_two_costs_what_the_next_does() -> None:
    assert at(CONV, [8, 8, 9, 16, 1, 2], [8, 9, 8, 16, 8, 1]) == [2, 3, 4, 5, 1, 1]
    assert at(CONV, [[4], [16]], [1, 9]) == [[2, 3], [4, 5]]
    assert at(DEPTHWISE, [1, 8, 9], [1, 8, 9]) == [0.25, 0.25, 0.5]
    assert at(LINEAR, 16, 10) == 0.2
    assert TABLE.fixed == 0.5


@pytest.mark.parametrize(
    ("shape", "read", "written", "said"),
    [
        (CONV, 17, 8, "of 17 to 8 channels; it goes up to 16 to 16"),
        (CONV, 8, 17, "of 8 to 17 channels"),
        (CONV, [8, 3], [8, 16], "of 3 to 16 channels"),
        (CONV, 0, 8, "of 0 to 8 channels"),
        (DEPTHWISE, 17, 17, "goes up to 16"),
        (replace(CONV, stride=(2, 2)), 8, 8, "has no conv2d 3x3 stride 2x2 at 8x8"),
    ],
)
def test_what_was_not_measured_is_refused(
    shape: LayerShape, read: Any, written: Any, said: str
) -> None:
    with pytest.raises(TableError, match=said):
        at(shape, read, written)


@pytest.mark.parametrize(
    ("fact", "other", "said"),
    [
        ("machine", "another", "measured for machine a CPU and another is asked for"),
        ("runtime", "torch-cpu", "measured for runtime onnxruntime-cpu and torch-cpu is asked"),
        ("version", "1.3", "measured for version 1.2 and 1.3 is asked for"),
        ("precision", "fp16", "measured for precision fp32 and fp16 is asked for"),
        ("batch", 8, "measured for batch 1 and 8 is asked for"),
        ("threads", 2, "measured for threads 1 and 2 is asked for"),
        ("network", "4567", "measured for another network"),
    ],
)
def test_a_table_of_something_else_is_refused(fact: str, other: Any, said: str) -> None:
    FACTS.require(replace(FACTS), "t.json")
    with pytest.raises(TableError, match=f"^t.json was {said}.*measure it again"):
        FACTS.require(replace(FACTS, **{fact: other}), "t.json")


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    table = replace(TABLE, curve=Curve((0.0, 5.0, 10.0), (0.0, 0.0, 1.0)))
    path = tmp_path / "deep" / "t.json"
    write_table(table, path)
    found = read_table(path)
    assert document_of(found) == document_of(table)
    assert found.grids.keys() == table.grids.keys()
    np.testing.assert_array_equal(found.grids[CONV].milliseconds, table.grids[CONV].milliseconds)
    assert (found.error.mean, found.error.largest) == pytest.approx((0.03, 0.04))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", [{}]),
        ("layers", 3),
        ("fixed_ms", "fast"),
        ("fixed_ms", None),
        ("dense", 3.0),
        ("channel_multiple", None),
        ("weights", {"bytes": [0, 0], "ms": [0, 0]}),
        ("error", {}),
        ("fingerprint", {"machine": "a CPU"}),
        ("fingerprint", {**TABLE.fingerprint.__dict__, "batch": "1"}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**document_of(TABLE), key: value}))
    with pytest.raises(TableError, match="is damaged"):
        read_table(path)


@pytest.mark.parametrize("change", ["fewer", "none", "negative", "disorder", "infinite"])
def test_a_damaged_grid_is_refused(tmp_path: Path, change: str) -> None:
    document = document_of(TABLE)
    grid = document["layers"][0]
    if change == "fewer":
        grid["ms"] = grid["ms"][:-1]
    elif change == "none":
        grid["ms"] = [[None, None]] * 3
    elif change == "negative":
        grid["ms"][1][1] = -1.0
    elif change == "infinite":
        grid["ms"][1][1] = float("inf")
    else:
        grid["read"].reverse()
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TableError, match="is damaged"):
        read_table(path)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(TableError, match="cannot read"):
        read_table(path)
    for text in ("", "[]", "{}", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(TableError, match="is damaged or is not a latency table"):
            read_table(path)
    path.write_text(json.dumps({**document_of(TABLE), "schema_version": 9}))
    with pytest.raises(TableError, match="version 9 and 1 is read here"):
        read_table(path)


def test_a_curve_is_straight_between_its_points() -> None:
    curve = Curve((0.0, 10.0, 20.0), (0.0, 0.0, 5.0))
    assert curve.tangent(4.0) == (0.0, 0.0)
    assert curve.tangent(14.0) == (2.0, 0.5)
    assert curve.tangent(30.0) == (10.0, 0.5)


def test_near_a_network_the_table_is_a_sum_over_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    )
    graph = analyse(model, (3, 8, 8))
    dense = graph.everything()
    weights = 4.0 * 9 * (3 * 16 + 16 * 16)
    assert network_weight_bytes(graph.layers, dense) == weights
    grid = Grid(widths(3, 8, 16), widths(8, 16), np.arange(1.0, 7.0).reshape(3, 2))
    table = replace(
        TABLE,
        grids={layer.shape: grid for layer in graph.layers},
        curve=Curve((0.0, 1000.0, 20000.0), (0.0, 0.0, 19.0)),
        dense_weights=weights,
    )
    # fixed, then 3 to 16 and 16 to 16, then a thousandth of a millisecond a byte beyond 1000
    expected = 0.5 + 2 + 6 + (weights - 1000) / 1000
    assert network_milliseconds(graph, table, dense) == pytest.approx(expected)
    near = table.around(graph, dense)
    layers = sum(
        float(near.milliseconds(layer.shape, *map(np.array, layer.widths(dense))))
        for layer in graph.layers
    )
    assert near.fixed + layers == pytest.approx(expected)
    kept = dense.copy()
    kept[graph.prunable[0].units[2:]] = False
    small = 4.0 * 9 * (3 * 2 + 2 * 16)  # beyond the bend at 1000 bytes still
    expected = 0.5 + 1 + 2 + (small - 1000) / 1000
    assert network_milliseconds(graph, table, kept) == pytest.approx(expected)


def test_the_digest_is_that_of_shapes_and_dense_widths() -> None:
    def digest(width: int, size: int = 8) -> str:
        layers = nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3)
        return network_digest(analyse(nn.Sequential(*layers), (3, size, size)))

    assert digest(16) == digest(16)
    assert len({digest(16), digest(24), digest(16, 9)}) == 3
