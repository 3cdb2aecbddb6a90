"""From tied atoms to units and groups. Pure functions of arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from compress.networks.groups import Axis, Group, Units, layer_of

NETWORK_INPUT = "network input"
"""Why the channels of an image stay."""


def components(num_atoms: int, ties: Iterable[tuple[Units, Units]], used: Units) -> Units:
    """Return the unit of each atom: connected components, numbered by their first atom.

    Args:
        num_atoms: how many atoms there are.
        ties: pairs of arrays of equal length; each atom of the one is tied to that of the other.
        used: atoms whose components count; the atoms of all others get -1.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    empty = np.zeros(0, np.int64)
    ties = list(ties)
    rows = np.concatenate([empty, *(np.ravel(first) for first, _ in ties)])
    columns = np.concatenate([empty, *(np.ravel(second) for _, second in ties)])
    links = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), (num_atoms, num_atoms))
    count, labels = connected_components(links, directed=False)
    counts = np.zeros(count, bool)
    counts[labels[used]] = True
    first_atom = np.full(count, num_atoms)
    np.minimum.at(first_atom, labels, np.arange(num_atoms))
    unit = np.full(count, -1, np.int64)
    in_order = np.flatnonzero(counts)[np.argsort(first_atom[counts])]
    unit[in_order] = np.arange(len(in_order))
    return unit[labels]


def groups_of(
    axes: Sequence[Axis],
    *,
    frozen: Mapping[int, str],
    residual: set[int],
    fewest: Mapping[int, int],
) -> tuple[Group, ...]:
    """Partition the units by the tensor dimensions they run through, frozen ones apart.

    Args:
        axes: all of them, in the order in which the network uses them.
        frozen: why a unit may not be removed.
        residual: units that residual additions tie.
        fewest: how many units of its group must be left, where a unit asks for it.
    """
    runs_through: dict[int, list[int]] = defaultdict(list)
    for index, axis in enumerate(axes):
        for unit in np.unique(axis.units).tolist():
            runs_through[unit].append(index)
    members: dict[tuple[bool, tuple[int, ...]], list[int]] = defaultdict(list)
    for unit in sorted(runs_through):
        members[unit in frozen, tuple(runs_through[unit])].append(unit)
    groups = []
    for (_, key), units in members.items():
        through = [axes[index] for index in key]
        if any(axis.writes or axis.reads for axis in through):
            group = _group(through, units, frozen, residual)
            least = max((fewest.get(unit, 1) for unit in units), default=1)
            groups.append(replace(group, fewest=min(least, group.size)))
    return _with_unique_names(groups)


def _group(
    axes: list[Axis],
    units: list[int],
    frozen: Mapping[int, str],
    residual: set[int],
) -> Group:
    writers = tuple(axis.layer for axis in axes if axis.writes)
    readers = tuple(axis.tensor for axis in axes if axis.reads)
    by_role = sorted(axes, key=lambda axis: not axis.writes)
    widths = [int(np.count_nonzero(axis.units == units[0])) for axis in by_role]
    reasons = [frozen[unit] for unit in units if unit in frozen]
    given = reasons[:1] == [NETWORK_INPUT]
    if not reasons and not readers:
        reasons = ["nothing reads it"]
    return Group(
        name=writers[0] if writers else "input" if given else f"{layer_of(readers[0])}.inputs",
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
