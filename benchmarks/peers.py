"""This project beside its peers: accuracy over measured time, coverage, and seconds of planning.

    python benchmarks/peers.py [RUN ...] [--data FOLDER] [--output DIR] [--networks NAMES]
    python benchmarks/peers.py --smoke

Peers that are not installed are left out, which is said: ``pip install '.[peers]'``. Every RUN
holds a dense network, one for each seed; what is printed of them is that of ``equal_time.py``.

Of every network of --networks (those of ``network_coverage.py``; ``''`` is none) each library
halves every layer in one shot, by its own magnitude criterion; FastNAS searches for half of the
MACs. ``exact`` says that what is left runs and computes what the dense network computes in which
every number that is gone is zero, in float64. The weights that are left tell which are gone, so
nobody is asked: no two numbers of a dense tensor are equal. Otherwise the relative difference, or
what went wrong; ``late`` is more than --patience. Before it stand the share of MACs that is left,
as torch counts them, and the seconds, which are those of one core, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from network_coverage import NETWORKS, build, size_of, within
from pruners import ANEW, ONE_SHOT, PRUNERS, missing
from race import SMALLEST, Way, race, race_parser
from smoke import parsed
from standings import plot_accuracy, tell
from torch import nn

from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.shrink import largest_difference, outputs_of

WAYS = (
    *(Way("latency", share, 8) for share in (0.5, 0.36, 0.26, 0.18)),
    *(Way("torch-pruning", *at) for at in ((0.3, 8), (0.16, 8), (0.04, 4))),
    *(Way(f"torch-pruning {kind}", 0.16, 1) for kind in ("default", "raw")),
    *(Way(f"torch-pruning {kind}", 0.08, 1) for kind in ("default", "raw")),
    *(Way("modelopt-fastnas", share, 8) for share in (0.3, 0.16)),
    *(Way("torch-kirigami", share, 8) for share in (0.3, 0.12)),
)
SMOKE = (Way("latency", 0.9, 8), Way("torch-pruning default", 0.9, 1))
EXACT = 1e-9
"""Relative difference in float64."""
DENSE = 0.98
"""Share of MACs above which nothing has been pruned."""


@dataclass(frozen=True)
class Outcome:
    """What one library made of one network."""

    seconds: float
    """Of one core, from the network to the pruned one."""
    macs: float | None
    """Share that is left; None where there is no network that runs."""
    verdict: str

    def __str__(self) -> str:
        left = "" if self.macs is None else f"{self.macs:.2f}, {self.seconds:.1f} s, "
        return left + self.verdict


def unequal(model: nn.Module) -> nn.Module:
    """Return a network in float64 in which no two numbers of a tensor are equal."""
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(1e-6 * noise)
    return model.eval()


def without_statistics(model: nn.Module) -> nn.Module:
    """Return a copy whose BatchNorm has seen no image."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def masked_as(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """Return the dense network in which every weight that a pruned one lacks is zero.

    Args:
        dense: no two numbers of a tensor are equal.
        pruned: its tensors hold some of the numbers of those of the same name, in any order.
    """
    left = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for name, tensor in [*masked.named_parameters(), *masked.named_buffers()]:
            if name.endswith("running_var") or not tensor.is_floating_point():
                continue
            rest = left.get(name)
            if rest is None:
                tensor.zero_()
            elif rest.shape != tensor.shape:
                there = np.isin(tensor.numpy(), rest.detach().numpy())
                tensor.mul_(torch.from_numpy(there))
    return masked


def attempt(name: str, dense: nn.Module, images: torch.Tensor, patience: int) -> Outcome:
    """Have one library prune one network, and judge what is left."""
    example = Example((images,))
    dense = without_statistics(dense) if name in ANEW else dense
    start = time.process_time()
    try:
        # What a library says of its work would part the table.
        with redirect_stdout(sys.stderr), within(patience, of_cpu=True):
            pruned = ONE_SHOT[name](copy.deepcopy(dense), images).eval()
        seconds = time.process_time() - start
        share = cost.measured(pruned, example)["macs"] / cost.measured(dense, example)["macs"]
        found = outputs_of(pruned, example)
    except TimeoutError:
        return Outcome(time.process_time() - start, None, "late")
    except Exception as error:  # whatever another library raises is its answer
        return Outcome(time.process_time() - start, None, f"fails: {type(error).__name__}")
    if share > DENSE:
        return Outcome(seconds, share, "nothing pruned")
    difference = largest_difference(outputs_of(masked_as(dense, pruned), example), found)
    return Outcome(seconds, share, "exact" if difference < EXACT else f"off by {difference:.0e}")


def coverage(networks: Sequence[str], size: int, patience: int) -> None:
    """Print what every library makes of every network, and how often it is exact."""
    torch.set_num_threads(1)
    names = [name for name in ONE_SHOT if not missing(name)]
    print(f"| network | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    rows: list[dict[str, Outcome]] = []
    for network in networks:
        dense = unequal(build(network))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, *size_of(network, size), generator=generator, dtype=torch.float64)
        rows.append({name: attempt(name, dense, images, patience) for name in names})
        short = network.replace("torchvision:", "tv:")
        print(f"| {short} | {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    exact = {name: [row[name] for row in rows if row[name].verdict == "exact"] for name in names}
    print(f"| exact, of {len(rows)} | {' | '.join(str(len(exact[n])) for n in names)} |")
    seconds = [f"{median(o.seconds for o in exact[n]):.1f} s" if exact[n] else "-" for n in names]
    print(f"| median time of those | {' | '.join(seconds)} |")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = race_parser(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="'' for none")
    parser.add_argument("--size", type=int, default=128, help="of their images")
    parser.add_argument("--patience", type=int, default=60, help="seconds for each of them")
    least = {**SMALLEST, "networks": "torchvision:squeezenet1_1", "size": 64, "patience": 5}
    return parsed(parser, arguments, **least)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, race, prune every network, print."""
    options = parse(arguments)
    for name in PRUNERS:
        if lacking := missing(name):
            print(f"left out: {name}, because {', '.join(lacking)} is not installed")
    if options.runs or options.smoke:
        ways = [w for w in (SMOKE if options.smoke else WAYS) if not missing(w.name)]
        points = race(options, ways, PRUNERS, may_fail=[n for n in PRUNERS if n != "latency"])
        tell(points)
        if options.plots:
            plot_accuracy(options.plots / "peers.svg", points)
        print()
    warnings.simplefilter("ignore")
    if options.networks:
        coverage(options.networks.split(","), options.size, options.patience)


if __name__ == "__main__":
    main()
