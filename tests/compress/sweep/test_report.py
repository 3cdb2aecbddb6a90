from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from compress.config import Budget, load_config
from compress.sweep.picture import draw_sweep
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
        PointState("macs-0.8", budgets[0], measured(0.8, 90.0), None, 12.34),
        PointState("macs-0.6", budgets[1], measured(0.6, 91.5), None, 10.0),
        PointState("macs-0.2", budgets[2], None, "out of memory", 1.0),
    ]
    asked = Goal(budgets=tuple(budgets), config=load_config())
    options = {"accuracy": {"top1": 92.0, "top5": 99.5}, "points": points, **changes}
    return sweep_document(asked, dense_seconds=5.0, search=None, chosen=None, **options)


class TestDocument:
    def test_figures_are_taken_against_the_dense_network(self) -> None:
        made = found_document()
        first, second, third = made["points"]
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
            ("macs=0.8", "800 (80.0 %)", "320 (80.0 %)", "90.00 %", "-2.00 pp", ""),
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
