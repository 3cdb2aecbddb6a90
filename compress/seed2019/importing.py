"""Read a network of somebody else into a file of this tool, without training anything."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from compress.checkpoints.checkpoint import identify, load_weights, require_claims, save_checkpoint
from compress.checkpoints.description import Description, read_description
from compress.checkpoints.tensors import read_state_dict
from compress.checkpoints.weights import is_gate
from compress.config import DataConfig, ModelConfig, RunConfig
from compress.config.location import root_setting
from compress.data.batches import first_images
from compress.data.datasets import IMAGENET_MEAN, IMAGENET_STD, load_data
from compress.errors import CheckpointError, ConfigError, ModelError
from compress.files.atomic import sha256_of
from compress.files.documents import apply_setting, validated
from compress.networks.analysis import analyse
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import TORCHVISION_MODELS, build_network, ends_in
from compress.networks.outputs import require_finite, rows_not_finite
from compress.networks.registries import usual_images
from compress.networks.shrink import PROOF_TOLERANCE, shrink_
from compress.seed2019.gates import attach, find_gates, left_without, ungated
from compress.seed2019.zeros import find_zeroed

log = logging.getLogger("compress")

if TYPE_CHECKING:
    from compress.runs.request import ImportRequest

IMAGENET = {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
"""How the networks of torchvision that are built in saw images."""


def import_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    model: ModelConfig | None = None,
    data: DataConfig | None = None,
    classes: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a state dict as a file of this tool, without channels that are closed.

    Gates are taken out, with the channels they close; so are channels that a zeroed filter or scale
    closes. A warning says how many channels with such zeros stay, and why.

    Args:
        checkpoint: a dense state dict, or one with the gates of the research code of Molchanov et
            al. 2019: ``.pth`` or safetensors.
        output: the file to write.
        model: the architecture, where it cannot be recognised.
        data: where class names, image size and normalisation come from, and the image of the proof.
            Without it: numbers, what published weights of the network are trained with, and noise.
        classes: how many there must be.
        overwrite: replace a file that is there.

    Returns:
        The path of the file that was written.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another architecture or class
            count, or holds gates that cannot be taken out.
        ConfigError: something must be said that the file does not say.
        DataError: the data set is missing or unreadable.
        ModelError: the network cannot be built, or the result would not compute the same.
    """
    _check_paths(checkpoint, output, overwrite=overwrite)
    state = read_state_dict(checkpoint)
    weights = {name: tensor for name, tensor in state.items() if not is_gate(name)}
    name = identify(weights) if model is None else model.name
    if name is None:
        raise CheckpointError(
            f"{checkpoint} holds {len(state)} tensors of no architecture that is recognised: "
            "say which with --model"
        )
    model = model or ModelConfig(name=name)
    ends = _ends(model, weights)
    require_claims(checkpoint, model, weights, *ends)
    description, images = _surroundings(model, data, *ends)
    if classes not in (None, description.num_classes):
        raise CheckpointError(
            f"{checkpoint} has {description.num_classes} classes and --classes asks for {classes}"
        )
    network = build_network(
        model, num_classes=description.num_classes, in_channels=description.input_size[0]
    )
    graph = analyse(network, description.input_size)
    result, gated, gates = _without_gates(network, name, graph, checkpoint, state)
    kept = _without_zeroed(result, graph, gated, images, checkpoint)
    shrink_(result, graph, kept)
    imported = {
        "file": checkpoint.name,
        "sha256": sha256_of(checkpoint),
        "gates": gates,
        "zeroed": int((gated & ~kept).sum()),
    }
    metrics = {"imported": imported, "proof": _difference(network, result, images)}
    save_checkpoint(
        output,
        result.float(),
        description=description.model_copy(update={"metrics": metrics}),
        graph=graph,
        kept=kept,
    )
    return output


def import_asked_for(request: ImportRequest) -> Path:
    """Import what the command asks for; see ``import_checkpoint``."""
    return import_checkpoint(
        *(request.checkpoint, request.output),
        model=request.permission.typed,
        data=data_asked_for(request.data, request.settings),
        classes=request.classes,
        overwrite=request.overwrite,
    )


def data_asked_for(folder: Path | None, settings: Iterable[str]) -> DataConfig | None:
    """Return the data set that a folder and ``data.key=value`` settings name; None if none do.

    Settings of the section ``model`` are passed over.

    Raises:
        ConfigError: a setting that is of neither.
    """
    document: dict[str, Any] = {"data": {"dataset": "imagefolder"} if folder else {}}
    settings = [setting for setting in settings if not setting.startswith("model.")]
    settings += [root_setting(folder)] if folder else []
    for setting in settings:
        if not setting.startswith("data."):
            raise ConfigError(
                f"--set {setting}: an import takes nothing but data.key=value and model.key=value"
            )
        apply_setting(document, setting)
    found = validated(RunConfig, document, source="--set").data
    if folder and found.dataset == "digits":
        raise ConfigError(f"--data {folder} would be ignored: data.dataset = 'digits' is embedded")
    return found if settings else None


def _check_paths(checkpoint: Path, output: Path, *, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise ConfigError(f"--output {output} must be the name of a file ending in .safetensors")
    if output.exists() and not (overwrite and output.is_file()):
        raise ConfigError(f"{output} exists: use --overwrite to replace it, or another --output")
    if checkpoint.suffix == ".safetensors" and read_description(checkpoint):
        raise CheckpointError(f"{checkpoint} is a file of this tool already: use it as it is")


def _ends(model: ModelConfig, weights: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Return the number of classes and of image channels that the weights have."""
    first, last = (weights.get(f"{end}.weight", torch.empty(0)) for end in ends_in(model))
    return len(last) if last.dim() >= 2 else 1, first.shape[1] if first.dim() == 4 else 3


def _without_gates(
    network: nn.Module,
    architecture: str,
    graph: ChannelGraph,
    checkpoint: Path,
    tensors: Iterable[str],
) -> tuple[nn.Module, Mask, int]:
    """Load a checkpoint with its gates into a network, which becomes float64.

    Args:
        network: as the architecture is built.
        architecture: its name.
        graph: its channel graph.
        checkpoint: the file.
        tensors: the names of all that it holds.

    Returns:
        The dense network without gates, the units that they leave, and how many gates there were.
    """
    result = copy.deepcopy(network)
    foreign = set(tensors) - set(network.state_dict())
    modules = [name.rpartition(".")[0] for name in foreign if is_gate(name)]
    gates = find_gates(architecture, graph, modules, checkpoint) if modules else ()
    attach(network, gates)
    load_weights(checkpoint, network)  # which checks the names and lengths of gates as well
    clean, kept = ungated(network.double().state_dict(), gates, graph, checkpoint)
    result.double().load_state_dict(clean)
    return result, kept, len(gates)


def _without_zeroed(
    network: nn.Module, graph: ChannelGraph, kept: Mask, images: torch.Tensor, checkpoint: Path
) -> Mask:
    """Return the units that are left without those that zeroed filters and scales close."""
    zeroed = find_zeroed(network, graph, images.double()).within(kept)
    if words := zeroed.words():
        log.warning("%s: channels with zeroed filters or scales that stay: %s", checkpoint, words)
    return left_without(graph, np.union1d(np.flatnonzero(~kept), zeroed.gone))


def _surroundings(
    model: ModelConfig, data: DataConfig | None, width: int, channels: int
) -> tuple[Description, torch.Tensor]:
    """Return what the file will say besides weights, and an image for the proof."""
    usual = IMAGENET if model.name in TORCHVISION_MODELS else usual_images(model.name)
    if data is not None:
        images = load_data(data.prepared(usual))
        return Description.of(model, images, {}), first_images(images, 1)
    if not usual.keys() >= IMAGENET.keys():
        raise ConfigError(
            f"the image size and the normalisation of a {model.name} are not known: add --data "
            "FOLDER, or --set data.dataset=NAME"
        )
    description = Description(
        architecture=model.name,
        options=model.options,
        output=model.output,
        classes=tuple(str(label) for label in range(width)),
        input_size=(channels, usual["image_size"], usual["image_size"]),
        mean=usual["mean"],
        std=usual["std"],
    )
    noise = torch.randn(1, *description.input_size, generator=torch.Generator().manual_seed(0))
    return description, noise


@torch.no_grad()
def _difference(gated: nn.Module, result: nn.Module, images: torch.Tensor) -> float:
    """Compare both networks in float64: max |gated - result| / max |gated| over all logits.

    Raises:
        ModelError: they differ by more than PROOF_TOLERANCE, or give NaN.
    """
    expected = gated.eval()(images.double())
    require_finite(rows_not_finite(expected).tolist(), len(images))
    difference = (result.eval()(images.double()) - expected).abs().max() / expected.abs().max()
    if not difference <= PROOF_TOLERANCE:
        raise ModelError(
            f"without its gates the network differs by {difference:.1e} relative, over "
            f"{PROOF_TOLERANCE:.0e}: this is a defect of the import, please report it"
        )
    return float(difference)
