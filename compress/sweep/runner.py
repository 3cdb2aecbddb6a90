"""The processes of a sweep: how they start, stop and report, and that none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from compress.errors import writing
from compress.sweep.devices import Slot

POLL = 0.1
"""Time between two looks at the processes, in seconds."""
STOPPING = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
"""What the first, the second and the third Ctrl-C send on: save and stop, stop at once, die."""
LAST_BYTES = 8192
"""Of a log, in which its last words are looked for."""
PROGRAM = (
    "import sys; sys.path[:] = {path!r}; "
    "from compress.sweep.lifeline import hold_on; hold_on(); "
    "import cli; cli.main()"
)
"""The command line, with this process's modules whatever directory it is started from."""


@dataclass(frozen=True)
class Task:
    """One command for one process."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    """Where its stdout and stderr are appended."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    task: Task
    code: int
    """Its exit code, or below zero the signal that ended it."""
    seconds: float
    words: str
    """Its last words, or what is known instead."""
    stopped: bool
    """Whether it was told to stop."""


@dataclass
class _Child:
    task: Task
    process: subprocess.Popen[bytes]
    log_start: int
    start: float = field(default_factory=time.monotonic)
    signals: int = 0

    def send(self, count: int) -> None:
        """Send on what has not been sent of the first ``count`` signals."""
        for number in STOPPING[self.signals : count]:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(self.process.pid, number)  # its loaders of images too
                else:
                    self.process.send_signal(number)
        self.signals = max(self.signals, count)

    def ended(self, code: int) -> Ended:
        if self.process.stdin:
            self.process.stdin.close()
        words = _last_words(self.task.log, self.log_start) if code > 0 else ""
        seconds = time.monotonic() - self.start
        return Ended(self.task, code, seconds, words or _ending(code), self.signals > 0)


def run_tasks(
    tasks: Sequence[Task],
    slots: Sequence[Slot],
    *,
    started: Callable[[Task, Slot], None],
    ended: Callable[[Ended], None],
) -> bool:
    """Run each task as a process of its own, at most one in each slot.

    Ctrl-C and SIGTERM are sent on to the processes, and no other is started. Whatever happens here,
    they are told to save and stop, and waited for.

    Args:
        tasks: started in this order.
        slots: where.
        started: told of each process that was started.
        ended: told of each that has ended.

    Returns:
        Whether all have run; False when the user stopped.

    Raises:
        OutputError: a log cannot be written.
    """
    waiting, running = deque(tasks), dict[int, _Child]()
    with _counting_signals() as signals:
        try:
            while running or (waiting and not signals):
                for place in range(len(slots)):
                    if place not in running and waiting and not signals:
                        running[place] = _start(waiting.popleft(), slots[place])
                        started(running[place].task, slots[place])
                _look(running, len(signals), ended)
        finally:
            while running:  # after an error
                _look(running, max(1, len(signals)), lambda _: None)
        return not signals


def _look(running: dict[int, _Child], signals: int, ended: Callable[[Ended], None]) -> None:
    """Send signals on, and take leave of the processes that have ended."""
    for place, child in list(running.items()):
        child.send(signals)
        code = child.process.poll()
        if code is not None:
            del running[place]
            ended(child.ended(code))
    if running:
        time.sleep(POLL)


def _start(task: Task, slot: Slot) -> _Child:
    command = [sys.executable, "-c", PROGRAM.format(path=sys.path), *task.arguments]
    with writing(task.log), task.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # the lifeline
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.variables},
            start_new_session=True,  # a terminal's Ctrl-C would reach it twice
        )
        return _Child(task, process, start)


@contextmanager
def _counting_signals() -> Iterator[list[int]]:
    """Yield a list that grows by each Ctrl-C and each SIGTERM."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def count(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    previous = {n: signal.signal(n, count) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _last_words(log: Path, start: int) -> str:
    """Return the error that a process reported since it was started, or its last line."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, size - LAST_BYTES))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [*lines, *errors][-1] if lines else ""


def _ending(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}, without a word"
