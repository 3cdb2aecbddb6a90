"""How sure a change of accuracy is: the images that a network answers otherwise than the dense."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.permission import Permission
from compress.config import RunConfig
from compress.data.batches import eval_batches
from compress.data.datasets import load_data
from compress.networks.capture import in_mode
from compress.training.compute import pick_device

TAIL = 0.025
"""Probability outside of the interval at each end: it is one of 95 %."""


class Flips(NamedTuple):
    """Validation images by what two networks answer."""

    to_wrong: int
    """The dense network is right, the other one wrong."""
    to_right: int
    """The other way round."""
    images: int
    """That were read, of all kinds."""


class ShareInterval(Protocol):
    """Bounds of (worse - better) / images, as ``bench.statistics.shares.tango_interval``."""

    def __call__(
        self, worse: float, better: float, images: float, *, tail: float
    ) -> tuple[float, float]:
        """Return both, as shares; ``tail`` is the probability outside at each end."""


@torch.inference_mode()
def count_flips(dense: Path, others: Mapping[str, Path], config: RunConfig) -> dict[str, Flips]:
    """Compare the dense network with others on the validation images, all of them in one walk.

    Args:
        dense: file of the dense network.
        others: files of the others, by their names.
        config: gives the data, the network and the device.

    Raises:
        CheckpointError: a file is missing or damaged.
        DataError: the images cannot be read.
    """
    device, data = pick_device(config.device), load_data(config.data)
    networks = {
        name: load_checkpoint(file, Permission(config.model)).model.to(device)
        for name, file in others.items()
    }
    reference = load_checkpoint(dense, Permission(config.model)).model.to(device)
    # (networks, 2): to wrong, to right
    counts = torch.zeros(len(networks), 2, dtype=torch.int64, device=device)
    images = 0
    with ExitStack() as stack:
        for network in (reference, *networks.values()):
            stack.enter_context(in_mode(network))
        for batch in eval_batches(
            data.val,
            batch_size=config.data.eval_batch_size,
            workers=config.data.workers,
            for_gpu=device.type == "cuda",
        ):
            if not len(batch.labels):  # none of it could be read
                continue
            pixels, labels = batch.to(device)
            before = reference(pixels).argmax(1) == labels
            for count, network in zip(counts, networks.values(), strict=True):
                after = network(pixels).argmax(1) == labels
                count += torch.stack([(before & ~after).sum(), (~before & after).sum()])
            images += len(labels)
    return {
        name: Flips(to_wrong, to_right, images)
        for name, (to_wrong, to_right) in zip(networks, counts.tolist(), strict=True)
    }


def drop_interval(flips: Flips, interval: ShareInterval) -> tuple[float, float]:
    """Return the bounds of the drop, in percentage points."""
    low, high = interval(flips.to_wrong, flips.to_right, flips.images, tail=TAIL)
    return 100 * low, 100 * high
