"""The events of a run as scalars for TensorBoard.

Dense training counts its steps from 0, and so does pruning, with the finetuning that follows it. So
they are two runs to TensorBoard, ``train`` and ``prune``: it draws them into the same charts, one
colour each, and one of them can be resumed without a word to the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # slow to import, so it is done with the first event
    from tensorboard.compat.proto.event_pb2 import Event

log = logging.getLogger("compress")

TAGS = {
    "loss": "training/loss",
    "lr": "training/learning_rate",
    "top1": "accuracy/top1",
    "top5": "accuracy/top5",
    "channels": "left/channels",
    "macs": "left/macs",
    "params": "left/params",
    "importance": "importance",
    "widths": "widths",
}
"""Facts that are drawn, and where; a fact with parts gives one scalar for each of them."""

FACTS = {
    "dense": ("top1", "top5"),
    "epoch": ("loss", "lr", "top1", "top5"),
    "prune_step": ("loss", "lr", "channels", "macs", "params", "importance", "widths"),
    "prune_pause": ("loss", "lr"),
    "pruned": ("top1", "top5"),
}
"""Events that are drawn, and what of them: no scalar comes twice at one step."""


class Scalar(NamedTuple):
    """One point of one chart."""

    tag: str
    value: float
    step: int


def run_of(phase: str) -> str:
    """Return the run, as TensorBoard has it, that a phase belongs to: one for each step count."""
    return "train" if phase == "train" else "prune"


def scalars(event: Mapping[str, Any]) -> list[Scalar]:
    """Return what is drawn of one event of the history; facts that it lacks are left out."""
    step = event.get("step", 0 if event["event"] == "dense" else None)
    if step is None:
        return []
    return [
        Scalar(tag, value, step)
        for fact in FACTS.get(event["event"], ())
        for tag, value in _numbers(TAGS[fact], event.get(fact))
    ]


def _numbers(tag: str, fact: Any) -> Iterator[tuple[str, float]]:
    if isinstance(fact, Mapping):
        for part, value in fact.items():
            yield from _numbers(f"{tag}/{part}", value)
    elif isinstance(fact, int | float) and not isinstance(fact, bool):
        yield tag, float(fact)


class Curves:
    """TensorBoard's files of one run, appended to event by event, one folder for each step count.

    TensorBoard's own writer has a thread, which prints a traceback when the disk is full and lives
    on while data loaders fork. These files are written as ``history.jsonl`` is: opened, appended to
    and closed. They are a by-product: when they cannot be written there is one warning and no more
    of them, and the run goes on.

    Args:
        folder: made with the first scalar.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._last: dict[str, int] = {}
        self._failed = False

    def resume(self, phase: str, step: int) -> None:
        """Have TensorBoard forget what an earlier process drew of a phase after a step."""
        self._files.pop(run_of(phase), None)
        self._last[run_of(phase)] = step

    def add(self, event: Mapping[str, Any]) -> None:
        """Draw one event of the history."""
        found = scalars(event)
        if not found or self._failed:
            return
        try:
            self._append(run_of(event.get("phase", event["event"])), found)
        except OSError as error:
            self._failed = True
            log.warning("cannot write %s, so there are no more curves: %s", self._folder, error)

    def _append(self, run: str, found: list[Scalar]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [_summary(found)]
        if run not in self._files:
            self._files[run] = _next_file(self._folder / run)
            events = [*_opening(self._last.get(run, 0) + 1), *events]
        with self._files[run].open("ab") as stream:
            for event in events:
                RecordWriter(stream).write(event.SerializeToString())


def _next_file(folder: Path) -> Path:
    """Return a name that TensorBoard, which goes by names, reads after those that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"events.out.tfevents.{len([*folder.iterdir()]):010d}"


def _opening(step: int) -> list[Event]:
    """Return what a file begins with: its version, and what it makes of the files before it.

    TensorBoard forgets all that those hold of this step and of later ones.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    now = time.time()
    start = SessionLog(status=SessionLog.START)
    return [
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=step, session_log=start),
    ]


def _summary(found: list[Scalar]) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value, _ in found]
    return Event(wall_time=time.time(), step=found[0].step, summary=Summary(value=values))
