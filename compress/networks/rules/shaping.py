"""Operators that lay the same numbers out anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from compress.networks.rules.registry import rule
from compress.networks.walk import NOWHERE, Atoms, Call, Dim, Hint, Origins, Value, Walk

Segment = tuple[list[int], list[int]]
"""Dimensions before and after that hold the same numbers."""


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def reshape(call: Call) -> Value:
    """Dimensions are merged and split; whichever part of the shape they share stays as it is."""
    return reshaped(call, call.values[0], call.shape)


def reshaped(call: Call, x: Value, shape: Sequence[int]) -> Value:
    """Return a value laid out as another shape."""
    dims: list[Dim] = [None] * len(shape)
    origins: list[Origins] = [NOWHERE] * len(shape)
    for before, after in segments(x.shape, shape):
        if len(before) == len(after) == 1:
            dims[after[0]], origins[after[0]] = x.dims[before[0]], x.origins[before[0]]
        elif after:
            _split(call, x, before, after, dims, shape)
    for dim in dims:
        if dim is not None:
            call.walk.hints.append(Hint(call.module, len(dim), dim))
    return Value(tuple(shape), tuple(dims), tuple(origins), x.fixed)


def _split(
    call: Call,
    x: Value,
    before: Sequence[int],
    after: Sequence[int],
    dims: list[Dim],
    shape: Sequence[int],
) -> None:
    carriers = [d for d in before if x.dims[d] is not None]
    if len(carriers) != 1:
        for dim in carriers:
            call.walk.freeze(x.dims[dim], f"{call.name} merges it with other channels")
        return
    atoms = x.dims[carriers[0]]
    assert atoms is not None
    along = [1] * len(before)
    along[list(before).index(carriers[0])] = -1
    spread = np.broadcast_to(atoms.reshape(along), [x.shape[d] for d in before])
    laid = spread.reshape([shape[d] for d in after])
    varying = [i for i in range(laid.ndim) if (laid != laid.take([0], axis=i)).any()]
    if not varying:  # all of them are one unit
        varying = [max(i for i in range(laid.ndim) if laid.shape[i] > 1)]
    # x.view(n, groups, c // groups): the number of parts is fixed, and each part shrinks alike;
    # in x.view(n, c, r, r, h, w) it is the number that shrinks. The trial tells which.
    keeper = varying[0 if call.node.name in call.walk.outer else -1]
    if len(varying) > 1:
        call.walk.splits.append((call.node.name, atoms))
    first = np.moveaxis(laid, keeper, -1).reshape(-1, laid.shape[keeper])
    if len(varying) > 1:
        call.walk.ties.append((np.tile(first[0], len(first)), first.ravel()))
    dims[after[keeper]] = first[0].copy()


def segments(before: Sequence[int], after: Sequence[int]) -> Iterator[Segment]:
    """Yield the smallest runs of dimensions with equal products, in order.

    Example: (2, 12, 7, 7) to (2, 3, 4, 49) is (0: 0), (1: 1, 2), (2, 3: 3).
    """
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        products = [1, 1]
        while True:
            if left and right and products[0] == products[1]:
                break
            if products[0] <= products[1] and i < len(before):
                left.append(i)
                products[0] *= before[i]
                i += 1
            elif j < len(after):
                right.append(j)
                products[1] *= after[j]
                j += 1
            else:
                break
        yield left, right


@rule("permute")
def permute(call: Call) -> Value:
    """Dimensions in another order."""
    x = call["self"]
    return x.take([d % x.rank for d in call["dims"]])


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Value:
    """Two dimensions change places."""
    x = call["self"]
    order = list(range(x.rank))
    first, second = (int(d) % x.rank for d in list(call.arguments.values())[1:3])
    order[first], order[second] = order[second], order[first]
    return x.take(order)


@rule("t", "numpy_T", "adjoint", "mT")
def matrix_transpose(call: Call) -> Value:
    """The last two dimensions change places."""
    x = call["self"]
    return x.take([*range(x.rank - 2), *reversed(range(max(0, x.rank - 2), x.rank))])


@rule("movedim", "moveaxis")
def movedim(call: Call) -> Value:
    """Dimensions go to other places."""
    x = call["self"]
    source, target = (
        [int(d) % x.rank for d in (v if isinstance(v, (list, tuple)) else [v])]
        for v in (call["source"], call["destination"])
    )
    rest = iter(d for d in range(x.rank) if d not in source)
    moved = dict(zip(target, source, strict=True))
    return x.take([moved[i] if i in moved else next(rest) for i in range(x.rank)])


@rule("squeeze")
def squeeze(call: Call) -> Value:
    """Dimensions of length 1 go; without saying which, one that shrinks to 1 would go too."""
    x, dims = call["self"], call.get("dim")
    if dims is None:
        gone = {d for d in range(x.rank) if x.shape[d] == 1}
        for dim in x.dims:
            if dim is not None:
                call.walk.least.append((dim, 2))
    else:
        chosen = dims if isinstance(dims, (list, tuple)) else [dims]
        gone = {d % x.rank for d in chosen if x.shape[d] == 1}
        for dim in (x.dims[d] for d in chosen):
            if dim is not None:
                call.walk.least.append((dim, 2))
    return x.take([d for d in range(x.rank) if d not in gone])


@rule("unsqueeze")
def unsqueeze(call: Call) -> Value:
    """A dimension of length 1 more."""
    x = call["self"]
    at = int(call["dim"]) % (x.rank + 1)
    return Value(
        call.shape,
        (*x.dims[:at], None, *x.dims[at:]),
        (*x.origins[:at], NOWHERE, *x.origins[at:]),
        x.fixed,
    )


@rule("expand", "broadcast_to")
def expand(call: Call) -> Value:
    """Dimensions of length 1 are repeated; how often may follow another tensor's width."""
    x = call["self"]
    dims: list[Dim] = []
    origins: list[Origins] = []
    for place in range(-len(call.shape), 0):
        there = -place <= x.rank and x.shape[place] == call.shape[place]
        repeated = place > -len(call.shape) and call.shape[place] > 1
        dims.append(
            x.dims[place] if there else call.walk.fresh(call.shape[place]) if repeated else None
        )
        origins.append(x.origins[place] if there else NOWHERE)
    return Value(call.shape, tuple(dims), tuple(origins), x.fixed)


@rule("repeat", "tile")
def repeat(call: Call) -> Value:
    """Copies side by side: an index goes from all of them."""
    x = call["self"]
    more = len(call.shape) - x.rank
    dims: list[Dim] = [None] * more
    for dim, size in zip(x.dims, call.shape[more:], strict=True):
        dims.append(None if dim is None else np.tile(dim, size // len(dim)))
    return Value(call.shape, tuple(dims), fixed=x.fixed)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Value | None:
    """Each index several times."""
    x, dim, times = call["self"], call.get("dim"), call.get("repeats")
    if dim is None or not isinstance(times, int):
        return None
    atoms = x.dims[dim % x.rank]
    many = None if atoms is None else np.repeat(atoms, times)
    return x.with_dim(dim % x.rank, many, call.shape[dim % x.rank])


@rule("flip")
def flip(call: Call) -> Value:
    """Backwards along some dimensions."""
    x = call["self"]
    for dim in (int(d) % x.rank for d in call["dims"]):
        atoms = x.dims[dim]
        if atoms is not None:
            x = x.with_dim(dim, atoms[::-1].copy(), x.shape[dim])
    return x.same()


@rule("roll")
def roll(call: Call) -> Value:
    """Indices move on, by a number that is no width."""
    x, dims = call["self"], call.get("dims") or []
    for dim in dims or range(x.rank):
        call.walk.freeze(x.dims[dim], "roll along it")
    return x.same()


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Value:
    """(..., c * r * r, h, w) to (..., c, h * r, w * r)."""
    x = call.values[0]
    at = x.rank - 3
    atoms = _runs(call.walk, x.dims[at], call.shape[at])
    return _in_space(x, at, atoms, call.shape)


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Value:
    """(..., c, h * r, w * r) to (..., c * r * r, h, w)."""
    x = call.values[0]
    at, atoms = x.rank - 3, x.dims[x.rank - 3]
    many = None if atoms is None else np.repeat(atoms, call.shape[at] // len(atoms))
    return _in_space(x, at, many, call.shape)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Value:
    """(n, g * c, ...) as (n, g, c, ...), transposed; each of the g parts shrinks alike."""
    x, groups = call.values[0], int(call["groups"])
    atoms = x.dims[1]
    if atoms is None:
        return x.same()
    parts = atoms.reshape(groups, -1)
    call.walk.ties.append((np.tile(parts[0], groups), atoms))
    return x.with_dim(1, np.repeat(parts[0], groups), x.shape[1])


def _runs(walk: Walk, atoms: Dim, count: int) -> Dim:
    """Let each of ``count`` runs of consecutive indices go whole."""
    return None if atoms is None else walk.tie_rows(atoms, count)


def _in_space(x: Value, at: int, atoms: Atoms | None, shape: Sequence[int]) -> Value:
    return Value(tuple(shape), (*x.dims[:at], atoms, None, None), fixed=x.fixed)
