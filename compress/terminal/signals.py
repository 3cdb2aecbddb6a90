"""Signals with which schedulers and terminals ask a process to end, and the lifeline.

A lifeline is how a process learns that the one which started it is gone, however that ended. The
starter holds the other end of the process's stdin and never writes. The system closes it when the
starter dies, by ``kill -9`` too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
LIFELINE = "COMPRESS_LIFELINE"
"""The variable that a starter sets to tell a process that its stdin is a lifeline."""


ENDING = (signal.SIGTERM, *((signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()))
"""What a scheduler sends, and a terminal that is closed."""


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Have signals handled during the block; SIGTERM and SIGHUP unless they are ignored.

    In a thread that is not the main one nothing can be handled, and nothing is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = [n for n in ENDING if signal.getsignal(n) is signal.SIG_IGN]
    previous = {n: signal.signal(n, handler) for n in numbers if n not in kept}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does: a KeyboardInterrupt that cleans up.

    Whoever started this process with one of them ignored, as nohup does, has it ignored here too.
    """
    with handled(ENDING, signal.default_int_handler):
        yield


def hold_on() -> None:
    """Where stdin is a lifeline, have SIGTERM sent to this process when its other end closes.

    That saves the state and stops a run, and ends anything else. What reads stdin later on finds it
    empty, and processes that this one starts are not told of the lifeline.
    """
    if os.environ.pop(LIFELINE, None) is None:
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the starter may have ignored it
    line = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_watch, args=(line,), daemon=True).start()


def _watch(line: int) -> None:
    while os.read(line, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
