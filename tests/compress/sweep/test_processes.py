from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_stand_in import COMMAND
from sweeps import calls, gone, ordered, python, started, until

import cli
from compress.errors import ConfigError, EnvironmentUnfitError, OutputError
from compress.sweep import processes
from compress.sweep.processes import Ended, Slot, Task, run_tasks, slots_for


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


class TestRunTasks:
    slots = (Slot("cpu"), Slot("cpu"))

    def test_an_error_here_stops_the_processes_that_run(self, tmp_path: Path) -> None:
        """The first ends while the second waits; what is done with the first then fails."""
        quick, slow = ordered(tmp_path / "a"), ordered(tmp_path / "b", "slow")
        tasks = [
            Task("x", ("train", "--resume", "--output", str(quick / "x")), tmp_path / "x.log"),
            Task("y", ("prune", "--resume", "--output", str(slow / "y")), tmp_path / "y.log"),
        ]
        (quick / "x").mkdir(parents=True)

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
    folder.mkdir()
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
