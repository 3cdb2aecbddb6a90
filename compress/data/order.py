"""Which images make up the batches of an epoch, and which of them one rank reads.

A batch is shared by the ranks that train together: its size is that of the joined batch. Nothing
here reads an image; everything follows from numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """The part of every batch that is one rank's: its positions ``rank::ranks``."""

    batch_size: int
    """Images per batch, over all ranks."""
    rank: int = 0
    ranks: int = 1

    def steps(self, images: int) -> int:
        """Return the batches of an epoch: whole ones, or one partial if that is all there is."""
        return images // self.batch_size or min(images, 1)

    def joined(self, images: int) -> int:
        """Return the size of the batches of an epoch over all ranks."""
        return min(self.batch_size, images)


def shuffled(images: int, share: Share, rng: np.random.Generator) -> Int64s:
    """Return one rank's positions in a set of ``images``, any image equally likely anywhere.

    The ranks' parts of a batch make up the batch that one process alone would read.

    Returns:
        (steps, images of the rank per step).
    """
    steps, joined = share.steps(images), share.joined(images)
    order = rng.permutation(images)[: steps * joined].reshape(steps, joined)
    return order[:, share.rank :: share.ranks]


def streamed(first: Int64s, window: int, share: Share, rng: np.random.Generator) -> Int64s:
    """Return one rank's positions in a set that lies in shards, so that few are read at a time.

    The shards are permuted. Each rank takes a run of the images in that order, in proportion to its
    part of a batch; then the images of every ``window`` of its shards are permuted. What is left
    over at the end of a run is left out, and changes with the order of the shards.

    Args:
        first: (S + 1,) position of the first image of every shard, and the number of images.
        window: Shards whose images are mixed.
        share: Which rank.
        rng: The same on every rank.

    Returns:
        (steps, images of the rank per step).
    """
    images = int(first[-1])
    steps, joined = share.steps(images), share.joined(images)
    parts = [len(range(rank, joined, share.ranks)) for rank in range(share.ranks)]
    permutation = rng.permutation(len(first) - 1)
    own = np.random.default_rng(rng.integers(2**63, size=share.ranks)[share.rank])
    before, part = sum(parts[: share.rank]), parts[share.rank]
    begin, end = (images * position // max(joined, 1) for position in (before, before + part))
    pieces = _pieces(first, permutation, begin, end)
    mixed = [
        own.permutation(np.concatenate(pieces[at : at + window]))
        for at in range(0, len(pieces), window)
    ]
    order = np.concatenate([np.empty(0, dtype=np.int64), *mixed])
    return order[: steps * part].reshape(steps, part)


def fetched_ahead(shards: Int64s, window: int) -> list[tuple[int, ...]]:
    """Return which shards to fetch during each step, so that they are there when they are read.

    While the images of one window are read the shards of the next are fetched: over the first half
    of its steps, so that reading does not wait for all of them at once.

    Args:
        shards: (steps, images per step) the shard of each image, in the order of ``streamed``.
        window: Shards whose images are mixed.
    """
    plan: list[list[int]] = [[] for _ in shards]
    used, first = np.unique(shards, return_index=True)
    by_use = np.argsort(first)
    order, begins = used[by_use].tolist(), first[by_use] // max(1, shards.shape[1])
    starts = begins[::window].tolist()
    for number in range(window, len(order)):
        now = number // window - 1
        steps = starts[now + 1] - starts[now]
        plan[starts[now] + steps * (number % window) // (2 * window)].append(order[number])
    return list(map(tuple, plan))


def _pieces(first: Int64s, permutation: Int64s, begin: int, end: int) -> list[Int64s]:
    """Return what lies at ``begin:end`` of permuted shards, the images of each shard apart."""
    ends = np.cumsum(np.diff(first)[permutation])
    found = []
    for shard, shard_end in zip(permutation.tolist(), ends.tolist(), strict=True):
        start, stop = int(first[shard]), int(first[shard + 1])
        shard_begin = shard_end - (stop - start)
        if shard_begin < end and shard_end > begin:
            low, high = max(begin - shard_begin, 0), min(end, shard_end) - shard_begin
            found.append(np.arange(start + low, start + high))
    return found
