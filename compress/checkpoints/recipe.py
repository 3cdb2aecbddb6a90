"""The recipe: which channels of each group a shrunk network kept. Pure data, JSON in and out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from compress.errors import CheckpointError
from compress.networks.groups import ChannelGraph, Mask

Recipe = dict[str, dict[str, Any]]
"""Per group that lost channels: ``{"size": dense width in units, "kept": [indices]}``."""


def recipe_from_mask(graph: ChannelGraph, kept: Mask) -> Recipe:
    """Describe a mask by the groups of the dense graph."""
    return {
        group.name: {"size": group.size, "kept": np.flatnonzero(kept[group.units]).tolist()}
        for group in graph.groups
        if not kept[group.units].all()
    }


def mask_from_recipe(graph: ChannelGraph, recipe: Mapping[str, Any]) -> Mask:
    """Return the mask that a recipe describes on the dense graph of its architecture.

    Raises:
        CheckpointError: the recipe does not fit this network.
    """
    groups = {group.name: group for group in graph.groups}
    kept = graph.everything()
    for name, entry in recipe.items():
        group = groups.get(name)
        if group is None or group.frozen:
            raise CheckpointError(f"the recipe prunes {name!r}, which this network does not allow")
        indices = _indices(name, entry, group.size)
        kept[group.units] = False
        kept[group.units[indices]] = True
    return kept


def _indices(name: str, entry: Any, size: int) -> list[int]:
    """Check one entry before anything is built from it."""
    found = entry.get("size") if isinstance(entry, Mapping) else None
    if type(found) is not int or found != size:
        raise CheckpointError(f"the recipe gives {name!r} another width than this network's {size}")
    indices = entry.get("kept")
    valid = (
        isinstance(indices, list)
        and 0 < len(indices) <= size
        and all(type(i) is int and 0 <= i < size for i in indices)
        and all(a < b for a, b in itertools.pairwise(indices))
    )
    if not valid or not isinstance(indices, list):
        raise CheckpointError(f"the recipe's kept channels of {name!r} are not ascending indices")
    return indices
