"""How a process of a sweep learns that the sweep is gone, however it ended.

The sweep holds the other end of the process's stdin and never writes. The system closes it when the
sweep dies, by ``kill -9`` too.
"""

from __future__ import annotations

import os
import signal
import threading


def hold_on() -> None:
    """Take stdin for a lifeline: when its other end closes, this process gets SIGTERM.

    That saves the state and stops a run, and ends anything else. What reads stdin later on finds it
    empty.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever started the sweep may have ignored it
    line = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_watch, args=(line,), daemon=True).start()


def _watch(line: int) -> None:
    while os.read(line, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
