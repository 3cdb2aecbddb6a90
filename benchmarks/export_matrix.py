"""Every family of networks through the export: sizes, agreement with torch, TensorRT-RTX builds.

    python benchmarks/export_matrix.py [--networks resnet18,resnet50] [--images 16] [--json]
    python benchmarks/export_matrix.py --smoke

Each network has random weights and BatchNorm statistics of random images, and is exported dense and
with half of its MACs removed at random, widths in multiples of 8, for the target of --target in
fp32, fp16 and int8. Errors are those of ONNX Runtime on the CPU against torch in float32. The
engine is built by TensorRT-RTX, which needs no GPU; its build time says nothing about TensorRT.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from rich.console import Console
from rich.table import Table
from smoke import parsed
from torch import nn

from compress.config import Budget, ExportConfig, ParityLimits, PruneConfig
from compress.config.targets import load_target
from compress.networks.analysis import analyse
from compress.networks.models import build_model
from compress.networks.shrink import shrink
from compress.pruning.decision import prunable
from compress.pruning.goal import goal_for
from compress.pruning.masking import prune_to
from export.engines.build import build_engine
from export.engines.sidecar import NETWORK_FACTS
from export.onnx.trace import onnx_from_network, staged_onnx
from export.precision.calibration import calibrate
from export.precision.fp16 import to_fp16
from export.precision.int8 import quantised_tensors, to_int8
from export.runners import OnnxRunner, TorchRunner
from export.verify import check_parity

NETWORKS = "resnet20,resnet18,resnet50,resnext50_32x4d,vgg16_bn,densenet121"
PRECISIONS = ("fp32", "fp16", "int8")
ANYTHING = ParityLimits(relative_error=1e9)


@dataclass(frozen=True)
class Row:
    """One network in one precision."""

    network: str
    precision: str
    onnx_mb: float
    relative_error: float
    cosine: float
    engine_mb: float
    build_s: float


def measure(name: str, images: int, target_name: str) -> Iterator[Row]:
    """Export and build one network, dense and pruned."""
    size = (3, 32, 32) if name == "resnet20" else (3, 224, 224)
    batch = torch.randn(images, *size)
    dense = random_network(name, batch)
    for kind, model in (("dense", dense), ("pruned", halved(dense, size))):
        proto = onnx_from_network(model, target=load_target(target_name), input_size=size)
        for precision in PRECISIONS:
            label = f"{name}, {kind}"
            yield export(label, model, copy.deepcopy(proto), precision, batch, target_name)


def random_network(name: str, images: torch.Tensor) -> nn.Module:
    """Return a network whose BatchNorm layers have seen the images."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10 if name == "resnet20" else 1000)
    for label, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
            # As after training, a block adds a little to its stream.
            nn.init.constant_(module.weight, 0.3 if label.endswith("bn3") else 1.0)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def halved(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Return the network with half of its MACs removed at random."""
    graph = analyse(model, size)
    config = PruneConfig(channel_multiple=8)
    allowed = prunable(model, graph, config)
    goal = goal_for(graph, Budget(kind="macs", value=0.5), allowed)
    scores = np.random.default_rng(0).random(len(graph.everything()))
    kept = prune_to(scores, graph.everything(), allowed, cost_of=goal.cost_of, limit=goal.limit)
    return shrink(model, graph, kept)


def export(
    label: str,
    model: nn.Module,
    proto: onnx.ModelProto,
    precision: Any,
    images: torch.Tensor,
    target_name: str,
) -> Row:
    """Write, compare and build one network in one precision."""
    if precision == "fp16":
        to_fp16(proto)
    elif precision == "int8":
        tensors = quantised_tensors(proto)
        halves = np.array_split(images.numpy(), 2)
        to_int8(proto, calibrate(proto.SerializeToString(), tensors, lambda: halves, method="max"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with staged_onnx(proto, path, target=load_target(target_name), metadata={}) as facts:
            pass
        with TorchRunner(model) as reference, OnnxRunner(path) as candidate:
            (parity,) = check_parity(
                *(reference, candidate, images.numpy()), batch_sizes=(8,), limits=ANYTHING
            )
        engine = build_engine(
            path,
            path.with_suffix(".engine"),
            target=load_target("rtx"),
            config=ExportConfig(precision=precision, batch=(1, 8)),
            onnx_sha256=facts.sha256,
            network=dict.fromkeys(NETWORK_FACTS),
        )
    return Row(
        network=label,
        precision=precision,
        onnx_mb=facts.bytes / 1e6,
        relative_error=parity.relative_error,
        cosine=parity.cosine,
        engine_mb=engine["engine"]["bytes"] / 1e6,
        build_s=engine["build_seconds"],
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--images", type=int, default=16, help="random images of each network")
    parser.add_argument("--target", default="v100", help="whose ONNX is exported")
    parser.add_argument("--json", action="store_true")
    return parsed(parser, arguments, networks="resnet20", images=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    options = parse(arguments)
    names = options.networks.split(",")
    rows = [row for name in names for row in measure(name, options.images, options.target)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table(*("network", "precision", "ONNX MB", "error", "cosine", "engine MB", "build s"))
    for row in rows:
        figures = f"{row.onnx_mb:.2f}", f"{row.relative_error:.1e}", f"{row.cosine:.6f}"
        built = f"{row.engine_mb:.1f}", f"{row.build_s:.1f}"
        table.add_row(row.network, row.precision, *figures, *built)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
