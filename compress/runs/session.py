"""What a long loop needs from its run: its history, its state to resume from, and Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from compress.config import SaveConfig
from compress.distributed.world import World, current
from compress.errors import CheckpointError, InterruptedRunError, writing
from compress.files.atomic import write_atomically
from compress.runs.rundirectory import RunDirectory, event_of
from compress.runs.state import State, StateFiles
from compress.runs.tensorboard import Curves
from compress.terminal.signals import ENDING, handled

log = logging.getLogger("compress")

PHASES = ("train", "prune", "finetune")
"""What a run does, in order; each can be gone on with by itself."""
PHASE_OF = {
    "dense": "train",
    "prune_step": "prune",
    "prune_pause": "prune",
    "prune_end": "prune",
    "shrink": "prune",
    "pruned": "prune",
    "finetuned": "finetune",
}
"""Events of the history that do not name their phase."""


@dataclass
class Session:
    """What a long loop needs from its run: history, curves, state, and whether to stop.

    With several processes every one of them has a session. All take the same decisions; only the
    main one writes.
    """

    run: RunDirectory
    stop: threading.Event = field(default_factory=threading.Event)
    _saved_at: float = field(init=False)
    _unsaved_steps: int = 0
    _lines: int = 0

    def __post_init__(self) -> None:
        self._saved_at = time.monotonic()
        config = self.run.saved_config() if self.run.is_begun else None
        self._save_config = config.save if config else SaveConfig()
        self._curves = Curves(self.run.tensorboard) if config and config.tensorboard else None
        self._states = StateFiles(self.run.state, self.run.previous_state)

    @property
    def world(self) -> World:
        """The processes of the run, of which this is one."""
        return current()

    def record(self, event: str, **facts: Any) -> None:
        """Append one line to the history, and draw it.

        Raises:
            OutputError: the disk is full.
        """
        self._lines += 1
        if not self.world.main:
            return
        line = json.dumps({"event": event, **facts})
        with writing(self.run.history), self.run.history.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if self._curves:
            self._curves.add({"event": event, **facts})

    def after_step(self, snapshot: Callable[[], State]) -> None:
        """Save the state when it is due, and stop when the user asked for it.

        Raises:
            InterruptedRunError: after the state was saved.
        """
        self._unsaved_steps += 1
        stop, due = self._agreed()
        if stop or due:
            self.save(snapshot())
        if stop:
            self.world.wait()  # a process that ended would have its launcher stop the others
            raise self._stopped()

    def check_stop(self) -> None:
        """Stop when the user asked for it and everything done so far is on disk.

        Raises:
            InterruptedRunError: the user did.
        """
        if self.world.any(self.stop.is_set()):
            raise self._stopped()

    @property
    def due(self) -> bool:
        """Whether the state must be saved after this step, as this process sees it."""
        every = self._save_config
        counted = every.every_steps is not None and self._unsaved_steps >= every.every_steps
        return counted or time.monotonic() - self._saved_at >= every.every_seconds

    def save(self, state: State) -> None:
        """Write the state atomically; the one before it is kept beside it.

        Raises:
            OutputError: it cannot be written; the state before it is kept.
        """
        if self.world.main:
            self._sync_history()
            self._states.write(state, lines=self._lines)
        self._saved_at, self._unsaved_steps = time.monotonic(), 0

    def load(self, phase: str) -> State | None:
        """Return the state of a phase, if that is where the run stopped; cut the history to it.

        If the run stopped elsewhere, what the history tells of this phase and of later ones was
        never finished, and is forgotten.

        Raises:
            CheckpointError: the state is damaged, and so is the one before it.
            RunError: another process finds another state; all must see the same directory.
        """
        saved = self._states.read()
        found = saved and (saved.state.phase, saved.state.facts.get("step"), saved.lines)
        self.world.require_same("the state to go on from", repr(found).encode())
        if saved is None or saved.state.phase != phase:
            self.forget(phase)
            return None
        self._keep_lines(self.run.history_lines()[: saved.lines])
        if self._curves:
            self._curves.resume(phase, saved.state.facts.get("step", 0))
        return saved.state

    def forget(self, phase: str) -> None:
        """Cut from the history what it tells of a phase and of later ones.

        Raises:
            CheckpointError: the history is damaged.
        """
        late = PHASES[PHASES.index(phase) :] if phase in PHASES else ()
        lines = self.run.history_lines()
        self._keep_lines(
            [line for line in lines if _phase_of(event_of(line, self.run.history)) not in late]
        )
        if self._curves and phase == "train":
            self._curves.resume("train", 0)
            # The accuracy of an imported network stands at step 0 of the pruning's curves.
            self._curves.resume("prune", -1)

    def finish(self) -> None:
        """Remove the state of a phase that is complete."""
        if self.world.main:
            self._states.remove()

    def mend(self, *, locked: bool) -> None:
        """End what a kill left behind: a beginning, temporary files, a state of a complete phase.

        Args:
            locked: whether nobody else can be writing in the run's directory.
        """
        self.run.settle()
        self.run.remove_strays(locked=locked)
        trained = self.run.dense.is_file() and self._states.phase() == "train"
        if trained or self.run.pruned.is_file():
            self.finish()

    @contextmanager
    def taking_up(self) -> Iterator[None]:
        """Translate what goes wrong while a state is put into a network that it does not fit.

        Raises:
            CheckpointError: naming the state.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.run.state} does not fit the run: start anew with --overwrite"
            ) from error

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn the first Ctrl-C, SIGTERM or SIGHUP into a stop after the step; a second: now."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stop.set()
            for each in previous:
                signal.signal(each, previous[each])
            log.warning("stopping after this step; once more stops at once and loses it")

        previous = {n: signal.getsignal(n) for n in (signal.SIGINT, *ENDING)}
        with handled(previous, ask):
            yield

    def _agreed(self) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the main one finds a save due.

        One exchange answers both, because it is made after every step.
        """
        answers = self.world.each(2 * self.stop.is_set() + self.due)
        return any(answer & 2 for answer in answers), bool(answers[0] & 1)

    def _stopped(self) -> InterruptedRunError:
        return InterruptedRunError(
            "stopped; the state is saved, go on with --resume --output "
            f"{shlex.quote(str(self.run.path))}"
        )

    def _sync_history(self) -> None:
        """Have the disk hold the lines before the state that counts them."""
        if self.run.history.is_file():
            with writing(self.run.history), self.run.history.open("ab") as stream:
                os.fsync(stream.fileno())

    def _keep_lines(self, lines: list[str]) -> None:
        """Have the history hold these lines, and not one that a full disk cut off."""
        text = "".join(lines)
        if self.world.main and text != self.run.history_text():
            write_atomically(self.run.history, text)
        self._lines = len(lines)


def _phase_of(event: Mapping[str, Any]) -> str | None:
    """Return the phase that an event belongs to; None for an event of no phase."""
    return event.get("phase") or PHASE_OF.get(event["event"])
