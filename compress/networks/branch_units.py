"""Branches as units of a channel graph: each with a number, and with what is nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import fx

from compress.networks.branches import Found
from compress.networks.groups import Axis, Branch, Group, Units, gone_from
from compress.networks.programs import Gate

UNTOLD = "no weights alone tell the gradient of its gate"
SHARED = "what stays uses weights of it"


def branch_units(
    found: Sequence[Found],
    axes: Sequence[Axis],
    groups: Sequence[Group],
    named: Mapping[fx.Node, str],
    *,
    first: int,
) -> tuple[Branch, ...]:
    """Return the branches of a graph.

    Args:
        found: what was found in it.
        axes: all dimensions, with the units of channels.
        groups: whose names no branch may have.
        named: the nodes of parameters and buffers, and their names.
        first: the unit of the first branch.
    """
    taken = {group.name for group in groups}
    branches = []
    for number, each in enumerate(found):
        name = _free(each.module, taken)
        taken.add(name)
        branch = Branch(
            name,
            first + number,
            each.module,
            each.body,
            each.addition,
            each.stays,
            each.gate or Gate(()),
        )
        gone = gone_from({each.module: branch.program})
        shared = any(
            gone(tensor) and any(user not in each.nodes for user in node.users)
            for node, tensor in named.items()
        )
        frozen = UNTOLD if each.gate is None else SHARED if shared else None
        within = [
            first + other
            for other, inner in enumerate(found)
            if other != number and inner.nodes < each.nodes
        ]
        own = _units(axis for axis in axes if gone(axis.tensor))
        others = _units(axis for axis in axes if not gone(axis.tensor))
        inner = np.append(np.setdiff1d(own, others), within).astype(np.int64)
        branches.append(replace(branch, inner=inner, frozen=frozen))
    return tuple(branches)


def _free(name: str, taken: set[str]) -> str:
    """Return a name that nothing else has."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _units(axes: Iterable[Axis]) -> Units:
    return np.concatenate([np.zeros(0, np.int64), *(np.unique(axis.units) for axis in axes)])
