from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from compress.errors import OutputError, writing
from compress.files.atomic import staged, write_flushed


def test_the_name_appears_only_when_the_block_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "model.onnx"
    with staged(path) as temporary:
        write_flushed(temporary, b"whole")
        assert temporary.suffix == ".onnx"
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_block_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    with pytest.raises(KeyError), staged(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "taken" / "a.onnx"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    path = tmp_path / "model.onnx"
    with (
        pytest.raises(OutputError, match="permission denied"),
        staged(path) as temporary,
        writing(path),
    ):
        write_flushed(temporary, b"")


def test_a_disk_that_fills_up_while_renaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="the disk is full"), staged(path) as temporary:
        write_flushed(temporary, b"later")
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
