"""How well latency tables predict: whole pruned networks that had no part in them.

    python benchmarks/latency_error.py [--networks resnet20:32,resnet18:112] [--batches 1,8]
    python benchmarks/latency_error.py --smoke

A table is measured as ``compress profile`` does, for networks with random weights. ``--held-out``
random networks in multiples of 8, half of which have lost branches too, are predicted by it and
measured, in the same process, as the export writes them. "mean" and "largest" are |predicted -
measured| / measured, "by MACs" is the mean error of the share of MACs times the dense network's
time. "halves" is the share by which two halves of the measurements differ (nine networks in ten by
less), "load" the load average of the machine before and after.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from smoke import parsed

from compress.latency.table import LatencyTable
from compress.networks import cost
from compress.networks.models import build_model
from compress.networks.trial import tried_graph
from export.latency.building import Plan, Profile, build_table
from export.latency.rounds import Effort
from export.latency.serving import Serving

HEADER = ("network", "batch", "dense, ms", "mean", "largest", "by MACs", "halves", "s", "load")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    plan = Plan(networks=options.train, held_out=options.held_out)
    if options.smoke:
        plan = Plan(networks=2, held_out=2, effort=Effort(fewest=2, most=2, spread=1.0))
    print(f"| {' | '.join(HEADER)} |\n|---{'|---:' * (len(HEADER) - 1)}|", flush=True)
    for network in options.networks.split(","):
        for batch in map(int, options.batches.split(",")):
            print(f"| {' | '.join(row(network, batch, plan, options))} |", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--networks", default="resnet20:32,resnet18:112", help="NAME:PIXELS,...")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--runtime", default="onnxruntime-cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", type=int, default=Plan.networks, help="networks that correct")
    parser.add_argument("--held-out", type=int, default=30, help="networks that tell the error")
    return parsed(parser, arguments, networks="lenet:28", batches="1")


def row(network: str, batch: int, plan: Plan, options: argparse.Namespace) -> tuple[str, ...]:
    name, _, pixels = network.partition(":")
    channels = 1 if name == "lenet" else 3
    size = (channels, int(pixels), int(pixels))
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, in_channels=channels).eval()
    profile = Profile(model, tried_graph(model, size), size, plan)
    serving = Serving(runtime=options.runtime, batch=batch, threads=options.threads)
    before, began = os.getloadavg()[0], time.monotonic()
    table = build_table(profile, serving)
    seconds, after = time.monotonic() - began, os.getloadavg()[0]
    return (
        f"{name} at {pixels}",
        str(batch),
        f"{table.dense_ms:.3f}",
        f"{table.error.mean:.2%}",
        f"{table.error.largest:.2%}",
        f"{by_macs(profile, table):.0%}",
        f"{table.spread:.1%}",
        f"{seconds:.0f}",
        f"{before:.1f} to {after:.1f}",
    )


def by_macs(profile: Profile, table: LatencyTable) -> float:
    graph = profile.graph
    whole = cost.macs(graph, graph.everything())
    shares = np.array([cost.macs(graph, mask) / whole for mask in profile.held_out])
    times = np.array([found for _, found in table.error.pairs])
    return float(np.abs(shares * table.dense_ms / times - 1).mean())


if __name__ == "__main__":
    main()
