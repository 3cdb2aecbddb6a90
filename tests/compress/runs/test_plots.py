from __future__ import annotations

import errno
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import built, random_mask, some_slow
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.image import imread

from compress.errors import OutputError
from compress.networks import cost
from compress.runs import plots
from compress.runs.plots import (
    BLUE,
    ORANGE,
    GroupWidths,
    Widths,
    count_along,
    course_of,
    draw_history,
    draw_widths,
    new_figure,
    plot_history,
    plot_widths,
    widths_of,
)


def many(count: int) -> Widths:
    """Return a network of many groups, all of other widths."""
    groups = tuple(GroupWidths(f"block{i}.conv", 8 + i, 1 + i // 2) for i in range(count))
    costs = {"macs": 2_500_000_000, "params": 25_000_000, "channels": 4_000}
    return Widths("wide", groups, costs, {"macs": 1_000_000_000, "params": 999, "channels": 1})


def bars(axes: Axes) -> tuple[list[float], list[float], list[str]]:
    """Return the widths of the outlines and of the filled bars, and the colours of these."""
    dense, kept = axes.containers
    return (
        [bar.get_width() for bar in dense],
        [bar.get_width() for bar in kept],
        [to_hex(bar.get_facecolor()).upper() for bar in kept],
    )


# Channels kept


@pytest.mark.parametrize(
    "name", some_slow(["resnet20", "resnet50", "resnext50_32x4d"], {"resnet50", "resnext50_32x4d"})
)
def test_bars_are_as_long_as_the_mask_says(name: str) -> None:
    _, graph = built(name)
    kept = random_mask(graph, seed=3)
    (axes,) = draw_widths(widths_of(name, graph, kept)).axes
    outputs = [graph.by_tensor[f"{g.writers[0]}.weight", 0].units for g in graph.prunable]
    written = [
        units[np.isin(units, g.units)] for g, units in zip(graph.prunable, outputs, strict=True)
    ]
    dense, filled, colours = bars(axes)
    assert dense == [len(units) for units in written]
    assert filled == [int(kept[units].sum()) for units in written]
    assert colours == [ORANGE if group.residual else BLUE for group in graph.prunable]
    assert {BLUE, ORANGE} <= {*colours}
    assert [text.get_text() for text in axes.get_yticklabels()] == [g.name for g in graph.prunable]


def test_every_bar_has_its_numbers_beside_it() -> None:
    groups = (GroupWidths("a", 2048, 1236, residual=True), GroupWidths("b", 64, 7))
    costs = {"macs": 4_089_284_608, "params": 25_557_032, "channels": 2112}
    now = {"macs": 2_049_000_000, "params": 999_700, "channels": 1243}
    figure = draw_widths(Widths("mine", groups, costs, now))
    (axes,) = figure.axes
    texts = [(text.get_text(), text.xy) for text in axes.texts]
    assert texts == [("1,236 of 2,048, 60 %", (2048, 0)), ("7 of 64, 11 %", (64, 1))]
    title = figure.get_suptitle()
    assert title.startswith("mine: ")
    assert "MACs 4.09 G \N{RIGHTWARDS ARROW} 2.05 G (50.1 %)" in title
    assert "parameters 25.6 M \N{RIGHTWARDS ARROW} 1.00 M (3.9 %)" in title
    assert "channels 2.11 k \N{RIGHTWARDS ARROW} 1.24 k (58.9 %)" in title


@pytest.mark.parametrize("residual", [True, False])
def test_the_legend_names_what_is_there(residual: bool) -> None:
    groups = (GroupWidths("a", 8, 4), GroupWidths("b", 8, 4, residual))
    (axes,) = draw_widths(
        Widths("mine", groups, *[{"macs": 2, "params": 2, "channels": 2}] * 2)
    ).axes
    legend = axes.get_legend()
    assert legend is not None
    found = [text.get_text() for text in legend.get_texts()]
    assert found == ["kept", *["kept, residual stream"] * residual, "dense"]


def test_costs_are_those_of_the_mask() -> None:
    _, graph = built("resnet20")
    kept = random_mask(graph, seed=1)
    widths = widths_of("resnet20", graph, kept)
    assert widths.dense == cost.totals(graph, graph.everything())
    assert widths.now == cost.totals(graph, kept)
    assert sum(group.kept for group in widths.groups) == widths.now["channels"]


@pytest.mark.parametrize("count", some_slow([1, 12, 200], {200}))
def test_nothing_overlaps_or_is_cut_off(count: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw_widths(many(count))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    whole, renderer = figure.bbox, canvas.get_renderer()
    rows = [text.get_window_extent(renderer) for text in axes.texts]
    names = [text.get_window_extent(renderer) for text in axes.get_yticklabels()]
    assert len(rows) == len(names) == count
    for boxes in (rows, names):
        assert all(box.x0 >= 0 and box.x1 <= whole.x1 for box in boxes)
        assert all(a.y0 >= b.y1 for a, b in pairwise(boxes))
    legend, title = axes.get_legend(), figure._suptitle
    assert legend is not None
    box = legend.get_window_extent(renderer)
    assert box.y0 >= axes.bbox.y1 - 1
    assert title.get_window_extent(renderer).y0 >= box.y1


def test_a_picture_of_many_groups_is_higher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(count: int) -> tuple[int, int]:
        plot_widths(tmp_path / "pruning.png", many(count))
        height, width, _ = imread(tmp_path / "pruning.png").shape
        return width, height

    (width, low), (same, high) = size(12), size(40)
    assert width == same == 1080
    assert high - low == pytest.approx(28 * 0.2 * 120, abs=2)
    monkeypatch.setattr(plots, "MOST_PIXELS", 500)
    width, height = size(40)
    assert height == pytest.approx(500, abs=1)  # at a lower resolution
    assert width == pytest.approx(1080 * 500 / high, abs=1)


# The course of a run


def epoch(phase: str, step: int, loss: float, top1: float) -> dict[str, Any]:
    return {"event": "epoch", "phase": phase, "step": step, "loss": loss, "top1": top1}


def pruning_step(step: int, loss: float, macs: int) -> dict[str, Any]:
    return {"event": "prune_step", "step": step, "loss": loss, "macs": macs, "widths": {"a": 3}}


EVENTS = [
    epoch("train", 10, 2.0, 50.0),
    epoch("train", 20, 1.0, 80.0),
    pruning_step(4, 1.1, 4_000_000),
    {"event": "shrink", "step": 8, "difference": 1e-15, "images": 1},
    pruning_step(8, 1.2, 2_000_000),
    {"event": "pruned", "macs": 2_000_000, "top1": 70.0},
    epoch("finetune", 18, 0.9, 79.0),
    {"event": "finetuned", "macs": 2_000_000, "top1": 79.0},
]


def test_pruning_follows_dense_training() -> None:
    course = course_of(EVENTS)
    assert course.loss == {10: 2.0, 20: 1.0, 24: 1.1, 28: 1.2, 38: 0.9}
    assert course.top1 == {10: 50.0, 20: 80.0, 28: 70.0, 38: 79.0}
    assert course.macs == {24: 4_000_000, 28: 2_000_000}
    assert course.macs_to_the_end == {24: 4_000_000, 28: 2_000_000, 38: 2_000_000}
    assert course.pruning_steps == {24, 28}
    assert list(course.ends.items()) == [("train", 20), ("prune", 28), ("finetune", 38)]


def test_a_network_that_was_not_trained_here() -> None:
    dense = {"event": "dense", "checkpoint": "a.pth", "top1": 76.0}
    course = course_of([dense, *EVENTS[2:]])
    assert course.top1 == {0: 76.0, 8: 70.0, 18: 79.0}
    assert course.pruning_steps == {4, 8}


def test_what_masking_left_of_the_accuracy_is_marked_below_the_curve() -> None:
    pruned = {"event": "pruned", "macs": 2_000_000, "top1": 70.0, "masked_top1": 12.0}
    figure = draw_history(course_of([*EVENTS[:5], pruned, *EVENTS[6:]]))
    axes = figure.axes[1]
    *_, drop = axes.get_lines()
    assert list(zip(*drop.get_data(), strict=True)) == [(28, 70.0), (28, 12.0)]
    (mark,) = (each for each in axes.collections if isinstance(each, PathCollection))
    assert mark.get_offsets().tolist() == [[28, 12.0]]
    assert "masked 12.00" in [text.get_text() for text in axes.texts]
    bottom, top = axes.get_ylim()
    assert bottom < 12 < top


@pytest.mark.parametrize("most", [640, 4_940_416, 10_100_000, 1_814_070_000])
def test_counts_along_an_axis_have_one_unit(most: int) -> None:
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axes.set_xlim(0, most)
    count_along(axes.xaxis)
    figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert len({text.partition(" ")[2] for text in shown if text != "0"}) == 1
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    numbers = [float(text.partition(" ")[0]) * factor[text.partition(" ")[2]] for text in shown]
    assert numbers == pytest.approx(list(axes.get_xticks()))


def test_steps_that_were_taken_twice_count_once() -> None:
    """Killed before the first state was saved, the run begins anew and its history goes on."""
    again = [epoch("train", 10, 2.5, 51.0), *EVENTS[1:]]
    assert course_of([EVENTS[0], *again]).loss == course_of(again).loss


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    course = course_of([pruning_step(4, float("nan"), 5), pruning_step(8, float("inf"), 4)])
    assert course.loss == {}
    assert course.macs == {4: 5, 8: 4}


def test_the_panels_show_the_curves() -> None:
    figure = draw_history(course_of(EVENTS))
    drawn = {}
    for axes in figure.axes:
        (line,) = axes.get_lines()
        drawn[axes.get_ylabel()] = dict(zip(*line.get_data(), strict=True))
        (marks,) = axes.collections
        assert sorted(path[0][0] for path in marks.get_segments()) == [24, 28]
    course = course_of(EVENTS)
    assert drawn == {
        "training loss": course.loss,
        "top-1 (%)": course.top1,
        "MACs left": course.macs_to_the_end,
    }
    top, _, bottom = figure.axes
    names = {text.get_text() for text in top.texts}
    assert {"dense training", "pruning", "finetuning", "0.900"} == names
    assert bottom.texts[-1].get_text() == "2.00 M"
    assert bottom.get_ylim()[0] == 0


def test_dense_training_alone_has_no_panel_of_macs() -> None:
    figure = draw_history(course_of(EVENTS[:2]))
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "top-1 (%)"]
    assert figure.axes[-1].get_xlabel() == "training steps"


@pytest.mark.parametrize("events", [[], [{"event": "dense", "top1": 76.0}], [{"event": "new"}]])
def test_nothing_to_draw(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    plot_history(tmp_path / "history.png", events)
    assert list(tmp_path.iterdir()) == []


# Files


def test_pictures_are_whole(tmp_path: Path) -> None:
    plot_widths(tmp_path / "run" / "pruning.png", many(12))
    plot_history(tmp_path / "run" / "history.png", EVENTS)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"pruning.png", "history.png"}
    for path in (tmp_path / "run").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        height, width, _ = imread(path).shape
        assert width == 1080
        assert 300 < height < 1000
        assert 5_000 < path.stat().st_size < 200_000


def test_a_picture_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pruning.png"
    path.write_bytes(b"the earlier one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"pruning\.png: the disk is full"):
        plot_widths(path, many(2))
    monkeypatch.undo()
    assert path.read_bytes() == b"the earlier one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_pyplot_stays_out(tmp_path: Path) -> None:
    """It is global state; and nothing of matplotlib is imported before something is drawn."""
    script = (
        "import sys; from compress.runs import plots\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "groups = (plots.GroupWidths('a', 8, 4),)\n"
        "costs = {'macs': 2, 'params': 2, 'channels': 8}\n"
        "from pathlib import Path\n"
        "plots.plot_widths(Path(sys.argv[1]), plots.Widths('a', groups, costs, costs))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.png"], check=True)
    assert (tmp_path / "a.png").is_file()
