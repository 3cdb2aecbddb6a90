"""Watching a build from Python, and cancelling it, where TensorRT can: since 10.0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.terminal.progress import Progress
    from export.engines.api import TensorRT


@dataclass
class _Phase:
    steps: int
    done: int = 0
    inner: float = 0.0
    """Share of the step that is being done, as far as phases within it have ended."""


class Watch:
    """What an ``IProgressMonitor`` hears, turned into one rising share.

    TensorRT nests its phases: within a step of one there may be others, and it does not say how
    many. So each takes half of what remains of the step.

    No exception may cross TensorRT's C++ frames, so one is kept here, cancels the build at the next
    step, and is raised when the ``guarded`` block ends.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._phases: dict[str, _Phase] = {}  # those that are open, the outermost first
        self._share = 0.0
        self._failure: BaseException | None = None

    def start(self, name: str, steps: int) -> None:
        """Open a phase inside of those that are open."""
        self._phases[name] = _Phase(max(1, steps))
        self._report(name)

    def step(self, name: str, step: int) -> bool:
        """Note that step ``step``, from 0, of a phase is done; False cancels the build."""
        if name in self._phases:
            self._phases[name].done = step + 1
            self._phases[name].inner = 0.0
        self._report(name)
        return self._failure is None

    def finish(self, name: str) -> None:
        """Close a phase; with the outermost the build has ended."""
        self._phases.pop(name, None)
        if self._phases:
            outer = next(reversed(self._phases.values()))
            outer.inner += (1 - outer.inner) / 2
        self._report(name)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep Ctrl-C until the block ends; until then it only cancels the build."""
        with _interrupts_to(self._keep):
            yield
        if self._failure is not None:
            raise self._failure

    def _keep(self, action: Callable[[], object]) -> None:
        """Do something whose exceptions are kept; the first is the one that counts."""
        try:
            action()
        except BaseException as failure:
            self._failure = self._failure or failure

    def _report(self, name: str) -> None:
        share = 0.0 if self._phases else 1.0
        for phase in reversed(self._phases.values()):
            within = phase.inner + (1 - phase.inner) / 2 * share
            share = min(1.0, (phase.done + within) / phase.steps)
        self._share = max(self._share, share)
        if self._progress is not None and self._failure is None:
            self._keep(partial(self._progress, name, self._share))


def attach(tensorrt: TensorRT, config: Any, progress: Progress | None) -> Watch:
    """Watch the build of an ``IBuilderConfig``; before 10.0 there is nothing to watch."""
    watch = Watch(progress)
    if not tensorrt.has_progress_monitor:
        return watch

    class Monitor(tensorrt.module.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            tensorrt.module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            watch.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return watch.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            watch.finish(phase_name)

    config.progress_monitor = Monitor()
    return watch


@contextmanager
def _interrupts_to(keep: Callable[[Callable[[], object]], None]) -> Iterator[None]:
    """Hand what the handler of Ctrl-C does to ``keep``; signals reach the main thread alone."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: keep(partial(usual, number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
