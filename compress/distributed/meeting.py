"""How the processes of a run find each other, also those that were started again.

torchrun keeps its store over restarts. What a dead process left there, such as the address that it
listened at, would be taken for that of the process in its place. So they agree on a name that no
earlier start has used, and keep everything under it.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from compress.errors import EnvironmentUnfitError

PAUSE = 0.02
"""Seconds between two looks at the store."""


def fresh_store(timeout: timedelta) -> Store:
    """Return the store that the environment names, below a name of this start alone.

    Raises:
        EnvironmentUnfitError: not every process came in time.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    name = _answer(store, rank) if rank else _invite(store, size, timeout)
    return PrefixStore(name, store)


def _invite(store: Store, size: int, timeout: timedelta) -> str:
    """Give every process that asks the name of this start, until each has confirmed it.

    The question of a dead process may still lie there; its answer is read by nobody.
    """
    name, missing = secrets.token_hex(8), set(range(1, size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks {rank}"]):
                question = store.get(f"asks {rank}").decode()
                store.set(f"answer {rank} {question}", name)
            if store.check([f"confirms {rank} {name}"]):
                missing.discard(rank)
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)))
            raise EnvironmentUnfitError(f"rank {ranks} of this run did not come in time")
        time.sleep(PAUSE)
    return name


def _answer(store: Store, rank: int) -> str:
    question = secrets.token_hex(8)
    store.set(f"asks {rank}", question)
    name = store.get(f"answer {rank} {question}").decode()  # waits for it
    store.set(f"confirms {rank} {name}", "")
    return name
