"""Operators that put tensors together and take them apart."""

from __future__ import annotations

import numpy as np

from compress.networks.rules.registry import rule
from compress.networks.walk import Call, Dim, Hint, Value, plain


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Value:
    """One behind the other along a dimension; the others lose the same indices."""
    parts = [v for v in call.values if v.rank == len(call.shape)]
    dim = int(call.get("dim", 0)) % len(call.shape)
    dims: list[Dim] = []
    for place in range(len(call.shape)):
        if place != dim:
            joined = parts[0].dims[place]
            for other in parts[1:]:
                joined = call.walk.tie(joined, other.dims[place], "cat with a fixed width")
            dims.append(joined)
        elif all(part.dims[dim] is None for part in parts):
            dims.append(None)
        else:
            dims.append(np.concatenate([_carried(call, part, dim) for part in parts]))
    return Value(call.shape, tuple(dims), fixed=all(part.fixed for part in parts))


def _carried(call: Call, part: Value, dim: int) -> np.ndarray:
    atoms = part.dims[dim]
    if atoms is None:
        atoms = call.walk.fresh(part.shape[dim])
        call.walk.freeze(atoms, "cat with a fixed width")
    return atoms


@rule("stack")
def stack(call: Call) -> Value:
    """Side by side along a new dimension."""
    parts = call.values
    at = int(call.get("dim", 0)) % len(call.shape)
    joined = list(parts[0].dims)
    for other in parts[1:]:
        for place, dim in enumerate(other.dims):
            joined[place] = call.walk.tie(joined[place], dim, "stack with a fixed width")
    dims = (*joined[:at], None, *joined[at:])
    return Value(call.shape, dims, fixed=all(part.fixed for part in parts))


@rule("unbind")
def unbind(call: Call) -> list[Value] | None:
    """One tensor for each index of a dimension."""
    x = call["self"]
    dim = int(call.get("dim", 0)) % x.rank
    if x.dims[dim] is not None:
        return None
    rest = x.take([d for d in range(x.rank) if d != dim])
    return [rest] * len(call.shapes)


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def split(call: Call) -> list[Value]:
    """Parts along a dimension; parts of one length lose the same places."""
    x = call.values[0]
    dim = int(call.get("dim", 0)) % x.rank
    atoms, sizes = x.dims[dim], [shape[dim] for shape in call.shapes]
    if atoms is None:
        return [x.with_dim(dim, None, size) for size in sizes]
    parts = np.split(atoms, np.cumsum(sizes)[:-1])
    if listed := _list_of(call, sizes):
        for number, part in enumerate(parts):
            call.walk.widths.append((call.module, f"{listed}.{number}", part))
    elif len(set(sizes)) == 1:
        for part in parts[1:]:
            call.walk.ties.append((parts[0], part))
        if "chunk" not in call.name:  # it is told a number of parts, which is no width
            call.walk.hints.append(Hint(call.module, sizes[0], parts[0]))
            call.walk.hints.append(Hint(call.module, len(atoms), atoms))
    elif call.name == "split_with_sizes":
        for size, part in zip(sizes, parts, strict=True):
            call.walk.hints.append(Hint(call.module, size, part))
    else:
        call.walk.freeze(atoms, f"{call.name} into unequal parts")
    return [x.with_dim(dim, part, len(part)) for part in parts]


def _list_of(call: Call, sizes: list[int]) -> str | None:
    """Return the module's list or tuple of integers that the sizes of parts are read from."""
    if call.name != "split_with_sizes":
        return None
    held = vars(call.walk.modules[call.module]) if call.module in call.walk.modules else {}
    return next(
        (
            name
            for name, value in held.items()
            if isinstance(value, (list, tuple)) and list(value) == sizes
        ),
        None,
    )


@rule("slice", "narrow")
def slicing(call: Call) -> Value:
    """Some indices of a dimension; where they begin and end may be widths."""
    x = call["self"]
    dim = int(call.get("dim", 0)) % x.rank
    atoms = x.dims[dim]
    if call.name == "narrow":
        start, step = int(call["start"]), 1
        end = start + int(call["length"])
    else:
        start, end, step = call.get("start"), call.get("end"), int(call.get("step", 1))
    if atoms is None:
        return x.with_dim(dim, None, call.shape[dim]) if call.shape != x.shape else x.same()
    taken = atoms[slice(start, end, step)]
    if len(taken) == len(atoms):
        return x.same()
    if step != 1:
        call.walk.freeze(atoms, "a slice with a step")
    first = int(start or 0) % len(atoms)
    for part in (atoms[:first], taken, atoms[first + len(taken) :]):
        if len(part):
            call.walk.hints.append(Hint(call.module, len(part), part))
    bounds = {first, first + len(taken)} - {0, len(atoms)}
    halves = len(bounds) == 1 and 2 * bounds.pop() == len(atoms)
    if halves:  # x[:, : c // 2]: both halves lose the same places
        call.walk.ties.append((atoms[: len(atoms) // 2], atoms[len(atoms) // 2 :]))
    return x.with_dim(dim, taken, len(taken))


@rule("select")
def select(call: Call) -> Value:
    """One index of a dimension, by its number."""
    x = call["self"]
    dim = int(call["dim"]) % x.rank
    call.walk.freeze(x.dims[dim], "one of its channels is picked by number")
    return x.take([d for d in range(x.rank) if d != dim])


@rule("index", "index_select", "gather", "take_along_dim")
def index(call: Call) -> Value | None:
    """Indices of dimensions, by tensors of numbers."""
    x = call["self"]
    if call.name == "index_select":
        picked = {int(call["dim"]) % x.rank}
    elif call.name == "index":
        # The schema's list holds None for dimensions that are taken whole.
        given = call["indices"]
        picked = {d for d, item in enumerate(given) if item is not None}
        if len(picked) != 1:
            return None
    else:
        return None
    for dim in picked:
        call.walk.freeze(x.dims[dim], "its channels are picked by number")
    (dim,) = picked
    middle = (None,) * (len(call.shape) - x.rank + 1)
    return Value(call.shape, (*x.dims[:dim], *middle, *x.dims[dim + 1 :]), fixed=x.fixed)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def pad(call: Call) -> Value:
    """Constants, or what lies at the border, around; along channels they are channels too."""
    x, sides = call.values[0], [int(n) for n in call.get("pad", call.get("padding"))]
    dims = list(x.dims)
    for place in range(len(sides) // 2):
        front, back = sides[2 * place : 2 * place + 2]
        at = x.rank - 1 - place
        atoms = dims[at]
        if atoms is not None and (front or back):
            if front < 0 or back < 0 or call.get("mode", "constant") != "constant":
                call.walk.freeze(atoms, "pad along channels")
            dims[at] = _padded(call, atoms, max(front, 0), max(back, 0))
            if len(dims[at]) != call.shape[at]:  # type: ignore[arg-type]
                dims[at] = None
    return Value(call.shape, tuple(dims), fixed=x.fixed)


def _padded(call: Call, atoms: np.ndarray, front: int, back: int) -> np.ndarray:
    """Channels of constants may go where the module says how many there are, as ChannelPad does."""
    sides = [call.walk.fresh(front), call.walk.fresh(back)]
    for name, side in zip(("front", "back"), sides, strict=True):
        call.walk.hints.append(Hint(call.module, len(side), side, name))
    return np.concatenate([sides[0], atoms, sides[1]])


@rule("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full")
def constant(call: Call) -> Value:
    """A tensor of its own; how long it is may follow a width."""
    dims: list[Dim] = [
        call.walk.fresh(size) if place and size > 1 else None
        for place, size in enumerate(call.shape)
    ]
    return Value(call.shape, tuple(dims), fixed=True)


@rule("arange", "linspace", "scalar_tensor", "eye", "randperm", "tril_indices")
def counting(call: Call) -> Value:
    """Numbers that no width is part of."""
    return plain(call.shape, fixed=True)
