"""Which networks that are not built in may be built: what is typed, and what is the user's own.

A file never makes code be imported because it says so. The network was typed with the command, or
a command of this user wrote this very file in this folder. docs/security.md says what follows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress.config import ModelConfig
from compress.errors import ConfigError
from compress.files.atomic import sha256_of
from compress.files.documents import section_of, validated


@dataclass(frozen=True)
class Permission:
    """Leave to build networks: built-in ones, the one that was typed, and those of own files."""

    typed: ModelConfig | None = None
    """The network that the user named, if any."""

    @classmethod
    def of(cls, model: str | None, settings: Iterable[str]) -> Permission:
        """Return what ``--model`` and ``model.key=value`` settings give leave to.

        Raises:
            ConfigError: settings that cannot be understood.
        """
        said = section_of(settings, "model") | ({"name": model} if model else {})
        return cls(validated(ModelConfig, said, source="--set") if "name" in said else None)

    def allows(self, model: ModelConfig, file: Path) -> bool:
        """Whether a network that a file of weights or a configuration names may be built."""
        from compress.networks.models import is_builtin  # it imports torch

        if is_builtin(model) or (self.typed is not None and self.typed.words == model.words):
            return True
        note = _note(model, sha256_of(file))
        return note is not None and note.is_file()

    def require(self, model: ModelConfig, config: Path) -> None:
        """Refuse to go on with a run whose network is neither typed nor the user's.

        Raises:
            ConfigError: it would be imported unasked, or another network was typed.
        """
        if self.typed is not None and self.typed.name != model.name:
            raise ConfigError(
                f"the run is of {model.name} and --model asks for {self.typed.name}: leave it away"
            )
        if not self.allows(model, config):
            raise ConfigError(
                f"{config} names {model.name}, whose code would be imported: {how_to_allow(model)}"
            )


BUILT_IN = Permission()
"""Nothing was typed."""


def how_to_allow(model: ModelConfig) -> str:
    """Return the end of the sentence that refuses a network."""
    return f"pass {shlex.join(model.words)} to allow it"


def remember(model: ModelConfig, data: bytes) -> None:
    """Note that this user's command wrote a file of a network, which may be built from it again.

    A note that cannot be written is none: the network has to be typed again.
    """
    from compress.networks.models import is_builtin

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
