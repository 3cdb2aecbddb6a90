"""Where units are read, and what operations cost."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from compress.errors import ModelError
from compress.networks.groups import ChannelGraph, ReadSite
from compress.networks.walk import operator_name
from compress.oracle.captured import AnyCount


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
