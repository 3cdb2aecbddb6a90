from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from compress.terminal.signals import LIFELINE

STUCK = "import time, cli; cli.app = lambda **_: time.sleep(600); cli.main()"
"""The command line with a command that never ends."""
SHOWS_ITS_STDIN = (
    "import subprocess, sys; from compress.terminal.signals import hold_on; hold_on(); "
    "look = 'import os, sys; print(sorted(os.environ), repr(sys.stdin.read()))'; "
    "subprocess.run([sys.executable, '-c', look], check=True)"
)


def process(program: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent)} | variables,
    )


def test_the_command_line_ends_when_its_lifeline_does() -> None:
    with process(STUCK, **{LIFELINE: "stdin"}) as held:
        assert held.stdin
        with pytest.raises(subprocess.TimeoutExpired):
            held.wait(timeout=1)
        held.stdin.close()
        assert held.wait(timeout=120) == -signal.SIGTERM


def test_a_process_of_a_process_neither_holds_the_lifeline_nor_reads_it() -> None:
    with process(SHOWS_ITS_STDIN, **{LIFELINE: "stdin"}) as held:
        assert held.stdout
        said = held.stdout.read()
        assert held.wait(timeout=120) == 0
    assert "'PATH'" in said
    assert LIFELINE not in said
    assert said.rstrip().endswith("''")


def test_without_the_variable_stdin_is_anybodys() -> None:
    with process("import sys; from compress.terminal.signals import hold_on; hold_on(); "
                 "print(sys.stdin.read())") as free:  # fmt: skip
        said, _ = free.communicate("words", timeout=120)
        assert (free.returncode, said) == (0, "words\n")
