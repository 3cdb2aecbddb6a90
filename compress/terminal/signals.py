"""SIGTERM, with which schedulers and service managers ask a process to end, and the lifeline.

A lifeline is how a process learns that the one which started it is gone, however that ended. The
starter holds the other end of the process's stdin and never writes. The system closes it when the
starter dies, by ``kill -9`` too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIFELINE = "COMPRESS_LIFELINE"
"""The variable that a starter sets to tell a process that its stdin is a lifeline."""


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Have SIGTERM end the block as Ctrl-C does, with a KeyboardInterrupt that cleans up.

    Whoever started this process with SIGTERM ignored has it ignored here as well.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


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
