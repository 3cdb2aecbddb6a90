"""What the machine refuses is one sentence, and streams that are closed stop no command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused

import cli
from compress.terminal.signals import sigterm_as_ctrl_c

LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", LONG),
        ("gate", LONG),
        ("bench", LONG),
        ("export", LONG),
        ("import", LONG, "--output", "o.safetensors"),
    ],
    ids=lambda command: command[0],
)
def test_a_name_that_is_too_long(command: tuple[str, ...]) -> None:
    refused(*command, code=1, says="too long")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_command_whose_streams_are_closed(closed: tuple[int, ...], tmp_path: Path) -> None:
    closing = "; ".join(f"os.close({number})" for number in closed)
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys; {closing}; "
         "os.execv(sys.executable, [sys.executable, '-c', 'import cli; cli.main()', '--version'])"],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent)},
        cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0


def test_sighup_is_as_ctrl_c() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who runs the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with sigterm_as_ctrl_c():  # as under nohup
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
