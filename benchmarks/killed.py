"""Runs of the command line that are killed with SIGKILL: at a moment of a run, or after a time.

``Runs`` starts this module once more as a process that imports everything, and forks a process of
it for every run. Such a process tells when its moment has come; whoever kills it is here.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

IMPORTED = (
    "bench.compare",
    "bench.pages.publish",
    "compress.runs.launch",
    "compress.runs.prune",
    "export.stage",
    "export.checkpoint_to_onnx",
    "sklearn.datasets",
    "sklearn.model_selection",
)
"""What takes seconds, and is the same for every run."""
STATE, PREVIOUS = "state.safetensors", "previous.safetensors"


@dataclass(frozen=True)
class Moment:
    """When to kill a run."""

    phase: str
    """``train``; ``prune``, which counts its steps on into finetuning; or ``end`` of both."""
    step: int
    """Training step after which the moment may come."""
    action: str = "step"
    """``step`` kills after it; ``half``, ``before`` and ``after`` while a file is written, before
    it takes its name, and after."""
    file: str = STATE

    def __str__(self) -> str:
        about = f"{self.action} {self.file}"
        if self.phase == "end" or self.file not in (STATE, PREVIOUS):
            return about
        where = f"{self.phase}, step {self.step}"
        return where if self.action == "step" else f"{where}, {about}"


STATE_ACTIONS = (
    ("step", STATE),
    ("half", STATE),
    ("before", PREVIOUS),
    ("before", STATE),
    ("after", STATE),
)
ENDS = (
    ("train", "half", "dense.safetensors"),
    ("train", "after", "dense.safetensors"),
    ("end", "half", "pruned.safetensors"),
    ("end", "after", "pruned.safetensors"),
    ("end", "before", "pruned.onnx"),
)


def drawn(kills: int, steps: dict[str, int], rng: random.Random) -> list[Moment]:
    """Draw moments in the order in which a run meets them.

    Args:
        kills: how many.
        steps: training steps of each phase in the run that is left alone.
        rng: decides.
    """
    ends = list(ENDS[: max(0, kills - 2)])
    actions = [STATE_ACTIONS[i % len(STATE_ACTIONS)] for i in range(kills - len(ends))]
    rng.shuffle(actions)
    # The last steps are left out: their state may be written before the moment can come.
    places = [(phase, step) for phase, last in steps.items() for step in range(1, last - 4)]
    chosen = sorted(rng.sample(range(len(places)), len(actions)))
    found = [Moment(*places[at], *action) for at, action in zip(chosen, actions, strict=True)]
    between = sum(moment.phase == "train" for moment in found)
    trained = [Moment("train", 1, *rest) for phase, *rest in ends if phase == "train"]
    over = [Moment("end", 0, *rest) for phase, *rest in ends if phase == "end"]
    return [*found[:between], *trained, *found[between:], *over]


# The process that is killed


def _hold(say: Callable[[], None]) -> None:
    """Tell that the moment has come, and wait for the end."""
    say()
    time.sleep(600)


def _arm(moment: Moment, say: Callable[[], None]) -> None:
    """Have this process come to the moment."""
    from compress.files import atomic as files
    from compress.runs import stages, state
    from compress.runs.dense import train_dense
    from compress.runs.prune import prune
    from compress.training.trainer import Trainer

    phase = [""]
    came = [moment.phase == "end"]

    def phased(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*arguments: Any) -> Any:
            phase[0] = name
            return work(*arguments)

        return entered

    vars(stages)["train_dense"] = phased("train", train_dense)
    vars(stages)["prune"] = phased("prune", prune)
    take, rename, write = Trainer.step, Path.replace, files.write_flushed

    def step(trainer: Trainer, *arguments: Any, **options: Any) -> bool:
        taken = take(trainer, *arguments, **options)
        if not came[0] and phase[0] == moment.phase and trainer.step_index >= moment.step:
            came[0] = True
            if moment.action == "step":
                say()  # and on: the kill comes whenever it comes
        return taken

    def replace(path: Path, target: Path) -> Path:
        meant = came[0] and Path(target).name == moment.file
        if meant and moment.action == "before":
            _hold(say)
        result = rename(path, target)
        if meant and moment.action == "after":
            _hold(say)
        return result

    def write_flushed(path: Path, data: bytes) -> None:
        if came[0] and moment.action == "half" and files.real_name(path.name) == moment.file:
            path.write_bytes(data[: len(data) // 2])
            _hold(say)
        write(path, data)

    Trainer.step, Path.replace = step, replace  # type: ignore[method-assign,assignment]
    files.write_flushed = write_flushed
    vars(state)["write_flushed"] = write_flushed


def _end_before_the_export() -> None:
    from bench import commands

    def end(*_: Any, **__: Any) -> None:
        os._exit(0)

    vars(commands)["export_stage"] = end


def _child(order: dict[str, Any], pipe: int) -> int:
    """Run the command line in this process, which may be killed on the way; return its code."""
    import cli

    os.dup2(2, 1)
    if order["moment"]:
        _arm(Moment(**order["moment"]), lambda: _send(pipe, {"here": True}))
    if order["until_pruned"]:
        _end_before_the_export()
    sys.argv = ["compress", *order["arguments"]]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def _send(pipe: int, document: dict[str, Any]) -> None:
    os.write(pipe, (json.dumps(document) + "\n").encode())


def nursery() -> None:
    """Import everything once; then fork a process for every line on stdin, and tell its end."""
    for name in IMPORTED:
        import_module(name)
    import torch

    torch.set_num_threads(1)  # sums over threads have no fixed order
    warnings.simplefilter("ignore")  # of a fork beside threads
    pipe = os.dup(1)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = _child(json.loads(line), pipe)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        _send(pipe, {"pid": pid})
        _send(pipe, {"ended": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


# The process that kills


class Runs:
    """Runs one command again and again, and kills it at moments.

    Args:
        until_pruned: end every run before its export.
    """

    def __init__(self, *, until_pruned: bool = False) -> None:
        self.until_pruned = until_pruned
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        here = Path(__file__).resolve()
        self._process = subprocess.Popen(
            [sys.executable, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"PYTHONPATH": str(here.parent.parent), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self.log.close()

    def run(self, arguments: Sequence[str], moment: Moment | None = None, delay: float = 0) -> int:
        """Run the command, killed so many seconds after the moment; return the exit code."""
        assert self._process.stdin
        order = {
            "arguments": list(arguments),
            "moment": asdict(moment) if moment else None,
            "until_pruned": self.until_pruned,
        }
        print(json.dumps(order), file=self._process.stdin, flush=True)
        pid, killed = 0, False
        while True:
            said = self._read()
            if "ended" in said:
                if moment and not killed:
                    raise RuntimeError(f"the run ended before {moment}:\n{self.said()}")
                return int(said["ended"])
            pid = said.get("pid", pid)
            killed = killed or "here" in said
            if "here" in said:
                time.sleep(delay)
            if killed and pid:  # either may be said first
                os.kill(pid, signal.SIGKILL)

    def killed_after(self, arguments: Sequence[str], seconds: float) -> bool:
        """Run the command, killed so many seconds after its start; return whether it still ran."""
        assert self._process.stdin
        order = {"arguments": list(arguments), "moment": None, "until_pruned": False}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        pid = self._read()["pid"]
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        code = int(self._read()["ended"])
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run failed with exit code {code}:\n{self.said()}")
        return code != 0

    def said(self) -> str:
        """Return what the processes said on stderr."""
        self.log.seek(0)
        return self.log.read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the processes cannot be started:\n{self.said()}")
        return json.loads(line)


if __name__ == "__main__":
    nursery()
