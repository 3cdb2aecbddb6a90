"""What the ranks of test_distributed.py do, and one process on the joined batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import lived_in
from judges import Scores
from networks import NETWORKS
from runs import DATA, config_of
from torch import nn

from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.permission import Permission
from compress.config import ComputeConfig, RunConfig, TrainConfig
from compress.criteria import bind
from compress.criteria.scoring import Context
from compress.data.batches import TrainBatches
from compress.data.loading import Batch
from compress.distributed.world import ALONE, World, current
from compress.networks.analysis import analyse
from compress.runs.loop import accuracy_of
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.training.compute import memory_format_for
from compress.training.trainer import Trainer
from export.quantizing import quantizer_for

IMAGES = 12
"""Of the joined minibatch."""
SHARES = {1: [12], 2: [7, 5], 4: [4, 3, 3, 2]}
"""Images of each rank, of different numbers, as broken images leave them."""
PLAIN = {"lr": 0.05, "schedule": "constant", "warmup_epochs": 0.0, "label_smoothing": 0.0}


class Smooth(nn.Module):
    """A residual block without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.b, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.nn.functional.silu(self.a(x))))
        return self.head(x.mean((2, 3)))


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return lived_in((NETWORKS | {"Smooth": Smooth})[name]()).train().to(dtype)


def share_of(world: World, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(IMAGES, 3, 12, 12, generator=generator)
    labels = torch.randint(4, (IMAGES,), generator=generator)
    shares = SHARES[world.size]
    own = slice(sum(shares[: world.rank]), sum(shares[: world.rank + 1]))
    return Batch(images[own].to(dtype), labels[own], skipped=world.rank)


def train_and_score(
    name: str,
    criterion: str,
    gate: str = "read",
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    steps: int = 3,
    sync: bool = True,
) -> dict[str, Any]:
    """Train a few steps while a criterion judges them; return scores and weights."""
    world, model = current(), network(name, dtype)
    graph = analyse(model, (3, 12, 12))
    trainer = Trainer(
        model,
        TrainConfig.model_validate(PLAIN),
        steps_per_epoch=10,
        epochs=10,
        memory_format=memory_format_for(model, (3, 12, 12)),
        compute=ComputeConfig(sync_batchnorm=sync, accumulate=accumulate),
        world=world,
    )
    context = Context(model, graph, gate, hessian_samples=2, as_published=False, world=world)
    judge = Scores(scoring := bind(criterion, context))
    for step in range(steps):
        trainer.step(share_of(world, step, dtype), judge=judge)
        if not scoring.per_minibatch:
            judge.found.append(scoring.score(1.0))
    return {
        "scores": torch.stack(judge.found),
        "loss": trainer.mean_loss(),
        "skipped": trainer.all_skipped,
        "weights": {key: tensor.clone() for key, tensor in model.state_dict().items()},
    }


def all_scores(cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [train_and_score(*case) for case in cases]


def prune_together(path: Path, config: RunConfig) -> dict[str, Any]:
    """Prune the dense network that lies in a run; return what every rank knows afterwards."""
    run = RunDirectory(path)
    world = current()
    session = Session(run)
    prune(config, DATA, session, quantizer=quantizer_for(config, DATA))
    small = load_checkpoint(run.pruned, Permission(config.model))
    return {
        "recipe": small.description.recipe,
        "weights": small.model.state_dict(),
        "metrics": small.description.metrics,
        "quantization": small.description.quantization,
        "accuracy": accuracy_of(small.model.eval(), DATA, config, world).as_dict(),
    }


def share_of_every_batch(batch_size: int) -> list[list[int]]:
    """Return the labels that this rank reads in one epoch."""
    world = current()
    batches = TrainBatches(DATA, batch_size=batch_size, seed=1, rank=world.rank, ranks=world.size)
    return [batch.labels.tolist() for batch in batches.epoch(0)]


def disagree() -> None:
    """Rank 1 has another mask."""
    current().require_same("the mask of pruning step 3", bytes([current().rank]))


def not_a_number() -> None:
    """The loss of rank 1 alone becomes NaN."""
    world = current() or ALONE
    trainer = Trainer(
        network("Smooth"),
        TrainConfig.model_validate(PLAIN),
        steps_per_epoch=10,
        epochs=10,
        world=world,
    )
    batch = share_of(world, 0)
    if world.rank == 1:
        batch = replace(batch, images=batch.images * float("nan"))
    trainer.step(batch)
    trainer.mean_loss()


def unused_parameter() -> None:
    """A parameter that no output depends on."""
    model = network("Smooth")
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    trainer = Trainer(
        model, TrainConfig.model_validate(PLAIN), steps_per_epoch=1, epochs=9, world=current()
    )
    trainer.step(share_of(current(), 0))


def empty_share() -> int:
    """A broken disk leaves rank 1 one image: every rank passes the minibatch over."""
    world = current()
    trainer = Trainer(
        network("PreActivation"),
        TrainConfig.model_validate(PLAIN),
        steps_per_epoch=10,
        epochs=10,
        compute=ComputeConfig(sync_batchnorm=True),
        world=world,
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = share_of(world, 0)
    if world.rank == 1:
        batch = Batch(batch.images[:1], batch.labels[:1], skipped=4)
    trainer.step(batch)
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert same
    trainer.step(share_of(world, 1))
    return trainer.step_index


def config_for(name: str, **sections: Any) -> RunConfig:
    """A run whose BatchNorms see the joined minibatch."""
    config = config_of(f"networks:{name}").model_dump()
    config["compute"] |= {"sync_batchnorm": True}
    config["data"] |= {"batch_size": 30}
    for section, values in sections.items():
        config[section] |= values
    return RunConfig.model_validate(config)


def several(tasks: list[tuple[Any, ...]]) -> list[Any]:
    """Do several things in one start of the ranks; an exception is a result."""
    found: list[Any] = []
    for work, *arguments in tasks:
        try:
            found.append(work(*arguments))
        except Exception as error:
            found.append(error)
    return found


def texts() -> list[str]:
    """Return what the first process says, where each says something else."""
    world = current()
    said = f"tables of {world.rank} \N{MICRO SIGN}s" + "!" * world.rank
    return [world.text_from_first(said), world.text_from_first("" if world.main else said)]
