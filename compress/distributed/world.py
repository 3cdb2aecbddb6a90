"""The processes that train one network together; torchrun starts them, one for each GPU.

The minibatch of the configuration is that of all processes: each takes its share, gradients and
counts are joined, and every process takes the same decisions. A run is therefore the same run
whatever the number of its processes, up to the order in which floating-point numbers are added, and
up to the statistics of BatchNorm, unless ``compute.sync_batchnorm`` joins these too.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from compress.distributed.meeting import fresh_store
from compress.distributed.torchrun import rank_and_size
from compress.errors import ConfigError, EnvironmentUnfitError, RunError

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process; rank 0 alone writes files and draws plots meanwhile."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them; alone, every method returns at once."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over processes, on the device of ``values``, which stay as they are."""
        if self.alone:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def total(self, number: int) -> int:
        """Return the sum over processes of a whole number."""
        return int(self.sum(torch.tensor(number, device=_control_device())))

    def mean(self, number: float) -> float:
        """Return the mean over processes."""
        values = torch.tensor(number, dtype=torch.float64, device=_control_device())
        return float(self.sum(values)) / self.size

    def each(self, number: int) -> list[int]:
        """Return a number of every process, by rank."""
        if self.alone:
            return [number]
        device = _control_device()
        found = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(int(number), device=device))
        return [int(each) for each in found]

    def any(self, flag: bool) -> bool:
        """Return whether any process says so."""
        return flag if self.alone else self.total(flag) > 0

    def first(self, flag: bool) -> bool:
        """Return what rank 0 says."""
        return bool(self.each(flag)[0])

    def from_first(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tensor of rank 0, on the CPU; it has one shape in all processes."""
        if self.alone:
            return values
        shared = values.detach().to(_control_device(), copy=True)
        dist.broadcast(shared, 0)
        return shared.cpu()

    def text_from_first(self, text: str) -> str:
        """Return the first process's text; what the others give is not looked at."""
        if self.alone:
            return text
        written = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = int(self.from_first(torch.tensor(len(written))))
        own = written if self.main else torch.zeros(length, dtype=torch.uint8)
        return bytes(self.from_first(own).tolist()).decode()

    def wait(self) -> None:
        """Wait for every process."""
        self.each(0)

    @torch.no_grad()
    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of rank 0, such as running statistics."""
        if not self.alone:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)

    @torch.no_grad()
    def average_buffers(self, network: nn.Module) -> None:
        """Replace every floating-point buffer by its mean over processes."""
        if not self.alone:
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer) / self.size)

    def require_same(self, what: str, content: bytes) -> None:
        """Compare something that must be equal in every process.

        Args:
            what: its name, for the message.
            content: what is compared, by its SHA-256.

        Raises:
            RunError: it differs.
        """
        digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)
        digests = self.each(digest)
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            ranks = ", ".join(map(str, others))
            raise RunError(
                f"{what} of rank {ranks} is not that of rank 0: the processes do not compute the "
                "same (other GPUs, other versions, other files?), so the run stops; start them "
                "alike and go on from its saved state"
            )


ALONE = World()


def current() -> World:
    """Return the processes that this one was joined with."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return World(dist.get_rank(), dist.get_world_size())


def _control_device() -> torch.device:
    """Where small messages lie: on the CPU, but for processes that NCCL alone joins."""
    if not dist.is_initialized() or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def launched() -> World:
    """Return the processes that the environment speaks of.

    Raises:
        ConfigError: what it says is no pair of numbers.
    """
    return World(*rank_and_size())


def device_name(name: str) -> str:
    """Return the device of this process where every process has its own: cuda becomes cuda:N.

    Raises:
        ConfigError: one GPU is named for several processes.
        EnvironmentUnfitError: there are fewer GPUs than processes.
    """
    if launched().alone or name == "cpu":
        return name
    if name.startswith("cuda:"):
        raise ConfigError(
            f"device = {name!r} is one GPU for {launched().size} processes: write cuda"
        )
    if name == "auto" and not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise EnvironmentUnfitError(
            f"process {local + 1} of this host finds {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node"
        )
    return f"cuda:{local}"


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that the environment speaks of, and part at the end.

    Args:
        device: this process's; GPUs are joined by NCCL, CPUs and all control messages by Gloo.

    Raises:
        EnvironmentUnfitError: they cannot be joined.
        RunError: another process failed.
    """
    world = launched()
    if world.alone or dist.is_initialized():
        yield current()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with _stdout_to_stderr():
            dist.init_process_group(
                backend,
                store=fresh_store(TIMEOUT),
                rank=world.rank,
                world_size=world.size,
                timeout=TIMEOUT,
            )
    except (RuntimeError, ValueError) as error:
        raise EnvironmentUnfitError(
            f"the {world.size} processes of this run cannot be joined: {error}"
        ) from error
    try:
        yield world
    except RuntimeError as error:
        if not _another_failed(error):
            raise
        raise RunError("another process of this run ended; its own message says why") from error
    finally:
        part()


def part() -> World:
    """Leave the other processes; return what this one was among them."""
    world = current()
    if not world.alone:
        dist.destroy_process_group()
    return world


def _another_failed(error: RuntimeError) -> bool:
    """Whether a collective operation ended because its partner went away."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return any(sign in str(error) for sign in (*signs, "Timed out waiting"))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what libraries print by themselves to stderr: stdout belongs to the results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
