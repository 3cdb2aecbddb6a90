"""Write a dense network that computes the same, with channels that one INT8 scale cannot serve.

    python benchmarks/uneven_channels.py RUN --output uneven.safetensors [--spread 6] [--seed 0]
    python benchmarks/uneven_channels.py --smoke

Inside of every residual block the channels that the first BatchNorm gives are multiplied by
factors between 2^-SPREAD and 2^SPREAD, log-uniform, and what the second convolution reads of them
is divided by them. Behind a ReLU that changes no output (Nagel et al. 2019, section 4.1, who go
the other way).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from smoke import finished_run, parsed_with_run
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from compress.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from compress.checkpoints.permission import Permission
from compress.errors import CompressError
from compress.networks.architectures import CifarBlock
from compress.networks.capture import Example
from compress.networks.shrink import largest_difference, outputs_of
from compress.runs.rundirectory import RunDirectory

BLOCKS = (CifarBlock, BasicBlock, Bottleneck)
"""Those in which a ReLU stands between ``bn1`` and ``conv2``."""


def uneven(model: nn.Module, spread: float, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Scale the channels of a network, in place; yield every block's name and its factors."""
    generator = torch.Generator().manual_seed(seed)
    for name, block in model.named_modules():
        if not isinstance(block, BLOCKS):
            continue
        exponents = 2 * torch.rand(block.bn1.num_features, generator=generator) - 1
        factors = torch.exp2(spread * exponents)
        with torch.no_grad():
            block.bn1.weight.mul_(factors)
            block.bn1.bias.mul_(factors)
            block.conv2.weight.div_(factors[None, :, None, None])
        yield name, factors


def difference(before: nn.Module, after: nn.Module, size: Sequence[int]) -> float:
    """Return the largest difference of two networks' outputs in float64, relative."""
    generator = torch.Generator().manual_seed(0)
    images = Example((torch.randn(2, *size, generator=generator, dtype=torch.float64),))
    expected, found = (
        outputs_of(copy.deepcopy(model).double().eval(), images) for model in (before, after)
    )
    return largest_difference(expected, found)


def write(directory: Path, output: Path, options: argparse.Namespace) -> None:
    """Write the checkpoint and print what was done to each block."""
    run = RunDirectory(directory)
    dense = load_checkpoint(run.dense, Permission(run.saved_config().model))
    model = copy.deepcopy(dense.model)
    print("| block | channels | least factor | largest factor |\n|---|---:|---:|---:|")
    for name, factors in uneven(model, options.spread, options.seed):
        print(f"| {name} | {len(factors)} | {factors.min():.3g} | {factors.max():.3g} |")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, model, description=dense.description)
    found = difference(dense.model, model, dense.input_size)
    print(f"\noutputs differ by {found:.1e} of the largest")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spread", type=float, default=6, help="exponent of 2 of the factors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="the checkpoint; default none is kept")
    return parsed_with_run(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with finished_run(options.run) as run, tempfile.TemporaryDirectory() as scratch:
        write(run, options.output or Path(scratch) / "uneven.safetensors", options)


if __name__ == "__main__":
    try:
        main()
    except CompressError as error:
        sys.exit(f"error: {error}")
