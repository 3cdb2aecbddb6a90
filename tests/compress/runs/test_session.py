from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.config import RunConfig
from compress.errors import CheckpointError, ConfigError, InterruptedRunError, OutputError
from compress.runs import session as session_module
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import State


def state_of(step: int, phase: str = "train") -> State:
    return State(phase, {"step": step}, {"weight": torch.full((3, 2), float(step))})


def filled(path: Path) -> RunDirectory:
    """Return a run directory with every file of a run, and some of somebody else's."""
    run = RunDirectory(path)
    run.begin(RunConfig(seed=5))
    run.export.mkdir()
    run.state.parent.mkdir()
    curves = run.tensorboard / "train" / "events.out.tfevents.0000000000"
    curves.parent.mkdir(parents=True)
    own = (run.dense, run.pruned, run.history, run.report, run.report.with_suffix(".md"))
    drawn = (curves, run.pruning_plot, run.history_plot)
    for file in (*own, *drawn, run.export / "pruned.onnx", run.state, path / "notes.txt"):
        file.write_text("kept")
    (path / "figures").mkdir()
    (path / "figures" / "plot.png").write_text("kept")
    return run


def everything_under(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


# The directory


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_empty_or_absent_is_taken(tmp_path: Path, overwrite: bool) -> None:
    RunDirectory(tmp_path).check_new(overwrite=overwrite)
    RunDirectory(tmp_path / "absent").check_new(overwrite=overwrite)
    assert not (tmp_path / "absent").exists()


def test_a_directory_that_holds_anything_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    with pytest.raises(ConfigError, match="is not empty: use --resume to go on, --overwrite"):
        RunDirectory(tmp_path).check_new(overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="file is a file, not a directory"):
        RunDirectory(tmp_path / "file").check_new(overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "kept"


def test_overwrite_is_for_runs_only(tmp_path: Path) -> None:
    """A folder ``export`` in somebody's project is not the run's to remove."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "exporter.py").write_text("kept")
    with pytest.raises(ConfigError, match="holds no run, so --overwrite leaves it alone"):
        RunDirectory(tmp_path).check_new(overwrite=True)
    assert everything_under(tmp_path) == {"export/exporter.py": b"kept"}


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = filled(tmp_path)
    run.check_new(overwrite=True)
    run.begin(RunConfig(seed=6))
    assert set(everything_under(tmp_path)) == {"config.toml", "notes.txt", "figures/plot.png"}
    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert not run.export.exists()
    assert not run.tensorboard.exists()
    assert run.saved_config() == RunConfig(seed=6)


def test_a_run_knows_its_configuration(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"seed": 3, "prune": {"budget": "removed=17"}, "finetune": {"ema": 0.5}}
    )
    run = RunDirectory(tmp_path / "deep" / "run")
    run.begin(config)
    assert run.saved_config() == config


def test_resuming_where_no_run_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory: it holds no config\.toml"):
        RunDirectory(tmp_path).saved_config()


def test_a_directory_with_nothing_done_in_it_is_discarded(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.discard_if_bare()  # absent: nothing to do
    run.begin(RunConfig())
    run.discard_if_bare()
    assert not run.path.exists()


@pytest.mark.parametrize("name", ["history.jsonl", "notes.txt", "dense.safetensors"])
def test_a_directory_with_something_in_it_is_not_discarded(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(RunConfig())
    (run.path / name).touch()
    run.discard_if_bare()
    assert {f.name for f in run.path.iterdir()} == {"config.toml", name}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permission denied"):
        RunDirectory(tmp_path / "run").begin(RunConfig())


# History and state


def test_history_is_one_json_object_a_line(tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    session.record("epoch", loss=0.25, widths={"a": 3})
    session.record("done", name="two\nlines")
    lines = session.run.history.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event": "epoch", "loss": 0.25, "widths": {"a": 3}},
        {"event": "done", "name": "two\nlines"},
    ]


def test_history_is_read_back(tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    assert session.run.events() == []
    session.record("epoch", loss=0.25, widths={"a": 3})
    with session.run.history.open("a") as stream:
        stream.write('{"event": "cut o')
    assert session.run.events() == [{"event": "epoch", "loss": 0.25, "widths": {"a": 3}}]


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "float": torch.tensor([0.1, -0.0, float("inf"), 1e-45]),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "strided": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(7),
    }
    facts = {"step": 3, "metrics": {"top1": 0.1 + 0.2, "none": None}}
    Session(RunDirectory(tmp_path)).save(State("prune", facts, tensors))
    loaded = Session(RunDirectory(tmp_path)).load("prune")
    assert loaded is not None
    assert (loaded.phase, loaded.facts) == ("prune", facts)
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert str(loaded.tensors["float"][1].item()) == "-0.0"


def test_state_is_of_one_phase(tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    assert session.load("train") is None
    session.save(state_of(1, "prune"))
    assert session.load("finetune") is None
    assert session.load("prune") is not None
    session.finish()
    session.finish()  # twice does no harm
    assert session.load("prune") is None


def test_history_is_cut_to_the_state(tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    session.record("a")
    session.record("b")
    session.save(state_of(2))
    session.record("c")
    resumed = Session(RunDirectory(tmp_path))
    assert resumed.load("train") is not None
    resumed.record("d")
    resumed.save(state_of(3))
    again = Session(RunDirectory(tmp_path))
    assert again.load("train") is not None
    events = [json.loads(line)["event"] for line in again.run.history.read_text().splitlines()]
    assert events == ["a", "b", "d"]


def test_a_phase_that_begins_anew_keeps_the_history_of_those_before(tmp_path: Path) -> None:
    """Killed between two phases: there is no state, and the lines of the first must not count."""
    first = Session(RunDirectory(tmp_path))
    first.record("trained")
    first.finish()
    second = Session(RunDirectory(tmp_path))
    assert second.load("prune") is None
    second.record("pruned")
    second.save(state_of(1, "prune"))
    second.record("lost")
    third = Session(RunDirectory(tmp_path))
    assert third.load("finetune") is None
    assert third.load("prune") is not None
    events = [json.loads(line)["event"] for line in third.run.history.read_text().splitlines()]
    assert events == ["trained", "pruned"]


def test_a_line_that_a_full_disk_cut_off_is_dropped(tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    session.record("a")
    with session.run.history.open("a") as stream:
        stream.write('{"event": "b", "lo')
    resumed = Session(RunDirectory(tmp_path))
    assert resumed.load("train") is None
    resumed.record("c")
    events = [json.loads(line)["event"] for line in session.run.history.read_text().splitlines()]
    assert events == ["a", "c"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"not safetensors at all",
        lambda data: data.replace(b"step", b'"\\\\"'),
    ],
    ids=["half", "last byte", "empty", "text", "header"],
)
def test_damaged_state_says_what_to_do(tmp_path: Path, damage: object) -> None:
    session = Session(RunDirectory(tmp_path))
    session.record("a")
    session.save(state_of(1))
    session.run.state.write_bytes(damage(session.run.state.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="is damaged: start anew with --overwrite"):
        Session(RunDirectory(tmp_path)).load("train")
    assert session.run.history.read_text() == '{"event": "a"}\n'


def test_safetensors_of_somebody_else_are_no_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    run = RunDirectory(tmp_path)
    run.state.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, run.state)
    with pytest.raises(CheckpointError, match="is damaged"):
        Session(run).load("train")


def test_a_full_disk_keeps_the_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(RunDirectory(tmp_path))
    session.save(state_of(1))
    before = everything_under(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full; what was there before is kept"):
        session.save(state_of(2))
    monkeypatch.undo()
    assert everything_under(tmp_path) == before
    loaded = session.load("train")
    assert loaded is not None
    assert loaded.facts == {"step": 1}


def test_a_history_that_cannot_be_written(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.history.mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*history\.jsonl"):
        Session(run).record("a")


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(session_module.time, "monotonic", lambda: self.now)


def begun(path: Path, **save: object) -> Session:
    run = RunDirectory(path)
    run.begin(RunConfig.model_validate({"save": save, "tensorboard": False}))
    return Session(run)


def saved_after(session: Session, steps: int, clock: Clock, seconds: float) -> list[int]:
    """Take steps of so many seconds; return those after which the state was saved."""
    saved: list[int] = []

    def snapshot(step: int) -> State:
        saved.append(step)
        return state_of(step)

    for step in range(1, steps + 1):
        clock.now += seconds
        session.after_step(partial(snapshot, step))
    return saved


@pytest.mark.parametrize(
    ("save", "seconds", "expected"),
    [
        ({}, 1.0, []),
        ({}, 25.0, [3, 6]),  # 75 s are over the minute
        ({"every_seconds": 10.0}, 5.0, [2, 4, 6, 8]),
        ({"every_steps": 3}, 1.0, [3, 6]),
        ({"every_steps": 1}, 0.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"every_steps": 3, "every_seconds": 2.0}, 1.0, [2, 4, 6, 8]),
        ({"every_steps": 3, "every_seconds": 5.0}, 1.0, [3, 6]),  # a save begins both counts anew
    ],
)
def test_state_is_saved_when_it_is_due(
    save: dict[str, object],
    seconds: float,
    expected: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    session = begun(tmp_path, **save)
    assert saved_after(session, 8, clock, seconds) == expected
    assert session.run.state.is_file() == bool(expected)


def test_a_write_that_takes_long_is_not_followed_by_the_next_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk a run must not do nothing but save."""
    clock = Clock(monkeypatch)
    session = begun(tmp_path, every_seconds=10.0)
    flush = os.fsync

    def slow(descriptor: int) -> None:
        clock.now += 100.0
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    assert saved_after(session, 8, clock, 5.0) == [2, 4, 6, 8]


def test_a_signal_during_a_save_is_neither_lost_nor_cuts_the_save_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begun(tmp_path, every_steps=2)
    flush, signals = os.fsync, [signal.SIGTERM]

    def slow(descriptor: int) -> None:
        if signals:
            os.kill(os.getpid(), signals.pop())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    taken = list[int]()

    def work() -> None:
        with session.interruptible():
            for step in range(1, 9):
                taken.append(step)
                session.after_step(lambda: state_of(taken[-1]))

    with pytest.raises(InterruptedRunError):
        work()
    assert taken == [1, 2, 3]  # asked while step 2 was saved; the step after it is saved as well
    loaded = Session(RunDirectory(tmp_path)).load("train")
    assert loaded is not None
    assert loaded.facts == {"step": 3}


def test_a_signal_between_two_looks_is_answered_with_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message promises, "the state is saved", must be of this very step."""
    session = begun(tmp_path)

    class Late(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    session.stop = Late()
    session.after_step(lambda: state_of(1))
    with pytest.raises(InterruptedRunError):
        session.after_step(lambda: state_of(2))
    loaded = Session(RunDirectory(tmp_path)).load("train")
    assert loaded is not None
    assert loaded.facts == {"step": 2}


# What a kill leaves behind


def events_in(run: RunDirectory) -> list[str]:
    return [event["event"] for event in run.events()]


def test_killed_before_the_first_save_the_attempt_is_forgotten(tmp_path: Path) -> None:
    first = Session(RunDirectory(tmp_path))
    first.record("epoch", phase="train", epoch=1)
    first.record("epoch", phase="train", epoch=2)
    second = Session(RunDirectory(tmp_path))
    assert second.load("train") is None
    second.record("epoch", phase="train", epoch=1)
    assert second.run.events() == [{"event": "epoch", "phase": "train", "epoch": 1}]


def test_complete_phases_stay_when_a_later_one_is_forgotten(tmp_path: Path) -> None:
    first = Session(RunDirectory(tmp_path))
    for event in ("dense", "prune_step", "shrink", "prune_pause", "prune_end", "pruned"):
        first.record(event)
    first.record("epoch", phase="train", epoch=1)
    first.record("epoch", phase="finetune", epoch=1)
    first.record("of a phase to come", phase="deploy")
    first.record("of no phase")
    first.record("finetuned")
    second = Session(RunDirectory(tmp_path))
    assert second.load("finetune") is None
    assert "finetuned" not in events_in(second.run)
    assert len(events_in(second.run)) == 9
    assert second.load("prune") is None
    assert events_in(second.run) == ["dense", "epoch", "of a phase to come", "of no phase"]
    assert second.load("train") is None
    assert events_in(second.run) == ["of a phase to come", "of no phase"]


def test_a_state_of_the_phase_before_does_not_bring_its_lines_back(tmp_path: Path) -> None:
    """Killed between the end of dense training and the removal of its state."""
    first = Session(RunDirectory(tmp_path))
    first.record("epoch", phase="train", epoch=1)
    first.save(state_of(3))
    first.record("epoch", phase="train", epoch=2)
    first.record("prune_step", step=2)
    second = Session(RunDirectory(tmp_path))
    assert second.load("finetune") is None
    assert second.load("prune") is None
    assert [event["epoch"] for event in second.run.events()] == [1, 2]


def test_the_lines_that_a_state_counts_are_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, flush, order = Session(RunDirectory(tmp_path)), os.fsync, list[str]()
    session.record("a")

    def flushed(descriptor: int) -> None:
        here = {path.stat().st_ino: path.name for path in tmp_path.rglob("*")}
        order.append(here.get(os.fstat(descriptor).st_ino, ""))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    session.save(state_of(1))
    assert order[:2] == ["history.jsonl", f".state.{os.getpid()}.safetensors"]


@pytest.mark.parametrize("line", [b"no JSON\n", b"[1]\n", b'{"step": 1}\n', b"\0\0\n", b"\xff\n"])
def test_a_history_that_is_none(line: bytes, tmp_path: Path) -> None:
    session = Session(RunDirectory(tmp_path))
    session.record("a")
    with session.run.history.open("ab") as stream:
        stream.write(line)
    for look in (lambda: Session(session.run).load("train"), session.run.events):
        with pytest.raises(CheckpointError, match=r"history\.jsonl (holds a line|cannot be read)"):
            look()


STRAYS = (
    ".config.17.toml",
    ".dense.4194304.safetensors",
    ".pruned.1.safetensors",
    ".history.9.jsonl",
    ".history.9.png",
    ".report.5.html",
    "state/.state.1.safetensors",
    "state/.previous.1.safetensors",
    "export/.dense.fp16.12.onnx",
    "export/.timing_cache.12",
    "export/.building.12/dense.engine",
)
NOT_OURS = (
    ".notes.2024.txt",
    ".dense.backup.safetensors",
    "dense.17.safetensors",
    ".config.toml",
    "figures/.config.17.toml",
    "export/model.12.onnx",
    "export/below/.dense.12.onnx",
)


def littered(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.begin(RunConfig())
    for name in (*STRAYS, *NOT_OURS):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("half")
    return run


def test_temporary_files_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    run = littered(tmp_path)
    Session(run).mend(locked=True)
    assert set(everything_under(tmp_path)) == {"config.toml", *NOT_OURS}


def test_without_locks_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    """A young one may be of a process on another host, where its number says nothing."""
    run = littered(tmp_path)
    old = tmp_path / ".dense.4194304.safetensors"
    os.utime(old, (0, 0))
    Session(run).mend(locked=False)
    assert set(everything_under(tmp_path)) == {"config.toml", *STRAYS, *NOT_OURS} - {old.name}


def test_a_folder_that_is_a_link_is_not_cleaned(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".a.1.onnx").write_text("kept")
    run = RunDirectory(tmp_path / "run")
    run.begin(RunConfig())
    run.export.symlink_to(elsewhere)
    Session(run).mend(locked=True)
    assert (elsewhere / ".a.1.onnx").read_text() == "kept"


@pytest.mark.parametrize(
    ("results", "phase", "stays"),
    [
        ((), "train", True),
        (("dense",), "train", False),
        (("dense",), "prune", True),
        (("dense",), "finetune", True),
        (("dense", "pruned"), "finetune", False),
    ],
)
def test_the_state_of_a_phase_whose_result_is_there_is_removed(
    results: tuple[str, ...], phase: str, stays: bool, tmp_path: Path
) -> None:
    session = begun(tmp_path)
    session.save(state_of(1, phase))
    session.save(state_of(2, phase))
    for name in results:
        (tmp_path / f"{name}.safetensors").touch()
    Session(session.run).mend(locked=True)
    assert session.run.state.exists() == session.run.previous_state.exists() == stays


@pytest.mark.parametrize("left", [(), ("state/lock",), (".config.9.toml", "state/lock")])
def test_what_a_start_left_that_was_killed_at_once_is_no_run(
    left: tuple[str, ...], tmp_path: Path
) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    RunDirectory(tmp_path).check_new(overwrite=False)
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state" / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        RunDirectory(tmp_path).check_new(overwrite=False)


@pytest.mark.parametrize("done", range(9))
def test_killed_while_an_earlier_run_is_overwritten_a_result_never_outlives_its_parent(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = filled(tmp_path)
    unlink, removed = Path.unlink, list[Path]()

    def killed(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == done:
            raise MemoryError
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(MemoryError):
        run.begin(RunConfig(seed=6))
    assert run.pruned.exists() >= run.report.exists()
    assert run.dense.exists() >= run.pruned.exists()
    assert run.history.exists() >= run.dense.exists()
    monkeypatch.setattr(Path, "unlink", unlink)
    assert run.saved_config().seed == 6  # it is the new run from its first moment on
    Session(run).mend(locked=True)
    assert set(everything_under(tmp_path)) == {"config.toml", "notes.txt", "figures/plot.png"}


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_moment_of_its_beginning_a_run_is_whole_or_the_earlier_one(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on files is the last one once; the network is that of the configuration."""
    for last in count():
        run = filled(tmp_path / str(last)) if earlier else RunDirectory(tmp_path / str(last))
        run.lock.parent.mkdir(parents=True, exist_ok=True)
        run.lock.touch()
        before = everything_under(run.path)
        run.imported.write_text("the new network")
        done = [0]
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "replace"), (os, "link"), (Path, "unlink"), (os, "fsync")):
                patch.setattr(owner, name, _until(getattr(owner, name), last, done))
            try:
                run.begin(RunConfig(seed=6))
            except MemoryError:
                pass
            else:
                break
        begun = run.is_begun and run.saved_config().seed == 6
        if not (begun or earlier) or (begun and not run.config.is_file()):
            run.check_new(overwrite=False)  # another command may take it
        run.settle()
        run.remove_strays(locked=True)
        if not begun:
            assert everything_under(run.path) == before
            continue
        assert run.saved_config().seed == 6
        assert run.dense.read_text() == "the new network"
        others = {"notes.txt", "figures/plot.png"} if earlier else set()
        found = set(everything_under(run.path)) - others
        assert found == {"config.toml", "dense.safetensors", "state/lock"}
    assert last > 5


def _until(operation: Callable[..., Any], last: int, done: list[int]) -> Callable[..., Any]:
    """Return an operation that is not done once the process is dead."""

    def tried(*arguments: Any, **options: Any) -> Any:
        if done[0] >= last:
            raise MemoryError
        done[0] += 1
        return operation(*arguments, **options)

    return tried


def test_a_state_that_does_not_fit_names_itself(tmp_path: Path) -> None:
    session = begun(tmp_path)
    with (
        pytest.raises(
            CheckpointError, match=r"state\.safetensors does not fit the run: start anew"
        ),
        session.taking_up(),
    ):
        {}["step"]


# Ctrl-C


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    session, before = Session(RunDirectory(tmp_path)), handlers()

    def work() -> None:
        with session.interruptible():
            session.after_step(lambda: state_of(1))
            os.kill(os.getpid(), number)
            finished.append("the step")
            session.after_step(lambda: state_of(2))
            finished.append("too much")

    finished: list[str] = []
    with pytest.raises(InterruptedRunError) as caught:
        work()
    assert finished == ["the step"]
    assert f"go on with --resume --output {tmp_path}" in str(caught.value)
    assert caught.value.exit_code == 130
    loaded = Session(RunDirectory(tmp_path)).load("train")
    assert loaded is not None
    assert loaded.facts == {"step": 2}
    assert handlers() == before


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A process that a shell started in the background ignores Ctrl-C."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    session, before = Session(RunDirectory(tmp_path)), handlers()

    def work() -> None:
        with session.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
            assert session.stop.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it came too late")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert handlers() == before
    assert not session.run.state.exists()


def test_handlers_come_back_without_a_signal_and_after_an_error(tmp_path: Path) -> None:
    before = handlers()
    session = Session(RunDirectory(tmp_path))
    with session.interruptible():
        assert handlers() != before
    assert handlers() == before
    with pytest.raises(OSError, match="elsewhere"), session.interruptible():
        raise OSError("elsewhere")
    assert handlers() == before


def test_a_thread_leaves_the_handlers_alone(tmp_path: Path) -> None:
    before, seen = handlers(), []

    def work() -> None:
        with Session(RunDirectory(tmp_path)).interruptible():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
