"""Weights as the bytes of a file; and put into a network, if all of them fit it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from compress.checkpoints.description import METADATA_KEY, Header, Saved
from compress.checkpoints.wrapped import without_prefixes
from compress.errors import CheckpointError

COUNTERS = "num_batches_tracked"
"""Files from before PyTorch 0.4.1 lack these buffers; nothing computed depends on them."""
CLASSES = "build the network for as many"


def encoded(state: Mapping[str, torch.Tensor], header: Header) -> bytes:
    """Return the file of a network."""
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    return safetensors.torch.save(tensors, {METADATA_KEY: header.model_dump_json()})


def with_tied(state: Mapping[str, torch.Tensor], header: Header | None) -> dict[str, torch.Tensor]:
    """Return tensors by all the names that a file has for them."""
    tied = header.tied if isinstance(header, Saved) else {}
    return {**{name: state[held] for name, held in tied.items() if held in state}, **state}


def assign(
    model: nn.Module, state: Mapping[str, torch.Tensor], path: Path, *, classes: str = CLASSES
) -> None:
    """Put tensors into a network after every name and shape has been compared.

    Args:
        model: the network; what it ties stays tied.
        state: tensors by name, prefixes taken off.
        path: where they are from, for messages.
        classes: what to do where the classifier is of another width, as the end of a sentence.

    Raises:
        CheckpointError: a tensor is missing, does not belong, has another shape or whole numbers.
    """
    names = model.state_dict()
    own = without_prefixes(names)
    missing = sorted(k for k in set(own) - set(state) if not k.endswith(COUNTERS))
    extra = sorted(set(state) - set(own))
    if missing or extra:
        raise CheckpointError(_names_message(path, model, missing, extra))
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(_shape_message(path, name, tensor, own[name], classes))
        if own[name].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{path} holds {name!r} as {kind}, and the network has fractions there: give the "
                "weights from before they were quantised"
            )
    for full_name, (name, tensor) in zip(names, own.items(), strict=True):
        value = state.get(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
        # A copy: safetensors gives views of the file, at addresses that change how sums round.
        _set_tensor(model, full_name, value.to(tensor.dtype, copy=True))


def _set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    current = getattr(module, attribute)
    if not current.is_meta:
        current.data = value.to(current.device)  # in place: tied weights stay tied
    elif isinstance(current, nn.Parameter):
        setattr(module, attribute, nn.Parameter(value, requires_grad=current.requires_grad))
    else:
        setattr(module, attribute, value)


def _names_message(path: Path, model: nn.Module, missing: list[str], extra: list[str]) -> str:
    parts = [
        f"{len(names)} tensors {verb} (first {names[0]!r})"
        for names, verb in ((missing, "are missing"), (extra, "do not belong"))
        if names
    ]
    if any(map(is_gate, extra)):
        return (
            f"{path} has the gates of the research code of 2019: take them out with compress import"
        )
    return f"{path} is of another architecture than {type(model).__name__}: {' and '.join(parts)}"


def _shape_message(
    path: Path, name: str, found: torch.Tensor, wanted: torch.Tensor, classes: str
) -> str:
    classifier = found.shape[1:] == wanted.shape[1:] and not name.endswith(
        ("running_mean", "running_var")
    )
    if classifier and name.startswith(("fc.", "classifier", "head")):
        return f"{path} has {found.shape[0]} classes and {wanted.shape[0]} are needed: {classes}"
    return (
        f"{path} is of another architecture: {name!r} is {list(found.shape)} "
        f"there and {list(wanted.shape)} in the network"
    )


def is_gate(name: str) -> bool:
    """Whether a tensor of a state dict has the name of a gate of the research code of 2019."""
    module, _, attribute = name.rpartition(".")
    return attribute == "weight" and module.rpartition(".")[2].startswith("gate")
