"""The recipe: what rebuilds a shrunk network from its dense one. Pure data, as JSON.

Version 2 names tensors, and version 3 modules as well::

    {"kept": {"a": {"size": 64, "indices": [0, 2, 5]}},
     "cuts": {"layer1.0.conv1.weight": {"0": "a"}, "layer1.0.conv1.out_channels": {"0": "a"}},
     "branches": {"layer2.0": {"steps": [{"call": "downsample", "of": ["$0"]},
                                         {"call": "relu", "of": ["$1"]}], "result": "$2"}}}

Dimensions that lose the same indices share an entry of ``kept``. ``branches`` says what is left of
each module that lost some (compress.networks.programs). Version 1 named channel groups, which only
the analysis of the dense network can find again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import CheckpointError
from compress.networks.cuts import Cut, Place, apply_cuts_, cuts_of
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.programs import Program
from compress.networks.shortened import programs_of, shorten_

Recipe = dict[str, dict[str, Any]]


def recipe_of(graph: ChannelGraph, kept: Mask) -> Recipe:
    """Return what rebuilds the network of a mask from the one of a graph."""
    return recipe_from(cuts_of(graph, kept), graph.programs(kept))


def recipe_from(cuts: Iterable[Cut], programs: Mapping[str, Program]) -> Recipe:
    """Describe cuts, and what is left of modules, as a JSON document; an empty one is nothing."""
    keys: dict[tuple[int, bytes], str] = {}
    kept: dict[str, Any] = {}
    named: dict[str, dict[str, str]] = {}
    for cut in cuts:
        same = (cut.size, cut.kept.tobytes())
        if same not in keys:
            keys[same] = str(len(keys))
            kept[keys[same]] = {"size": cut.size, "indices": cut.kept.tolist()}
        named.setdefault(cut.tensor, {})[str(cut.dim)] = keys[same]
    found: Recipe = {"kept": kept, "cuts": named} if named or programs else {}
    if programs:
        found["branches"] = {name: program.to_json() for name, program in programs.items()}
    return found


def version_of(recipe: Mapping[str, Any]) -> int:
    """Return the oldest format version whose readers understand a recipe."""
    return 3 if "branches" in recipe else 2


def rebuild_(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Make a shrunk network of its dense one, in place.

    Raises:
        CheckpointError: the recipe does not fit this network.
    """
    programs = programs_in(recipe)
    apply_cuts_(model, cuts_from_recipe(model, recipe))
    try:
        shorten_(model, programs)
    except ValueError as error:
        raise CheckpointError(
            f"the recipe takes branches out of another network: {error}"
        ) from error


def programs_in(recipe: Mapping[str, Any]) -> dict[str, Program]:
    """Return what a recipe leaves of the modules that lose branches, by name.

    Raises:
        CheckpointError: it says so in no way that is understood.
    """
    named = recipe.get("branches", {})
    if not isinstance(named, Mapping):
        raise CheckpointError("the recipe has no branches")
    programs = {}
    for name, document in named.items():
        try:
            programs[name] = Program.of_json(document)
        except ValueError as error:
            raise CheckpointError(
                f"the recipe does not say what is left of {name!r}: {error}"
            ) from error
    return programs


def cuts_from_recipe(model: nn.Module, recipe: Mapping[str, Any]) -> tuple[Cut, ...]:
    """Return the cuts that a recipe describes, checked against the dense network.

    Raises:
        CheckpointError: the recipe does not fit this network.
    """
    return _fitting(model, recipe, lambda cut: cut.size)


def cuts_of_result(model: nn.Module, recipe: Mapping[str, Any]) -> tuple[Cut, ...]:
    """Return the cuts that a recipe describes, checked against what they have left.

    Raises:
        CheckpointError: the recipe does not end in this network.
    """
    if programs_of(model) != programs_in(recipe):
        raise CheckpointError("the recipe takes other branches out than this network has lost")
    return _fitting(model, recipe, lambda cut: len(cut.kept))


def _fitting(
    model: nn.Module, recipe: Mapping[str, Any], length: Callable[[Cut], int]
) -> tuple[Cut, ...]:
    """Return cuts if every dimension that they are of has the length that a cut says."""
    cuts, modules = cuts_in(recipe), dict(model.named_modules())
    for cut in cuts:
        _require_fit(modules, cut, length(cut))
    return cuts


def cuts_in(recipe: Mapping[str, Any]) -> tuple[Cut, ...]:
    """Return the cuts that a recipe describes, whatever network they are for.

    Raises:
        CheckpointError: it is none.
    """
    if not recipe:
        return ()
    kept, named = recipe.get("kept"), recipe.get("cuts")
    if not isinstance(kept, Mapping) or not isinstance(named, Mapping):
        raise CheckpointError("the recipe has no cuts")
    indices = {
        key: _indices(f"entry {key!r}", entry, "indices", fewest=0) for key, entry in kept.items()
    }
    cuts = []
    for tensor, by_dim in named.items():
        for dim, key in by_dim.items() if isinstance(by_dim, Mapping) else ():
            entry = indices.get(key) if isinstance(key, str) else None
            if not (isinstance(dim, str) and dim.isdecimal() and entry and str(int(dim)) == dim):
                raise CheckpointError(f"the recipe cuts dimension {dim!r} of {tensor!r} in no way")
            size, left = entry
            cuts.append(Cut(tensor, int(dim), size, np.array(left, np.int64)))
    return tuple(cuts)


def mask_from_groups(graph: ChannelGraph, recipe: Mapping[str, Any]) -> Mask:
    """Return the mask that a recipe of version 1 describes on the dense graph of its architecture.

    Raises:
        CheckpointError: the recipe does not fit this network.
    """
    groups = {group.name: group for group in graph.groups}
    kept = graph.everything()
    for name, entry in recipe.items():
        group = groups.get(name)
        if group is None or group.frozen:
            raise CheckpointError(f"the recipe prunes {name!r}, which this network does not allow")
        size, indices = _indices(repr(name), entry, "kept", fewest=1)
        if size != group.size:
            raise CheckpointError(
                f"the recipe gives {name!r} another width than this network's {group.size}"
            )
        kept[group.units] = False
        kept[group.units[indices]] = True
    return kept


def _require_fit(modules: Mapping[str, nn.Module], cut: Cut, length: int) -> None:
    """Refuse a cut of what has another length; it is a tensor, or an integer of a module."""
    name, value = cut.tensor, Place.of(modules, cut.tensor).value
    if value is None:
        raise CheckpointError(f"the recipe cuts {name!r}, which this network does not have")
    lengths = tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)
    if cut.dim >= len(lengths):
        raise CheckpointError(f"the recipe cuts dimension '{cut.dim}' of {name!r} in no way")
    if lengths[cut.dim] != length:
        raise CheckpointError(
            f"the recipe gives {name!r} a width of {length} and this network has {lengths[cut.dim]}"
        )
    if not len(cut.kept) and isinstance(value, torch.Tensor):  # padding may become 0
        raise CheckpointError(f"the recipe leaves nothing of {name!r}")


def _indices(name: str, entry: Any, key: str, *, fewest: int) -> tuple[int, list[int]]:
    """Check one entry before anything is built from it."""
    size = entry.get("size") if isinstance(entry, Mapping) else None
    indices = entry.get(key) if isinstance(entry, Mapping) else None
    valid = (
        type(size) is int
        and isinstance(indices, list)
        and fewest <= len(indices) <= size
        and all(type(i) is int and 0 <= i < size for i in indices)
        and all(a < b for a, b in itertools.pairwise(indices))
    )
    if not valid or not isinstance(indices, list) or type(size) is not int:
        raise CheckpointError(f"the recipe's kept channels of {name} are not ascending indices")
    return size, indices
