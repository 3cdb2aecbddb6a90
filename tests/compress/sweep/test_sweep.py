from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import contents, document, files_in, full_for, invoke, refused, small
from hypothesis import given
from hypothesis import strategies as st
from sweep_stand_in import COMMAND, DENSE_TOP1, top1_of

import cli
from compress.checkpoints.checkpoint import load_checkpoint
from compress.config import Budget, load_config
from compress.data.datasets import load_data
from compress.errors import BudgetError, ConfigError, EnvironmentUnfitError, OutputError
from compress.files.documents import read_toml
from compress.runs.lock import locked
from compress.runs.prune import check_budget
from compress.sweep import processes
from compress.sweep import run as sweep_run
from compress.sweep.plan import Search, pareto_front, search_state
from compress.sweep.points import SweepFiles, name_of, point_config
from compress.sweep.processes import Ended, Slot, Task, run_tasks, slots_for
from compress.sweep.report import PointState, draw_sweep, sweep_csv, sweep_document, sweep_sheet
from compress.sweep.request import Goal, SweepRequest, split_budgets
from compress.sweep.run import least_share, run_sweep

GRID = ("--budget", "macs=0.7,0.5", "--budget", "params=0.4")
FAST = ("--set", "data.image_size=8")


class TestParetoFront:
    points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)

    @given(points)
    def test_no_point_on_the_front_is_beaten_and_every_other_is(
        self, points: list[tuple[float, float]]
    ) -> None:
        for (cost, accuracy), on_front in zip(points, pareto_front(points), strict=True):
            better = [
                (c, a)
                for c, a in points
                if c <= cost and a >= accuracy and (c < cost or a > accuracy)
            ]
            assert on_front == (not better)

    @given(points)
    def test_along_the_front_more_cost_buys_more_accuracy(
        self, points: list[tuple[float, float]]
    ) -> None:
        flags = pareto_front(points)
        front = sorted({point for point, on in zip(points, flags, strict=True) if on})
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(front))
        assert bool(front) == bool(points)


def search(**options: Any) -> Search:
    return Search.model_validate({"max_drop": 1.0, **options})


def found(asked: Search, smallest: float) -> Any:
    """Search where every share from ``smallest`` on is enough."""
    within: dict[float, bool] = {}
    while (state := search_state(asked, within)).next:
        within |= {share: share >= smallest for share in state.next}
    return state


class TestSearch:
    def test_by_hand(self) -> None:
        # Of 0.2 to 1: 0.6 is enough, 0.4 is, 0.3 is not, and 0.4 - 0.3 is the tolerance.
        state = found(search(lowest=0.2, tolerance=0.1), 0.32)
        assert state.tried == (0.6, 0.4, 0.3)
        assert (state.failed, state.passed) == (0.3, 0.4)

    @given(
        st.floats(0.05, 0.5),
        st.floats(0.0, 1.0),
        st.sampled_from([0.001, 0.01, 0.02, 0.1]),
        st.integers(1, 9),
    )
    def test_it_finds_the_smallest_share_to_its_tolerance(
        self, lowest: float, smallest: float, tolerance: float, at_once: int
    ) -> None:
        asked = search(lowest=lowest, tolerance=tolerance, at_once=at_once)
        state = found(asked, smallest)
        assert state.passed - state.failed <= tolerance + 1e-9
        assert state.passed == 1 or state.passed >= smallest
        assert state.failed == lowest or state.failed < smallest
        assert len(set(state.tried)) == len(state.tried)
        assert all(lowest < share < 1 for share in state.tried)

    @pytest.mark.parametrize(("at_once", "rounds"), [(1, 6), (3, 3), (8, 2), (44, 1)])
    def test_the_rounds_are_as_many_as_logarithms_say(self, at_once: int, rounds: int) -> None:
        # 0.9 / 0.02 = 45 intervals: 2^6, 4^3, 9^2 and 45^1 are the first powers that reach it.
        asked, within, count = search(at_once=at_once), dict[float, bool](), 0
        while (state := search_state(asked, within)).next:
            within |= {share: share >= 0.777 for share in state.next}
            count += 1
        assert count == rounds

    @given(st.data(), st.integers(1, 5), st.integers(1, 12))
    def test_of_noise_it_takes_the_smallest_share_that_was_enough(
        self, data: Any, at_once: int, points: int
    ) -> None:
        asked, within = search(at_once=at_once, points=points), dict[float, bool]()
        while (state := search_state(asked, within)).next:
            within |= {share: data.draw(st.booleans()) for share in state.next}
        good = [share for share in state.tried if within[share]]
        assert len(state.tried) <= points
        assert state.passed == min(good, default=1.0)
        assert state.failed < state.passed

    @given(st.data(), st.integers(1, 6))
    def test_a_round_stays_the_same_whatever_of_it_is_finished(
        self, data: Any, at_once: int
    ) -> None:
        asked, within = search(at_once=at_once), dict[float, bool]()
        while (state := search_state(asked, within)).next:
            share = data.draw(st.sampled_from([s for s in state.next if s not in within]))
            within[share] = data.draw(st.booleans())
            unfinished = [s for s in state.next if s not in within]
            again = search_state(asked, dict(reversed(within.items())))
            assert again.next == state.next or not unfinished
            assert again.tried[: len(state.tried)] == state.tried

    def test_a_drop_that_is_just_allowed_survives_rounding(self) -> None:
        assert search(max_drop=0.1).within(98.4, 98.3)  # 98.4 - 98.3 = 0.10000000000000853
        assert not search(max_drop=0.1).within(98.4, 98.29)


def test_a_budget_option_may_hold_several_and_needs_the_kind_once() -> None:
    options = ["macs=0.7,0.5", "params=0.4, macs=0.7 ,removed=3", "0.2"]
    names = ["macs=0.7", "macs=0.5", "params=0.4", "removed=3", "0.2"]
    assert split_budgets(options) == names
    assert name_of(Budget.model_validate("macs=0.50")) == "macs-0.5"


@pytest.mark.parametrize("name", ["digits-resnet20", "imagenet-resnet50-seed2019"])
def test_what_was_asked_for_comes_back_from_the_document(name: str) -> None:
    settings = ("data.root=/nowhere", "prune.step_size=3", "train.ema=0.9")
    config = load_config(name, settings)
    asked = Goal(search=search(), checkpoint=Path("/x/y.pth"), config=config)
    assert Goal.model_validate(json.loads(json.dumps(asked.model_dump(mode="json")))) == asked


class TestDevices:
    @pytest.fixture(autouse=True)
    def _two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_gpus", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    @pytest.mark.parametrize(
        ("devices", "configured", "jobs", "used"),
        [
            (None, "auto", None, ["cuda:0", "cuda:1"]),
            (None, "cpu", None, ["cpu"]),
            (None, "cuda", None, ["cuda:0"]),
            ("cuda:1", "cpu", None, ["cuda:1"]),
            ("cuda:1, cuda:0", "cpu", 3, ["cuda:1", "cuda:0", "cuda:1"]),
            ("auto", "cpu", 1, ["cuda:0"]),
        ],
    )
    def test_every_process_gets_one(
        self, devices: str | None, configured: str, jobs: int | None, used: list[str]
    ) -> None:
        slots = slots_for(devices, configured, jobs)
        assert [slot.device for slot in slots] == used
        for slot in slots:
            shown = "" if slot.device == "cpu" else slot.device[-1]
            assert slot.variables["CUDA_VISIBLE_DEVICES"] == shown

    def test_gpus_are_counted_among_those_that_are_visible(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3f")
        shown = [s.variables["CUDA_VISIBLE_DEVICES"] for s in slots_for("auto", "cpu", None)]
        assert shown == ["5", "GPU-3f"]

    def test_processes_on_the_cpu_share_its_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        assert [s.variables["OMP_NUM_THREADS"] for s in slots_for("cpu", "cpu", 3)] == ["2"] * 3
        assert "OMP_NUM_THREADS" not in slots_for("cpu", "cpu", 1)[0].variables
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert "OMP_NUM_THREADS" not in slots_for("cpu", "cpu", 3)[0].variables

    def test_what_is_not_there_is_refused(self) -> None:
        with pytest.raises(EnvironmentUnfitError, match="'cuda:2' cannot be used"):
            slots_for("cuda:0,cuda:2", "cpu", None)
        with pytest.raises(ConfigError, match="'gpu0' is none of"):
            slots_for("gpu0", "cpu", None)
        with pytest.raises(ConfigError, match="--jobs 0"):
            slots_for("cpu", "cpu", 0)


def measured(share: float, top1: float) -> dict[str, Any]:
    dense = {"macs": 1000, "params": 400, "channels": 50}
    costs = {key: int(share * value) for key, value in dense.items()}
    stages = {"masked": {"top1": 10.0, "top5": 20.0}, "pruned": {"top1": 30.0, "top5": 40.0}}
    return {"dense": dense, "costs": costs, **stages, "finetuned": {"top1": top1, "top5": 99.0}}


def found_document(**changes: Any) -> dict[str, Any]:
    """Return the document of three points: one beaten, one failed."""
    budgets = [Budget(kind="macs", value=share) for share in (0.8, 0.6, 0.2)]
    points = [
        PointState("macs-0.8", "macs=0.8", measured(0.8, 90.0), None, 12.34),
        PointState("macs-0.6", "macs=0.6", measured(0.6, 91.5), None, 10.0),
        PointState("macs-0.2", "macs=0.2", None, "out of memory", 1.0),
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


# Processes


def by_stand_ins(request: SweepRequest, say: Any, command: Any) -> dict[str, Any]:
    """``run_sweep`` with another command than the command line has given."""
    return run_sweep(request, say, COMMAND)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "run_sweep", by_stand_ins)
    monkeypatch.setattr(sweep_run, "check_budget", lambda *_: None)  # TestRefused has the real one


def calls(folder: Path) -> list[tuple[str, str, int]]:
    """Return what the stand-in noted: word, point and process."""
    file = folder / "calls"
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    lines = (line.split() for line in whole.splitlines())
    return [(word, name, int(pid)) for word, name, pid in lines]


def started(folder: Path, word: str = "prune") -> list[str]:
    return [name for found, name, _ in calls(folder) if found == word]


def ordered(folder: Path, *marks: str) -> Path:
    """Make a directory for a sweep in which a file tells the stand-in what to do."""
    folder.mkdir(exist_ok=True)
    for mark in marks:
        (folder / mark).touch()
    return folder


def sweep_over(folder: Path, monkeypatch: pytest.MonkeyPatch, *marks: str) -> None:
    """Have a sweep accept a directory that holds orders for the stand-in."""
    ordered(folder, *marks)
    real = SweepFiles._entries
    own = {folder / name for name in ("calls", *marks)}
    monkeypatch.setattr(SweepFiles, "_entries", lambda files: real(files) - own)


@pytest.mark.usefixtures("stand_in")
class TestSweepOfStandIns:
    def test_every_point_becomes_a_run_directory(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        result = invoke("sweep", *GRID, *FAST, "--output", folder, "--set", "seed=3", "--json")
        assert result.exit_code == 0, result.stderr
        names = ["macs-0.7", "macs-0.5", "params-0.4"]
        assert started(folder, "train") == ["dense"]
        assert started(folder) == names
        made = document(result)
        assert made == json.loads((folder / "sweep.json").read_text())
        assert made["complete"]
        assert [point["drop_pp"] for point in made["points"]] == pytest.approx([3, 5, 6])
        for name in names:
            config = read_toml(str(folder / name / "config.toml"))
            assert config["prune"]["budget"] == name.replace("-", "=")
            assert config["seed"] == 3
            dense = (folder / name / "dense.safetensors").stat()
            assert dense.st_ino == (folder / "dense" / "dense.safetensors").stat().st_ino
            event = json.loads((folder / name / "history.jsonl").read_text())
            assert (event["event"], event["top1"]) == ("dense", DENSE_TOP1)
        rows = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
        assert [row["name"] for row in rows] == ["dense", *names]
        assert (folder / "pareto.png").read_bytes()[1:4] == b"PNG"
        assert "macs=0.7: done in" in result.stderr
        assert "top-1 95.00 % (-3.00 pp)" in result.stderr
        assert not (folder / "state").exists()

    def test_where_there_are_no_hard_links_the_dense_network_is_copied(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
        folder = tmp_path / "s"
        assert invoke("sweep", "--budget", "macs=0.5", *FAST, "--output", folder).exit_code == 0
        one, other = (folder / name / "dense.safetensors" for name in ("dense", "macs-0.5"))
        assert one.read_bytes() == other.read_bytes()
        assert one.stat().st_ino != other.stat().st_ino

    def test_a_failed_point_stops_no_other_and_is_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "s"
        sweep_over(folder, monkeypatch, "fail-macs-0.5")
        result = invoke("sweep", *GRID, *FAST, "--output", folder)
        assert result.exit_code == 1
        said = result.stderr.splitlines()[-1]
        assert said.startswith("error: 1 of 3 points failed, macs=0.5: their logs are")
        assert f"{folder / 'macs-0.5'}.log; go on with --resume --output {folder}" in said
        assert "macs=0.5: failed: it went wrong" in result.stderr
        assert started(folder) == ["macs-0.7", "macs-0.5", "params-0.4"]
        status = [p["status"] for p in json.loads((folder / "sweep.json").read_text())["points"]]
        assert status == ["done", "failed", "done"]

        (folder / "fail-macs-0.5").unlink()
        finished = folder / "macs-0.7" / "pruned.safetensors"
        before = (finished.stat().st_ino, finished.stat().st_mtime_ns)
        result = invoke("sweep", "--resume", "--output", folder, "--json")
        assert result.exit_code == 0, result.stderr
        assert started(folder)[3:] == ["macs-0.5"]
        assert started(folder, "train") == ["dense"]
        assert document(result)["complete"]
        assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == before
        assert "macs=0.7: done before, top-1 95.00 %" in result.stderr

    def test_a_sweep_that_is_complete_starts_nothing_again(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        first = invoke("sweep", *GRID, *FAST, "--output", folder, "--json")
        held = calls(folder)
        again = invoke("sweep", "--resume", "--output", folder, "--json")
        assert document(again) == document(first)
        assert calls(folder) == held

    def test_a_scheduler_that_starts_the_command_again_goes_on_with_the_sweep(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "s"
        sweep_over(folder, monkeypatch, "fail-macs-0.5")
        command = ("sweep", *GRID, *FAST, "--output", folder)
        assert invoke(*command).exit_code == 1
        (folder / "fail-macs-0.5").unlink()
        refused(*command, code=2, says="is not empty: use --resume to go on")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        refused(*command, "--set", "seed=9", code=2, says="is not empty: use --resume to go on")
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
        assert f"started again: going on with the sweep in {folder}" in result.stderr
        assert started(folder) == ["macs-0.7", "macs-0.5", "params-0.4", "macs-0.5"]

    def test_a_search_is_taken_up_again_though_its_start_had_to_be_found_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("sweep", "--max-drop", "5", "--tolerance", "0.2", *FAST)
        command = (*command, "--output", tmp_path / "s")
        result = invoke(*command, "--jobs", "2", "--json")
        assert document(result)["asked"]["search"]["lowest"] > 0.1
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert document(invoke(*command, "--json")) == document(result)

    def test_points_run_side_by_side(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "s"
        sweep_over(folder, monkeypatch, "pair")  # each waits for the other
        result = invoke(
            "sweep", *FAST, "--budget", "macs=0.7,0.5", "--output", folder, "--jobs", "2"
        )
        assert result.exit_code == 0, result.stderr

    def test_one_job_runs_one_point_at_a_time(self, tmp_path: Path) -> None:
        invoke("sweep", *GRID, *FAST, "--output", tmp_path / "s", "--jobs", "1")
        words = [word for word, _, _ in calls(tmp_path / "s")]
        assert words == ["train", "end", *["prune", "end"] * 3]

    def test_when_the_dense_network_fails_nothing_is_pruned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "s"
        sweep_over(folder, monkeypatch, "fail-dense")
        arguments = ("sweep", *GRID, *FAST, "--output", folder)
        refused(*arguments, code=1, says="the dense network was not trained: it went wrong")
        assert started(folder) == []
        (folder / "fail-dense").unlink()
        assert invoke("sweep", "--resume", "--output", folder).exit_code == 0

    def test_a_search_ends_at_the_smallest_network_within_the_drop(self, tmp_path: Path) -> None:
        # The stand-in drops by 10 (1 - share): within 4 pp means a share of 0.6.
        folder = tmp_path / "s"
        options = ("--max-drop", "4", "--tolerance", "0.05", "--kind", "params")
        result = invoke("sweep", *options, "--lowest", "0.4", *FAST, "--output", folder)
        assert result.exit_code == 0, result.stderr
        made = json.loads((folder / "sweep.json").read_text())
        name = made["chosen"]
        share = float(name.removeprefix("params-"))
        assert 0.6 <= share <= 0.65
        assert top1_of(share) >= DENSE_TOP1 - 4
        assert [f"params-{tried:g}" for tried in made["search"]["tried"]] == started(folder)
        assert f"within 4 pp of the dense one: params={share:g}, in" in result.stdout.replace(
            "\n", " "
        )

    def test_a_search_that_was_cut_off_goes_on_with_the_same_points(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = ("--max-drop", "4", "--tolerance", "0.05", "--lowest", "0.4", *FAST)
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        invoke("sweep", *options, "--output", whole)
        second = started(whole)[1]
        sweep_over(cut, monkeypatch, f"fail-{second}")
        assert invoke("sweep", *options, "--output", cut).exit_code == 1
        assert started(cut) == started(whole)[:2]
        (cut / f"fail-{second}").unlink()
        result = invoke("sweep", "--resume", "--output", cut, "--jobs", "3", "--json")
        assert result.exit_code == 0, result.stderr
        assert started(cut) == [started(whole)[0], *started(whole)[1:2] * 2, *started(whole)[2:]]
        assert (
            document(result)["chosen"] == json.loads((whole / "sweep.json").read_text())["chosen"]
        )

    def test_a_search_that_finds_nothing_says_what_came_closest(self, tmp_path: Path) -> None:
        options = ("--max-drop", "0", "--points", "2", "--lowest", "0.4")
        result = invoke("sweep", *options, *FAST, "--output", tmp_path / "s", "--json")
        assert result.exit_code == 1
        assert document(result)["chosen"] is None
        assert document(result)["complete"]
        says = "no pruned network stays within 0 pp of the dense one: the closest, macs=0.85, "
        assert says + "drops by 1.50 pp" in result.stderr

    def test_overwrite_removes_what_sweeps_write_and_nothing_else(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        invoke("sweep", *GRID, *FAST, "--output", folder)
        (folder / "notes.txt").write_text("mine")
        (folder / "macs-0.5" / "notes.txt").write_text("mine")
        new = ("sweep", "--budget", "macs=0.6", *FAST, "--output", folder)
        refused(*new, code=2, says="is not empty: use --resume to go on")
        assert invoke(*new, "--overwrite").exit_code == 0
        held = {name for name in files_in(folder) if not name.startswith(("dense", "macs-0.6"))}
        assert held == {"notes.txt", "macs-0.5/notes.txt", "calls", "pareto.png"} | {
            "sweep.json",
            "sweep.csv",
        }

    def test_a_full_disk_at_the_start_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full_for(monkeypatch, "compress.files.atomic", ".csv")
        arguments = ("sweep", *GRID, *FAST, "--output", tmp_path / "s")
        refused(*arguments, code=1, says="sweep.csv: the disk is full")
        assert not (tmp_path / "s").exists()


class TestRunTasks:
    slots = (Slot("cpu"), Slot("cpu"))

    def test_an_error_here_stops_the_processes_that_run(
        self, tmp_path: Path, stand_in: None
    ) -> None:
        """The first ends while the second waits; what is done with the first then fails."""
        quick, slow = ordered(tmp_path / "a"), ordered(tmp_path / "b", "slow")
        tasks = [
            Task("x", ("train", "--resume", "--output", str(quick / "x")), tmp_path / "x.log"),
            Task("y", ("prune", "--resume", "--output", str(slow / "y")), tmp_path / "y.log"),
        ]
        (quick / "x").mkdir()

        def fail(end: Ended) -> None:
            until(lambda: started(slow))
            raise OutputError("no room for the table")

        with pytest.raises(OutputError, match="no room"):
            run_tasks(tasks, self.slots, command=COMMAND, started=lambda *_: None, ended=fail)
        assert [word for word, _, _ in calls(slow)] == ["prune", "told", "saved"]

    def test_a_process_that_says_nothing_is_described(self, tmp_path: Path) -> None:
        command = (sys.executable, "-c", "import os, sys; exec(sys.argv[1])")
        programs = ["os.kill(os.getpid(), 9)", "sys.exit(3)", "1 / 0", "print('error: a\\nb')"]
        ends: dict[str, Ended] = {}
        tasks = [Task(p, (p,), tmp_path / f"{i}.log") for i, p in enumerate(programs)]
        tasks[1].log.write_text("error: of an earlier start\n")
        assert run_tasks(
            tasks,
            self.slots,
            command=command,
            started=lambda *_: None,
            ended=lambda end: ends.update({end.task.name: end}),
        )
        assert [ends[p].words for p in programs[:3]] == [
            "ended by SIGKILL",
            "exit code 3, without a word",
            "ZeroDivisionError: division by zero",
        ]
        assert [ends[p].code for p in programs] == [-9, 3, 1, 0]

    def test_a_process_imports_what_this_one_does_and_not_what_lies_in_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cli.py").write_text("raise SystemExit('the wrong cli')")
        task = Task("v", ("--version",), tmp_path / "v.log")
        ends: list[Ended] = []
        command = (sys.executable, cli.__file__)
        assert run_tasks(
            [task], self.slots, command=command, started=lambda *_: None, ended=ends.append
        )
        assert ends[0].code == 0, task.log.read_text()
        assert task.log.read_text().startswith("compress ")


def until(holds: Any) -> None:
    """Wait for something that must come."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that finds the modules of the tests."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_ctrl_c_is_sent_on_and_the_sweep_goes_on_where_it_stopped(
    tmp_path: Path, stand_in: None
) -> None:
    folder = ordered(tmp_path / "s", "slow")
    program = (
        "import cli, sweep_stand_in; "
        "from compress.sweep import points, run; real_run = run.run_sweep; "
        "run.run_sweep = lambda *given, **_: real_run(*given, sweep_stand_in.COMMAND); "
        "real = points.SweepFiles._entries; "
        "points.SweepFiles._entries = lambda f: real(f) - {f.path / 'slow', f.path / 'calls'}; "
        "cli.main()"
    )
    budgets = ("--budget", "macs=0.7,0.5,0.3", "--jobs", "2")
    process = python(program, "sweep", *budgets, *FAST, "--output", folder)
    until(lambda: len(started(folder)) == 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (130, ""), stderr
    assert stderr.splitlines()[-1] == (
        f"error: stopped; all states are saved, go on with --resume --output {folder}"
    )
    assert "Traceback" not in stderr
    assert sorted(started(folder, "saved")) == ["macs-0.5", "macs-0.7"]
    assert len(started(folder, "told")) == 2
    assert all(gone(pid) for _, _, pid in calls(folder))
    status = [p["status"] for p in json.loads((folder / "sweep.json").read_text())["points"]]
    assert status == ["unfinished"] * 3

    (folder / "slow").unlink()
    result = invoke("sweep", "--resume", "--output", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert document(result)["complete"]
    assert started(folder, "train") == ["dense"]


def tasks_process(folder: Path, mark: str) -> subprocess.Popen[str]:
    """Start a process that runs two tasks of the stand-in, which never end by themselves."""
    program = (
        "import sys; from pathlib import Path; import sweep_stand_in; "
        "from compress.sweep.processes import Slot, Task, run_tasks; folder = Path(sys.argv[1]); "
        "tasks = [Task(n, ('prune', '--resume', '--output', str(folder / n)), "
        "folder / f'{n}.log') for n in 'xy']; "
        "nothing = lambda *_: None; slots = [Slot('cpu'), Slot('cpu')]; "
        "command = sweep_stand_in.COMMAND; "
        "sys.exit(not run_tasks(tasks, slots, command=command, started=nothing, ended=nothing))"
    )
    process = python(program, ordered(folder, mark))
    until(lambda: len(started(folder)) == 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


class TestNoProcessIsLeftBehind:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, -9)])
    def test_by_a_sweep_that_is_ended(self, tmp_path: Path, number: int, code: int) -> None:
        folder = tmp_path / "s"
        process = tasks_process(folder, "slow")
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == code, stderr
        until(lambda: all(gone(pid) for _, _, pid in calls(folder)))
        assert sorted(started(folder, "saved")) == ["x", "y"]

    def test_when_they_do_not_stop_the_third_ctrl_c_kills_them(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        process = tasks_process(folder, "stubborn")
        for count in (2, 4):
            process.send_signal(signal.SIGINT)
            until(lambda count=count: len(started(folder, "told")) == count)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 1, stderr
        assert all(gone(pid) for _, _, pid in calls(folder))


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            ((), 2, "compress sweep needs --budget macs=0.7,0.5,0.3 for a grid, or --max-drop"),
            ((*GRID, "--max-drop", "1"), 2, "one of both"),
            ((*GRID, "--kind", "macs"), 2, "--kind, --lowest, --tolerance and --points belong"),
            (("--budget", "macs"), 2, "a budget is written KIND=VALUE"),
            (("--budget", "macs=half"), 2, "budgets.0.value = 'half'"),
            (("--budget", "mac=0.5"), 2, "'macs', 'params', 'channels' or 'removed'"),
            (("--max-drop", "-1"), 2, "search.max_drop = -1.0"),
            (("--max-drop", "nan"), 2, "search.max_drop"),
            (("--max-drop", "1", "--kind", "removed"), 2, "search.kind = 'removed'"),
            (("--max-drop", "1", "--lowest", "1"), 2, "search.lowest = 1.0"),
            (("--max-drop", "1", "--lowest", "0.9", "--tolerance", "0.2"), 2, "nothing to search"),
            (("--max-drop", "1", "--lowest", "0.001"), 1, "macs=0.001 cannot be reached"),
            ((*GRID, "--budget", "macs=0.001"), 1, "the budget macs=0.001 cannot be reached"),
            ((*GRID, "--resume"), 2, "--resume goes on with what the sweep was asked for"),
            (("--resume",), 2, "holds no sweep.json: nothing to resume"),
            (("--resume", "--overwrite"), 2, "exclude each other"),
            ((*GRID, "--devices", "cuda:99"), 5, "'cuda:99' cannot be used here"),
            ((*GRID, "--devices", "tpu"), 2, "'tpu' is none of auto, cpu"),
            ((*GRID, "--jobs", "0"), 2, "--jobs 0: give 1 or more"),
            ((*GRID, "--data", "/nowhere"), 1, "/nowhere does not exist"),
            ((*GRID, "--checkpoint", "/nowhere.pth"), 1, "/nowhere.pth"),
            ((*GRID, "--config", "digits-resnet2"), 2, "did you mean 'digits-resnet20'?"),
        ],
    )
    def test_before_a_file_is_written(
        self, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
    ) -> None:
        refused("sweep", *arguments, *(() if "--resume" in arguments else FAST), "--output",
                tmp_path / "s", code=code, says=says)  # fmt: skip
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize("kind", ["macs", "params", "channels"])
    def test_a_search_starts_no_lower_than_the_network_can_reach(self, kind: str) -> None:
        config = load_config(settings=FAST[1:])
        data = load_data(config.data)
        least = least_share(config, data, kind)
        assert 0 < least < 0.5
        check_budget(point_config(config, Budget.model_validate(f"{kind}={least}")), data)
        below = point_config(config, Budget.model_validate(f"{kind}={least - 0.01}"))
        with pytest.raises(BudgetError, match=f"closest is {kind}={least:.4f}"):
            check_budget(below, data)

    def test_directories_that_are_none_of_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").touch()
        new = ("sweep", *GRID, *FAST, "--output")
        refused(*new, tmp_path / "file", code=2, says="is a file, not a directory")
        refused(*new, tmp_path / "full", code=2, says="is not empty")
        refused(*new, tmp_path / "full", "--overwrite", code=2, says="leaves it alone")
        inside = ("--checkpoint", tmp_path / "full" / "mine.txt")
        refused(*new, tmp_path / "full", *inside, "--overwrite", code=2, says="leaves it alone")

    def test_a_directory_where_another_sweep_works(self, tmp_path: Path, stand_in: None) -> None:
        folder = tmp_path / "s"
        assert invoke("sweep", *GRID, *FAST, "--output", folder).exit_code == 0
        held = contents(folder)
        with locked(SweepFiles(folder).lock):
            refused("sweep", "--resume", "--output", folder, code=2, says="in use by another")
            refused("sweep", *GRID, *FAST, "--output", folder, "--overwrite", code=2, says="in use")
        assert contents(folder) == held

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("{", "is damaged: start anew with --overwrite"),
            ("[1]", "is damaged"),
            ('{"schema_version": 2, "asked": {}}', "is of schema version 2 and this tool reads 1"),
            ('{"schema_version": 1, "asked": {"config": {"sed": 1}}}', "unknown key 'config.sed'"),
        ],
    )
    def test_a_document_that_cannot_be_understood(
        self, tmp_path: Path, text: str, says: str
    ) -> None:
        (tmp_path / "sweep.json").write_text(text)
        refused("sweep", "--resume", "--output", tmp_path, code=2, says=says)


def test_a_point_is_what_compress_prune_would_have_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)  # as in the processes: the order of sums changes their last bits
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = (*small(device="cpu"), "--set", "tensorboard=false")
    common = ("--checkpoint", run / "dense.safetensors", *settings)
    alone, folder = tmp_path / "alone", tmp_path / "s"
    result = invoke("prune", "--budget", "macs=0.5", "--output", alone, *common)
    assert result.exit_code == 0, result.stderr

    budgets = ("--budget", "macs=0.5,channels=0.4", "--devices", "cpu")
    result = invoke("sweep", *budgets, "--output", folder, *common, "--json")
    assert result.exit_code == 0, result.stderr
    point, made = folder / "macs-0.5", document(result)
    assert files_in(point) == files_in(alone)
    ours, theirs = (
        safetensors.torch.load_file(made_by / "pruned.safetensors") for made_by in (point, alone)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found = load_checkpoint(point / "pruned.safetensors")
    row = made["points"][0]
    assert (row["macs"], row["params"]) == (found.costs["macs"], found.costs["params"])
    assert row["macs_ratio"] <= 0.5
    assert made["points"][1]["channels_ratio"] <= 0.4
    assert made["dense"]["macs"] > row["macs"]
    assert all(row["seconds"] > 0 for row in (made["dense"], *made["points"]))
