from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench.measuring.records import GroupRecord, LayerFigures, LayerRecord, LayerTimes
from bench.pages import figures, pareto
from bench.pages.figures import Plot, plots
from bench.pages.svg import VARIABLES, default_style, fitted, inline_svg, plain
from bench.reports.schema import Report
from bench.statistics.shares import paired_drop
from compress.runs.plots import BLUE, GREEN, INK, ORANGE, VERMILION

ReportFactory = Callable[..., Report]


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report()


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with default_style():
        yield


def changed(report: Report, path: str, value: Any) -> Report:
    """Return a report with one field, named by its path, set to another value."""
    key, _, rest = path.partition(".")
    inner = changed(getattr(report, key), rest, value) if rest else value
    return report.model_copy(update={key: inner})


def named(report: Report, *others: Report) -> dict[str, Report]:
    """Return reports by name, as the page of the first one shows them."""
    return {"own": report, **{f"other {number}": each for number, each in enumerate(others, 1)}}


def plot(report: Report, key: str, others: Sequence[Report] = ()) -> Plot:
    reports = named(report, *others) if others else None
    return next(found for found in plots(report, reports) if found.key == key)


def figure(report: Report, key: str, others: Sequence[Report] = ()) -> Figure:
    (found,) = plot(report, key, others).figures
    return found


def markers(axes: Axes) -> dict[tuple[float, float], tuple[str, bool]]:
    """Return the colour of every marked point, and whether it is full."""
    return {
        (line.get_xdata()[0], line.get_ydata()[0]): (
            to_hex(line.get_color()).upper(),
            line.get_markerfacecolor() == line.get_color(),
        )
        for line in axes.lines
        if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1
    }


def texts(found: Figure) -> str:
    return " ".join(ElementTree.fromstring(inline_svg(found, "key", "label")).itertext())


# Accuracy against cost


def test_points_lie_at_the_ratios_and_changes_of_the_report(report: Report) -> None:
    gain = -report.comparison.accuracy.drop.drop_pp
    for axes, found in zip(
        figure(report, "accuracy-latency").axes, report.comparison.latency, strict=True
    ):
        assert markers(axes) == {
            (1.0, 0.0): (BLUE, False),
            (found.ratio.ratio, gain): (VERMILION, True),
        }
    (axes,) = figure(report, "accuracy-macs").axes
    assert {cost for cost, _ in markers(axes)} == {1.0, report.comparison.macs_ratio}


def test_bars_are_the_intervals_of_the_differences_from_the_reference(report: Report) -> None:
    (axes, _) = figure(report, "accuracy-latency").axes
    across, along = [c.get_segments()[0] for c in axes.collections if isinstance(c, LineCollection)]
    ratio, drop = report.comparison.latency[0].ratio, report.comparison.accuracy.drop
    assert across[:, 0] == pytest.approx([ratio.low, ratio.high])
    assert along[:, 1] == pytest.approx([-drop.high_pp, -drop.low_pp])


def test_a_point_without_a_measured_interval_has_no_bar(report: Report) -> None:
    bare = changed(report, "comparison.accuracy", None)
    (point,) = pareto.points(named(bare), None)
    assert point.gain_bar is point.cost_bar is None
    networks = report.networks
    assert point.gain == pytest.approx(100 * (networks.pruned.top1 - networks.reference.top1))
    plot(bare, "accuracy-macs")


def test_two_measurements_share_no_milliseconds(report: Report) -> None:
    """The better ratio lies further left, also where everything took longer meanwhile."""
    slow = report
    for side in ("reference", "pruned"):
        records = tuple(
            record.model_copy(
                update={"summary": replace(record.summary, median_ms=9 * record.summary.median_ms)}
            )
            for record in getattr(report.networks, side).latency
        )
        slow = changed(slow, f"networks.{side}.latency", records)
    better = tuple(
        found.model_copy(update={"ratio": replace(found.ratio, ratio=0.9 * found.ratio.ratio)})
        for found in report.comparison.latency
    )
    slow = changed(slow, "comparison.latency", better)
    own, other = pareto.points(named(report, slow), 1)
    assert other.cost == pytest.approx(0.9 * own.cost)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12))
def test_the_frontier_is_every_point_that_no_other_one_beats(pairs: list[tuple[int, int]]) -> None:
    points = [pareto.Point("", "pruned", True, cost, gain) for cost, gain in pairs]
    unbeaten = {
        (cost, gain)
        for cost, gain in pairs
        if not any(c <= cost and t >= gain and (c, t) != (cost, gain) for c, t in pairs)
    }
    found = [(p.cost, p.gain) for p in pareto.frontier(points)]
    assert found == sorted(unbeaten)


def fronts(axes: Axes) -> list[list[tuple[float, float]]]:
    """Return the corners of every line that joins points."""
    lines = (line for line in axes.lines if line.get_marker() == "None")
    return [list(zip(*line.get_data(), strict=True)) for line in lines]


def test_the_frontier_is_drawn_as_steps_to_the_edge(report: Report) -> None:
    (axes,) = figure(report, "accuracy-macs").axes
    ((*line, edge),) = fronts(axes)
    ratio, gain = report.comparison.macs_ratio, -report.comparison.accuracy.drop.drop_pp
    assert gain < 0
    assert line == [(ratio, gain), (1, gain), (1, 0)]
    assert edge == (axes.get_xlim()[1], 0)


def test_a_network_that_beats_all_others_is_joined_with_none(report: Report) -> None:
    accuracy = report.comparison.accuracy
    assert accuracy is not None
    images, half = np.arange(accuracy.drop.images), accuracy.drop.images // 2
    drop = paired_drop(images < half, images < half + 9, confidence=0.95)
    better = changed(report, "comparison.accuracy", replace(accuracy, drop=drop))
    found = plot(better, "accuracy-macs")
    assert fronts(found.figures[0].axes[0]) == []
    assert "joins" not in found.caption


@pytest.mark.parametrize(
    "changes",
    [
        {"networks.reference.onnx_sha256": "c" * 64},
        {"precision": "int8"},
        {"runtime": "torch"},
        {"target": "v100"},
    ],
)
def test_networks_of_other_references_are_not_joined(
    report: Report, changes: dict[str, Any]
) -> None:
    other = cheaper(report, 0.3)
    assert len(fronts(figure(report, "accuracy-macs", (other,)).axes[0])) == 1
    for path, value in changes.items():
        other = changed(other, path, value)
    found = plot(report, "accuracy-macs", (other,))
    assert fronts(found.figures[0].axes[0]) == []
    assert "joins" not in found.caption


def words(found: Figure) -> set[str]:
    return {text.get_text() for axes in found.axes for text in axes.texts}


def test_both_networks_are_named_in_the_plot(report: Report) -> None:
    found = figure(report, "accuracy-latency")
    assert words(found) == {"dense", "pruned"}
    assert [axes.get_title("left") for axes in found.axes] == ["batch 1", "batch 8"]
    against_run = changed(report, "against", "run")
    assert "other run" in texts(figure(against_run, "accuracy-macs"))


def cheaper(report: Report, ratio: float, **changes: Any) -> Report:
    """Return another report on the same reference, whose pruned network has so many MACs."""
    other = changed(report, "networks.pruned.macs", round(40_813_184 * ratio))
    return changed(other, "comparison.macs_ratio", ratio).model_copy(update=changes)


def test_every_report_is_named_in_the_plot(report: Report) -> None:
    others = (cheaper(report, 0.3), cheaper(report, 0.7))
    found = figure(report, "accuracy-macs", others)
    looks = sorted(markers(found.axes[0]).values())
    assert looks == sorted([(BLUE, False), (VERMILION, True), (GREEN, True), (GREEN, True)])
    assert words(found) == {"dense", "own", "other 1", "other 2"}


def test_accuracy_on_other_images_is_left_out_and_said_so(report: Report) -> None:
    other = changed(cheaper(report, 0.3), "validation.identity", "f" * 64)
    found = plot(report, "accuracy-macs", (other, cheaper(report, 0.4)))
    assert len(markers(found.figures[0].axes[0])) == 3
    assert "Left out here: 1 measured on other images." in found.caption


def test_latency_on_another_machine_is_left_out_and_said_so(report: Report) -> None:
    other = changed(cheaper(report, 0.3), "environment.cpu", "Example CPU 4000")
    found = plot(report, "accuracy-latency", (other,))
    assert len(markers(found.figures[0].axes[0])) == 2
    assert "Left out here: 1 measured on another machine." in found.caption
    assert len(markers(figure(report, "accuracy-macs", (other,)).axes[0])) == 3
    assert "Left out" not in plot(report, "accuracy-latency", (cheaper(report, 0.3),)).caption


POINTS = st.lists(
    st.tuples(st.integers(10, 100), st.integers(-300, 100)).map(lambda p: (p[0] / 100, p[1] / 100)),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(pairs=POINTS)
@example(pairs=[(0.5, -0.2)] * 4)  # of one budget, and of one accuracy
@example(pairs=[(1.0, 0.0)])  # as the reference
@example(pairs=[(0.5, -0.2), (0.5, -0.21), (0.51, -0.2)])
def test_no_words_lie_over_others_or_over_points(pairs: list[tuple[float, float]]) -> None:
    shown = tuple(
        pareto.Point(
            label=f"report {number}",
            role="pruned",
            ours=number == 0,
            cost=cost,
            gain=gain,
            gain_bar=(gain - 0.5, gain + 0.5),
        )
        for number, (cost, gain) in enumerate(pairs)
    )
    origin = pareto.Point("dense", "reference", True, 1.0, 0.0)
    found = pareto._draw_pareto({"": (origin, *shown)}, "cost", joined=True)
    found.draw_without_rendering()
    (axes,) = found.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    scale = found.dpi / 72
    for line in (line for line in axes.lines if line.get_marker() in ("o", "s")):
        x, y = axes.transData.transform(line.get_xydata()[0])
        half = scale * line.get_markersize() / 2
        point = Bbox.from_extents(x - half, y - half, x + half, y + half)
        assert point.count_overlaps(boxes) == 0


def test_points_at_one_place_are_rings_around_each_other(report: Report) -> None:
    found = figure(report, "accuracy-macs", (report, report.model_copy()))
    places: dict[Any, list[tuple[float, str]]] = {}
    for line in found.axes[0].lines:
        if line.get_marker() in ("o", "s"):
            look = (line.get_markersize(), str(line.get_markerfacecolor()))
            places.setdefault(tuple(line.get_xydata()[0]), []).append(look)
    *_, sizes = sorted(places.values(), key=len)
    assert [size for size, _ in sizes] == [7, 13, 19]
    assert [face for _, face in sizes][1:] == ["none", "none"]


# Latency


def test_curves_are_the_quantiles_of_the_report(report: Report) -> None:
    for axes, size in zip(figure(report, "latency").axes, (0, 1), strict=True):
        curves = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
        networks = (report.networks.reference, report.networks.pruned)
        for line, network, colour in zip(curves, networks, (BLUE, VERMILION), strict=True):
            summary = network.latency[size].summary
            assert to_hex(line.get_color()).upper() == colour
            assert tuple(line.get_xdata()) == summary.quantiles_ms
            assert dict(zip(line.get_ydata(), line.get_xdata(), strict=True))[100] == summary.max_ms


def test_dots_mark_the_median_and_p99(report: Report) -> None:
    (axes, _) = figure(report, "latency").axes
    dots = [list(line.get_xydata().ravel()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [
        [found.median_ms, 50, found.p99_ms, 99]
        for found in (
            report.networks.reference.latency[0].summary,
            report.networks.pruned.latency[0].summary,
        )
    ]


def test_the_legend_has_the_figures_of_both(report: Report) -> None:
    (axes, _) = figure(report, "latency").axes
    summary = report.networks.pruned.latency[0].summary
    expected = f"pruned: median {summary.median_ms:.3f} ms, p99 {summary.p99_ms:.3f} ms"
    assert expected in [text.get_text() for text in axes.get_legend().get_texts()]


def with_summary(report: Report, **figures: float) -> Report:
    """Return a report of one batch size whose pruned network has other figures of its calls."""
    (record,) = report.networks.pruned.latency
    values = {name: getattr(record.summary, name) for name in record.summary.__dataclass_fields__}
    summary = type(record.summary)(**{**values, **figures})
    return changed(
        report, "networks.pruned.latency", (record.model_copy(update={"summary": summary}),)
    )


def test_a_long_tail_does_not_squash_the_curves(sample_report: ReportFactory) -> None:
    tailed = with_summary(sample_report(batch_sizes=(1,)), max_ms=5000.0)
    found = plot(tailed, "latency")
    (axes,) = found.figures[0].axes
    slowest = tailed.networks.reference.latency[0].summary.p99_ms
    assert slowest < axes.get_xlim()[1] < 1.1 * slowest
    assert axes.get_xscale() == "linear"
    assert "5000.0 ms" in found.caption


def test_a_p99_far_out_is_shown_on_a_logarithmic_axis(sample_report: ReportFactory) -> None:
    tailed = with_summary(sample_report(batch_sizes=(1,)), p99_ms=300.0, max_ms=5000.0)
    (axes,) = figure(tailed, "latency").axes
    assert axes.get_xscale() == "log"
    assert 300 < axes.get_xlim()[1] < 400
    inline_svg(axes.figure, "key", "label")


def test_a_call_that_took_no_time_by_a_coarse_clock_can_be_drawn(
    sample_report: ReportFactory,
) -> None:
    report = with_summary(sample_report(batch_sizes=(1,)), min_ms=0.0)
    assert inline_svg(figure(report, "latency"), "k", "").startswith("<svg")


def test_the_course_is_every_block_against_the_median_of_its_network(report: Report) -> None:
    (_, axes) = figure(report, "course").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    blocks = {
        "dense": report.networks.reference.latency[1].block_medians_ms,
        "pruned": report.networks.pruned.latency[1].block_medians_ms,
        "dense again": report.comparison.latency[1].control_block_medians_ms,
    }
    for name, found in blocks.items():
        middle = sum(sorted(found)[9:11]) / 2  # of 20 rounds
        assert lines.pop(name) == pytest.approx([100 * (block / middle - 1) for block in found])
    assert not lines


# Channels


def groups(count: int) -> tuple[GroupRecord, ...]:
    return tuple(
        GroupRecord(name=f"block{i}.conv", dense=8 + i, kept=1 + i // 2, residual=i % 3 == 0)
        for i in range(count)
    )


@pytest.mark.parametrize("count", [1, 28, 29, 150])
def test_every_group_is_drawn_once_and_to_one_scale(count: int) -> None:
    found = figures.draw_channels(groups(count))
    dense, kept, colours, names = [], [], [], []
    for each in found:
        (axes,) = each.axes
        outlines, filled = axes.containers
        dense += [bar.get_width() for bar in outlines]
        kept += [bar.get_width() for bar in filled]
        colours += [to_hex(bar.get_facecolor()).upper() for bar in filled]
        names += [text.get_text() for text in axes.texts[::2]]
        assert axes.get_xlim() == (0, 7 + count)
        assert len(outlines) <= figures.MOST_ROWS
    assert dense == [group.dense for group in groups(count)]
    assert kept == [group.kept for group in groups(count)]
    assert colours == [GREEN if group.residual else VERMILION for group in groups(count)]
    assert names == [group.name for group in groups(count)]


def test_figures_side_by_side_are_of_nearly_equal_length() -> None:
    lengths = [len(each.axes[0].containers[0]) for each in figures.draw_channels(groups(53))]
    assert lengths == [27, 26]


def test_every_group_has_its_numbers_beside_it() -> None:
    (found,) = figures.draw_channels((GroupRecord(name="a", dense=2048, kept=1236),))
    assert [text.get_text() for text in found.axes[0].texts] == ["a", "1,236 of 2,048, 60 %"]


def test_a_residual_stream_is_named_in_words() -> None:
    name = "stage4.block23.shortcut.conv"
    group = GroupRecord(name=name, dense=2048, kept=1236, residual=True)
    (found,) = figures.draw_channels((group,))
    label, beside = (text.get_text() for text in found.axes[0].texts)
    assert label.endswith(name[-21:])
    assert beside == "residual, 1,236 of 2,048, 60 %"
    found.draw_without_rendering()
    left, right = (Text.get_window_extent(text) for text in found.axes[0].texts)
    assert left.x1 < right.x0


def test_the_caption_sums_the_channels(report: Report) -> None:
    found = plot(report.model_copy(update={"groups": groups(4)}), "channels")
    assert "6 of 38 channels, 15.79 %" in found.caption
    assert "residual" in found.caption
    plain_groups = tuple(g.model_copy(update={"residual": False}) for g in groups(4))
    found = plot(report.model_copy(update={"groups": plain_groups}), "channels")
    assert "residual" not in found.caption


# Layers


def layer(name: str, before: float, after: float, *, misses: bool = False) -> LayerRecord:
    return LayerRecord(
        name=name,
        kind="Conv",
        reference=LayerFigures(macs=9_000_000, milliseconds=before, channels=64),
        pruned=LayerFigures(macs=3_000_000, milliseconds=after, channels=33),
        misses_multiple=misses,
    )


def times(*layers: LayerRecord, batch_size: int = 1) -> LayerTimes:
    return LayerTimes(
        batch_size=batch_size,
        calls=20,
        multiple=8,
        reference_ms=sum(found.reference.milliseconds for found in layers if found.reference),
        pruned_ms=sum(found.pruned.milliseconds for found in layers if found.pruned),
        layers=layers,
    )


def layer_bars(found: Figure) -> tuple[list[float], list[float]]:
    """Return the lengths of the bars of both networks, row by row."""
    (axes,) = found.axes
    frames, filled = axes.containers[::2], axes.containers[1::2]
    assert all(to_hex(bar.get_facecolor()).upper() == VERMILION for (bar,) in filled)
    return [bar.get_width() for (bar,) in frames], [bar.get_width() for (bar,) in filled]


def grey(patch: Patch) -> float:
    """Return how bright the inside of a patch is without its colour, from 0 to 1."""
    return float(np.dot((0.299, 0.587, 0.114), patch.get_facecolor()[:3]))


def test_the_bars_of_a_layer_and_their_legend_are_told_apart_without_colours() -> None:
    found = figures.draw_layers(times(layer("a", 2, 1)), ("dense", "pruned"))
    (axes,), (legend,) = found.axes, found.legends
    bars = [bar for container in axes.containers for bar in container]
    for frame, filled in (bars, legend.get_patches()):
        assert grey(frame) - grey(filled) > 0.4
        assert to_hex(frame.get_edgecolor()).upper() == BLUE  # or it would not be seen on paper
        assert frame.get_linewidth() > 0
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "pruned"]


def test_a_layer_that_took_no_time_has_no_frame() -> None:
    found = figures.draw_layers(times(layer("a", 0, 2), layer("b", 1, 1)), ("dense", "pruned"))
    (frame,) = found.axes[0].containers[0]
    assert frame.get_width() == frame.get_linewidth() == 0
    inline_svg(found, "key", "label")


def test_layers_are_drawn_slowest_first() -> None:
    found = figures.draw_layers(
        times(layer("a", 1, 2), layer("b", 5, 1), layer("c", 3, 3)), ("d", "p")
    )
    assert layer_bars(found) == ([5, 3, 1], [1, 3, 2])
    assert [text.get_text() for text in found.axes[0].texts[::2]] == ["b", "c", "a"]
    assert found.axes[0].get_title("left") == "batch 1"
    assert {text.get_text() for text in found.legends[0].get_texts()} == {"d", "p"}


def test_layers_beyond_the_slowest_are_summed() -> None:
    many = times(*(layer(f"conv{i}", 150 - i, (150 - i) / 4) for i in range(150)))
    found = figures.draw_layers(many, ("dense", "pruned"))
    assert layer_bars(found)[0] == list(range(150, 125, -1))
    *_, name, sums = (text.get_text() for text in found.axes[0].texts)
    assert name == "125 others together"
    assert sums == f"{125 * 126 / 2:.1f} ms \N{RIGHTWARDS ARROW} {125 * 126 / 8:.1f} ms"


def test_layers_have_their_macs_beside_them_and_those_off_the_multiple_are_marked() -> None:
    found = figures.draw_layers(times(layer("a", 2, 2), layer("b", 1, 1, misses=True)), ("d", "p"))
    macs = "9.00 M \N{RIGHTWARDS ARROW} 3.00 M MACs"
    written = [(text.get_text(), to_hex(text.get_color()).upper()) for text in found.axes[0].texts]
    assert written == [("a", INK), (macs, INK), ("b", ORANGE), (f"not x8, {macs}", ORANGE)]


def test_a_layer_of_one_network_only_has_one_bar() -> None:
    only = layer("a", 2, 1).model_copy(update={"reference": None})
    free = LayerFigures(macs=0, milliseconds=3)
    other = LayerRecord(name="Add", kind="Add", reference=free, pruned=free, misses_multiple=False)
    found = figures.draw_layers(times(only, other), ("dense", "pruned"))
    assert layer_bars(found) == ([3, 0], [3, 1])
    assert [text.get_text() for text in found.axes[0].texts] == ["Add", "", "a", "3.00 M MACs"]


def test_every_profiled_batch_size_is_drawn_and_explained(report: Report) -> None:
    found = plot(
        report.model_copy(
            update={
                "layers": (times(layer("a", 3, 2)), times(layer("a", 9, 6), batch_size=8)),
            }
        ),
        "layers",
    )
    assert [each.axes[0].get_title("left") for each in found.figures] == ["batch 1", "batch 8"]
    assert [note.partition(":")[0] for note in found.notes] == ["Batch 1", "Batch 8"]
    assert all("MACs" in note for note in found.notes)


# What is not there


def test_plots_come_in_order_with_all_data(report: Report) -> None:
    full = report.model_copy(update={"groups": groups(3), "layers": (times(layer("a", 2, 1)),)})
    assert [found.key for found in plots(full)] == [
        *("accuracy-latency", "accuracy-macs", "latency", "course", "layers", "channels")
    ]


@pytest.mark.parametrize(
    ("path", "value", "absent"),
    [
        ("comparison.latency", (), {"accuracy-latency", "latency", "course"}),
        ("networks.pruned.top1", None, {"accuracy-latency", "accuracy-macs"}),
        ("groups", (), {"channels"}),
        ("layers", (), {"layers"}),
    ],
)
def test_what_was_not_measured_is_not_drawn(
    report: Report, path: str, value: Any, absent: set[str]
) -> None:
    full = report.model_copy(update={"groups": groups(3), "layers": (times(layer("a", 2, 1)),)})
    everything = {found.key for found in plots(full)}
    assert {found.key for found in plots(changed(full, path, value))} == everything - absent


def test_without_accuracy_nothing_is_drawn_against_it(report: Report) -> None:
    bare = report
    for path in ("networks.pruned.top1", "networks.reference.top1", "comparison.accuracy"):
        bare = changed(bare, path, None)
    assert [found.key for found in plots(bare)] == ["latency", "course"]


def test_unknown_macs_are_not_drawn(report: Report) -> None:
    bare = report
    for path in ("networks.pruned.macs", "networks.reference.macs", "comparison.macs_ratio"):
        bare = changed(bare, path, None)
    assert "accuracy-macs" not in [found.key for found in plots(bare)]


# SVG


def test_every_plot_becomes_an_svg_in_the_colours_of_the_page(report: Report) -> None:
    full = report.model_copy(update={"groups": groups(3), "layers": (times(layer("a", 2, 1)),)})
    for found in plots(full, named(report, cheaper(report, 0.3))):
        for each in found.figures:
            svg = inline_svg(each, found.key, found.caption)
            assert not re.search(r"#[0-9a-fA-F]{6}", svg)
            assert {*re.findall(r"var\(--(\w+)\)", svg)} <= {*VARIABLES.values()}
            root = ElementTree.fromstring(svg)
            assert root.get("role") == "img"
            assert root.get("aria-label") == found.caption
            assert root.get("width") is root.get("height") is None
            assert root.get("viewBox").startswith("0 0 302.4 ")


def drawn(*names: str) -> Figure:
    return figures.draw_channels([GroupRecord(name=name, dense=8, kept=4) for name in names])[0]


def test_an_svg_is_the_same_every_time() -> None:
    assert inline_svg(drawn("a", "b"), "key", "x") == inline_svg(drawn("a", "b"), "key", "x")


def test_an_svg_holds_nothing_that_reaches_beyond_it() -> None:
    svg = inline_svg(drawn("a"), "key", "x")
    assert not re.search(r"http|xmlns|<style|<metadata|<\?xml|<!DOCTYPE", svg)
    ids = re.findall(r'id="([^"]*)"', svg)
    assert ids
    assert all(name.startswith("key-") for name in ids)
    assert {*re.findall(r"#([\w.-]+)", svg)} == {*ids}


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$x_1$", r"a\$b", "&amp;", "\u5c64", "a % b", "#1"]
)
def test_names_are_written_as_they_are(name: str) -> None:
    assert name in texts(drawn(name))


def test_characters_that_no_document_can_hold_are_spelt_out() -> None:
    assert plain("a\x00b\ud800c\nd\ufffe") == r"a\x00b\ud800c\nd\ufffe"
    inline_svg(drawn("a\x00b\ud800"), "key", "x\x01").encode()


@settings(deadline=None)
@given(st.text(max_size=80), st.integers(4, 60))
def test_a_name_fits_and_keeps_its_end(name: str, most: int) -> None:
    found = fitted(name, most)
    assert len(found) <= most
    assert found == plain(name) or (found[0] == "\u2026" and plain(name).endswith(found[1:]))


def test_the_style_of_the_user_changes_nothing_and_is_put_back() -> None:
    expected = inline_svg(drawn("a"), "key", "x")
    with mpl.rc_context({"font.size": 30, "text.color": "red", "svg.fonttype": "path"}):
        with default_style():
            assert inline_svg(drawn("a"), "key", "x") == expected
        assert mpl.rcParams["font.size"] == 30
        assert mpl.rcParams["svg.fonttype"] == "path"
