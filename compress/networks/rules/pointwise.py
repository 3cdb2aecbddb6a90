"""Operators that compute every element from those at the same place, after broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from compress.networks.rules.registry import rule
from compress.networks.walk import NOWHERE, Call, Dim, Origins, Value, plain

FURTHER = (
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"),
    *("alias", "contiguous", "clone", "detach", "lift", "lift_fresh", "lift_fresh_copy"),
    *("to", "_to_copy", "type_as", "float", "half", "double", "bernoulli", "rrelu", "copy"),
    *("hardswish", "masked_fill", "where", "fill", "zero", "log_sigmoid", "softsign", "uniform"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like"),
    *("randn_like", "new_empty_like", "__and__", "__or__", "__xor__", "resolve_conj"),
    *("celu", "elu", "hardsigmoid", "hardtanh", "ldexp", "leaky_relu", "selu", "_conj_physical"),
)
"""Those that torch does not tag as pointwise, or did not until 2.10."""


def broadcast(call: Call, values: Sequence[Value], shape: Sequence[int]) -> Value:
    """Join values as broadcasting does: dimensions of equal place lose the same indices."""
    dims: list[Dim] = []
    origins: list[Origins] = []
    fixed = all(value.fixed for value in values)
    for place in range(-len(shape), 0):
        there = [v for v in values if -place <= v.rank and v.shape[place] == shape[place]]
        dim = there[0].dims[place] if there else None
        for other in there[1:]:
            dim = call.walk.tie(dim, other.dims[place], f"{call.name} with a fixed width")
        dims.append(dim)
        origins.append(NOWHERE.union(*(v.origins[place] for v in there)) if fixed else NOWHERE)
    return Value(tuple(shape), tuple(dims), tuple(origins), fixed)


@rule(*FURTHER)
def pointwise(call: Call) -> Value | list[Value]:
    """Same place in, same place out."""
    values = call.values
    if not call.shapes:
        return []
    if not values:
        return plain(call.shape)
    result = broadcast(call, values, call.shape)
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


@rule("add")
def add(call: Call) -> Value:
    """A sum; of two activations of one shape it may be the end of a residual block."""
    values = call.values
    result = broadcast(call, values, call.shape)
    if is_addition(call, values) and not call.walk.training:
        call.walk.additions.append((call.node, result.dims[1]))
    return result


def is_addition(call: Call, values: Sequence[Value]) -> bool:
    """Whether two activations of one shape are added; compress.networks.gates counts the same."""
    return (
        len(values) == 2
        and values[0] is not values[1]
        and values[0].shape == values[1].shape
        and values[0].rank >= 2
        and call.node.meta["val"].is_floating_point()
    )


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Value:
    """One slope for all channels, or one for each along dimension 1."""
    x, weight = call.values
    if weight.shape[-1] > 1:
        at = 1 if weight.rank == 1 else weight.shape.index(max(weight.shape))
        own = at if weight.rank > 1 else 0
        call.walk.tie(x.dims[at], weight.dims[own], "prelu with a fixed width")
        slopes = weight.dims[own]
        if slopes is not None:
            owners = {name.rpartition(".")[0] for name, _ in weight.origins[own]}
            call.walk.widths += [(owner, "num_parameters", slopes) for owner in owners]
    return x.same()


@rule("expand_as")
def expand_as(call: Call) -> Value:
    """Dimensions of length 1 take those of the other tensor."""
    x, other = call.values
    return broadcast(call, [x, other], call.shape)
