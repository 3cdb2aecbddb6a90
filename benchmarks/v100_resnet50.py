"""What the shipped table of the V100 predicts of smaller forms of ResNet-50, as a Markdown table.

    python benchmarks/v100_resnet50.py [--precision fp16] [--batch 1 32] [--size 224]
    python benchmarks/v100_resnet50.py --smoke

Shares of the dense network's MACs and predicted time, speed-ups in brackets; then what is chosen
for a budget of predicted time, with and without blocks. Nothing is measured here: docs/v100.md says
where the table comes from and how far it misses. Importance is that of random weights on random
images, or the MACs themselves, which shows how few a choice can do with; what a trained network
needs lies elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from smoke import parsed
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from compress.config import PruneConfig
from compress.latency.fitted import shipped_table
from compress.latency.times import Times, network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.cost import channels, macs
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.choice.widths import Chooser
from compress.pruning.masking import Scores, candidates
from compress.pruning.pieces import importance

DENSE = (3, 4, 6, 3)
MINIBATCHES = 4
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
    total = np.zeros(graph.num_units)
    for _ in range(MINIBATCHES):
        model.zero_grad()
        logits = model(torch.randn(8, 3, max(size // 2, 32), max(size // 2, 32)))
        loss = F.cross_entropy(logits, torch.randint(0, 1000, (8,)))
        loss.backward()  # type: ignore[no-untyped-call]
        total += importance(model, graph, "taylor-parts")
    return total / MINIBATCHES


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", default="fp16", choices=("fp32", "fp16", "int8"))
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 32))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--budget", type=float, default=0.5, help="share of the time")
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
    found = {
        "of random weights": importance_of(model, graphs[DENSE], options.size),
        "the MACs": macs_of(graphs[DENSE]),
    }
    for batch, table in zip(options.batch, columns, strict=True):
        for name, scores in found.items():
            for row in choices(graphs[DENSE], scores, table, options.budget):
                print(f"| {batch} | {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
