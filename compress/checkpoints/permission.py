"""Which networks that are not built in may be built: what is typed, and what is the user's own.

A file never makes code be imported because it says so. The network was typed with the command, or
a command of this user wrote this very file in this folder. docs/security.md says what follows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from contextlib import suppress
from pathlib import Path

from compress.config import ModelConfig
from compress.files.atomic import sha256_of
from compress.networks.models import is_builtin


def is_allowed(model: ModelConfig, typed: ModelConfig | None, file: Path) -> bool:
    """Whether a network that a file names may be built.

    Args:
        model: the network that the file names.
        typed: what the user has asked for with the command, if anything.
        file: a file of weights or a configuration.
    """
    if is_builtin(model) or (typed is not None and typed.words == model.words):
        return True
    note = _note(model, sha256_of(file))
    return note is not None and note.is_file()


def how_to_allow(model: ModelConfig) -> str:
    """Return the end of the sentence that refuses a network."""
    return f"pass {shlex.join(model.words)} to allow it"


def remember(model: ModelConfig, data: bytes) -> None:
    """Note that this user's command wrote a file of a network, which may be built from it again.

    A note that cannot be written is none: the network has to be typed again.
    """
    if is_builtin(model):
        return
    note = _note(model, hashlib.sha256(data).hexdigest())
    if note is not None:
        with suppress(OSError):
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            note.write_text(f"{Path.cwd()}: {shlex.join(model.words)}\n")  # for people


def _note(model: ModelConfig, digest: str) -> Path | None:
    """Return where it is noted that a file with this digest was written here.

    The folder is part of it because a callable's module is looked for there. None where what is
    unpacked in this folder could bring notes with it.
    """
    state, here = _state_folder(), Path.cwd()
    if state is None or state.resolve().is_relative_to(here):
        return None
    said = json.dumps([str(here), model.words, digest])
    return state / "compress" / "allowed" / hashlib.sha256(said.encode()).hexdigest()


def _state_folder() -> Path | None:
    given = os.environ.get("XDG_STATE_HOME")
    try:
        state = Path(given) if given else Path.home() / ".local" / "state"
    except RuntimeError:  # a user without a home
        return None
    return state if state.is_absolute() else None
