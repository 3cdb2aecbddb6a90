"""The processes of a sweep: where they compute, how they start, stop and report.

None outlives the sweep: each holds a lifeline to it, see ``compress.terminal.signals``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import ConfigError, EnvironmentUnfitError, writing
from compress.terminal.signals import ENDING, LIFELINE, handled

POLL = 0.1
"""Time between two looks at the processes, in seconds."""
STOPPING = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
"""What the first three Ctrl-C send on: save and stop, stop at once, be killed."""
LAST_BYTES = 8192
"""Of a log, in which its last words are looked for."""


@dataclass(frozen=True)
class Slot:
    """A place for one process at a time."""

    device: str
    """``cpu`` or ``cuda:N``."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment of a process here: it sees its own device only, and takes it for ``auto``."""


@dataclass(frozen=True)
class Task:
    """What one process does."""

    name: str
    arguments: tuple[str, ...]
    """Those that follow the command."""
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
    command: Sequence[str],
    started: Callable[[Task, Slot], None],
    ended: Callable[[Ended], None],
) -> bool:
    """Run each task as a process of its own, at most one in each slot.

    Ctrl-C and SIGTERM are sent on to the processes, and no other is started. Whatever happens here,
    they are told to save and stop, and waited for.

    Args:
        tasks: started in this order.
        slots: where.
        command: the words that start this tool's command line, before the arguments of a task.
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
                        running[place] = _start(waiting.popleft(), slots[place], command)
                        started(running[place].task, slots[place])
                _look(running, len(signals), ended)
        finally:
            while running:  # after an error
                _look(running, max(1, len(signals)), lambda _: None)
        return not signals


def _look(running: dict[int, _Child], signals: int, ended: Callable[[Ended], None]) -> None:
    """Send signals on, and forget the processes that have ended."""
    for place, child in list(running.items()):
        child.send(signals)
        code = child.process.poll()
        if code is not None:
            del running[place]
            ended(child.ended(code))
    if running:
        time.sleep(POLL)


def _start(task: Task, slot: Slot, command: Sequence[str]) -> _Child:
    with writing(task.log), task.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [*command, *task.arguments],
            stdin=subprocess.PIPE,  # the lifeline
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.variables, LIFELINE: "stdin"},
            start_new_session=True,  # a terminal's Ctrl-C would reach it twice
        )
        return _Child(task, process, start)


@contextmanager
def _counting_signals() -> Iterator[list[int]]:
    """Yield a list that grows by each Ctrl-C, SIGTERM and SIGHUP."""
    seen: list[int] = []
    with handled((signal.SIGINT, *ENDING), lambda number, frame: seen.append(number)):
        yield seen


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


# Places


def slots_for(devices: str | None, configured: str, jobs: int | None) -> tuple[Slot, ...]:
    """Return a place for each process that may run at a time.

    Args:
        devices: names with commas between them, ``auto`` for all GPUs; default ``configured``.
        configured: ``device`` of the configuration.
        jobs: processes at a time; default one for each device.

    Raises:
        ConfigError: a device's name cannot be understood, or there are no jobs.
        EnvironmentUnfitError: a GPU is not there.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: give 1 or more")
    names = _names(configured if devices is None else devices)
    places = [names[index % len(names)] for index in range(jobs or len(names))]
    return tuple(Slot(name, _variables(name, places.count(name))) for name in places)


def _names(asked: str) -> Sequence[str]:
    gpus = _gpus()
    names: list[str] = []
    for name in asked.split(","):
        word = name.strip()
        if word == "auto":
            names += [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
        elif word == "cpu":
            names.append(word)
        elif match := re.fullmatch(r"cuda(?::(\d{1,4}))?", word):
            index = int(match[1] or 0)
            if index >= gpus:
                raise EnvironmentUnfitError(
                    f"device {word!r} cannot be used here: there are {gpus} GPUs, give --devices"
                )
            names.append(f"cuda:{index}")
        else:
            raise ConfigError(
                f"--devices {asked}: {word!r} is none of auto, cpu, cuda:0, cuda:1, ..."
            )
    return list(dict.fromkeys(names))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _variables(name: str, sharing: int) -> dict[str, str]:
    if name == "cpu":
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        if sharing == 1 or "OMP_NUM_THREADS" in os.environ:
            return hidden
        return {**hidden, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // sharing))}
    index = int(name.partition(":")[2])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}
