"""What the shipped table of the V100 predicts of smaller forms of ResNet-50, as a Markdown table.

    python benchmarks/v100_resnet50.py [--precision fp16] [--batch 1 32] [--size 224]
    python benchmarks/v100_resnet50.py --run RUN [--data FOLDER]
    python benchmarks/v100_resnet50.py --smoke

Shares of the dense network's MACs and predicted time, speed-ups in brackets; then what is chosen
for a budget of predicted time, with and without blocks. Nothing is measured here: docs/v100.md says
where the table comes from and how far it misses. Importance is that of random weights on random
images; the MACs themselves, which shows how few a choice can do with; and that of a dense ResNet-50
that a run has trained, on its own images, whatever their size.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from smoke import parsed
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from compress.checkpoints.checkpoint import load_checkpoint
from compress.checkpoints.permission import Permission
from compress.config import PruneConfig
from compress.data.batches import TrainBatches
from compress.data.datasets import load_data
from compress.latency.fitted import shipped_table
from compress.latency.times import Times, network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.cost import channels, macs
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import Scores, candidates
from compress.pruning.pieces import importance
from compress.runs.rundirectory import RunDirectory

DENSE = (3, 4, 6, 3)
MINIBATCHES = 4
TRAINED_MINIBATCHES = 20
CHANGES: tuple[tuple[str, tuple[int, ...], float, float], ...] = (
    ("all widths x 0.75", DENSE, 0.75, 0.75),
    ("all widths x 0.5", DENSE, 0.5, 0.5),
    ("inner widths x 0.5", DENSE, 1.0, 0.5),
    ("inner widths x 0.25", DENSE, 1.0, 0.25),
    ("blocks 2,2,3,2", (2, 2, 3, 2), 1.0, 1.0),
    ("blocks 2,2,2,2, inner x 0.75", (2, 2, 2, 2), 1.0, 0.75),
    ("blocks 1,1,1,1", (1, 1, 1, 1), 1.0, 1.0),
)
"""Name, blocks of each stage, share kept of the outer widths, and of those inside blocks."""


def narrowed(graph: ChannelGraph, outer: float, inner: float) -> Mask:
    """Return the mask that keeps such shares of the widths between blocks and inside them."""
    kept = graph.everything()
    for group in graph.prunable:
        inside = group.name.startswith("layer") and not group.residual
        share = inner if inside else outer
        kept[group.units[round(share * group.size) :]] = False
    return kept


def macs_of(graph: ChannelGraph) -> Scores:
    """Return what the removal of each unit alone saves."""
    everything = graph.everything()
    dense, saved = macs(graph, everything), np.zeros(graph.num_units)
    for group in graph.prunable:
        kept = everything.copy()
        kept[group.units[0]] = False
        saved[group.units] = dense - macs(graph, kept)
    for branch in graph.removable:
        kept = everything.copy()
        kept[branch.unit] = False
        saved[branch.unit] = dense - macs(graph, graph.closed(kept))
    return saved


def choices(
    graph: ChannelGraph, scores: Scores, times: Times, share: float
) -> Iterator[tuple[str, ...]]:
    """Yield rows of what is chosen for a share of the time, with blocks and without."""
    everything = graph.everything()
    dense = macs(graph, everything), network_milliseconds(graph, times, everything)
    for name, blocks in (("blocks and channels", True), ("channels only", False)):
        settings = PruneConfig(budget=f"latency={share}", channel_multiple=8, blocks=blocks)
        chooser = Chooser(graph, times, candidates(graph, settings))
        # What cannot be reached is as near to it as it can be.
        limit = max(share * dense[1], chooser.fastest(everything, scores) * (1 + 1e-9))
        kept = graph.closed(chooser.choose(scores, everything, limit, least=0.98 * limit).mask)
        now = macs(graph, kept), network_milliseconds(graph, times, kept)
        left = [one / other for one, other in zip(now, dense, strict=True)]
        gone = sum(not kept[branch.unit] for branch in graph.removable)
        width = channels(graph, kept) / channels(graph, everything)
        saved = (1 - left[1]) / (1 - left[0])
        yield name, f"{gone}", f"{width:.2f}", f"{left[0]:.2f}", f"{left[1]:.3f}", f"{saved:.2f}"


def importance_of(model: nn.Module, graph: ChannelGraph, size: int) -> Scores:
    """Return what adds up, from a few minibatches of random images and labels."""
    shape = (MINIBATCHES, 8, 3, max(size // 2, 32), max(size // 2, 32))
    labels = torch.randint(0, 1000, (MINIBATCHES, 8))
    return scored(model, graph, zip(torch.randn(shape), labels, strict=True))


def trained(path: Path, data: str | None, size: int) -> tuple[ChannelGraph, Scores]:
    """Return the channel graph of a run's dense network at a size, and its importance.

    Args:
        path: the run.
        data: data set, default that of the run.
        size: of the images that the graph describes; those of the importance are the run's.
    """
    run = RunDirectory(path)
    config = run.saved_config()
    images = load_data(config.data.model_copy(update={"root": data or config.data.root}))
    batches = TrainBatches(images, batch_size=config.data.batch_size, seed=0, workers=0)
    model = load_checkpoint(run.dense, Permission(config.model)).model.train()
    graph = analyse(model, (3, size, size))
    few = itertools.islice(batches.epoch(0), TRAINED_MINIBATCHES)
    return graph, scored(model, graph, ((batch.images, batch.labels) for batch in few))


def scored(
    model: nn.Module, graph: ChannelGraph, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> Scores:
    """Return the mean of what adds up over minibatches of images and labels."""
    found = []
    for images, labels in batches:
        model.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(importance(model, graph, "taylor-parts"))
    return np.mean(found, axis=0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "int8"))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the time")
    parser.add_argument("--run", type=Path, help="run directory of a dense ResNet-50")
    parser.add_argument("--data", help="its data set, default that of the run")
    return parsed(parser, arguments, size=32)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    columns = [shipped_table("v100").times(options.precision, batch) for batch in options.batch]
    graphs: dict[Sequence[int], ChannelGraph] = {}
    for blocks in {blocks for _, blocks, _, _ in CHANGES}:
        graphs[blocks] = analyse(ResNet(Bottleneck, list(blocks)), (3, options.size, options.size))

    def figures(blocks: Sequence[int], outer: float, inner: float) -> list[float]:
        graph = graphs[blocks]
        kept = narrowed(graph, outer, inner)
        return [macs(graph, kept), *(network_milliseconds(graph, t, kept) for t in columns)]

    dense = figures(DENSE, 1.0, 1.0)
    pairs = zip(options.batch, dense[1:], strict=True)
    times = ", ".join(f"{ms:.2f} ms at batch {batch}" for batch, ms in pairs)
    print(f"Dense, predicted on a V100 in {options.precision}: {times}.\n")
    heads = (f"time, batch {batch}" for batch in options.batch)
    print(f"| change (predicted) | MACs | {' | '.join(heads)} |")
    print(f"|---|---:|{'---:|' * len(columns)}")
    for name, blocks, outer, inner in CHANGES:
        now = figures(blocks, outer, inner)
        shares = [one / other for one, other in zip(now, dense, strict=True)]
        cells = (f"{share:.2f} ({1 / share:.2f}x)" for share in shares[1:])
        print(f"| {name} | {shares[0]:.2f} | {' | '.join(cells)} |")
    chosen_heads = ("blocks gone", "channels", "MACs", "time", "saved time / saved MACs")
    print(f"\n| batch | importance | chosen | {' | '.join(chosen_heads)} |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    torch.manual_seed(0)
    model = ResNet(Bottleneck, list(DENSE)).train()
    graph = graphs[DENSE]
    found = {
        "of random weights": (graph, importance_of(model, graph, options.size)),
        "the MACs": (graph, macs_of(graph)),
    }
    if options.run:
        found["of the trained network"] = trained(options.run, options.data, options.size)
    for batch, table in zip(options.batch, columns, strict=True):
        for name, (graph, scores) in found.items():
            for row in choices(graph, scores, table, options.budget):
                print(f"| {batch} | {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
