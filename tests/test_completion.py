"""Shells complete commands and options, installed as docs/install.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
INSTALL, FOR_ZSH = re.findall(
    r"^    (.+)$", PAGE.split("## Completion in the shell")[1].split("\n## ")[0], re.MULTILINE
)
COMPLETED = """
source ~/.bashrc
COMP_WORDS=({words}) COMP_CWORD={last}
_compress_completion compress
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def told(shell: str, program: str, home: Path, *options: str) -> list[str]:
    """Run a program of a shell for a user with a home of their own; return its lines."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = home / "bin" / "compress"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "cli.py"}" "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join((str(command.parent), os.environ["PATH"]))
    variables = {**os.environ, "HOME": str(home), "PATH": path, "TERM": "dumb"}
    done = subprocess.run(
        [shell, *options, "-c", program],
        env={**variables, "PYTHONPATH": str(ROOT)},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compress pru", ["prune"]),
        ("compress ba", ["baseline"]),
        ("compress prune --pre", ["--precision"]),
        ("compress gate report.json --li", ["--limits"]),
    ],
)
def test_bash_completes_commands_and_options(
    words: str, offered: list[str], tmp_path: Path
) -> None:
    told("bash", f"{INSTALL}\ntrue", tmp_path)  # the shell is known by its being the parent
    program = COMPLETED.format(words=words, last=len(words.split()) - 1)
    assert told("bash", program, tmp_path) == offered


def test_zsh_completes_commands_though_it_knows_another_compress(tmp_path: Path) -> None:
    told("zsh", f"{INSTALL}\ntrue", tmp_path)
    told("zsh", FOR_ZSH, tmp_path)
    asked = told("zsh", "print $_comps[compress]", tmp_path, "-i")
    assert asked == ["_compress_completion"]
    asking = "_TYPER_COMPLETE_ARGS='compress pru' _COMPRESS_COMPLETE=complete_zsh compress"
    assert '"prune":' in " ".join(told("zsh", asking, tmp_path))
