from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.errors import ConfigError, OutputError
from compress.runs.lock import locked

HOLDER = """
import os, sys, time
from pathlib import Path
from compress.runs.lock import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(600)
"""


def lock_of(path: Path) -> Path:
    return path / "run" / "state" / "lock"


def test_one_at_a_time(tmp_path: Path) -> None:
    path = lock_of(tmp_path)
    who = f"pid {os.getpid()} on {socket.gethostname()}"
    with locked(path) as holds:
        assert holds
        with (
            pytest.raises(ConfigError, match=f"run is in use by another process \\({who}\\): wait"),
            locked(path),
        ):
            pass
        with pytest.raises(ConfigError, match="in use"), locked(path, shared=True):
            pass
    assert not path.parent.exists()
    with locked(path):
        pass


def test_readers_share_it_and_keep_writers_out(tmp_path: Path) -> None:
    path = lock_of(tmp_path)
    with locked(path, shared=True):
        with locked(path, shared=True), pytest.raises(ConfigError, match="in use"), locked(path):
            pass
        assert path.exists()  # the other reader holds it still
        with pytest.raises(ConfigError, match="in use"), locked(path):
            pass
    assert not path.parent.exists()


def test_the_folder_stays_when_it_holds_anything_else(tmp_path: Path) -> None:
    path = lock_of(tmp_path)
    with locked(path):
        (path.parent / "state.safetensors").touch()
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


def test_it_dies_with_its_holder_though_children_live_on(tmp_path: Path) -> None:
    """Workers that load images outlive a parent that is killed, for seconds."""
    path = lock_of(tmp_path)
    root = Path(compress.__file__).parents[1]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"pid {holder.pid} on "), locked(path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert path.exists()
        with locked(path) as holds:
            assert holds
        assert not path.exists()
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_system_without_locks_does_no_harm(
    shared: bool, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = lock_of(tmp_path)
    with locked(path, shared=shared) as holds:
        assert not holds
        with locked(path, shared=shared) as holds:
            assert not holds
    assert not path.parent.exists()


def test_a_read_only_disk_is_no_error_for_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with locked(lock_of(tmp_path), shared=True) as holds:
        assert not holds
    with (
        pytest.raises(OutputError, match="the file system is read-only"),
        locked(lock_of(tmp_path)),
    ):
        pass


def test_a_lock_that_is_removed_while_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder ends between another's opening of the file and its locking it."""
    path, lock, rounds = lock_of(tmp_path), fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        rounds.append(descriptor)
        if len(rounds) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path) as holds:
        assert holds
        assert len(rounds) == 2
        monkeypatch.undo()
        with pytest.raises(ConfigError, match="in use"), locked(path):
            pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A run directory of somebody else must not have another file emptied."""
    (tmp_path / "mine").write_text("kept")
    path = lock_of(tmp_path)
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot write"), locked(path):
        pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_the_body_keeps_its_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), locked(lock_of(tmp_path)):
        raise FileNotFoundError("elsewhere")
    assert not lock_of(tmp_path).parent.exists()
