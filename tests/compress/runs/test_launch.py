"""How runs are started, and started again by a scheduler; the command line's own are test_cli's."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.config import RunConfig
from compress.distributed.torchrun import RESTART_COUNTS
from compress.errors import ConfigError, InterruptedRunError, OutputError
from compress.runs.launch import Started, reading, started
from compress.runs.request import RunRequest
from compress.runs.rundirectory import RunDirectory
from compress.runs.state import State
from compress.terminal.signals import sigterm_as_ctrl_c

SETTINGS = ["device=cpu", "data.image_size=8", "tensorboard=false"]


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RESTART_COUNTS:
        monkeypatch.delenv(name, raising=False)


def request_for(
    output: Path, *settings: str, resume: bool = False, overwrite: bool = False
) -> RunRequest:
    asked = [] if resume else [*SETTINGS, *settings]
    return RunRequest(settings=asked, output=output, resume=resume, overwrite=overwrite)


def begun(output: Path, *settings: str) -> RunDirectory:
    """Leave a run as a kill in its dense training does."""
    with started(request_for(output, *settings)) as on:
        on.session.record("epoch", phase="train", epoch=1)
        on.session.save(State("train", {"step": 1}, {}))
    return on.run


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_run_is_locked_until_its_end(tmp_path: Path) -> None:
    with started(request_for(tmp_path / "run")) as on:
        assert not on.resumed
        with pytest.raises(ConfigError, match="in use by another process"), reading(on.run):
            pass
        with (
            pytest.raises(ConfigError, match="in use by another process"),
            started(request_for(tmp_path / "run", resume=True)),
        ):
            pass
        on.session.record("epoch", phase="train", epoch=1)
    assert names_in(tmp_path / "run") == {"config.toml", "history.jsonl"}


def test_a_reader_keeps_the_run_as_it_is(tmp_path: Path) -> None:
    run = begun(tmp_path)
    before = names_in(tmp_path)
    with (
        reading(run),
        pytest.raises(ConfigError, match="in use by another process"),
        started(request_for(tmp_path, overwrite=True)),
    ):
        pass
    assert names_in(tmp_path) == before


def test_what_killed_processes_left_is_gone_when_the_run_goes_on(tmp_path: Path) -> None:
    run = begun(tmp_path)
    stray = tmp_path / "state" / ".state.1.safetensors"
    for file in (stray, run.lock, tmp_path / ".dense.1.safetensors"):
        file.write_text("half")
    with started(request_for(tmp_path, resume=True)) as on:
        assert on.resumed
        assert names_in(tmp_path) == {
            *("config.toml", "history.jsonl", "state", "state/lock", "state/state.safetensors"),
        }


# A scheduler starts the command again


@pytest.fixture(params=RESTART_COUNTS)
def _again(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(request.param, "2")


@pytest.mark.usefixtures("_again")
@pytest.mark.parametrize("overwrite", [False, True])
def test_started_again_the_run_goes_on(
    overwrite: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on(tmp_path, caplog, overwrite=overwrite)


@pytest.mark.parametrize("count", [None, "0", "", "many", "-1"])
def test_the_same_command_goes_on_whoever_gives_it(
    count: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if count is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    goes_on(tmp_path, caplog)
    with started(request_for(tmp_path, overwrite=True)) as on:
        assert not on.resumed
        assert on.session.load("train") is None


def goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture, *, overwrite: bool = False) -> None:
    begun(tmp_path)
    with started(request_for(tmp_path, overwrite=overwrite)) as on:
        assert on.resumed
        assert on.config == on.run.saved_config()
        assert on.session.load("train") is not None
    assert caplog.messages == [f"started again: going on with the run in {tmp_path}"]


@pytest.mark.usefixtures("_again")
def test_started_again_where_nothing_is_yet(tmp_path: Path) -> None:
    with started(request_for(tmp_path / "run")) as on:
        assert not on.resumed
        on.session.record("epoch", phase="train", epoch=1)


@pytest.mark.usefixtures("_again")
def test_started_again_beside_the_run_of_another_configuration(tmp_path: Path) -> None:
    """The first start may have been killed before it came to overwrite what lay there."""
    begun(tmp_path, "seed=5")
    with (
        pytest.raises(ConfigError, match="is not empty: use --resume to go on"),
        started(request_for(tmp_path)),
    ):
        pass
    with started(request_for(tmp_path, overwrite=True)) as on:
        assert not on.resumed
        assert on.session.load("train") is None
        on.session.record("epoch", phase="train", epoch=1)
    assert on.run.saved_config().seed == RunConfig().seed


# Nothing stays of a command that did nothing


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("compress.files.atomic.write_flushed", refuse)
    with (
        pytest.raises(OutputError, match=r"config\.toml: the file system is read-only"),
        started(request_for(tmp_path / "run")),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_anything_was_done(tmp_path: Path, number: signal.Signals) -> None:
    def work() -> Iterator[Started]:
        with sigterm_as_ctrl_c(), started(request_for(tmp_path / "run")) as on:
            yield on
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRunError, match=r"^stopped$"):
        list(work())
    assert not (tmp_path / "run").exists()


def test_stopped_where_something_was_done(tmp_path: Path) -> None:
    path = tmp_path / "my run"

    def work() -> None:
        with sigterm_as_ctrl_c(), started(request_for(path)) as on:
            on.session.record("epoch", phase="train", epoch=1)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=f"go on with --resume --output '{path}'"):
        work()


# SIGTERM


def test_sigterm_is_as_ctrl_c_and_as_it_was_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_that_ignores_sigterm_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_as_ctrl_c():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
