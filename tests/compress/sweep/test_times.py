"""Sweeps whose budgets are times: stand-ins measure, or times are computed."""

from __future__ import annotations

import csv
import io
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import document, files_in, invoke, refused, small
from sweep_stand_in import DENSE_MS, time_of
from sweeps import calls, install, ordered, ordered_no_longer, started, until

import cli
from compress.config import Budget, RunConfig, load_config
from compress.data.batches import ImageData
from compress.errors import BudgetError
from compress.files.documents import read_toml
from compress.sweep import run as sweep_run
from compress.sweep.times import needs_table, profile_words

FAST = ("--set", "data.image_size=8")
TIMES = ("sweep", "--budget", "latency=0.7,0.5", *FAST)
NAME = "onnxruntime-cpu-fp32-b1-t1.json"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def test_the_table_is_the_one_that_runs_look_for_and_its_command_is_accepted(
    tmp_path: Path,
) -> None:
    settings = ("prune.latency_runtime=torch-cpu", "prune.latency_batch=8")
    config = load_config(settings=(*settings, "prune.latency_threads=2"))
    words = profile_words(config, tmp_path / "config.toml", tmp_path / "table.json")
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    told = group.commands["profile"].make_context("profile", list(words[1:])).params
    assert told["config"] == str(tmp_path / "config.toml")
    assert (told["runtime"], told["batch"], told["threads"]) == ("torch-cpu", 8, 2)


@pytest.mark.usefixtures("stand_in")
class TestSweepOfTimes:
    def test_one_table_is_measured_first_and_serves_all_points(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        result = invoke(*TIMES, "--output", folder, "--jobs", "2", "--json")
        assert result.exit_code == 0, result.stderr
        words = [word for word, _, _ in calls(folder)]
        assert words[:4] == ["profile", "end", "train", "end"]
        assert words.count("profile") == 1
        for name in ("latency-0.7", "latency-0.5"):
            prune = read_toml(str(folder / name / "config.toml"))["prune"]
            assert prune["latency_cache"] == str(folder / "latency")
            assert "latency_table" not in prune  # it would hold on another machine too
        assert f"the dense network takes {DENSE_MS:g} ms" in result.stderr
        assert "measured 1.36 ms, 68.0 % of the dense time (67.0 to 69.0)" in result.stderr
        made = document(result)
        assert [point["latency"] for point in made["points"]] == [time_of(0.68), time_of(0.48)]
        assert made["dense"]["latency"]["measured_ms"] == DENSE_MS
        rows = list(csv.DictReader(io.StringIO((folder / "sweep.csv").read_text())))
        assert [float(row["measured_ms"]) for row in rows] == [2, 1.36, 0.96]
        assert [row["measured_high"] for row in rows] == ["", "0.69", "0.49"]
        assert [row["pareto_latency"] for row in rows] == ["True"] * 3
        assert [row["missed"] for row in rows] == ["", "False", "False"]

    def test_a_point_that_misses_its_budget_stops_no_other_and_is_kept(
        self, tmp_path: Path
    ) -> None:
        folder = ordered(tmp_path / "s", "miss-latency-0.7")
        result = invoke(*TIMES, "--output", folder, "--json")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == (
            "error: 1 of 2 budgets of time are missed (latency=0.7: measured 1.6 ms, 80.0 % of the "
            "dense time (79.0 to 81.0), which misses the budget); all networks are finished and "
            "kept"
        )
        made = document(result)
        assert made["complete"]
        assert [row["status"] for row in made["points"]] == ["done", "done"]
        assert [row["missed"] for row in made["points"]] == [True, False]
        again = invoke("sweep", "--resume", "--output", folder)
        assert again.exit_code == 1
        assert "latency=0.7: measured 1.6 ms" in again.stdout.replace("\n", " ")
        assert started(folder) == ["latency-0.7", "latency-0.5"]
        assert started(folder, "profile") == [NAME]

    def test_a_search_takes_a_budget_that_is_missed_for_too_small(self, tmp_path: Path) -> None:
        # The stand-in drops by 10 (1 - share): 0.4 would be accurate enough.
        folder = ordered(tmp_path / "s", "miss-latency-0.4")
        search = ("--max-drop", "6", "--kind", "latency", "--lowest", "0.2", "--tolerance", "0.2")
        result = invoke("sweep", *search, *FAST, "--output", folder, "--json")
        assert result.exit_code == 0, result.stderr
        assert started(folder) == ["latency-0.6", "latency-0.4"]
        assert document(result)["chosen"] == "latency-0.6"

    def test_what_the_table_says_cannot_be_reached_is_refused_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def check(config: RunConfig, data: ImageData) -> None:
            table, budget = config.prune.latency_table, config.prune.budget
            if table is not None and budget.value < 0.6:
                assert json.loads(table.read_text())["dense"]["ms"] == DENSE_MS
                raise BudgetError(f"the budget {budget} cannot be reached")

        monkeypatch.setattr(sweep_run, "check_budget", check)
        folder = tmp_path / "s"
        refused(*TIMES, "--output", folder, code=1, says="latency=0.5 cannot be reached")
        assert started(folder, "train") == []
        assert {name.partition("/")[0] for name in files_in(folder)} == {"latency"}
        result = invoke("sweep", "--budget", "latency=0.7", *FAST, "--output", folder)
        assert result.exit_code == 0, result.stderr  # the table is in nobody's way

    def test_a_search_starts_no_lower_than_the_table_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def least(config: RunConfig, data: ImageData, kind: str) -> float:
            return 0.0 if config.prune.latency_table is None else 0.35

        monkeypatch.setattr(sweep_run, "least_share", least)
        search = ("--max-drop", "5", "--kind", "latency", "--tolerance", "0.4")
        result = invoke("sweep", *search, *FAST, "--output", tmp_path / "s", "--json")
        asked = document(result)["asked"]
        assert asked["search"]["lowest"] == 0.35
        assert asked["config"]["prune"]["latency_table"] is None

    def test_without_a_table_nothing_is_trained(self, tmp_path: Path) -> None:
        folder = ordered(tmp_path / "s", f"fail-{NAME}")
        says = f"no latency table was measured: it went wrong; the log is {folder}/latency/"
        refused(*TIMES, "--output", folder, code=1, says=says)
        assert started(folder, "train") == []

    def test_after_ctrl_c_in_the_table_the_same_command_goes_on(self, tmp_path: Path) -> None:
        folder = ordered(tmp_path / "s", "slow")

        def press() -> None:
            until(lambda: bool(started(folder, "profile")))
            signal.raise_signal(signal.SIGINT)  # Python's handlers run in the main thread

        pressing = threading.Thread(target=press)
        pressing.start()
        result = invoke(*TIMES, "--output", folder)
        pressing.join()
        assert result.exit_code == 130, result.stderr
        assert result.stderr.splitlines()[-1].endswith("and the same command goes on")
        assert started(folder, "saved") == [NAME]
        assert started(folder, "train") == []
        ordered_no_longer(folder, "slow")
        assert invoke(*TIMES, "--output", folder).exit_code == 0


@pytest.mark.parametrize(
    ("budgets", "search", "settings", "needs"),
    [
        (["macs=0.5", "latency=0.5"], None, (), True),
        (["macs=0.5", "latency=2ms"], None, ("prune.latency_table=v100",), False),
        (["macs=0.5"], None, ("prune.budget=latency=0.5",), False),
        ([], {"max_drop": 1, "kind": "latency"}, (), True),
        ([], {"max_drop": 1}, (), False),
    ],
)
def test_a_table_is_measured_where_a_budget_is_a_time(
    budgets: list[str], search: Any, settings: tuple[str, ...], needs: bool
) -> None:
    asked = {"budgets": budgets, "search": search, "config": load_config(settings=settings)}
    assert needs_table(sweep_run.Goal.model_validate(asked)) is needs


CLOCKLESS = """
from bench.stopwatch import RuntimeStopwatch
from compress.latency.stopwatch import Comparison
from compress.networks.architectures import CifarResNet
from compress.networks.capture import Example
from compress.networks.cost import measured
from export.latency import building
from export.latency.rounds import Measured
import torch

def time_of(network, size):
    example = Example((torch.zeros(1, *size),))
    return 0.1 + measured(network, example)["macs"] / 4e6

def measure_ms(networks, serving, effort=None, *, seed=0, told=None):
    return Measured(tuple(time_of(n.model, n.input_size) for n in networks), 0.0)

def compare(self, dense, pruned, size):
    times = [time_of(network, size) for network in (dense, pruned)]
    ratio = times[1] / times[0]
    return Comparison(*times, ratio, 0.99 * ratio, 1.01 * ratio)

building.measure_ms = measure_ms
RuntimeStopwatch.compare = compare

def build(num_classes, in_channels):
    return CifarResNet(8, num_classes, in_channels)
"""
"""A network of the user's own, with which every process computes times: no noise moves them."""


@pytest.mark.slow
def test_a_budget_of_time_is_planned_measured_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes run the real commands; what they would measure is computed."""
    (tmp_path / "own_network_in_time.py").write_text(CLOCKLESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = (*small(data_image_size="32", device="cpu"), "--set", "tensorboard=false")
    own = ("--model", "own_network_in_time:build", *settings)
    options = ("--budget", "latency=0.6", "--output", "s", "--json")
    result = invoke("sweep", *own, *options)
    assert result.exit_code == 0, result.stderr
    made = document(result)
    (row,) = made["points"]
    times = row["latency"]
    dense, pruned = (0.1 + macs / 4e6 for macs in (made["dense"]["macs"], row["macs"]))
    assert times["measured_ms"] == pytest.approx(pruned, abs=1e-4)
    assert times["measured_share"] == pytest.approx(pruned / dense, abs=1e-5)
    assert times["measured_interval"] == pytest.approx(
        [0.99 * pruned / dense, 1.01 * pruned / dense], abs=1e-5
    )
    assert 0.5 < times["measured_interval"][1] <= 0.6
    assert not row["missed"]
    table = json.loads((tmp_path / "s" / "latency" / NAME).read_text())
    assert table["dense"]["ms"] == pytest.approx(dense, abs=1e-4)
    assert made["dense"]["latency"]["predicted_ms"] == pytest.approx(dense, rel=0.01)
    assert Budget.model_validate(row["budget"]).value == 0.6
    below = (*own, "--budget", "latency=0.01", "--output", "s", "--overwrite")
    refused("sweep", *below, code=1, says="the budget latency=0.01 cannot be reached")
    assert (tmp_path / "s" / "sweep.json").is_file()
