"""From tied atoms to units and groups. Pure functions of arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from compress.networks.groups import Group, Layer, Units


def components(num_atoms: int, ties: Iterable[tuple[Units, Units]]) -> Units:
    """Return the unit of each atom: connected components, numbered by their first atom."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    empty = np.zeros(0, np.int64)
    rows = np.concatenate([empty, *(np.ravel(first) for first, _ in ties)])
    columns = np.concatenate([empty, *(np.ravel(second) for _, second in ties)])
    links = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), (num_atoms, num_atoms))
    _, labels = connected_components(links, directed=False)
    _, first_atom, unit = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first_atom))
    return order[unit].astype(np.int64)


def groups_of(
    layers: Sequence[Layer], frozen: dict[int, str], residual: set[int]
) -> tuple[Group, ...]:
    """Partition the units by the tensor dimensions they run through."""
    axes = [(layer, role, units) for layer in layers for role, units in _axes(layer)]
    runs_through: dict[int, list[int]] = defaultdict(list)
    for index, (_, _, units) in enumerate(axes):
        for unit in np.unique(units).tolist():
            runs_through[unit].append(index)
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for unit in sorted(runs_through):
        members[tuple(runs_through[unit])].append(unit)
    groups = [
        _group([axes[i] for i in key], units, frozen, residual) for key, units in members.items()
    ]
    return _with_unique_names(groups)


def _axes(layer: Layer) -> list[tuple[str, Units]]:
    if layer.kind == "pad":
        return [("pads", np.concatenate([layer.inputs, layer.outputs]))]
    if layer.reads:
        return [("reads", layer.inputs), ("writes", layer.outputs)]
    return [("passes", layer.outputs)]


def _group(
    axes: list[tuple[Layer, str, Units]],
    units: list[int],
    frozen: dict[int, str],
    residual: set[int],
) -> Group:
    writers = tuple(layer.name for layer, role, _ in axes if role == "writes")
    readers = tuple(layer.name for layer, role, _ in axes if role == "reads")
    by_role = sorted(axes, key=lambda axis: axis[1] != "writes")
    widths = [int(np.count_nonzero(found == units[0])) for _, _, found in by_role]
    reasons = [frozen[unit] for unit in units if unit in frozen]
    if not reasons and not readers:
        reasons = ["nothing reads it"]
    return Group(
        name=(writers or ("input",))[0],
        units=np.array(units, np.int64),
        writers=writers,
        readers=readers,
        residual=any(unit in residual for unit in units),
        frozen=reasons[0] if reasons else None,
        widths=tuple(widths) or (1,),
    )


def _with_unique_names(groups: Sequence[Group]) -> tuple[Group, ...]:
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        count = seen[group.name]
        named.append(group if count == 1 else replace(group, name=f"{group.name}#{count}"))
    return tuple(named)
