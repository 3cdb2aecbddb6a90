"""The tools for shards.

python -m compress.data.shards index ROOT          write ROOT/index.safetensors
python -m compress.data.shards pack FOLDER ROOT    make shards of an image folder
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.data.shards.dataset import read_shards
from compress.data.shards.index import INDEX, Shard, index_bytes, index_of
from compress.data.shards.pack import pack_folder
from compress.data.shards.store import Folder
from compress.errors import CompressError, DataError, InterruptedRunError
from compress.files.atomic import write_atomically
from compress.terminal.console import say
from compress.terminal.progress import bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code, those of the compress command line."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "pack":
            pack_folder(options.folder, options.root, images_per_shard=options.images_per_shard)
        else:
            write_index(options.root)
    except CompressError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("stopped")
        return InterruptedRunError.exit_code
    return 0


def write_index(root: Path) -> None:
    """Index every ``*.tar`` under a folder, at any depth, and write the index beside them.

    Raises:
        DataError: there is none, or one is damaged.
        OutputError: the index cannot be written.
    """
    names = Folder(root).globbed("**/*.tar")
    if not names:
        raise DataError(f"there is no *.tar under {root}: name the folder of the shards")
    shards: list[Shard] = []
    with bar("index", len(names)) as shown:
        for shard in read_shards(Folder(root), names):
            shards.append(shard)
            shown.at(len(shards))
    index = index_of(shards)
    write_atomically(root / INDEX, index_bytes(index))
    say(f"{root / INDEX}: {len(index)} images in {len(names)} shards")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m compress.data.shards", description="Tools for images in tar shards."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="write the index of the shards under a folder")
    index.add_argument("root", type=Path, metavar="ROOT")
    pack = commands.add_parser("pack", help="make shards of an image folder")
    pack.add_argument("folder", type=Path, metavar="FOLDER", help="it holds train/ and val/")
    pack.add_argument("root", type=Path, metavar="ROOT", help="folder to make")
    pack.add_argument("--images-per-shard", type=_positive, default=1000, metavar="N")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
