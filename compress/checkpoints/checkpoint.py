"""Networks on disk: safetensors with everything needed to rebuild them; nothing writes a pickle."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compress
from compress.checkpoints.description import (
    FORMAT_VERSION,
    QUANTIZED_VERSION,
    BranchFacts,
    Description,
    GroupFacts,
    Header,
    Saved,
    Structure,
    read_header,
)
from compress.checkpoints.permission import BUILT_IN, Permission, how_to_allow, remember
from compress.checkpoints.recipe import mask_from_groups, rebuild_, recipe_of, version_of
from compress.checkpoints.tensors import read_state_dict, read_tensors
from compress.checkpoints.weights import COUNTERS, assign, encoded, is_gate, with_tied
from compress.checkpoints.wrapped import without_prefixes
from compress.config import ModelConfig
from compress.errors import CheckpointError, ModelError
from compress.files.atomic import sha256_of, write_atomically
from compress.networks import cost
from compress.networks.analysis import analyse
from compress.networks.capture import Example
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.models import (
    BUILTIN_MODELS,
    build_model,
    build_skeleton,
    ends_of,
    is_builtin,
)
from compress.networks.shrink import shrink_

ANY_NETWORK = 2**30
"""Bytes: more than any architecture takes by itself, so that more of them are claimed by a file."""
NEW_HEAD = (
    "give the data that it was trained on, or add --set model.new_head=true for a classifier that "
    "begins anew"
)


@dataclass(frozen=True)
class Checkpoint:
    """A network rebuilt from a file, in eval mode, and what the file says of it."""

    model: nn.Module
    description: Description
    sha256: str
    structure: Structure | None = field(default=None, repr=False)
    """Costs and groups, where the file or the way to read it tells."""

    @property
    def architecture(self) -> str:
        """Name of the dense architecture."""
        return self.description.architecture

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return self.description.classes

    @property
    def num_classes(self) -> int:
        """Width of the classifier."""
        return self.description.num_classes

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.description.input_size

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of images scaled to [0, 1]."""
        return self.description.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of images scaled to [0, 1]."""
        return self.description.std

    @cached_property
    def costs(self) -> dict[str, int]:
        """``macs`` of one image and ``params``, counted on the network."""
        return cost.measured(self.model, Example.images(self.input_size, count=1))


def save_checkpoint(
    path: Path,
    model: nn.Module,
    *,
    description: Description,
    graph: ChannelGraph | None = None,
    kept: Mask | None = None,
) -> None:
    """Write weights, recipe and provenance as one safetensors file, atomically.

    Args:
        path: the file.
        model: dense, or shrunk by ``kept``; if it is not built in, this file may be built again.
        description: what the file says of itself; recipe and tools are filled in here.
        graph: the channel graph of the dense network, for a shrunk one.
        kept: the units that the shrunk network kept.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    written: dict[str, Any] = {"format_version": FORMAT_VERSION, "tools": tool_versions()}
    if graph is not None and kept is not None:
        written["recipe"] = recipe_of(graph, kept)
        written["format_version"] = version_of(written["recipe"])
        written["structure"] = structure_of(graph, kept)
    if description.quantization is not None:
        written["format_version"] = QUANTIZED_VERSION
    document = description.model_copy(update=written)
    data = encoded(model.state_dict(), document)
    write_atomically(path, data)
    remember(document.model, data)


def load_model(
    path: str | Path, model: str | None = None, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Rebuild a network from a file that this tool wrote, in eval mode.

    Args:
        path: ``dense.safetensors`` or ``pruned.safetensors``.
        model: ``package.module:callable``, ``timm:NAME`` or ``torchvision:NAME``. A file never
            names code to import by itself: a network that is not built in must be asked for here,
            unless a command of this user wrote the file in this folder.
        options: what it is called with, where the file says that it is called with any.

    Raises:
        CheckpointError: the file is missing, damaged, or not of that architecture.
    """
    typed = ModelConfig(name=model, options=dict(options or {})) if model else None
    return load_checkpoint(Path(path), Permission(typed)).model


def load_checkpoint(path: Path, permission: Permission = BUILT_IN) -> Checkpoint:
    """Rebuild a network and its description.

    Args:
        path: a file of this tool.
        permission: which networks that are not built in may be built.

    Raises:
        CheckpointError: the file is missing, damaged, or of a network that is not allowed.
    """
    description = read_header(path)
    if isinstance(description, Saved):
        raise CheckpointError(
            f"{path} does not say which network it holds: in Python, compress.load reads it with "
            "the function that builds the network, and compress.export_onnx writes its ONNX file"
        )
    if description is None:
        raise CheckpointError(
            f"{path} holds weights only, not what compress needs to rebuild the network: "
            "give it to compress prune with --checkpoint, or name the architecture with --model"
        )
    if not permission.allows(description.model, path):
        raise CheckpointError(
            f"{path} holds a network of {description.architecture}: "
            f"{how_to_allow(description.model)}"
        )
    network, structure = _skeleton(path, description)
    assign(network, read_tensors(path), path)
    return Checkpoint(network.eval(), description, sha256_of(path), structure)


def load_weights(
    path: Path, model: nn.Module, *, without: Collection[str] = (), key: str | None = None
) -> None:
    """Load a dense state dict (``.pth`` or safetensors) into a network of the same architecture.

    Wrappers such as ``{"state_dict": ...}`` and prefixes such as ``module.`` are taken off.

    Args:
        path: the file.
        model: the network.
        without: names of tensors that the network keeps as they are, whatever the file holds.
        key: which weights, where the file holds several sets; None for the usual ones.

    Raises:
        CheckpointError: the file is missing, damaged, a pickle that needs code execution, or of
            another architecture or class count.
    """
    header = read_header(path) if path.suffix == ".safetensors" else None
    if header and header.recipe:
        raise CheckpointError(f"{path} is pruned already: prune its dense parent instead")
    own = model.state_dict()
    short = zip(own, without_prefixes(own).items(), strict=True)
    kept = dict(item for name, item in short if name in without)
    needed = {name for name in without_prefixes(own) if not name.endswith(COUNTERS)}

    def fits(state: Mapping[str, torch.Tensor]) -> bool:
        names = {name for name in with_tied(state, header) if not name.endswith(COUNTERS)}
        return names - {name for name in names if is_gate(name)} == needed

    state = with_tied(read_state_dict(path, key, fits), header)
    assign(model, {**state, **kept}, path, classes=NEW_HEAD)


def require_claims(
    path: Path, model: ModelConfig, state: Mapping[str, torch.Tensor], classes: int, channels: int
) -> None:
    """Refuse a width that a file cannot hold before memory is taken for a network of it.

    Raises:
        CheckpointError: the network would be many times as large as the file's tensors.
    """
    if not is_builtin(model):  # it takes its memory in any case, and the user has asked for it
        return
    try:
        network = build_skeleton(model, num_classes=classes, in_channels=channels)
        size = sum(parameter.nbytes for parameter in network.parameters())
    except RuntimeError:  # of dimensions whose product no integer holds
        size = sys.maxsize
    held = sum(tensor.nbytes for tensor in state.values())
    if size > 4 * held + ANY_NETWORK:  # weights may be of 8 bits
        raise CheckpointError(
            f"{path} claims {classes} classes and images of {channels} channels and holds "
            f"{held} bytes of weights, which is too little for that: it is damaged"
        )


def identify(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return the built-in architecture whose tensors these are, or None."""
    shapes = _shapes(state)
    for name in BUILTIN_MODELS:
        first, classifier = (shapes.get(f"{end}.weight", ()) for end in ends_of(name))
        if len(first) != 4 or len(classifier) != 2:  # no need to build it
            continue
        # RuntimeError: dimensions whose product no integer holds.
        with suppress(ModelError, RuntimeError):
            if _builtin_shapes(name, classifier[0], first[1]) == shapes:
                return name
    return None


def tool_versions() -> dict[str, str]:
    """Return the versions of what computed the weights."""
    return {
        "compress": compress.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def structure_of(graph: ChannelGraph, kept: Mask) -> Structure:
    """Return costs and groups of a network, dense and under a mask."""
    return Structure(
        dense=cost.totals(graph, graph.everything()),
        now=cost.totals(graph, kept),
        groups=tuple(
            GroupFacts(
                name=group.name,
                dense=group.size * group.width,
                kept=int(np.count_nonzero(kept[group.units])) * group.width,
                channels_per_unit=group.width,
                writers=len(group.writers),
                readers=len(group.readers),
                residual=group.residual,
                frozen=group.frozen,
            )
            for group in graph.groups
        ),
        branches=tuple(
            BranchFacts(name=b.name, kept=bool(kept[b.unit]), frozen=b.frozen)
            for b in graph.branches
        ),
        unknown_operations=graph.unknown,
    )


def cut_(network: nn.Module, header: Header) -> Structure | None:
    """Cut a dense network in place, as the header of a file describes.

    Nothing is captured, which other threads would notice, but for a file of version 1.

    Returns:
        Costs and groups, where the file or the way to read it tells.

    Raises:
        CheckpointError: the recipe does not fit the network.
        ModelError: the network of a file of version 1 cannot be analysed.
    """
    description = header if isinstance(header, Description) else None
    if description and description.format_version == 1 and header.recipe:
        graph = analyse(network, description.input_size, whole_groups=True)
        kept = mask_from_groups(graph, header.recipe)
        shrink_(network, graph, kept)
        return structure_of(graph, kept)
    rebuild_(network, header.recipe)
    return description.structure if description else None


def _skeleton(path: Path, description: Description) -> tuple[nn.Module, Structure | None]:
    """Build the shrunk network; of one that is built in, no memory is taken before its shapes are
    checked.
    """
    try:
        network = build_skeleton(
            description.model,
            num_classes=description.num_classes,
            in_channels=description.input_size[0],
        )
        return network, cut_(network, description)
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(f"{path}: {error}") from error


@cache
def _builtin_shapes(name: str, num_classes: int, in_channels: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, in_channels=in_channels)
    return _shapes(model.state_dict())


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(COUNTERS)}
