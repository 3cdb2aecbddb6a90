from __future__ import annotations

import csv
import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from scipy.stats import binomtest

from bench.statistics.shares import paired_drop, tango_interval
from compress.config import Budget, load_config
from compress.runs.plots import new_figure
from compress.sweep.flips import Flips
from compress.sweep.labels import Label, place_labels
from compress.sweep.picture import draw_sweep, wilson
from compress.sweep.report import PointState, sweep_csv, sweep_document, sweep_sheet
from compress.sweep.request import Goal


def measured(share: float, top1: float) -> dict[str, Any]:
    dense = {"macs": 1000, "params": 400, "channels": 50}
    costs = {key: int(share * value) for key, value in dense.items()}
    stages = {"masked": {"top1": 10.0, "top5": 20.0}, "pruned": {"top1": 30.0, "top5": 40.0}}
    return {"dense": dense, "costs": costs, **stages, "finetuned": {"top1": top1, "top5": 99.0}}


def found_document(**changes: Any) -> dict[str, Any]:
    """Return the document of three points: one beaten, one failed."""
    budgets = [Budget(kind="macs", value=share) for share in (0.8, 0.6, 0.2)]
    points = [
        PointState("macs-0.8", budgets[0], measured(0.8, 90.0), None, 12.34, Flips(25, 5, 1000)),
        PointState("macs-0.6", budgets[1], measured(0.6, 91.5), None, 10.0),
        PointState("macs-0.2", budgets[2], None, "out of memory", 1.0),
    ]
    asked = Goal(budgets=tuple(budgets), config=load_config())
    options = {"accuracy": {"top1": 92.0, "top5": 99.5}, "points": points, **changes}
    return sweep_document(
        asked, dense_seconds=5.0, search=None, chosen=None, interval=tango_interval, **options
    )


class TestDocument:
    def test_figures_are_taken_against_the_dense_network(self) -> None:
        made = found_document()
        first, second, third = made["points"]
        assert first["flips"] == {"to_wrong": 25, "to_right": 5, "images": 1000}
        right = np.repeat([(1, 1), (1, 0), (0, 1)], (970, 25, 5), axis=0)
        paired = paired_drop(*right.T, confidence=0.95)
        assert first["drop_interval_pp"] == pytest.approx((paired.low_pp, paired.high_pp))
        assert "drop_interval_pp" not in second
        assert (first["macs_ratio"], first["params"], first["drop_pp"]) == (0.8, 320, 2.0)
        assert (first["pareto_macs"], second["pareto_macs"], second["pareto_params"]) == (
            False,
            True,
            True,
        )
        assert (third["status"], third["error"]) == ("failed", "out of memory")
        assert (made["dense"]["macs"], made["dense"]["pareto_macs"]) == (1000, True)
        assert not made["complete"]
        assert found_document(points=[])["dense"]["macs"] is None

    def test_the_csv_holds_the_same(self) -> None:
        rows = list(csv.DictReader(io.StringIO(sweep_csv(found_document()))))
        assert [row["name"] for row in rows] == ["dense", "macs-0.8", "macs-0.6", "macs-0.2"]
        assert [row["finetuned_top1"] for row in rows] == ["92.0", "90.0", "91.5", ""]
        assert [row["masked_top5"] for row in rows] == ["", "20.0", "20.0", ""]
        assert [row["macs_ratio"] for row in rows] == ["1.0", "0.8", "0.6", ""]
        assert [row["seconds"] for row in rows] == ["5.0", "12.3", "10.0", "1.0"]

    def test_the_table_says_who_is_on_the_front_and_what_failed(self) -> None:
        sheet = sweep_sheet(found_document(), Path("out"))
        assert sheet.rows == (
            ("dense", "1.00 k", "400", "92.00 %", "", "both"),
            ("macs=0.8", "800 (80.0 %)", "320 (80.0 %)", "90.00 %", "-2.00 [-3.22, -1.00] pp", ""),
            ("macs=0.6", "600 (60.0 %)", "240 (60.0 %)", "91.50 %", "-0.50 pp", "both"),
            ("macs=0.2", "-", "-", "failed", "", ""),
        )
        assert sheet.notes == ("macs=0.2 failed: out of memory",)

    def test_the_plot_shows_every_finished_network_where_it_is(self) -> None:
        figure = draw_sweep(found_document())
        for axes, dense, shares in zip(
            figure.axes, (1000, 400), ((800, 600), (320, 240)), strict=True
        ):
            drawn = {
                tuple(at) for each in axes.collections for at in np.asarray(each.get_offsets())
            }
            assert drawn == {(dense, 92.0), (shares[0], 90.0), (shares[1], 91.5)}
            (front,) = axes.lines
            line = list(zip(front.get_xdata(), front.get_ydata(), strict=True))
            assert line == [(shares[1], 91.5), (dense, 92.0)]
            names = {text.get_text() for text in axes.texts}
            assert names == {"dense", "macs=0.8", "macs=0.6"}

    def test_bars_are_the_intervals_of_so_many_images(self) -> None:
        accuracy = {"top1": 92.0, "top5": 99.5, "images": 250}
        budgets = [Budget(kind="macs", value=share) for share in (0.8, 0.6)]
        points = [
            PointState(str(budget), budget, measured(budget.value, top1), None, 1.0)
            for budget, top1 in zip(budgets, (90.0, 91.2), strict=True)
        ]
        figure = draw_sweep(found_document(accuracy=accuracy, points=points))
        for axes in figure.axes:
            ends = [
                np.asarray(each.get_segments()[0])[:, 1].tolist()
                for each in axes.collections
                if isinstance(each, LineCollection)
            ]
            for top1 in (92.0, 90.0, 91.2):
                right = binomtest(round(2.5 * top1), 250).proportion_ci(0.95, method="wilson")
                ends.remove(pytest.approx([100 * right.low, 100 * right.high]))
            assert not ends
        assert "95 % intervals, 250 images" in figure.axes[0].get_ylabel()

    @given(st.floats(0, 1), st.integers(1, 50_000))
    def test_the_interval_holds_the_share(self, share: float, count: int) -> None:
        low, high = wilson(share, count)
        assert 0 <= low <= share + 1e-12
        assert share - 1e-12 <= high <= 1

    @pytest.mark.parametrize("seed", range(3))
    def test_names_stand_clear_of_the_front_and_of_the_bars(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        shares = np.sort(random.uniform(0.1, 0.95, 6))
        top1 = 92 - 12 * (1 - shares) ** 2 + random.normal(scale=0.8, size=6)
        points = [
            PointState(
                f"macs-{share:.2f}",
                Budget(kind="macs", value=round(float(share), 2)),
                measured(float(share), float(accuracy)),
                None,
                1.0,
            )
            for share, accuracy in zip(shares, top1, strict=True)
        ]
        accuracy = {"top1": 92.0, "top5": 99.5, "images": 5000}
        figure = draw_sweep(found_document(accuracy=accuracy, points=points))
        figure.draw_without_rendering()
        for axes in figure.axes:
            lines = [line.get_path() for line in axes.lines]
            for each in axes.collections:
                lines += each.get_paths() if isinstance(each, LineCollection) else []
            boxes = [Text.get_window_extent(text) for text in axes.texts]
            assert len(boxes) == 7
            assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
            for line in lines:
                drawn = line.transformed(axes.transData)
                assert not any(drawn.intersects_bbox(box, filled=False) for box in boxes)


def timed(share: float, top1: float, **changes: Any) -> dict[str, Any]:
    """Return a point whose dense network took 2 ms beside it, and less than it was predicted."""
    latency = {"predicted_ms": 1.8 * share, "predicted_share": share, "measured_ms": 2 * share}
    latency |= {"measured_dense_ms": 2.0, "measured_share": share}
    latency |= {"measured_interval": [share - 0.02, share + 0.01]}
    return {**measured(share**2, top1), "latency": {**latency, **changes}}


def timed_document(*points: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    budgets = [Budget.model_validate(text) for text, _ in points]
    states = [
        PointState(str(budget).replace("=", "-"), budget, found, None, 1.0)
        for budget, (_, found) in zip(budgets, points, strict=True)
    ]
    asked = Goal(budgets=tuple(budgets), config=load_config())
    accuracy = {"top1": 92.0, "top5": 99.5}
    options: dict[str, Any] = {"dense_seconds": 5.0, "search": None, "chosen": None}
    options["interval"] = tango_interval
    return sweep_document(asked, accuracy=accuracy, points=states, **options)


SHARES = ("latency=0.8", timed(0.78, 90.0)), ("latency=0.6", timed(0.6, 91.5))


class TestTimes:
    def test_the_front_is_by_time_and_the_dense_network_has_one(self) -> None:
        # It was measured beside each point; the second time the machine was slow.
        slow = timed(0.6, 91.5, measured_ms=1.8, measured_dense_ms=3.0)
        made = timed_document(SHARES[0], ("latency=0.6", slow))
        dense, (first, second) = made["dense"], made["points"]
        assert dense["latency"]["measured_ms"] == 2.5
        assert dense["latency"]["predicted_ms"] == pytest.approx(1.8)
        fronts = [row["pareto_latency"] for row in (dense, first, second)]
        assert fronts == [True, False, True]
        assert (first["missed"], second["missed"]) == (False, True)  # 0.61 of 0.6

    def test_the_table_has_shares_for_shares_and_milliseconds_for_milliseconds(self) -> None:
        made = timed_document(*SHARES, ("latency=1ms", timed(0.4, 80.0)))
        sheet = sweep_sheet(made, Path("out"))
        assert sheet.rows == (
            ("dense", "1.00 k", "1.8 ms", "2 ms", "92.00 %", "", "both"),
            ("latency=0.8", "60.8 %", "78.0 %", "78.0 %", "90.00 %", "-2.00 pp", ""),
            ("latency=0.6", "36.0 %", "60.0 %", "60.0 %", "91.50 %", "-0.50 pp", "both"),
            ("latency=1ms", "16.0 %", "0.72 ms", "0.8 ms", "80.00 %", "-12.00 pp", "both"),
        )
        assert sheet.notes == (
            "latency=0.6: measured 1.2 ms, 60.0 % of the dense time (58.0 to 61.0), which misses "
            "the budget; it is finished and kept.",
        )

    def test_beside_other_costs_times_are_shown_and_costs_compared(self) -> None:
        made = timed_document(("macs=0.6", measured(0.6, 91.0)), SHARES[0])
        assert "pareto_latency" not in made["dense"]
        rows = sweep_sheet(made, Path("out")).rows
        assert rows[1] == ("macs=0.6", "60.0 %", "-", "-", "91.00 %", "-1.00 pp", "both")
        assert rows[2][:4] == ("latency=0.8", "60.8 %", "78.0 %", "78.0 %")
        assert [axes.get_xlabel() for axes in draw_sweep(made).axes] == ["MACs", "parameters"]
        header, *_ = csv.reader(io.StringIO(sweep_csv(made)))
        assert "measured_low" in header
        assert "pareto_latency" not in header

    def test_what_is_predicted_only_is_not_drawn_over_time(self) -> None:
        predicted = {"predicted_ms": 0.9, "predicted_share": 0.5}
        made = timed_document(("latency=0.5", {**measured(0.4, 91.0), "latency": predicted}))
        assert sweep_sheet(made, Path("out")).rows[1][1:4] == ("40.0 %", "50.0 %", "-")
        assert sweep_sheet(made, Path("out")).rows[0][1:4] == ("1.00 k", "1.8 ms", "-")
        assert "missed" not in made["points"][0]
        assert len(draw_sweep(made).axes) == 2

    def test_the_picture_shows_milliseconds_and_their_intervals(self) -> None:
        (axes,) = draw_sweep(timed_document(*SHARES)).axes
        assert "milliseconds" in axes.get_xlabel()
        bars = [
            np.asarray(each.get_segments()[0]).tolist()
            for each in axes.collections
            if isinstance(each, LineCollection)
        ]
        # By the front first: 0.6 of 2 ms and its interval, from 0.58 to 0.61.
        assert np.allclose(bars, [[[1.16, 91.5], [1.22, 91.5]], [[1.52, 90], [1.58, 90]]])
        (front,) = axes.lines
        drawn = list(zip(front.get_xdata(), front.get_ydata(), strict=True))
        assert np.allclose(drawn, [(1.2, 91.5), (2.0, 92.0)])
        names = {text.get_text() for text in axes.texts}
        assert names == {"dense", "latency=0.8", "latency=0.6, missed"}


def boxes_of(figure: Any) -> list[Any]:
    """Return where words lie when the figure is drawn, without the lines that lead to them."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    return [Text.get_window_extent(text) for text in axes.texts]


@pytest.mark.parametrize("seed", [0, 2])
def test_no_words_lie_over_others_or_over_points(seed: int) -> None:
    places = np.random.default_rng(seed).normal(scale=2 + 2 * seed, size=(10, 2))
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axes.scatter(*places.T)
    axes.set(xlim=(-30, 30), ylim=(-20, 20))
    labels = [
        Label(f"latency=0.{number}", tuple(at), "#222222") for number, at in enumerate(places)
    ]
    place_labels(figure, [(axes, labels)])
    boxes = boxes_of(figure)
    assert len(boxes) >= 6
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    points = axes.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_a_point_by_itself_has_its_words_right_above() -> None:
    figure = new_figure(5, 3)
    axes = figure.add_subplot()
    axes.scatter([1], [1])
    place_labels(figure, [(axes, [Label("macs=0.5", (1, 1), "#222222")])])
    (box,) = boxes_of(figure)
    x, y = axes.transData.transform((1, 1))
    assert box.x0 < x < box.x1
    assert 0 < box.y0 - y < 15
