"""Importance, or a mask, from a file: what was measured elsewhere decides, nothing is scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.checkpoints.tensors import read_tensors
from compress.errors import ConfigError, nearest
from compress.files.documents import parsed_json
from compress.networks.groups import ChannelGraph, Group
from compress.pruning.masking import Candidate, Scores

MOST_BYTES = 2**26
"""Largest JSON file; a million numbers take a third of it."""


def read_importance(path: Path, graph: ChannelGraph, allowed: Iterable[Candidate]) -> Scores:
    """Return the importance that a file gives to units, (units,); zero for groups that stay.

    Args:
        path: safetensors, or JSON with one object. A name is that of a group, of a layer that
            writes it, or of the layer's weight; it holds one number for each unit. In JSON it may
            hold ``{"kept": [indices]}`` instead: kept units count 1 and the others 0.
        graph: the channel graph of the dense network.
        allowed: the groups that may lose units; the file must name them all.

    Raises:
        ConfigError: the file cannot be read, names what is not there or not all that is needed, or
            has another number of values.
        CheckpointError: a safetensors file is damaged.
    """
    names = _names(graph)
    scores, named = np.zeros(graph.num_units), set()
    for name, values in _document(path).items():
        group = names.get(name)
        if group is None:
            known = [group.name for group in graph.prunable]
            raise ConfigError(f"{path}: no group is named {name!r}: {nearest(name, known)}")
        if group.name in named:
            raise ConfigError(f"{path} names the group {group.name} twice: leave {name!r} out")
        named.add(group.name)
        scores[group.units] = _numbers(values, group, f"{path}: {name}")
    missing = [c.group.name for c in allowed if c.group.name not in named]
    if missing:
        raise ConfigError(
            f"{path} says nothing of {len(missing)} groups that may be pruned, such as "
            f"{missing[0]}: add them, or exclude them with prune.keep_dense"
        )
    return scores


def _names(graph: ChannelGraph) -> dict[str, Group]:
    """Return the groups by all of their names."""
    found: dict[str, Group] = {}
    for group in graph.groups:
        for writer in group.writers:
            found |= {writer: group, f"{writer}.weight": group}
    return {**found, **{group.name: group for group in graph.groups}}


def _document(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} is larger than 64 MiB: give the numbers as safetensors")
    try:
        document = parsed_json(data)
    except ValueError as error:
        raise ConfigError(
            f"{path} is neither JSON ({error}) nor named .safetensors; a pickle is never loaded: "
            "write its numbers as JSON, see docs/original.md"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no JSON object with numbers by the names of groups")
    return document


def _numbers(values: Any, group: Group, where: str) -> Scores:
    """Return one finite number for each unit of a group."""
    if isinstance(values, dict):
        return _mask(values, group, where)
    if isinstance(values, list) and not all(isinstance(value, int | float) for value in values):
        raise ConfigError(f"{where} holds something else than numbers")
    if not isinstance(values, list | torch.Tensor):
        raise ConfigError(f"{where} holds no list of numbers")
    found = torch.as_tensor(values, dtype=torch.float64).numpy()
    if found.shape != (group.size,):
        raise ConfigError(
            f"{where} holds values of shape {list(found.shape)} and the group has {group.size} "
            "units: give one number for each"
        )
    if not np.isfinite(found).all():
        raise ConfigError(f"{where} holds values that are not finite")
    return found


def _mask(values: Mapping[str, Any], group: Group, where: str) -> Scores:
    kept = values.get("kept")
    whole = isinstance(kept, list) and all(type(index) is int for index in kept)
    if values.keys() != {"kept"} or not whole:
        raise ConfigError(f'{where} must be a list of numbers, or {{"kept": [indices]}}')
    assert isinstance(kept, list)
    outside = [index for index in kept if not 0 <= index < group.size]
    if outside:
        raise ConfigError(
            f"{where} keeps unit {outside[0]} and the group has the units 0 to {group.size - 1}"
        )
    found = np.zeros(group.size)
    found[kept] = 1
    return found
