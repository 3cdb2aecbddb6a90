from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from commands import contents, document, files_in, full_for, invoke, refused, small
from sweep_stand_in import DENSE_TOP1, top1_of
from sweeps import calls, gone, install, ordered, ordered_no_longer, started, until
from typer.testing import Result

from bench.statistics.shares import paired_drop
from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description
from compress.checkpoints.permission import Permission
from compress.config import Budget, load_config
from compress.data.batches import eval_batches
from compress.data.datasets import load_data
from compress.errors import BudgetError
from compress.files.documents import read_toml
from compress.runs.dense import fresh_network
from compress.runs.lock import locked
from compress.runs.prune import check_budget
from compress.runs.rundirectory import RunDirectory
from compress.sweep import run as sweep_run
from compress.sweep.picture import plot_sweep
from compress.sweep.plan import Search
from compress.sweep.points import SweepFiles, name_of, point_config
from compress.sweep.request import Goal, split_budgets
from compress.sweep.run import least_share

GRID = ("--budget", "macs=0.7,0.5", "--budget", "params=0.4")
FAST = ("--set", "data.image_size=8")
OWN = "own_network_of_the_sweep:build"
SMALL = ("--model", OWN)


def test_a_budget_option_may_hold_several_and_needs_the_kind_once() -> None:
    options = ["macs=0.7,0.5", "params=0.4, macs=0.7 ,removed=3", "0.2"]
    names = ["macs=0.7", "macs=0.5", "params=0.4", "removed=3", "0.2"]
    assert split_budgets(options) == names
    assert name_of(Budget.model_validate("macs=0.50")) == "macs-0.5"


@pytest.mark.parametrize("name", ["digits-resnet20", "imagenet-resnet50-seed2019"])
def test_what_was_asked_for_comes_back_from_the_document(name: str) -> None:
    settings = ("data.root=/nowhere", "prune.step_size=3", "train.ema=0.9")
    config = load_config(name, settings)
    asked = Goal(search=Search(max_drop=1.0), checkpoint=Path("/x/y.pth"), config=config)
    assert Goal.model_validate(json.loads(json.dumps(asked.model_dump(mode="json")))) == asked


# Sweeps of stand-ins


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


class Grid(NamedTuple):
    """A sweep of stand-ins that is complete; read only."""

    folder: Path
    result: Result


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    folder = tmp_path_factory.mktemp("grid") / "s"
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr("compress.sweep.sweep.plot_sweep", plot_sweep)
        options = ("--set", "seed=3", "--jobs", "1", "--json")
        return Grid(folder, invoke("sweep", *GRID, *FAST, "--output", folder, *options))


@pytest.fixture
def complete(grid: Grid, tmp_path: Path) -> Path:
    """A copy of that sweep, to be changed."""
    return Path(shutil.copytree(grid.folder, tmp_path / "s"))


@pytest.mark.usefixtures("stand_in")
class TestSweepOfStandIns:
    def test_every_point_becomes_a_run_directory(self, grid: Grid) -> None:
        folder, result = grid
        assert result.exit_code == 0, result.stderr
        names = ["macs-0.7", "macs-0.5", "params-0.4"]
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
        ordered(folder, "fail-macs-0.5")
        result = invoke("sweep", *GRID, *FAST, "--output", folder)
        assert result.exit_code == 1
        said = result.stderr.splitlines()[-1]
        assert said.startswith("error: 1 of 3 points failed, macs=0.5: their logs are")
        assert f"{folder / 'macs-0.5'}.log; go on with --resume --output {folder}" in said
        assert "macs=0.5: failed: it went wrong" in result.stderr
        assert started(folder) == ["macs-0.7", "macs-0.5", "params-0.4"]
        status = [p["status"] for p in json.loads((folder / "sweep.json").read_text())["points"]]
        assert status == ["done", "failed", "done"]

        ordered_no_longer(folder, "fail-macs-0.5")
        finished = folder / "macs-0.7" / "pruned.safetensors"
        before = (finished.stat().st_ino, finished.stat().st_mtime_ns)
        result = invoke("sweep", "--resume", "--output", folder, "--json")
        assert result.exit_code == 0, result.stderr
        assert started(folder)[3:] == ["macs-0.5"]
        assert started(folder, "train") == ["dense"]
        assert document(result)["complete"]
        assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == before
        assert "macs=0.7: done before, top-1 95.00 %" in result.stderr

    def test_a_sweep_that_is_complete_starts_nothing_again(
        self, grid: Grid, complete: Path
    ) -> None:
        again = invoke("sweep", "--resume", "--output", complete, "--json")
        assert document(again) == document(grid.result)
        assert calls(complete) == []

    def test_the_same_command_goes_on_with_the_sweep_whoever_gives_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        ordered(folder, "fail-macs-0.5")
        command = ("sweep", *GRID, *FAST, "--output", folder)
        assert invoke(*command).exit_code == 1
        ordered_no_longer(folder, "fail-macs-0.5")
        refused(*command, "--set", "seed=9", code=2, says="is not empty: use --resume to go on")
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
        assert f"started again: going on with the sweep in {folder}" in result.stderr
        assert started(folder) == ["macs-0.7", "macs-0.5", "params-0.4", "macs-0.5"]

    def test_a_search_is_taken_up_again_though_its_start_had_to_be_found_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = iter([0.3])  # TestRefused has the real one
        monkeypatch.setattr(sweep_run, "least_share", lambda *_: next(found))
        command = ("sweep", "--max-drop", "5", "--tolerance", "0.2", *FAST)
        command = (*command, "--output", tmp_path / "s")
        result = invoke(*command, "--jobs", "2", "--json")
        assert document(result)["asked"]["search"]["lowest"] == 0.3
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert document(invoke(*command, "--json")) == document(result)

    def test_points_run_side_by_side(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "s"
        ordered(folder, "pair")  # each waits for the other
        result = invoke(
            "sweep", *FAST, "--budget", "macs=0.7,0.5", "--output", folder, "--jobs", "2"
        )
        assert result.exit_code == 0, result.stderr

    def test_one_job_runs_one_point_at_a_time(self, grid: Grid) -> None:
        words = [word for word, _, _ in calls(grid.folder)]
        assert words == ["train", "end", *["prune", "end"] * 3]
        assert started(grid.folder, "train") == ["dense"]
        assert started(grid.folder) == ["macs-0.7", "macs-0.5", "params-0.4"]

    def test_when_the_dense_network_fails_nothing_is_pruned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "s"
        ordered(folder, "fail-dense")
        arguments = ("sweep", *GRID, *FAST, "--output", folder)
        refused(*arguments, code=1, says="the dense network was not trained: it went wrong")
        assert started(folder) == []
        ordered_no_longer(folder, "fail-dense")
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
        ordered(cut, f"fail-{second}")
        assert invoke("sweep", *options, "--output", cut).exit_code == 1
        assert started(cut) == started(whole)[:2]
        ordered_no_longer(cut, f"fail-{second}")
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
        says = "no pruned network stays within 0 pp of the dense one; the closest is macs=0.85. "
        says += "It drops by 1.50 pp, 95 % interval 0.91 to 2.46 pp on the same 1000 images."
        assert says in result.stderr

    def test_overwrite_removes_what_sweeps_write_and_nothing_else(self, complete: Path) -> None:
        folder = complete
        assert (folder / "pareto.png").exists()
        (folder / "notes.txt").write_text("mine")
        (folder / "macs-0.5" / "notes.txt").write_text("mine")
        new = ("sweep", "--budget", "macs=0.6", *FAST, "--output", folder)
        refused(*new, code=2, says="is not empty: use --resume to go on")
        assert invoke(*new, "--overwrite").exit_code == 0
        held = {name for name in files_in(folder) if not name.startswith(("dense", "macs-0.6"))}
        assert held == {"notes.txt", "macs-0.5/notes.txt", "sweep.json", "sweep.csv"}

    def test_a_full_disk_at_the_start_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full_for(monkeypatch, "compress.files.atomic", ".csv")
        arguments = ("sweep", *GRID, *FAST, "--output", tmp_path / "s")
        refused(*arguments, code=1, says="sweep.csv: the disk is full")
        assert not (tmp_path / "s").exists()


def test_ctrl_c_is_sent_on_and_the_sweep_goes_on_where_it_stopped(
    tmp_path: Path, stand_in: None
) -> None:
    folder = ordered(tmp_path / "s", "slow")
    budgets = ("--budget", "macs=0.7,0.5,0.3", "--jobs", "2")

    def press() -> None:
        until(lambda: len(started(folder)) == 2)
        signal.raise_signal(signal.SIGINT)  # Python's handlers run in the main thread

    pressing = threading.Thread(target=press)
    pressing.start()
    result = invoke("sweep", *budgets, *FAST, "--output", folder)
    pressing.join()
    assert (result.exit_code, result.stdout) == (130, ""), result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"error: stopped; all states are saved, go on with --resume --output {folder}"
    )
    assert sorted(started(folder, "saved")) == ["macs-0.5", "macs-0.7"]
    assert len(started(folder, "told")) == 2
    assert all(gone(pid) for _, _, pid in calls(folder))
    status = [p["status"] for p in json.loads((folder / "sweep.json").read_text())["points"]]
    assert status == ["unfinished"] * 3

    ordered_no_longer(folder, "slow")
    result = invoke("sweep", "--resume", "--output", folder, "--json")
    assert result.exit_code == 0, result.stderr
    assert document(result)["complete"]
    assert started(folder, "train") == ["dense"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a ResNet-8, which lies in the folder that this process and its own are in."""
    (tmp_path / "own_network_of_the_sweep.py").write_text(
        "from compress.networks.architectures import CifarResNet\n"
        "def build(num_classes, in_channels):\n"
        "    return CifarResNet(8, num_classes, in_channels)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return OWN


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            ((), 2, "compress sweep needs --budget macs=0.7,0.5,0.3 for a grid, or --max-drop"),
            ((*GRID, "--max-drop", "1"), 2, "one of both"),
            ((*GRID, "--kind", "macs"), 2, "--kind, --lowest, --tolerance and --points belong"),
            (("--budget", "macs"), 2, "a budget is written KIND=VALUE"),
            (("--budget", "macs=half"), 2, "the value of a budget is a number, as in macs=0.5"),
            (("--budget", "mac=0.5"), 2, "'macs', 'params', 'channels', 'removed' or 'latency'"),
            (("--max-drop", "-1"), 2, "--max-drop -1.0"),
            (("--max-drop", "nan"), 2, "--max-drop nan"),
            (("--max-drop", "1", "--kind", "removed"), 2, "--kind 'removed'"),
            (("--budget", "latency=4.2"), 2, "or milliseconds, as latency=4.2ms"),
            (("--budget", "latency=0.5,macs=0.5", "--set", "prune.step_size=9"), 2, "step_size"),
            (("--max-drop", "1", "--lowest", "1"), 2, "--lowest 1.0"),
            (("--max-drop", "1", "--lowest", "0.9", "--tolerance", "0.2"), 2, "nothing to search"),
            ((*SMALL, "--max-drop", "1", "--lowest", "0.001"), 1, "macs=0.001 cannot be reached"),
            ((*SMALL, "--budget", "macs=0.5,0.001"), 1, "the budget macs=0.001 cannot be reached"),
            ((*GRID, "--resume"), 2, "--resume goes on with what the sweep was asked for"),
            (("--resume",), 2, "holds no sweep.json: nothing to resume"),
            (("--resume", "--overwrite"), 2, "exclude each other"),
            ((*GRID, "--devices", "cuda:99"), 5, "'cuda:99' cannot be used here"),
            ((*GRID, "--devices", "tpu"), 2, "'tpu' is none of auto, cpu"),
            ((*GRID, "--jobs", "0"), 2, "--jobs 0: give 1 or more"),
            ((*GRID, "--data", "/nowhere"), 1, "/nowhere does not exist"),
            ((*SMALL, "--budget", "macs=0.5", "--checkpoint", "/nowhere.pth"), 1, "/nowhere.pth"),
            ((*GRID, "--config", "digits-resnet2"), 2, "did you mean 'digits-resnet20'?"),
        ],
    )
    def test_before_a_file_is_written(
        self, own: str, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
    ) -> None:
        refused("sweep", *arguments, *(() if "--resume" in arguments else FAST), "--output",
                tmp_path / "s", code=code, says=says)  # fmt: skip
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize("kind", ["macs", "params", "channels", "latency"])
    def test_a_search_starts_no_lower_than_the_network_can_reach(self, own: str, kind: str) -> None:
        table = ("prune.latency_table=v100",) if kind == "latency" else ()
        config = load_config(settings=(FAST[1], f"model.name={own}", *table))
        data = load_data(config.data)
        least = least_share(config, data, kind)
        assert 0 < least < 0.5
        check_budget(point_config(config, Budget.model_validate(f"{kind}={least}")), data)
        below = point_config(config, Budget.model_validate(f"{kind}={least - 0.01}"))
        with pytest.raises(BudgetError, match=rf"(closest|which) is {kind}={least:.4f}"):
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

    def test_a_directory_where_another_sweep_works(self, complete: Path, stand_in: None) -> None:
        held = contents(complete)
        with locked(SweepFiles(complete).lock):
            refused("sweep", "--resume", "--output", complete, code=2, says="in use by another")
            anew = ("sweep", *GRID, *FAST, "--output", complete, "--overwrite")
            refused(*anew, code=2, says="in use")
        assert contents(complete) == held

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


@pytest.mark.usefixtures("stand_in")
def test_a_name_in_a_document_leads_nowhere_else(complete: Path) -> None:
    """It was the folder that the sweep lies in: a run there lost its files."""
    above = RunDirectory(complete.parent)
    above.config.write_text("seed = 1\n")
    document = json.loads((complete / "sweep.json").read_text())
    for point, name in zip(document["points"], ("..", "", "../s"), strict=True):
        point["name"] = name
    (complete / "sweep.json").write_text(json.dumps(document))
    result = invoke("sweep", *GRID, *FAST, "--output", complete, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert above.config.read_text() == "seed = 1\n"


@pytest.mark.slow
def test_a_point_is_what_compress_prune_would_have_made(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes run the real command, and import the network from where this one runs."""
    torch.set_num_threads(1)  # as in the processes: the order of sums changes their last bits
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = (*small(device="cpu"), "--set", "tensorboard=false")
    dense = tmp_path / "dense.safetensors"
    config = load_config(settings=(FAST[1], f"model.name={own}"))
    data = load_data(config.data)
    model = fresh_network(config, data)
    save_checkpoint(dense, model, description=Description.of(config.model, data, {}))
    common = ("--checkpoint", dense, "--model", own, *settings)
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
    found = load_checkpoint(point / "pruned.safetensors", Permission(config.model))
    row = made["points"][0]
    assert (row["macs"], row["params"]) == (found.costs["macs"], found.costs["params"])
    assert row["macs_ratio"] <= 0.5
    assert made["points"][1]["channels_ratio"] <= 0.4
    assert made["dense"]["macs"] > row["macs"]
    assert all(row["seconds"] > 0 for row in (made["dense"], *made["points"]))
    images, labels = next(eval_batches(data.val, batch_size=len(data.val))).to("cpu")
    right = [
        load_checkpoint(file, Permission(config.model)).model.eval()(images).argmax(1) == labels
        for file in (dense, point / "pruned.safetensors")
    ]
    paired = paired_drop(*right, confidence=0.95)
    assert paired.flips_to_wrong > 0
    assert row["flips"] == {
        "to_wrong": paired.flips_to_wrong,
        "to_right": paired.flips_to_right,
        "images": len(labels),
    }
    assert row["drop_pp"] == pytest.approx(paired.drop_pp)
    assert row["drop_interval_pp"] == pytest.approx([paired.low_pp, paired.high_pp])
