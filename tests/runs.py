"""Whole prune runs on small networks and images, and what holds of every finished one."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import lived_in
from torch import nn

from compress.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compress.checkpoints.description import Description, read_description
from compress.checkpoints.permission import Permission
from compress.checkpoints.recipe import recipe_from
from compress.config import RunConfig
from compress.data.batches import ImageData, eval_batches
from compress.data.loading import TensorImages
from compress.data.views import View
from compress.networks import cost
from compress.networks.cuts import cuts_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import build_model
from compress.networks.trial import tried_graph
from compress.pruning.masking import candidates
from compress.runs.prune import prune
from compress.runs.rundirectory import RunDirectory
from compress.runs.session import Session
from compress.runs.state import State
from compress.training.evaluate import evaluate

CPU = torch.device("cpu")


def images_of_four_classes(train: int = 128, val: int = 64) -> ImageData:
    """Return noisy stripes in four directions, 3 x 12 x 12."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    stripes = [rows, columns, rows + columns, rows - columns]
    view = View(12, "crop", (0.5,) * 3, (0.25,) * 3)

    def half(count: int) -> TensorImages:
        labels = torch.arange(count) % 4
        pattern = torch.stack([torch.sin(stripes[label]) for label in labels.tolist()])
        noise = torch.randn(count, 3, 12, 12, generator=generator)
        images = 0.5 + 0.25 * pattern[:, None] + 0.15 * noise
        return TensorImages(images.clamp(0, 1), labels, view)

    names = ("rows", "columns", "rising", "falling")
    return ImageData(half(train), half(val), names, (3, 12, 12), view.mean, view.std, "stripes")


DATA = images_of_four_classes()


def config_of(name: str, *, finetune: dict[str, Any] | None = None, **prune: Any) -> RunConfig:
    settings = {
        "seed": 1,
        "device": "cpu",
        "model": {"name": name},
        "data": {"batch_size": 32, "eval_batch_size": 64},
        "prune": {
            "budget": "macs=0.5",
            "steps": 4,
            "interval": 2,
            "min_channels": 1,
            "min_share": 0.0,
            "bn_batches": 2,
            "proof_images": 2,
            **prune,
        },
        "finetune": {"epochs": 1, "lr": 0.02, "warmup_epochs": 0.5, **(finetune or {})},
    }
    return RunConfig.model_validate(settings)


def start(path: Path, config: RunConfig, data: ImageData = DATA) -> RunDirectory:
    """Begin a run with a dense network that has lived."""
    run = RunDirectory(path)
    run.begin(config)
    torch.manual_seed(3)
    model = lived_in(build_model(config.model.name, num_classes=data.num_classes))
    accuracy = {"top1": 12.5, "top5": 100.0, "images": 64, "skipped": 0}
    description = Description.of(config.model, data, {"accuracy": accuracy})
    save_checkpoint(run.dense, model, description=description)
    return run


def pruned_run(path: Path, config: RunConfig, data: ImageData = DATA) -> RunDirectory:
    run = start(path, config, data)
    assert prune(config, data, Session(run)) == run.pruned
    return run


def loaded(file: Path, config: RunConfig) -> Checkpoint:
    return load_checkpoint(file, Permission(config.model))


def graph_of(run: RunDirectory, config: RunConfig) -> ChannelGraph:
    """Return the channel graph of the dense network of a run, as pruning finds it."""
    dense = loaded(run.dense, config)
    return tried_graph(dense.model, dense.input_size)


def kept_in(run: RunDirectory, graph: ChannelGraph) -> Mask:
    """Return the units that the pruned network of a run kept, as its recipe says."""
    description = read_description(run.pruned)
    assert description is not None
    kept, recipe = graph.everything(), description.recipe
    for tensor, cuts in recipe.get("cuts", {}).items():
        for dim, key in cuts.items():
            units = graph.by_tensor[tensor, int(dim)].units
            kept[np.setdiff1d(units, units[recipe["kept"][key]["indices"]])] = False
    assert recipe_from(cuts_of(graph, kept), {}) == recipe
    return kept


def history(run: RunDirectory, event: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.history.read_text().splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def macs_by_hooks(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Count multiply-adds where they happen: each output is a dot product with its weights."""
    total = 0

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # type: ignore[union-attr,operator]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *input_size))
    return total


def limit_of(config: RunConfig, dense: int) -> float:
    budget = config.prune.budget
    if budget.kind == "removed":
        return dense - budget.value
    return budget.value * dense if budget.value <= 1 else budget.value


def assert_sound(run: RunDirectory, config: RunConfig, data: ImageData = DATA) -> dict[str, Any]:
    """Check everything that holds of every finished run; return its metrics."""
    dense, small = loaded(run.dense, config), loaded(run.pruned, config)
    graph, metrics = graph_of(run, config), small.description.metrics
    kept = kept_in(run, graph)
    # What the file says of its costs is what the network in it costs.
    for at in ("pruned", "finetuned"):
        assert metrics[at]["params"] == sum(p.numel() for p in small.model.parameters())
        assert metrics[at]["macs"] == macs_by_hooks(small.model, data.input_size)
        assert metrics[at]["channels"] == cost.channels(graph, kept)
    assert metrics["dense"]["macs"] == macs_by_hooks(dense.model, data.input_size)
    assert metrics["dense"]["top1"] == 12.5
    assert small.description.parent_sha256 == dense.sha256
    # The budget holds, and one chunk less in a group of the last step would break it.
    kind = "channels" if config.prune.budget.kind == "removed" else config.prune.budget.kind
    limit = limit_of(config, metrics["dense"][kind])
    assert metrics["finetuned"][kind] <= limit < metrics["dense"][kind]
    assert_not_overshot(run, config, graph, kept, kind, limit)
    # Pruned channels never come back, and the proof was made at every shrink.
    assert_only_shrinks(run, graph, kept)
    differences = [line["difference"] for line in history(run, "shrink")]
    assert differences
    assert metrics["proof"] == max(differences) <= 1e-9
    # The accuracy is that of the network in the file.
    batches = eval_batches(data.val, batch_size=64)
    measured = evaluate(loaded(run.pruned, config).model, batches, CPU)
    assert {k: metrics["finetuned"][k] for k in measured.as_dict()} == measured.as_dict()
    assert history(run, "finetuned")[0].items() >= metrics["finetuned"].items()
    assert not run.state.exists()
    return metrics


def assert_not_overshot(
    run: RunDirectory,
    config: RunConfig,
    graph: ChannelGraph,
    kept: Mask,
    kind: str,
    limit: float,
) -> None:
    dense_widths = {g.name: g.size for g in graph.groups}
    before, after = [dense_widths, *(line["widths"] for line in history(run, "prune_step"))][-2:]
    with_one_more = []
    for candidate in candidates(graph, config.prune):
        units = candidate.group.units
        if after.get(candidate.group.name, 0) < before[candidate.group.name]:
            more = kept.copy()
            more[units[~kept[units]][: candidate.chunk]] = True
            with_one_more.append(getattr(cost, kind)(graph, more))
    assert max(with_one_more) > limit


def assert_only_shrinks(run: RunDirectory, graph: ChannelGraph, kept: Mask) -> None:
    steps = history(run, "prune_step")
    groups = {g.name: g for g in graph.groups}
    for before, after in pairwise(steps):
        for name, width in after["widths"].items():
            assert width <= before["widths"][name]
        assert after["macs"] <= before["macs"]
    for name, width in steps[-1]["widths"].items():
        assert width == kept[groups[name].units].sum()
    assert [line["pruning_step"] for line in steps] == list(range(1, len(steps) + 1))


def metrics_of(run: RunDirectory) -> dict[str, Any]:
    """Return the metrics of a pruned file of a network from ``networks``."""
    description = read_description(run.pruned)
    assert description is not None
    return description.metrics


class Stopping(Session):
    """Somebody presses Ctrl-C in a step, counted from one."""

    def stop_in(self, step: int) -> Stopping:
        self.left = step
        return self

    def after_step(self, snapshot: Callable[[], State]) -> None:
        self.left -= 1
        if not self.left:
            self.stop.set()
        super().after_step(snapshot)
