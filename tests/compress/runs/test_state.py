from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from compress.errors import CheckpointError, OutputError
from compress.runs import state as state_module
from compress.runs.state import State, StateFiles


def state_of(step: int, phase: str = "train") -> State:
    return State(phase, {"step": step}, {"weight": torch.full((3, 2), float(step))})


def files_of(folder: Path) -> StateFiles:
    return StateFiles(folder / "state.safetensors", folder / "previous.safetensors")


def step_in(folder: Path) -> int | None:
    """Return the step that a new process would go on from."""
    saved = files_of(folder).read()
    if saved is None:
        return None
    step = saved.state.facts["step"]
    assert torch.equal(saved.state.tensors["weight"], torch.full((3, 2), float(step)))
    assert saved.lines == 10 * step
    return step


def written(folder: Path, steps: int) -> StateFiles:
    files = files_of(folder)
    for step in range(1, steps + 1):
        files.write(state_of(step), lines=10 * step)
    return files


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is kept


def test_the_newest_is_read_and_the_one_before_it_kept(tmp_path: Path) -> None:
    assert step_in(tmp_path) is None
    written(tmp_path, 1)
    assert names_in(tmp_path) == {"state.safetensors"}
    files = written(tmp_path, 4)
    assert names_in(tmp_path) == {"state.safetensors", "previous.safetensors"}
    assert step_in(tmp_path) == 4
    files.newest.unlink()
    assert step_in(tmp_path) == 3


def test_nothing_is_left_when_it_is_removed(tmp_path: Path) -> None:
    files = written(tmp_path, 3)
    files.remove()
    files.remove()  # twice does no harm
    assert names_in(tmp_path) == set()
    assert step_in(tmp_path) is None


def test_the_digest_is_of_what_the_file_says(tmp_path: Path) -> None:
    """Made again by hand from the file as anybody reads it."""
    tensors = {"b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "a": torch.tensor(True)}
    files_of(tmp_path).write(State("prune", {"step": 2, "more": [None, 0.1]}, tensors), lines=7)
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["state"]) == {
        "phase": "prune",
        "lines": 7,
        "facts": {"step": 2, "more": [None, 0.1]},
    }
    words = metadata["state"].encode() + b"\na torch.bool []\n\x01"
    words += b"\nb torch.bfloat16 [2]\n" + bytes.fromhex("c03f00c0")  # little-endian 1.5 and -2
    assert metadata["sha256"] == hashlib.sha256(words).hexdigest()


# Killed at every operation on files


class Killed(BaseException):
    """Power went at this moment: nothing that follows happens."""


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stop for ever before the operation on a file that follows ``count`` of them."""
    done: list[str] = []

    def guard(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            if len(done) >= count:
                raise Killed
            result = real(*arguments, **options)
            done.append(name)
            return result

        monkeypatch.setattr(owner, name, operation)

    for name in ("replace", "hardlink_to", "unlink"):
        guard(Path, name)
    guard(Path, "write_bytes")

    def in_two(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        path.write_bytes(data)

    monkeypatch.setattr(state_module, "write_flushed", in_two)
    return done


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("before", [1, 2, 3])
def test_whatever_moment_it_is_killed_in_a_whole_state_is_there(
    before: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    moments = 0
    for count in range(40):
        folder = tmp_path / str(count)
        folder.mkdir()
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(Path, "hardlink_to", refuse)
            files = written(folder, before)
            killed_after(count, patch)
            try:
                files.write(state_of(before + 1), lines=10 * (before + 1))
            except Killed:
                moments += 1
            else:
                break
        assert step_in(folder) in (before, before + 1)
        written(folder, before + 2)  # what lies there hinders nobody
        assert step_in(folder) == before + 2
    assert step_in(folder) == before + 1
    assert moments >= 4


def test_killed_between_the_two_renames_a_spare_name_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest and the previous are then one file, and rename(2) leaves both its names."""
    files = written(tmp_path, 2)
    files.previous.unlink()
    files.previous.hardlink_to(files.newest)
    files.write(state_of(3), lines=30)
    assert names_in(tmp_path) == {"state.safetensors", "previous.safetensors"}
    assert step_in(tmp_path) == 3


# Damage

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "last byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"not safetensors at all",
    "one bit of a tensor": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "a digit of the step": lambda data: data.replace(b'step\\": 3', b'step\\": 9'),
    "the phase": lambda data: data.replace(b"train", b"prune"),
    "the lines": lambda data: data.replace(b'lines\\": 30', b'lines\\": 10'),
    "the name of a tensor": lambda data: data.replace(b"weight", b"height"),
    "the shape of a tensor": lambda data: data.replace(b"[3,2]", b"[2,3]"),
    "the document": lambda data: data.replace(b"facts", b"fa\\\\ts"),
    "the digest": lambda data: data.replace(b"sha256", b"sha512"),
}


@pytest.fixture(params=DAMAGE)
def damage(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = path.read_bytes()
        spoilt = DAMAGE[request.param](data)
        assert spoilt != data
        path.write_bytes(spoilt)

    return spoil


def test_a_damaged_newest_gives_way_to_the_one_before_it_and_says_so(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = written(tmp_path, 3)
    damage(files.newest)
    with caplog.at_level(logging.WARNING, "compress"):
        assert step_in(tmp_path) == 2
    (said,) = caplog.messages
    assert said.startswith(f"{files.newest} is damaged (")
    assert said.endswith(f"so the run goes on from the state before it, in {files.previous}")


def test_nothing_to_go_on_from_but_damage(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = written(tmp_path, 3)
    damage(files.newest)
    files.previous.write_bytes(b"")
    both = f"{files.newest} and {files.previous} are damaged: start anew with --overwrite"
    with pytest.raises(CheckpointError, match=both):
        files_of(tmp_path).read()
    files.previous.unlink()
    with pytest.raises(CheckpointError, match=f"{files.newest} is damaged: start anew with"):
        files_of(tmp_path).read()
    assert not caplog.messages


def test_a_damaged_file_never_takes_the_place_of_the_one_before_it(tmp_path: Path) -> None:
    """The one whole state is not given away for the sake of a damaged one."""
    written(tmp_path, 2)
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    files = files_of(tmp_path)
    assert files.read() is not None
    files.write(state_of(3), lines=30)
    assert step_in(tmp_path) == 3
    (tmp_path / "state.safetensors").write_bytes(b"torn again")
    assert step_in(tmp_path) == 1
    files.write(state_of(4), lines=40)  # this process knows nothing of the damage
    assert step_in(tmp_path) == 4


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    written(tmp_path, 2)
    (tmp_path / "state.safetensors").unlink()
    (tmp_path / "state.safetensors").mkdir()
    assert step_in(tmp_path) == 1


# Documents that nobody here has written

DOCUMENTS: dict[str, Any] = {
    "no document": None,
    "a list": [1, 2],
    "empty": {},
    "no facts": {"phase": "train", "lines": 1},
    "facts that are none": {"phase": "train", "lines": 1, "facts": [1]},
    "a phase that is a number": {"phase": 1, "lines": 1, "facts": {}},
    "no name of a phase": {"phase": "", "lines": 1, "facts": {}},
    "lines below zero": {"phase": "train", "lines": -1, "facts": {}},
    "lines that are true": {"phase": "train", "lines": True, "facts": {}},
    "lines that are text": {"phase": "train", "lines": "1", "facts": {}},
    "too many lines": {"phase": "train", "lines": 10**30, "facts": {}},
    "a step below zero": {"phase": "train", "lines": 1, "facts": {"step": -1}},
    "a step that is text": {"phase": "train", "lines": 1, "facts": {"step": "7"}},
    "a step that is true": {"phase": "train", "lines": 1, "facts": {"step": True}},
    "a key too many": {"phase": "train", "lines": 1, "facts": {}, "code": "x"},
}


@pytest.mark.parametrize("name", [*DOCUMENTS, "deep", "no JSON"])
def test_a_hostile_document_is_damage_even_with_the_right_digest(name: str, tmp_path: Path) -> None:
    text = {"deep": "[" * 100_000, "no JSON": "{"}.get(name) or json.dumps(DOCUMENTS[name])
    tensors = {"weight": torch.zeros(2)}
    words = text.encode() + b"\nweight torch.float32 [2]\n" + bytes(8)
    header = {"state": text, "sha256": hashlib.sha256(words).hexdigest()}
    safetensors.torch.save_file(tensors, tmp_path / "state.safetensors", header)
    files = files_of(tmp_path)
    with pytest.raises(CheckpointError, match="is damaged: start anew with --overwrite"):
        files.read()
    assert files.phase() is None


def test_such_a_document_is_read_when_it_is_sound(tmp_path: Path) -> None:
    """Else the test above would pass for a slip in its digest."""
    text = json.dumps({"phase": "train", "lines": 1, "facts": {"step": 4}})
    words = text.encode() + b"\nweight torch.float32 [2]\n" + bytes(8)
    header = {"state": text, "sha256": hashlib.sha256(words).hexdigest()}
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "state.safetensors", header)
    saved = files_of(tmp_path).read()
    assert saved is not None
    assert (saved.state.phase, saved.lines, saved.state.facts) == ("train", 1, {"step": 4})


# Disks


def test_a_full_disk_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_module, "write_flushed", full)
    with pytest.raises(OutputError, match="the disk is full; what was there before is kept"):
        files.write(state_of(4), lines=40)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path, 2)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(state_module, "write_flushed", refuse)
    with pytest.raises(OutputError, match="the file system is read-only"):
        files.write(state_of(3), lines=30)
    assert step_in(tmp_path) == 2


def test_file_and_folder_are_flushed_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that lasts must never be that of bytes that do not."""
    files, order = written(tmp_path, 2), list[str]()
    flush, rename = os.fsync, Path.replace

    def flushed(descriptor: int) -> None:
        here = {path.stat().st_ino: path.name for path in (tmp_path, *tmp_path.iterdir())}
        order.append(f"flush {here[os.fstat(descriptor).st_ino]}")
        flush(descriptor)

    def renamed(path: Path, to: Path) -> Path:
        order.append(f"rename to {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    files.write(state_of(3), lines=30)
    assert order == [
        f"flush .state.{os.getpid()}.safetensors",
        "rename to previous.safetensors",
        "rename to state.safetensors",
        f"flush {tmp_path.name}",
    ]
