"""The true importance of units: what the loss becomes when each is really removed.

For every unit u, change[u] = L(z_u = 0) - L(dense): the difference of the mean cross-entropy over a
fixed set of images, with the gate where readers read, so that z_u = 0 is what a shrink does. The
square of the change is the importance that criteria estimate (Molchanov et al. 2019, equation 2).
What is measured is logged, one JSON object a line, so that a stopped measurement goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from compress.errors import CheckpointError, ConfigError, ModelError, nearest, writing
from compress.files.atomic import write_atomically
from compress.files.documents import parsed_json
from compress.networks.groups import ChannelGraph, Group, Units
from compress.oracle.replay import TENSOR_BYTES, DensePass, Plan, Replay

PIECE_MACS = 50 * 10**9
"""Work between two lines of the log: a few seconds of one core."""
FEWEST_IMAGES = 16
"""Of one batch, however large the values: every batch adds its lines to the log."""
MOST_PAIRS = 20_000
SCHEMA_VERSION = 1
"""Of the log."""
DENSE = "dense loss"
"""The name of the log's lines that hold the loss of the dense network."""


@dataclass(frozen=True)
class Job:
    """Removals that share what must run again."""

    name: str
    removed: Units
    """(removals, units of each)."""
    plan: Plan

    @property
    def macs(self) -> int:
        """Multiply-adds for one image."""
        return len(self.removed) * self.plan.macs

    def pieces(self, images: int) -> Iterator[slice]:
        """Yield the removals between two lines of the log."""
        size = max(1, PIECE_MACS // max(1, images * self.plan.macs))
        for first in range(0, len(self.removed), size):
            yield slice(first, min(first + size, len(self.removed)))


@dataclass(frozen=True)
class Measured:
    """What was measured."""

    dense_loss: float
    """Mean cross-entropy of the dense network."""
    removed: Units
    """(removals, units of each)."""
    changes: NDArray[np.float64]
    """(removals,) change of the mean cross-entropy."""


def single_jobs(replay: Replay, graph: ChannelGraph) -> list[Job]:
    """Return the removal of every unit that may be pruned, one at a time."""
    return _in_order(
        Job(group.name, group.units[:, None], replay.plan(group.units)) for group in graph.prunable
    )


def pair_jobs(replay: Replay, graph: ChannelGraph, wanted: str) -> list[Job]:
    """Return the removal of every pair of units of one group, or of ``all`` groups.

    Raises:
        ConfigError: no such group, or more pairs than can be tried.
    """
    groups = pair_groups(graph, wanted)
    jobs = []
    for index, first in enumerate(groups):
        rows, columns = np.triu_indices(first.size, 1)
        within = np.stack([first.units[rows], first.units[columns]], 1)
        if len(within):
            jobs.append(Job(first.name, within, replay.plan(first.units)))
        for second in groups[index + 1 :]:
            across = np.stack(np.meshgrid(first.units, second.units, indexing="ij"), -1)
            plan = replay.plan(np.concatenate([first.units, second.units]))
            jobs.append(Job(f"{first.name} x {second.name}", across.reshape(-1, 2), plan))
    return _in_order(jobs)


def pair_groups(graph: ChannelGraph, wanted: str) -> tuple[Group, ...]:
    """Return the groups whose pairs are asked for.

    Raises:
        ConfigError: no such group that may be pruned, or too many pairs, or none.
    """
    names = [group.name for group in graph.prunable]
    if wanted != "all" and wanted not in names:
        raise ConfigError(
            f"no group that may be pruned is named {wanted!r}: {nearest(wanted, ['all', *names])}"
        )
    groups = tuple(g for g in graph.prunable if wanted in ("all", g.name))
    units = sum(group.size for group in groups)
    pairs = units * (units - 1) // 2
    if pairs > MOST_PAIRS:
        raise ConfigError(
            f"--pairs {wanted} asks for {pairs:,} pairs of {units:,} units and at most "
            f"{MOST_PAIRS:,} are tried: name one group of at most 200 units"
        )
    if not pairs:
        raise ConfigError(f"--pairs {wanted} has one unit, and a pair needs two: name another")
    return groups


def images_at_once(jobs: Sequence[Job], limit: int, device: str) -> int:
    """Return the number of images of one batch: as many as keep every value small.

    Args:
        jobs: what is measured.
        limit: most images.
        device: kind of device that it runs on.
    """
    largest = max((job.plan.largest for job in jobs), default=1)
    return min(limit, max(FEWEST_IMAGES, TENSOR_BYTES[device] // (4 * largest)))


@torch.no_grad()
def measure(
    replay: Replay,
    jobs: Sequence[Job],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    log: ChangeLog,
    batch_size: int,
    after_piece: Callable[[float], None] = lambda share: None,
) -> Measured:
    """Measure the change of the loss for every removal, as far as the log does not hold it.

    Args:
        replay: the network.
        jobs: the removals.
        images: (N, C, H, W), normalised; batches move to the network's device.
        labels: (N,).
        log: where every finished piece is written, and where those of an earlier run are.
        batch_size: images of one batch.
        after_piece: called with the share of the work that is done; may raise to stop.

    Raises:
        ModelError: the loss of the dense network is not finite.
        OutputError: the log cannot be written.
    """
    device = replay.device
    dense = 0.0
    totals = {job.name: np.zeros(len(job.removed)) for job in jobs}
    whole, done = len(images) * max(1, sum(job.macs for job in jobs)), 0
    with _exact(device):
        for number, first in enumerate(range(0, len(images), batch_size)):
            part = slice(first, first + batch_size)
            pair = images[part].to(device), labels[part].to(device)
            batch = _Batch(replay, jobs, *pair, number=number, log=log)
            dense += batch.dense_sum()
            if not np.isfinite(dense):
                raise ModelError(f"the loss of the dense network is {dense} on these images")
            for job in jobs:
                for piece in job.pieces(batch.count):
                    totals[job.name][piece] += batch.changes(job, piece)
                    done += batch.count * job.plan.macs * (piece.stop - piece.start)
                    after_piece(done / whole)
                batch.done(job)
    return Measured(
        dense / len(images),
        np.concatenate([job.removed for job in jobs]),
        np.concatenate([totals[job.name] for job in jobs]) / len(images),
    )


class _Batch:
    """One batch of images: the dense pass, run only if something is left to measure."""

    def __init__(
        self,
        replay: Replay,
        jobs: Sequence[Job],
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        number: int,
        log: ChangeLog,
    ) -> None:
        self.replay, self.images, self.labels = replay, images, labels
        self.number, self.log = number, log
        self.count = len(images)
        self.dense_pass = DensePass(replay, images, [job.plan for job in jobs])
        self._losses: torch.Tensor | None = None

    def dense_sum(self) -> float:
        """Return the summed loss of the dense network."""
        key = Key(self.number, DENSE, 0)
        return self.log.entry(key, lambda: [float(self._dense().sum())])[0]

    def changes(self, job: Job, piece: slice) -> list[float]:
        """Return the change of the summed loss for some removals of a job."""
        key = Key(self.number, job.name, piece.start)
        return self.log.entry(key, lambda: self._measured(job, piece))

    def done(self, job: Job) -> None:
        """Forget what only this job has needed."""
        self.dense_pass.done(job.plan)

    def _measured(self, job: Job, piece: slice) -> list[float]:
        if self.replay.logits not in job.plan.nodes:  # nothing that counts reads these units
            return [0.0] * (piece.stop - piece.start)
        kept = self.dense_pass.until(job.plan)
        limit = TENSOR_BYTES[self.images.device.type]
        copies = max(1, limit // (4 * self.count * job.plan.largest))
        found = []
        for first in range(piece.start, piece.stop, copies):
            removed = job.removed[first : min(first + copies, piece.stop)]
            losses = _losses(self.replay.run_again(job.plan, kept, removed), self.labels)
            found.append((losses - self._dense()).sum(1))
        return [float(value) for value in torch.cat(found).tolist()]

    def _dense(self) -> torch.Tensor:
        if self._losses is None:
            images = self.images.to(memory_format=self.replay.memory_format)
            self._losses = _losses(self.replay.network(images)[None], self.labels)
        return self._losses


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(copies, N, classes) logits -> (copies, N) cross-entropies in float64."""
    copies = len(logits)
    flat = F.cross_entropy(logits.flatten(0, 1).double(), labels.repeat(copies), reduction="none")
    return flat.view(copies, -1)


def _in_order(jobs: Iterator[Job] | list[Job]) -> list[Job]:
    """Sort by where the dense pass must be, so that few of its values are kept at a time."""
    return sorted(jobs, key=lambda job: job.plan.ready)


def _exact(device: torch.device) -> AbstractContextManager[object]:
    """Full float32 and the same order of sums every time: changes can be tiny."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )


# The log


class Key(NamedTuple):
    """Which figures a line holds."""

    batch: int
    """Number of the batch of images."""
    removed: str
    """Name of the job: a group, or two."""
    first: int
    """Position of the first removal in the job."""


class ChangeLog:
    """A file of figures under keys, each written as soon as it is known.

    The first line says what is measured. Figures are sums over the images of a batch. Floats are
    written so that they read back exactly, so a resumed file equals one that was never stopped.

    Args:
        path: the file; what is there is gone on with.
        identity: what is measured; equal for all runs that may share the file.

    Raises:
        ConfigError: the file there is of another measurement.
        CheckpointError: the file there is damaged.
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.entries: dict[Key, list[float]] = {}
        header = {"schema_version": SCHEMA_VERSION, **identity}
        text = self._text()
        # A line that a kill or a full disk cut off was never finished.
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not whole:
            write_atomically(path, json.dumps(header) + "\n")
            return
        self._read(whole, header)
        if "".join(whole) != text:
            write_atomically(path, "".join(whole))

    def _text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        except ValueError as error:
            raise self._damaged() from error

    def _damaged(self) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: start anew with --overwrite")

    def entry(self, key: Key, compute: Callable[[], list[float]]) -> list[float]:
        """Return the figures of a key; what is not there is computed and written."""
        if key not in self.entries:
            self.entries[key] = compute()
            line = json.dumps({**key._asdict(), "sums": self.entries[key]})
            with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        return self.entries[key]

    def _read(self, lines: list[str], header: dict[str, Any]) -> None:
        try:
            found, *documents = map(parsed_json, lines)
            self._check(found, header)
            for document in documents:
                sums, key = _numbers(document.pop("sums")), Key(**document)
                if type(key.batch) is not int or type(key.first) is not int or min(key[::2]) < 0:
                    raise ValueError(key)
                self.entries[key] = sums
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise self._damaged() from error

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for name, wanted in header.items():
            if found.get(name) != wanted:
                raise ConfigError(
                    f"{self.path} was measured with {name} = {_short(found.get(name))} and now "
                    f"{_short(wanted)} is given: give the same, or start anew with --overwrite"
                )


def _numbers(values: list[Any]) -> list[float]:
    if not all(type(value) in (int, float) for value in values):
        raise TypeError("numbers")
    return list(map(float, values))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12]
