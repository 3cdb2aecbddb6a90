"""``--smoke`` of the programs beside this file: seconds, for the same code and the same columns."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = (
    *("device=cpu", "data.image_size=8", "data.batch_size=256", "train.epochs=1"),
    *("prune.steps=2", "prune.interval=1", "prune.bn_batches=1", "finetune.epochs=1"),
    *("bench.batch_sizes=[1]", "bench.block_ms=1", "bench.min_blocks=8", "bench.max_seconds=1"),
)
"""Of a run on digits that takes seconds."""


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **smallest: Any
) -> argparse.Namespace:
    """Parse a command line; with ``--smoke`` what is not given has its smallest value.

    Args:
        parser: of the program.
        arguments: its command line, by default that of the process; it is kept under this name.
        smallest: value by the name of the option.
    """
    about = "try the program on next to nothing; the figures say nothing"
    parser.add_argument("--smoke", action="store_true", help=about)
    given = sys.argv[1:] if arguments is None else list(arguments)
    if "--smoke" in given:
        parser.set_defaults(**smallest)
    return parser.parse_args(given, argparse.Namespace(arguments=given))


def parsed_with_run(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **smallest: Any
) -> argparse.Namespace:
    """Parse a command line that begins with a run directory, which ``--smoke`` can do without."""
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run directory")
    options = parsed(parser, arguments, **smallest)
    if options.run is None and not options.smoke:
        parser.error("RUN is missing: give the directory of a finished run")
    return options


@contextmanager
def finished_run(given: Path | None) -> Iterator[Path]:
    """Yield the run directory that was given, or that of a run on digits that lasts seconds."""
    from compress.config import load_config
    from compress.data.datasets import load_data
    from compress.runs.dense import train_dense
    from compress.runs.prune import prune
    from compress.runs.rundirectory import RunDirectory
    from compress.runs.session import Session

    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as scratch:
        config = load_config("digits-resnet20", SETTINGS)
        run, data = RunDirectory(Path(scratch) / "run"), load_data(config.data)
        run.begin(config)
        train_dense(config, data, Session(run))
        prune(config, data, Session(run))
        yield run.path
