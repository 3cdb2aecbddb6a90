"""The loop that all training phases share: batches in, epochs counted, state saved, bar moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from compress.config import RunConfig
from compress.data.batches import ImageData, TrainBatches, eval_batches, require_images
from compress.data.loading import Batch
from compress.data.readable import Readable, counted
from compress.distributed.world import ALONE, World
from compress.errors import DataError
from compress.runs.session import Session
from compress.runs.state import State
from compress.terminal.progress import Bar
from compress.training.evaluate import Accuracy, evaluate
from compress.training.trainer import SMALLEST_BATCH, Trainer


@dataclass
class Loop:
    """Training steps over a data set, resumable at any of them."""

    trainer: Trainer
    data: ImageData
    config: RunConfig
    session: Session
    bar: Bar

    def __post_init__(self) -> None:
        self.world = self.trainer.world
        self.batches = train_batches(self.data, self.config, self.trainer.device.type, self.world)

    def run(
        self,
        step: Callable[[Batch], object],
        *,
        snapshot: Callable[[], State],
        finished: Callable[[], bool],
        each_epoch: Callable[[int], None] | None = None,
    ) -> None:
        """Take steps until ``finished``; call ``each_epoch`` whenever one is complete."""
        trainer, per_epoch = self.trainer, len(self.batches)
        while not finished():
            epoch, offset = divmod(trainer.step_index, per_epoch)
            read = trained = 0
            for batch in self.batches.epoch(epoch, start=offset):
                step(batch)
                read += len(batch.images)
                trained += len(batch.images) >= SMALLEST_BATCH
                self.bar.at(trainer.step_index)
                done, rest = divmod(trainer.scheduled, per_epoch)
                if each_epoch and rest == 0:
                    each_epoch(done)
                self.session.after_step(snapshot)
                if finished():
                    return
            if not offset:  # the rest of an epoch says nothing about the whole
                require_images(self.world.total(read), trainer.all_skipped, purpose="training")
                if not self.world.any(trained > 0):
                    raise DataError(
                        f"no batch of {self.config.data.batch_size} held two readable images: "
                        "raise data.batch_size, or mend the files"
                    )

    def accuracy(self) -> Accuracy:
        """Measure what training has yielded so far on the validation set."""
        return accuracy_of(self.trainer.result, self.data, self.config, self.world)

    def record_epoch(self, phase: str, epoch: int) -> None:
        """Evaluate, write one line of history and show it."""
        measured = self.accuracy()
        loss = self.trainer.mean_loss()
        self.session.record(
            "epoch",
            phase=phase,
            epoch=epoch,
            step=self.trainer.step_index,
            loss=loss,
            lr=self.trainer.lr,
            train_skipped=self.trainer.all_skipped,
            **measured.as_dict(),
        )
        self.bar.at(self.trainer.step_index, f"loss {loss:.3f}  top-1 {measured.top1:.2f} %")


def train_batches(
    data: ImageData, config: RunConfig, device: str, world: World = ALONE
) -> TrainBatches:
    """Return this process's share of the training batches of a run."""
    return TrainBatches(
        data,
        batch_size=config.data.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        for_gpu=device == "cuda",
        rank=world.rank,
        ranks=world.size,
        limit=config.data.limit_batches,
    )


def accuracy_of(
    model: nn.Module, data: ImageData, config: RunConfig, world: World = ALONE
) -> Accuracy:
    """Measure the accuracy of a network on the validation set, on the network's device.

    Raises:
        DataError: too many images cannot be read, or all of a class.
    """
    device = next(model.parameters()).device
    world.share_buffers(model)
    batches = eval_batches(
        data.val,
        batch_size=config.data.eval_batch_size,
        workers=config.data.workers,
        for_gpu=device.type == "cuda",
        rank=world.rank,
        ranks=world.size,
    )
    read = torch.zeros(data.num_classes, dtype=torch.int64)

    def counting() -> Iterator[Batch]:
        for batch in batches:
            read.add_(torch.from_numpy(counted(batch.labels.numpy(), data.num_classes)))
            yield batch

    accuracy = evaluate(model, counting(), device, world)
    readable = Readable.of(data.val, data.classes, config.data.max_skipped)
    readable.require(accuracy.skipped, world.sum(read).numpy())
    return accuracy
