"""Several processes on one machine, joined by Gloo as torchrun would join them."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as processes

from compress.distributed.world import joined, launched


def together(ranks: int, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """Call a function of an importable module in every rank, and return the results by rank.

    One that raises gives its exception; one that is killed gives its exit code.
    """
    spawned = processes.get_context("spawn")
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for rank in range(ranks):
        here, there = spawned.Pipe()
        place = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = spawned.Process(target=_take_part, args=(there, place, work, arguments))
        process.start()
        there.close()
        started.append((process, here))
    return [_answer(*each) for each in started]


def _answer(process: Any, here: Connection) -> Any:
    try:
        written = here.recv_bytes()
    except EOFError:
        written = b""
    process.join()
    return torch.load(io.BytesIO(written), weights_only=False) if written else process.exitcode


def _take_part(
    there: Connection, place: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    try:
        with joined(torch.device("cpu")):
            assert launched().size == int(place["WORLD_SIZE"])
            answer = work(*arguments)
    except Exception as error:
        if not type(error).__module__.startswith("compress"):
            traceback.print_exc()
        answer = error
    written = io.BytesIO()  # torch would send tensors through files of a process that is gone
    torch.save(answer, written)
    there.send_bytes(written.getvalue())


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])
