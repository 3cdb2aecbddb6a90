"""Operators that contract with weights: convolutions, linear layers, products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from compress.networks.layers import LayerShape
from compress.networks.rules.registry import rule
from compress.networks.walk import Call, Dim, Hint, Value, followers


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Value | None:
    """(N, in, ...) and (out, in / groups, ...) to (N, out, ...)."""
    return _convolve(call, reads=1, writes=0, places=call.shape)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(call: Call) -> Value | None:
    """(N, in, ...) and (in, out / groups, ...) to (N, out, ...)."""
    return _convolve(call, reads=0, writes=1, places=call["input"].shape)


def _convolve(call: Call, *, reads: int, writes: int, places: Sequence[int]) -> Value | None:
    """Dimension 0 of the weight runs through all groups, dimension 1 through each of them.

    Args:
        call: of a convolution.
        reads: the dimension of the weight that is contracted.
        writes: the one that is written.
        places: shape of the tensor at each position of which the kernel is applied.
    """
    x, weight, groups = call["input"], call["weight"], int(call.get("groups", 1))
    if not _fits(call, x, weight):
        return None
    inputs, outputs = x.shape[1], call.shape[1]
    call.walk.keep_still(weight, *range(2, weight.rank))
    work = math.prod(weight.shape[2:]) * math.prod(places[2:]) * places[0]
    in_each: Dim | int = _length(weight, 1)
    group_width = 0
    if groups == 1:
        _read(call, x, weight, channels=1, at=reads)
        written = call.walk.write(weight, writes)
    elif groups == inputs == outputs:
        written = call.walk.tie(x.dims[1], weight.dims[0], f"{call.name} of a fixed width")
        call.walk.keep_still(weight, 1)
        _say_groups(call, weight, written)
        group_width = 1
    elif call.walk.whole_groups or groups >= inputs // groups:
        written, in_each = _whole_groups(call, x, weight, groups), weight.shape[1]
        group_width = inputs // groups
    else:
        written = _evenly(call, x, weight, groups, reads=reads, writes=writes)
    call.walk.count(work, _length(weight, 0), in_each)
    _bias(call, written)
    call.state(weight, in_channels=x.dims[1], out_channels=written)
    result = _result(call, x, written)
    _layer(call, x, weight, result, at=1, group_width=group_width)
    return result


@rule("linear")
def linear(call: Call) -> Value | None:
    """(..., in) and (out, in) to (..., out)."""
    x, weight = call["input"], call["weight"]
    if weight.rank != 2 or not weight.fixed:
        return None
    _read(call, x, weight, channels=-1, at=1)
    written = call.walk.write(weight, 0)
    rows = (_length(x, i) for i in range(x.rank - 1))
    call.walk.count(1, *rows, _length(weight, 0), _length(weight, 1))
    _bias(call, written)
    call.state(weight, in_features=x.dims[-1], out_features=written)
    result = x.with_dim(x.rank - 1, written, call.shape[-1])
    _layer(call, x, weight, result, at=x.rank - 1)
    return result


@rule("embedding")
def embedding(call: Call) -> Value:
    """Rows of (rows, out) by their numbers, to (..., out)."""
    weight = call["weight"]
    call.walk.keep_still(weight, 0)
    written = call.walk.write(weight, 1)
    call.state(weight, embedding_dim=written)
    return Value(call.shape, (*(None,) * (len(call.shape) - 1), written))


@rule("matmul", "bmm", "mm", "dot", "mv")
def matmul(call: Call) -> Value | None:
    """(..., m, k) and (..., k, n) to (..., m, n)."""
    first, second = call.values
    if first.rank < 2 or second.rank < 2:
        return None
    return _product(call, first, second)


@rule("einsum")
def einsum(call: Call) -> Value | None:
    """Dimensions of one letter lose the same indices; a letter that goes is contracted."""
    equation, parts = str(call["equation"]).replace(" ", ""), call.values
    entries, arrow, result = equation.partition("->")
    letters = entries.split(",")
    if len(parts) != 2 or not arrow or "." in equation:
        return None
    if any(len(set(part)) < len(part) for part in letters):  # a diagonal
        return None
    found = {
        letter: [
            (part, own.index(letter))
            for part, own in zip(parts, letters, strict=True)
            if letter in own
        ]
        for letter in dict.fromkeys(equation)
        if letter.isalpha()
    }
    for letter, places in found.items():
        (first, at), (last, there) = places[0], places[-1]
        if letter in result:
            if len(places) > 1:
                call.walk.tie(first.dims[at], last.dims[there], "einsum of a fixed width")
            elif first.fixed:
                call.walk.write(first, at)
        elif len(places) > 1 and first.fixed != last.fixed:
            if first.fixed:
                (first, at), (last, there) = (last, there), (first, at)
            call.walk.read(first.dims[at], last, there, "einsum of a fixed width")
        else:
            for part, dim in places:
                call.walk.freeze(part.dims[dim], "einsum sums over it")
    call.walk.count(1, *(_length(*places[0]) for places in found.values()))
    kept = [found[letter][0] for letter in result]
    return Value(
        call.shape,
        tuple(part.dims[dim] for part, dim in kept),
        tuple(part.origins[dim] for part, dim in kept) if all(p.fixed for p in parts) else (),
        all(part.fixed for part in parts),
    )


@rule("addmm", "baddbmm")
def addmm(call: Call) -> Value | None:
    """A product of matrices and a sum."""
    from compress.networks.rules.pointwise import broadcast

    added, first, second = call.values
    return broadcast(call, [added, _product(call, first, second)], call.shape)


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Value | None:
    """(..., L, E), (..., S, E) and (..., S, V) to (..., L, V)."""
    query, key, value = call["query"], call["key"], call["value"]
    for tensor in (query, key):
        call.walk.freeze(tensor.dims[-1], "a product of activations sums over it")
    batch = math.prod(query.shape[:-2])
    pairs = batch * query.shape[-2] * key.shape[-2]
    call.walk.count(pairs, query.shape[-1])
    call.walk.count(pairs, _length(value, value.rank - 1))
    return query.with_dim(query.rank - 1, value.dims[-1], call.shape[-1])


def _fits(call: Call, x: Value, weight: Value) -> bool:
    """Whether an input has a batch dimension and a weight that does not depend on it.

    Channels in dimensions of space are frozen.
    """
    if x.rank != weight.rank or len(call.shape) != x.rank or not weight.fixed:
        return False
    call.freeze_others(x, {0, 1})
    return True


def _read(call: Call, x: Value, weight: Value, *, channels: int, at: int) -> None:
    """Contract channels of an activation with a dimension of a weight."""
    call.walk.read(x.dims[channels], weight, at, f"{call.name} of a fixed width")
    _site(call, x, weight, channels)


def _site(call: Call, x: Value, weight: Value, channels: int) -> None:
    read = x.dims[channels]
    if weight.name is not None and read is not None and not call.walk.training:
        call.walk.sites.append((call.node, weight.name, read, channels))


def _layer(
    call: Call, x: Value, weight: Value, result: Value, *, at: int, group_width: int = 0
) -> None:
    """Tell of a layer that latency tables know; ``at`` is the dimension of the channels."""
    if call.walk.training:
        return
    convolved, rows = weight.rank > 2, math.prod(x.shape[1:-1])
    shape = LayerShape(
        call.name,
        kernel=tuple(weight.shape[2:]),
        stride=_each(call, "stride", weight.rank - 2),
        dilation=_each(call, "dilation", weight.rank - 2),
        input_size=x.shape[2:] if convolved else (rows,),
        output_size=result.shape[2:] if convolved else (rows,),
        groups=int(call.get("groups", 1)),
        group_width=group_width,
        then=followers(call.node),
    )
    ends = (_length(x, at), _length(result, at))
    call.walk.layers.append((call.node, weight.name or "", shape, *ends))


def _each(call: Call, argument: str, count: int) -> tuple[int, ...]:
    """Return an argument that may be given once for all dimensions of space."""
    given = call.get(argument, 1)
    numbers = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return tuple(int(n) for n in (numbers * count if len(numbers) == 1 else numbers))[:count]


def _whole_groups(call: Call, x: Value, weight: Value, groups: int) -> Dim:
    """A grouped convolution with many groups: each goes whole, with what it reads and writes."""
    read, own, outputs = x.dims[1], weight.dims[0], call.shape[1]
    call.walk.keep_still(weight, 1)
    if read is None or own is None:
        written = call.walk.fresh(outputs)
        for dim in (read, own, written):
            call.walk.freeze(dim, f"{call.name} of a fixed width")
        return written
    first, second = (call.walk.tie_rows(atoms, groups) for atoms in (read, own))
    call.walk.ties.append((first, second))
    call.walk.reads |= weight.origins[0]  # what a group reads goes with its rows
    call.walk.writes |= weight.origins[0]
    _site(call, x, weight, 1)
    _say_groups(call, weight, first)
    return np.repeat(first, outputs // groups)


def _evenly(call: Call, x: Value, weight: Value, groups: int, *, reads: int, writes: int) -> Dim:
    """A grouped convolution with few groups: each loses the same places."""
    through_all, in_each = weight.dims[0], weight.dims[1]
    if through_all is not None:
        places = through_all.reshape(groups, -1)
        call.walk.ties.append((np.tile(places[0], groups), through_all))
    ends = (through_all, None if in_each is None else np.tile(in_each, groups))
    call.walk.tie(x.dims[1], ends[reads], f"{call.name} of a fixed width")
    call.walk.reads |= weight.origins[reads]
    call.walk.writes |= weight.origins[writes]
    _site(call, x, weight, 1)
    return ends[writes]


def _bias(call: Call, written: Dim) -> None:
    bias = call.get("bias")
    if bias is not None:
        call.walk.tie(written, bias.dims[0], f"{call.name} of a fixed width")


def _result(call: Call, x: Value, written: Dim) -> Value:
    space = (None,) * (x.rank - 2)
    return Value(call.shape, (x.dims[0], written, *space))


def _say_groups(call: Call, weight: Value, groups: Dim) -> None:
    """An integer states the number of groups: of the weight's module, or of the one that calls."""
    call.state(weight, groups=groups)
    if groups is not None:
        call.walk.hints.append(Hint(call.module, len(groups), groups))


def _length(value: Value, dim: int) -> Dim | int:
    """The atoms of a dimension, or its length where it never shrinks."""
    atoms = value.dims[dim]
    return value.shape[dim] if atoms is None else atoms


def _product(call: Call, first: Value, second: Value) -> Value:
    """Contract the last dimension of the first with the second to last of the second."""
    from compress.networks.rules.pointwise import broadcast

    reason = f"{call.name} of a fixed width"
    if second.fixed:
        call.walk.read(first.dims[-1], second, second.rank - 2, reason)
        call.walk.writes |= second.origins[-1]
    elif first.fixed:
        call.walk.read(second.dims[-2], first, first.rank - 1, reason)
        call.walk.writes |= first.origins[-2]
    else:
        for dim in (first.dims[-1], second.dims[-2]):
            call.walk.freeze(dim, "a product of activations sums over it")
    outer = broadcast(
        call,
        [first.take(range(first.rank - 2)), second.take(range(second.rank - 2))],
        call.shape[:-2],
    )
    lengths = [_length(outer, i) for i in range(outer.rank)]
    sides = (_length(first, first.rank - 2), _length(first, first.rank - 1))
    call.walk.count(1, *lengths, *sides, _length(second, second.rank - 1))
    return Value(
        call.shape,
        (*outer.dims, first.dims[-2], second.dims[-1]),
        (*outer.origins, first.origins[-2], second.origins[-1]) if outer.fixed else (),
        outer.fixed,
    )
