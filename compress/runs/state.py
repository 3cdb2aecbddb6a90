"""The state that an unfinished run goes on from, on disk.

Two files: the newest state, and the one before it. Whatever moment a process is killed in, one of
them is whole. Each holds the SHA-256 of what it says, so damage anywhere in it is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors import SafetensorError, safe_open

from compress.errors import CheckpointError, writing
from compress.files.atomic import staged, temporary_name, write_flushed

log = logging.getLogger("compress")

DOCUMENT_KEY = "state"
DIGEST_KEY = "sha256"
Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]


@dataclass(frozen=True)
class State:
    """What an unfinished run goes on from."""

    phase: str
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Document(BaseModel):
    """What a file of state says besides its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: Annotated[str, Field(strict=True, min_length=1)]
    lines: Count
    """Lines of the history that belong to the state."""
    facts: dict[str, Any]

    @field_validator("facts")
    @classmethod
    def _steps_are_counted(cls, facts: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        step = facts.get("step", 0)
        if type(step) is not int or step < 0:
            raise ValueError("the step is no number of steps")
        return facts


@dataclass(frozen=True)
class Saved:
    """A state, and how much of the history belongs to it."""

    state: State
    lines: int


class _DamagedError(Exception):
    """A file that does not hold what was written into it."""


class StateFiles:
    """The newest state of a run and the one before it.

    Args:
        newest: the file of the newest state.
        previous: the file of the one before it, in the same folder.
    """

    def __init__(self, newest: Path, previous: Path) -> None:
        self.newest, self.previous = newest, previous
        self._damaged = False

    def write(self, state: State, *, lines: int) -> None:
        """Write a state that survives a loss of power; the newest one becomes the one before it.

        Raises:
            OutputError: it cannot be written; what was there is kept.
        """
        data = _serialised(state, lines)
        with staged(self.newest) as temporary, writing(self.newest):
            write_flushed(temporary, data)
            if not self._damaged:
                self._keep_newest()
        self._damaged = False

    def read(self) -> Saved | None:
        """Return the newest state that is whole; None if there is none at all.

        A damaged one is passed over with a warning, and stays until the next is written.

        Raises:
            CheckpointError: all that there are are damaged.
        """
        reasons = {}
        for path in (self.newest, self.previous):
            try:
                saved = _parsed(path)
            except FileNotFoundError:
                continue
            except _DamagedError as error:
                reasons[path] = str(error)
                continue
            if reasons:
                self._damaged = True
                log.warning(
                    "%s is damaged (%s), so the run goes on from the state before it, in %s",
                    self.newest,
                    reasons[self.newest],
                    self.previous,
                )
            return saved
        if reasons:
            raise CheckpointError(
                f"{' and '.join(map(str, reasons))} {'is' if len(reasons) == 1 else 'are'} "
                "damaged: start anew with --overwrite"
            )
        return None

    def phase(self) -> str | None:
        """Return the phase of the newest state from its header alone; None if it is not clear."""
        for path in (self.newest, self.previous):
            with suppress(_DamagedError, FileNotFoundError):
                return _header(path)[0].phase
        return None

    def remove(self) -> None:
        """Remove both; nothing is left to go on from."""
        for path in (self.previous, self.newest):
            path.unlink(missing_ok=True)

    def _keep_newest(self) -> None:
        """Give the newest the name of the one before it as well: a next one takes its own."""
        if not self.newest.exists():
            return
        spare = temporary_name(self.previous)
        spare.unlink(missing_ok=True)
        try:
            spare.hardlink_to(self.newest)
        except OSError:  # a file system without hard links
            self.newest.replace(self.previous)
            return
        try:
            spare.replace(self.previous)
        finally:
            # Renaming a file to another name of the same file does nothing (rename(2)).
            spare.unlink(missing_ok=True)


def _serialised(state: State, lines: int) -> bytes:
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}
    text = json.dumps({"phase": state.phase, "lines": lines, "facts": state.facts})
    header = {DOCUMENT_KEY: text, DIGEST_KEY: _digest(text, tensors)}
    return safetensors.torch.save(tensors, header)


def _parsed(path: Path) -> Saved:
    document, text, digest = _header(path)
    try:
        # Copies: safetensors gives views of the file, at addresses that change how sums round.
        tensors = {name: t.clone() for name, t in safetensors.torch.load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _DamagedError("its tensors cannot be read") from error
    if digest != _digest(text, tensors):
        raise _DamagedError("its SHA-256 is another")
    return Saved(State(document.phase, document.facts, tensors), document.lines)


def _header(path: Path) -> tuple[Document, str, str]:
    """Return what a file says, as it is understood and as it is written, and its digest.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        text, digest = metadata[DOCUMENT_KEY], metadata[DIGEST_KEY]
        return Document.model_validate(json.loads(text)), text, digest
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise _DamagedError("it is truncated or cannot be read") from error
    except (ValidationError, ValueError, KeyError, RecursionError) as error:
        raise _DamagedError("its header cannot be understood") from error


def _digest(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a document and of tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
