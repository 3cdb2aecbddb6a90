"""Random networks: what the analysis finds is exact, counted, tried and not too little.

How many networks the slow tests draw is in ``COMPRESS_RANDOM_NETWORKS``: 60, and 200 in CI.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks_random import KINDS, RandomNetwork, random_network

from compress.criteria.taylor import FoldedGate
from compress.errors import ModelError
from compress.networks import cost
from compress.networks.capture import Example
from compress.networks.gates import GatedNetwork, UnplacedError
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.partition import NETWORK_INPUT
from compress.networks.rules import RULES
from compress.networks.rules.pointwise import pointwise
from compress.networks.shrink import largest_difference, mask_, outputs_of, shrink
from compress.networks.trial import tried_graph
from compress.networks.walk import Call, Result, Rule, Value

NETWORKS = int(os.environ.get("COMPRESS_RANDOM_NETWORKS", "60"))
MASKS = 4
CHUNK = 20
FEW = 4
"""Networks that every run of the tests draws."""
ENDS = (NETWORK_INPUT, "network output")
FOUND_BY_TRIAL = ("without some of them", "in training mode")
LEAST_SHARE = 0.6
"""Of all channels between inputs and outputs; what the blocks that keep channels leave."""


def masks(graph: ChannelGraph, seed: int) -> Iterator[Mask]:
    """Yield random masks: any number of units of any groups; last, the fewest of all."""
    generator = np.random.default_rng(seed)
    for number in range(MASKS):
        kept, last = graph.everything(), number == MASKS - 1
        for group in graph.prunable:
            left = int(generator.integers(group.fewest, group.size + 1))
            left = group.fewest if last or generator.random() < 0.2 else left
            kept[group.units[generator.permutation(group.size)[left:]]] = False
        for branch in graph.removable:
            kept[branch.unit] = generator.random() < 0.6
        yield graph.closed(kept)


def require_exact(model: RandomNetwork, graph: ChannelGraph, example: Example, seed: int) -> None:
    """Assert masked == shrunk and costs == those that torch counts, for several masks."""
    assert cost.macs(graph, graph.everything()) == cost.measured(model, example)["macs"]
    assert cost.params(graph, graph.everything()) == cost.measured(model, example)["params"]
    with torch.no_grad():
        whole = outputs_of(model, example)
    for kept in masks(graph, seed):
        masked = copy.deepcopy(model)
        mask_(masked, graph, kept)
        smaller = shrink(model, graph, kept)
        with torch.no_grad():
            expected, found = outputs_of(masked, example), outputs_of(smaller, example)
        assert all(torch.isfinite(tensor).all() for tensor in expected)
        assert largest_difference(expected, found) <= 1e-9
        assert kept.all() or largest_difference(whole, expected) > 1e-12, "masks change nothing"
        counted = cost.measured(smaller, example)
        assert cost.macs(graph, kept) == counted["macs"]
        assert cost.params(graph, kept) == counted["params"]
        assert cost.macs(graph.removed(kept), kept) == counted["macs"]


def require_gates(model: RandomNetwork, graph: ChannelGraph, example: Example) -> bool:
    """Assert that folded gates have the gradient of explicit ones; False where none fit."""
    try:
        gated = GatedNetwork(model, graph, "read")
    except UnplacedError:
        return False
    model.zero_grad()
    outputs = gated(*example.args, **example.kwargs)
    leaves = torch.utils._pytree.tree_leaves(outputs)
    sum(
        (leaf * torch.arange(leaf.numel()).view(leaf.shape).cos()).sum() for leaf in leaves
    ).backward()
    prunable = np.concatenate([np.zeros(0, np.int64), *(g.units for g in graph.prunable)])
    explicit, folded = gated.gates.grad, FoldedGate(model, graph)()
    assert explicit is not None
    assert torch.allclose(explicit[prunable], folded[prunable], rtol=1e-6, atol=1e-9)
    return True


def require(seed: int, model: RandomNetwork, example: Example) -> tuple[ChannelGraph, bool]:
    """Assert all that holds for a network; return its graph and whether gates were compared."""
    graph = tried_graph(model, example)
    tried = {g.name: g.frozen for g in graph.frozen if str(g.frozen).startswith(FOUND_BY_TRIAL)}
    assert model.has("tried") or not tried, tried
    model, example = model.double(), example.to(torch.device("cpu"), torch.float64)
    require_exact(model, graph, example, seed)
    placed = require_gates(model, graph, example)
    assert placed or model.has("computed")
    return graph, placed


def shares(graph: ChannelGraph) -> tuple[int, int]:
    """Return how many channels may go, and how many there are between inputs and outputs."""
    inside = [group for group in graph.groups if group.frozen not in ENDS]
    return (
        sum(group.size * group.width for group in inside if group.frozen is None),
        sum(group.size * group.width for group in inside),
    )


def require_all(seeds: range) -> None:
    """Assert all that holds for each network, and that not too little is free in all of them."""
    free = inside = 0
    for seed in seeds:
        graph, _ = require(seed, *random_network(seed))
        own = shares(graph)
        free, inside = free + own[0], inside + own[1]
    assert free >= LEAST_SHARE * inside


def test_a_few_random_networks() -> None:
    require_all(range(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FEW, NETWORKS, CHUNK))
def test_random_networks(first: int) -> None:
    require_all(range(first, min(first + CHUNK, NETWORKS)))


SOME = list(KINDS)[::3]
"""Kinds of blocks that every run of the tests tries alone."""


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        *((name, range(1000, 1001)) for name in SOME),
        *(pytest.param(name, range(1000, 1003), marks=pytest.mark.slow) for name in KINDS),
    ],
)
def test_each_kind_keeps_what_it_says_and_nothing_else(name: str, seeds: range) -> None:
    reasons = set().union(*(reasons_to_keep(name, seed) for seed in seeds))
    assert any(KINDS[name].dense in reason for reason in reasons) or not KINDS[name].dense


def reasons_to_keep(name: str, seed: int) -> set[str]:
    """Assert all that holds for a block alone; return why channels within it stay dense."""
    kind = KINDS[name]
    model, example = random_network(seed, [name], nested=False)
    graph, placed = require(seed, model, example)
    assert placed or kind.computed
    own = {str(g.frozen) for g in graph.frozen if g.frozen not in ENDS and g.size > 1}
    assert bool(own) == bool(kind.dense), own
    assert all(kind.dense in reason or "a fixed width" in reason for reason in own), own
    return own


# Planted bugs

CORRECT = defaultdict(lambda: pointwise, RULES)
SEEDS = 10


def _value(result: Result | None) -> Value:
    assert isinstance(result, Value)
    return result


def rolled(call: Call) -> Value:
    """An index of the channels too far."""
    x = _value(CORRECT[call.name](call))
    channels = [place for place, dim in enumerate(x.dims) if dim is not None]
    for place in channels:
        x = x.with_dim(place, np.roll(x.dims[place], 1), x.shape[place])
    return x


def untied(call: Call) -> Result | None:
    """All that the rule finds, without what it ties."""
    ties = len(call.walk.ties)
    result = CORRECT[call.name](call)
    del call.walk.ties[ties:]
    return result


def unfrozen(call: Call) -> Result | None:
    """All that the rule finds, without what it freezes."""
    frozen = len(call.walk.frozen)
    result = CORRECT[call.name](call)
    del call.walk.frozen[frozen:]
    return result


def unread(call: Call) -> Result | None:
    """A weight that reads nothing."""
    reads = set(call.walk.reads)
    result = CORRECT[call.name](call)
    call.walk.reads = reads
    return result


def uncounted(call: Call) -> Result | None:
    """Multiply-adds that are forgotten."""
    macs = len(call.walk.macs)
    result = CORRECT[call.name](call)
    del call.walk.macs[macs:]
    return result


def unstated(call: Call) -> Result | None:
    """Integers of modules that stay as they are."""
    widths, hints = len(call.walk.widths), len(call.walk.hints)
    result = CORRECT[call.name](call)
    del call.walk.widths[widths:], call.walk.hints[hints:]
    return result


def first_part(call: Call) -> Value:
    """A concatenation in which every part begins at the same place."""
    result = _value(CORRECT[call.name](call))
    parts = [part for part in call.values if part.rank == result.rank]
    at = int(call.get("dim", 0)) % result.rank
    longest = max((part.dims[at] for part in parts if part.dims[at] is not None), key=len)
    return result.with_dim(at, np.resize(longest, result.shape[at]), result.shape[at])


def tiled(call: Call) -> Value:
    """Copies of channels that lie side by side, where each is repeated."""
    x, result = call.values[0], _value(CORRECT[call.name](call))
    if x.rank < 2 or x.dims[1] is None or result.dims[1] is None:
        return result
    return result.with_dim(1, np.resize(x.dims[1], result.shape[1]), result.shape[1])


def repeated(call: Call) -> Value:
    """Copies of channels one by one, where they lie side by side."""
    x, result = call["self"], _value(CORRECT[call.name](call))
    if x.dims[1] is None:
        return result
    return result.with_dim(1, np.repeat(x.dims[1], 2), result.shape[1])


def unswapped(call: Call) -> Value:
    """A transpose that leaves what it moves."""
    return Value(call.shape, tuple(call.values[0].dims), fixed=call.values[0].fixed)


def strided(call: Call) -> Value:
    """A pixel shuffle whose channels lie apart and not in runs."""
    x = call.values[0]
    at, atoms = x.rank - 3, x.dims[x.rank - 3]
    count = call.shape[at]
    call.walk.ties.append((np.tile(atoms[:count], len(atoms) // count), atoms))
    return Value(call.shape, (*x.dims[:at], atoms[:count], None, None))


def as_plain_convolution(call: Call) -> Value | None:
    """A depthwise convolution taken for one that reads all channels."""
    if call["groups"] == 1:
        return CORRECT[call.name](call)
    return _value(CORRECT[call.name](replace(call, arguments={**call.arguments, "groups": 1})))


def without_buffers(call: Call) -> Value:
    """A BatchNorm whose statistics are not cut."""
    arguments = {**call.arguments, "running_mean": None, "running_var": None}
    return _value(CORRECT[call.name](replace(call, arguments=arguments)))


PLANTED: list[tuple[Rule, str, str]] = [
    *((rolled, name, "Dense") for name in ("cat",)),
    *((rolled, name, "Gated") for name in ("chunk", "split", "slice")),
    *((rolled, "flip", "Repeated"), (rolled, "channel_shuffle", "ShuffledParts")),
    (first_part, "cat", "Dense"),
    *((untied, "chunk", "EvenParts"), (untied, "slice", "Halves"), (untied, "glu", "Gated")),
    *((untied, "conv2d", name) for name in ("Plain", "FewGroups", "ManyGroups", "Depthwise")),
    *((untied, "conv_transpose2d", "Transposed"), (untied, "conv1d", "OneDimension")),
    *((untied, "linear", "Tokens"), (untied, "matmul", "Product"), (untied, "einsum", "Einsum")),
    *((untied, "batch_norm", "Plain"), (untied, "group_norm", "GroupNorms")),
    *((untied, "instance_norm", "Plain"), (untied, "prelu", "Plain")),
    *((untied, "add", "Attention"), (untied, "mul", "Scales")),
    *((untied, "mul", "SqueezeExcite"), (untied, "stack", "Selective")),
    *((untied, "copy", "Written"), (untied, "sub", "Scales")),
    *((untied, name, "ShuffledParts") for name in ("view", "channel_shuffle")),
    *((untied, "pixel_shuffle", "PixelShuffled"), (untied, "view", "PixelShuffled")),
    *((unfrozen, "layer_norm", name) for name in ("ConvNeXt", "OneNormGroup")),
    *((unfrozen, "group_norm", "OneNormGroup"), (unfrozen, "rms_norm", "OneNormGroup")),
    *(
        (unfrozen, name, "ChannelStatistics")
        for name in ("mean", "amax", "softmax", "cumsum", "linalg_vector_norm")
    ),
    *((unfrozen, name, "Picked") for name in ("index", "index_select", "select")),
    *((unfrozen, "matmul", "Attention"), (unfrozen, "scaled_dot_product_attention", "Attention")),
    *((unfrozen, "mean", "ComputedWeight"), (unfrozen, "_weight_norm", "WeightNorm")),
    *((unread, "conv2d", "Plain"), (unread, "linear", "Tokens"), (unread, "matmul", "Product")),
    *((unread, "conv_transpose2d", "Transposed"), (unread, "conv2d", "ManyGroups")),
    *((uncounted, "conv2d", "Plain"), (uncounted, "linear", "Tokens")),
    *((uncounted, "matmul", "Attention"), (uncounted, "einsum", "Einsum")),
    *((uncounted, "scaled_dot_product_attention", "Attention"),),
    *((uncounted, "conv_transpose2d", "Transposed"),),
    *((unstated, "conv2d", "Depthwise"), (unstated, "group_norm", "GroupNorms")),
    *((unstated, "view", "Selective"), (unstated, "split_with_sizes", "PartlyPassed")),
    *((unstated, "split", "EvenParts"), (unstated, "conv_transpose2d", "Transposed")),
    *((tiled, name, "Flattened") for name in ("flatten", "reshape")),
    *((tiled, "repeat_interleave", "Repeated"), (tiled, "pixel_unshuffle", "PixelShuffled")),
    (repeated, "repeat", "Repeated"),
    *((unswapped, "permute", "ChannelsLast"), (unswapped, "transpose", "Tokens")),
    (strided, "pixel_shuffle", "PixelShuffled"),
    (as_plain_convolution, "conv2d", "Depthwise"),
    *((without_buffers, "batch_norm", name) for name in ("Plain", "Subclassed")),
]


def first_of_every_bug() -> Iterator[Any]:
    """Yield the planted bugs as parameters: all but the first of every sort are slow."""
    seen = set[Rule]()
    for bug, operator, kind in PLANTED:
        marks = [pytest.mark.slow] * (bug in seen)
        yield pytest.param(bug, operator, kind, marks=marks, id=f"{operator}-{bug.__name__}-{kind}")
        seen.add(bug)


@pytest.mark.parametrize(("bug", "operator", "kind"), list(first_of_every_bug()))
def test_planted_bugs_are_found(
    bug: Rule, operator: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, operator, bug)
    for seed in range(2000, 2000 + SEEDS):
        try:
            reasons_to_keep(kind, seed)
        except (AssertionError, ValueError, IndexError, RuntimeError, ModelError):
            return
    pytest.fail(f"{SEEDS} networks are as without the bug")
