"""What torchrun, SLURM and Kubernetes say in the environment of the processes that they start."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress

from compress.errors import ConfigError

RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables in which schedulers count how often they have started a command again."""


def started_again() -> bool:
    """Return whether a scheduler says that this is not the first start of the command."""
    counts = (os.environ.get(name, "") for name in RESTART_COUNTS)
    return any(count.isdecimal() and int(count) > 0 for count in counts)


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are: RANK and WORLD_SIZE.

    Raises:
        ConfigError: what they say is no pair of numbers.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"RANK = {rank!r} and WORLD_SIZE = {size!r} of the environment are no number of a "
            "process and of processes: start with torchrun, or unset them"
        )
    return int(rank), int(size)


def ranks_here() -> int:
    """Return how many processes run on this host, or in all where nothing says it."""
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(here) if here.isdecimal() and int(here) else rank_and_size()[1]


def is_main() -> bool:
    """Return whether this process speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


def leave(code: int) -> None:
    """End a process of several at once, after all that Python does at its exit; else do nothing.

    Gloo's threads outlive the process group. One that asks for the interpreter while that is taken
    down aborts the process ("terminate called without an active exception", torch 2.10), and the
    launcher takes a run that has finished for one that failed.
    """
    with suppress(ConfigError):
        if rank_and_size()[1] > 1:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def require_one_process(command: str) -> None:
    """Refuse a command that several processes would only repeat.

    Raises:
        ConfigError: there are several.
    """
    size = rank_and_size()[1]
    if size > 1:
        raise ConfigError(
            f"compress {command} runs in one process and WORLD_SIZE says {size}: start it without "
            "torchrun; train, prune and run take several"
        )
