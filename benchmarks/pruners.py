"""Who prunes in a race: this project and its peers, each of them as it is meant to be used.

A peer makes a new optimizer after each of its steps, whose momentum begins at nothing, so it takes
fewer of them. Peers are imported when they are asked; ``missing`` names those that are not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from race import Loop, Prune, Race, Way
from torch import nn

from compress.latency.times import Times
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.shrink import shrink
from compress.networks.trial import tried_graph
from compress.pruning.pruner import Pruner

PEER_INTERVALS = 3
"""Times as many minibatches between two steps of a peer, and as few steps."""
SCORED = 1024
"""Training images by which FastNAS scores a network: those to validate on stay unseen."""


def ours(loop: Loop, way: Way, race: Race, table: Times) -> None:
    """Prune by this project, for a share of the time or of the MACs."""
    by_time = way.name == "latency"
    pruner = Pruner(
        loop.model,
        _images(loop)[:1],
        optimizer=loop.optimizer,
        table=table if by_time else None,
        budget=f"{way.name}={way.budget}",
        rank="importance" if by_time else "importance-per-mac",
        channel_multiple=way.multiple,
        steps=loop.options.steps,
        interval=loop.options.interval,
        seed=race.seed,
    )
    loop.prune(pruner.score, pruner.step)


def torch_pruning(
    loop: Loop, way: Way, race: Race, table: Times, normalizer: str | None = "mean"
) -> None:
    """Prune by Torch-Pruning: Taylor importance, all layers together, until the MACs fit.

    Args:
        loop: that trains.
        way: share of the MACs, and the multiple that widths are rounded to.
        race: not used.
        table: not used.
        normalizer: what importance is divided by in each group; None ranks it raw.
    """
    import torch_pruning as tp

    images = _images(loop)[:1]
    pruner = tp.pruner.BasePruner(
        loop.model,
        images,
        importance=tp.importance.GroupTaylorImportance(normalizer=normalizer),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.95,
        iterative_steps=12 * _steps(loop),
        ignored_layers=[m for m in loop.model.modules() if isinstance(m, nn.Linear)],
        round_to=way.multiple if way.multiple > 1 else None,
    )

    def macs() -> float:
        return float(tp.utils.count_ops_and_params(loop.model, images)[0])

    dense = macs()

    def take(share: float) -> None:
        while macs() > dense * share and pruner.current_step < pruner.iterative_steps:
            pruner.step()

    _in_steps(loop, way, take)


def kirigami(loop: Loop, way: Way, race: Race, table: Times) -> None:
    """Prune by torch-kirigami: Taylor importance of weights, greedily, until the parameters fit."""
    from torch_kirigami import DependencyGraph, pruning

    dense = sum(p.numel() for p in loop.model.parameters())

    def take(share: float) -> None:
        graph = DependencyGraph.build(loop.model, args=(_images(loop)[:1],))
        pruner = pruning.Pruner(
            loop.model,
            graph=graph,
            granularity=pruning.Granularity(by_type={nn.Conv2d: way.multiple}),
        )
        pruner.prune(
            pruner.discover_candidates(),
            budget=pruning.ParameterBudget(max_params=int(dense * share)),
            strategy=pruning.Greedy(pruning.WeightTaylor()),
        )

    _in_steps(loop, way, take)


def fastnas(loop: Loop, way: Way, race: Race, table: Times) -> None:
    """Prune by ModelOpt's FastNAS: a search before the training, which lasts as long as others'."""
    import modelopt.torch.prune as mtp

    images, labels = _scored(loop)
    config = mtp.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = way.multiple
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = way.multiple

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).double().mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated parts of torch that it uses
        mtp.prune(
            loop.model,
            [("fastnas", config)],
            constraints={"flops": f"{way.budget:.0%}"},
            dummy_input=images[:1],
            config={
                "data_loader": [images[at : at + 128] for at in range(0, len(images), 128)],
                "collect_func": lambda batch: batch,
                "score_func": score,
                "verbose": False,
            },
        )
    loop.model.train()
    loop.renew()
    left = loop.options.steps * loop.options.interval

    def after() -> bool:
        return loop.steps >= left

    loop.prune(lambda: None, after)


PRUNERS: dict[str, Prune] = {
    "latency": ours,
    "macs": ours,
    "torch-pruning": torch_pruning,
    "torch-pruning default": torch_pruning,
    "torch-pruning raw": partial(torch_pruning, normalizer=None),
    "torch-kirigami": kirigami,
    "modelopt-fastnas": fastnas,
}
"""By the name of a way."""
PACKAGES = {
    "torch-pruning": ("torch_pruning",),
    "torch-pruning default": ("torch_pruning",),
    "torch-pruning raw": ("torch_pruning",),
    "torch-kirigami": ("torch_kirigami",),
    "modelopt-fastnas": ("modelopt", "torchprofile", "requests"),
}
"""What must be installed for a peer, by its name."""


def missing(name: str) -> Sequence[str]:
    """Return the modules that a peer needs and that are not installed."""
    return [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]


def _images(loop: Loop) -> Any:
    return next(iter(loop.batches.epoch(0))).images


def _scored(loop: Loop) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of the first minibatches."""
    images: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for batch in loop.batches.epoch(0):
        images.append(batch.images)
        labels.append(batch.labels)
        if sum(map(len, labels)) >= SCORED:
            break
    return torch.cat(images), torch.cat(labels)


def _steps(loop: Loop) -> int:
    return max(1, int(loop.options.steps) // PEER_INTERVALS)


def _in_steps(loop: Loop, way: Way, take: Callable[[float], None]) -> None:
    """Train, and prune every so many minibatches.

    Args:
        loop: that trains.
        way: what is asked in the end.
        take: prunes until the share of the cost that it is given is left.
    """
    loop.model.train()  # counting leaves it in evaluation mode
    taken = 0

    def after() -> bool:
        nonlocal taken
        if loop.steps % (PEER_INTERVALS * loop.options.interval):
            return False
        taken += 1
        take(1 - (1 - way.budget) * taken / _steps(loop))
        loop.model.train()
        loop.renew()
        return taken >= _steps(loop)

    loop.prune(lambda: None, after)


# In one shot: half of every layer, by the magnitude of its weights


def halved(graph: ChannelGraph) -> Mask:
    """Return a mask with a random half of every free group, rounded up."""
    kept, generator = graph.everything(), np.random.default_rng(0)
    for group in graph.prunable:
        left = max(group.fewest, (group.size + 1) // 2)
        kept[group.units[generator.permutation(group.size)[left:]]] = False
    return kept


def halved_by_us(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return the network without a random half of every group that the analysis leaves free."""
    graph = tried_graph(model, Example((images[:1],)))
    return shrink(model, graph, halved(graph))


def halved_by_torch_pruning(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Prune by Torch-Pruning, in place: half of every layer but the last, by magnitude."""
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )
    pruner.step()
    return model


def halved_by_kirigami(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Prune by torch-kirigami, in place: half of every axis that it finds, by magnitude."""
    from torch_kirigami import DependencyGraph, pruning

    pruner = pruning.Pruner(model, graph=DependencyGraph.build(model, args=(images,)))
    pruner.prune(
        pruner.discover_candidates(),
        budget=pruning.ChannelRatio(0.5),
        strategy=pruning.Greedy(pruning.GroupMagnitude()),
    )
    return model


def halved_by_fastnas(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Prune by FastNAS, in place: half of the MACs, nearest to the answers of the whole network.

    Statistics of BatchNorm begin anew, and see no image: those of the whole network are as new.
    """
    import modelopt.torch.prune as mtp

    with torch.no_grad():
        expected = model(images)

    def score(smaller: nn.Module) -> float:
        with torch.no_grad():
            return -float((smaller(images) - expected).square().mean())

    mtp.prune(
        model,
        "fastnas",
        constraints={"flops": "50%"},
        dummy_input=images[:1],
        config={"forward_loop": lambda _: None, "score_func": score, "verbose": False},
    )
    return model


ONE_SHOT: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "ours": halved_by_us,
    "torch-pruning": halved_by_torch_pruning,
    "torch-kirigami": halved_by_kirigami,
    "modelopt-fastnas": halved_by_fastnas,
}
"""By the name of who prunes; the network may be pruned in place."""
ANEW = ("modelopt-fastnas",)
"""Those of them that forget the statistics of BatchNorm."""
