"""Accuracy at equal measured time: latency budgets, MACs budgets and Torch-Pruning.

    python benchmarks/equal_time.py RUN [RUN ...] --data FOLDER --output DIR
    python benchmarks/equal_time.py --smoke

Every RUN holds a dense network, one for each seed, all of one architecture. One loop prunes and
finetunes for all three (``race.py``): same minibatches, learning rates and lengths; only what is
removed differs. Every network is exported and measured against its dense one, in turn in one
process, as the gate does. Accuracy at a share of the dense time lies between the two points next
to it; means are over the seeds, with 95 % intervals (Student), and so are the differences, each
within one seed. What is complete in DIR is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pruners import PRUNERS
from race import SMALLEST, Way, race, race_parser
from smoke import parsed
from standings import plot_accuracy, plot_prediction, tell

WAYS = (
    *(Way("latency", share, 8) for share in (0.5, 0.36, 0.26, 0.18)),
    *(Way(name, *at) for name in ("macs", "torch-pruning") for at in ((0.3, 8), (0.16, 8))),
    *(Way(name, 0.04, 4) for name in ("macs", "torch-pruning")),
)
"""Widths in multiples of eight cannot reach small MACs: there, of four."""
SMOKE = (Way("latency", 0.9, 8), Way("macs", 0.6, 8), Way("torch-pruning", 0.9, 8))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = race_parser(__doc__)
    options = parsed(parser, arguments, **SMALLEST)
    if not options.runs and not options.smoke:
        parser.error("RUN is missing: give the directories of dense networks")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, race, print the tables."""
    options = parse(arguments)
    points = race(options, SMOKE if options.smoke else WAYS, PRUNERS)
    tell(points)
    if options.plots:
        plot_accuracy(options.plots / "accuracy-over-time.svg", points)
        plot_prediction(options.plots / "predicted-over-measured.svg", points)


if __name__ == "__main__":
    main()
