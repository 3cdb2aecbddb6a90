"""The captured graph of a network, made to run on any number of images; what it reads and costs.

torch.export writes the number of images into the sizes of views and of new tensors. So the network
is captured with two numbers, and what differs between the two graphs is computed from the number of
images that comes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

from compress.errors import ModelError
from compress.networks.capture import Captured, Example, capture, source_of
from compress.networks.cuts import tensor_of
from compress.networks.groups import ChannelGraph, ReadSite
from compress.networks.walk import operator_name

COUNTS = (3, 5)
"""Numbers of images that the network is captured with."""
READERS = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "convolution", "linear", "matmul", "mm"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    }
)
"""Operators whose second argument is a weight with which channels of the first are read."""


@dataclass(frozen=True)
class AnyCount:
    """A captured network that runs on any number of images.

    Attributes:
        module: from (N, C, H, W) images to what the network returns; parameters, buffers and
            constants are tensors of it, and all operators are calls of functions.
        images: the only input.
        count: the number of images, from which sizes are computed.
        reads: the parameter with which each convolution, linear layer and product reads.
        computed: parameters that something else uses, too.
    """

    module: fx.GraphModule
    images: fx.Node
    count: fx.Node
    reads: Mapping[fx.Node, str]
    computed: frozenset[str]


def captured_for_any_count(model: nn.Module, sample: torch.Tensor) -> AnyCount:
    """Capture a network, in evaluation mode.

    Args:
        model: the network; the result shares its tensors, in whatever precision and memory format.
        sample: (N, C, H, W) what images look like; its values do not matter.

    Raises:
        ModelError: the network cannot be captured, or does something else for another number of
            images.
    """
    first, second = (capture(model, _example(sample, count)) for count in COUNTS)
    if len(first.inputs) != 1 or len(first.outputs) != 1:
        raise ModelError("the oracle needs a network that takes images and returns one tensor")
    count = _Merge(first, second).run()
    readers = [n for n in first.graph.nodes if operator_name(n) in READERS]
    reads = {n: first.named[n.args[1]] for n in readers if n.args[1] in first.named}
    computed = {
        name
        for node, name in first.named.items()
        if any(user not in reads or user.args[1] is not node for user in node.users)
    }
    _return(first.graph, first.outputs[0])
    module = fx.GraphModule(_hold_tensors(model, first), first.graph)
    return AnyCount(module, first.inputs[0], count, reads, frozenset(computed))


def _example(sample: torch.Tensor, count: int) -> Example:
    """Strides stay those of the sample, since what a view can do depends on them."""
    images = torch.zeros_like(sample[:1].expand(count, -1, -1, -1))
    last = sample.is_contiguous(memory_format=torch.channels_last)
    format_ = torch.channels_last if last else torch.contiguous_format
    return Example((images.contiguous(memory_format=format_),))


class _Merge:
    """Two captures of one network with other numbers of images, made into the first."""

    def __init__(self, first: Captured, second: Captured) -> None:
        self.first, self.second = first, second
        self.twins: dict[fx.Node, fx.Node] = {}
        """Of the nodes of the second graph, those of the first."""
        self.numbers: dict[tuple[int, int], fx.Node] = {}
        """A multiple of the number of images plus a constant."""

    def run(self) -> fx.Node:
        """Write computed sizes into the first graph; return the node of the number of images."""
        graph = self.first.graph
        start = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(start):
            count = graph.call_function(len, (self.first.inputs[0],))
        self.numbers[1, 0], self.start = count, start
        own = [node for node in graph.nodes if node is not count]
        for node, other in zip_longest(own, self.second.graph.nodes):
            if not (node and other and _alike(node, other)):
                raise _not_any(node or other)
            self.twins[other] = node
            if node.op == "call_function":
                node.args = self._merged(node, node.args, other.args)
                node.kwargs = self._merged(node, node.kwargs, other.kwargs)
        return count

    def _merged(self, node: fx.Node, first: Any, second: Any) -> Any:
        """Return what to give an operator in place of what the two captures give it."""
        if isinstance(second, fx.Node):
            if self.twins[second] is not first:
                raise _not_any(node)
            return first
        if isinstance(first, (list, tuple)) and len(first) == len(second):
            merged = (self._merged(node, a, b) for a, b in zip(first, second, strict=True))
            return tuple(merged) if isinstance(first, tuple) else list(merged)
        if isinstance(first, dict) and first.keys() == second.keys():
            return {key: self._merged(node, first[key], second[key]) for key in first}
        if first == second:
            return first
        if type(first) is type(second) is int:
            times, rest = divmod(second - first, COUNTS[1] - COUNTS[0])
            if not rest:
                return self._number(times, first - times * COUNTS[0])
        raise _not_any(node)

    def _number(self, times: int, plus: int) -> fx.Node:
        if (times, plus) not in self.numbers:
            graph = self.first.graph
            with graph.inserting_before(self.start):
                product = graph.call_function(operator.mul, (self.numbers[1, 0], times))
                self.numbers[times, plus] = graph.call_function(operator.add, (product, plus))
        return self.numbers[times, plus]


def _alike(first: fx.Node, second: fx.Node) -> bool:
    return (first.op, first.name, first.target) == (second.op, second.name, second.target)


def _not_any(node: fx.Node) -> ModelError:
    return ModelError(
        "the network does not accept any number of images: it does something else for each at "
        f"{source_of(node)}"
    )


def _return(graph: fx.Graph, result: fx.Node) -> None:
    """Return one tensor and no updated buffers."""
    graph.output_node().args = (result,)


def _hold_tensors(model: nn.Module, captured: Captured) -> dict[str, Any]:
    """Replace inputs of the graph, but for the images, by tensors; return these by name."""
    graph, held = captured.graph, dict[str, Any]()
    for node in list(graph.nodes):
        if node.op == "get_attr":
            raise ModelError(
                f"the oracle cannot follow what is computed at {source_of(next(iter(node.users)))}"
            )
        if node.op != "placeholder" or node in captured.inputs:
            continue
        if node in captured.named:
            held[node.name] = tensor_of(model, captured.named[node]).detach()
        elif node in captured.constants:
            held[node.name] = captured.constants[node]
        with graph.inserting_before(node):
            tensor = graph.create_node("get_attr", node.name, name=f"{node.name}_")
        node.replace_all_uses_with(tensor)
        graph.erase_node(node)
    return held


# What is read, and what operations cost


def sites_of(captured: AnyCount, graph: ChannelGraph) -> dict[fx.Node, ReadSite]:
    """Return what each convolution, linear layer and product reads.

    Raises:
        ModelError: a group that may be pruned is read by something else.
    """
    by_weight = {site.weight: site for site in graph.read_sites}
    sites = {}
    for node, weight in captured.reads.items():
        axis = graph.by_tensor.get((weight, 0))
        if operator_name(node) in ("matmul", "mm"):
            if axis is not None and axis.reads:
                sites[node] = ReadSite(weight, axis.units, dim=-1)
        elif weight in by_weight:
            sites[node] = by_weight[weight]
    placed = {site.weight for site in sites.values()} - captured.computed
    for group in graph.prunable:
        for reader in group.readers:
            if reader not in placed:
                raise ModelError(
                    f"{group.name} is read by {reader} in a computed form, where the oracle cannot "
                    "remove its units"
                )
    return sites


def macs_of(node: fx.Node, values: dict[fx.Node, Any]) -> int:
    """Return the multiply-adds of an operation on all images."""
    name = operator_name(node)
    if name.startswith("conv"):
        source, weight = (values[item] for item in node.args[:2])  # type: ignore[index]
        positions = source if "transpose" in name else values[node]
        return positions.numel() * math.prod(weight.shape[1:])
    if name in ("linear", "matmul", "mm", "bmm"):
        return values[node].numel() * values[read_by(node)].shape[-1]
    if name == "scaled_dot_product_attention":
        return 2 * values[node].numel() * values[node.args[1]].shape[-2]  # type: ignore[index]
    return 0


def read_by(node: fx.Node) -> fx.Node:
    """Return the activation that a reader reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
