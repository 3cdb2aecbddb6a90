"""Run a network again behind removed units; everything before them comes from one dense pass."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from compress.errors import ModelError
from compress.networks.groups import ChannelGraph, ReadSite, Units
from compress.oracle.captured import macs_of, read_by, sites_of
from compress.oracle.network import close, unwritten, values_of
from compress.training.compute import memory_format_for

TENSOR_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}
"""Largest value while removals are stacked: what a CPU's caches hold, what fills a GPU."""


@dataclass(frozen=True)
class Plan:
    """What must run again when units of some groups are removed."""

    nodes: tuple[fx.Node, ...]
    """In order."""
    sites: dict[fx.Node, ReadSite]
    """Those that read the groups, and what they read."""
    needed: frozenset[fx.Node]
    """Values of the dense pass that they use."""
    ready: int
    """Position in the network after which all of these are there."""
    spent: dict[fx.Node, tuple[fx.Node, ...]]
    """Values that nothing reads any more after a node."""
    macs: int
    """Multiply-adds for one image."""
    largest: int
    """Numbers in the largest value of one image."""


class Replay:
    """A network that can be run again from where units are read.

    Args:
        model: the network, in evaluation mode; it is copied.
        graph: its channel graph.
        sample: (N, C, H, W) at least two images, on the network's device.

    Raises:
        ModelError: the network cannot be run on several batches side by side, or a group that may
            be pruned is read where no gate can be put.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, sample: torch.Tensor) -> None:
        self.memory_format = memory_format_for(model, sample.shape[1:])
        self.num_units = graph.num_units
        captured = unwritten(model, sample, self.memory_format)
        self.network, self.images, self.count = captured.module, captured.images, captured.count
        everything = list(self.network.graph.nodes)
        self.tensors = {
            node: getattr(self.network, str(node.target))
            for node in everything
            if node.op == "get_attr"
        }
        self.nodes = [n for n in everything if n not in self.tensors and n.op != "output"]
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.logits: fx.Node = everything[-1].all_input_nodes[0]
        self.last_use = {
            node: max((self.position.get(u, len(self.nodes)) for u in node.users), default=-1)
            for node in everything
        }
        self.sites = {
            node: site for node, site in sites_of(captured, graph).items() if node in self.position
        }
        self.like = sample.new_empty(0)
        with torch.no_grad():
            self._look(sample.to(memory_format=self.memory_format))

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.like.device

    def plan(self, units: Units) -> Plan:
        """Return what must run again when any of these units is removed.

        Raises:
            ModelError: it reads a value that has no row for each image.
        """
        sites = {n: site for n, site in self.sites.items() if np.isin(site.units, units).any()}
        again: set[fx.Node] = set()
        for node in self.nodes:
            if node in sites or any(source in again for source in node.all_input_nodes):
                again.add(node)
        again &= self.useful
        self._add_plain_values(again)
        nodes = tuple(node for node in self.nodes if node in again)
        sites = {node: site for node, site in sites.items() if node in again}
        needed = frozenset(
            source
            for node in nodes
            for source in node.all_input_nodes
            if source not in again and source not in self.tensors
        )
        for node in {*(needed & self.varying), *map(read_by, sites)} - {self.count}:
            if node not in self.rows:
                raise ModelError(
                    f"the value of {node.name} has no row for each image, so removals cannot be "
                    "measured side by side"
                )
        return Plan(
            nodes,
            sites,
            needed,
            max(map(self.position.__getitem__, needed), default=-1),
            _spent(nodes, again),
            sum(self.macs[node] for node in nodes),
            max((self.numbers[n] for n in again | needed), default=1),
        )

    @property
    def total_macs(self) -> int:
        """Multiply-adds of the whole network for one image."""
        return sum(self.macs.values())

    def run_again(self, plan: Plan, kept: dict[fx.Node, Any], removed: Units) -> torch.Tensor:
        """Return the logits without some units, several removals at once.

        Args:
            plan: of the groups whose units are removed.
            kept: the values of the dense pass that it needs, for N images.
            removed: (copies, units) the units that each removal takes away.

        Returns:
            (copies, N, classes).
        """
        copies, values = len(removed), dict[fx.Node, Any]()
        gates = self._gates(removed)

        def value_of(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node in self.tensors:
                return self.tensors[node]
            if node is self.count:
                return copies * kept[node]
            return _stack(kept[node], copies) if node in self.rows else kept[node]

        for node in plan.nodes:
            given: Callable[[fx.Node], Any] = value_of
            if node in plan.sites:
                source, site = read_by(node), plan.sites[node]
                factors = gates[:, torch.from_numpy(site.units).to(gates.device)]
                own = source in values
                value = values[source] if own else kept[source]
                gated = _stack(value, copies, factors, dim=site.dim, own=own)
                given = _with(value_of, source, gated)
            values[node] = self.execute(node, given)
            for finished in plan.spent[node]:
                del values[finished]
        return _apart(values[self.logits], copies)

    def execute(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        """Run one operation."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _gates(self, removed: Units) -> torch.Tensor:
        gates = torch.ones(len(removed), self.num_units, dtype=self.like.dtype)
        return gates.scatter_(1, torch.from_numpy(removed), 0).to(self.device)

    def _look(self, sample: torch.Tensor) -> None:
        """Run a few times, and note of every value what it is and what it costs."""
        others = sample.flip(0) / 2
        found, beside, together = (
            values_of(self.network, images)
            for images in (sample, others, torch.cat([others, sample]))
        )
        self.varying: set[fx.Node] = {self.images}
        """Values that depend on the images."""
        self.rows: set[fx.Node] = set()
        """Those of them in which images stand one behind the other, with one row or more each."""
        self.numbers: dict[fx.Node, int] = {}
        self.macs: dict[fx.Node, int] = {}
        for node in self.nodes:
            value = found[node]
            is_tensor = isinstance(value, torch.Tensor)
            if any(source in self.varying for source in node.all_input_nodes):
                self.varying.add(node)
            if node in self.varying and is_tensor and value.dim():
                apart = torch.cat([beside[node], value])
                if close(together[node], apart):
                    self.rows.add(node)
            self.numbers[node] = value.numel() // len(sample) if is_tensor else 0
            self.macs[node] = macs_of(node, found) // len(sample)
        self.plain = {n for n in self.varying if not isinstance(found[n], torch.Tensor)}
        """Sizes and tuples, which cannot be stacked."""
        self.useful: set[fx.Node] = {self.logits}
        for node in reversed(self.nodes):
            if node in self.useful:
                self.useful.update(node.all_input_nodes)

    def _add_plain_values(self, again: set[fx.Node]) -> None:
        """Add sizes and tuples that the nodes read: they must be those of the stacked values."""
        pending = list(again)
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in self.plain - {self.count} and source not in again:
                    again.add(source)
                    pending.append(source)


class DensePass:
    """The values of one batch, computed as far as plans need them, dropped when none does.

    Args:
        replay: the network.
        images: (N, C, H, W) on its device.
        plans: all that will ask, once each, best in the order of ``Plan.ready``.
    """

    def __init__(self, replay: Replay, images: torch.Tensor, plans: Iterable[Plan]) -> None:
        self.replay = replay
        self.images = images.to(memory_format=replay.memory_format)
        self.values: dict[fx.Node, Any] = {}
        self.next = 0
        self.waiting = Counter(node for plan in plans for node in plan.needed)

    def until(self, plan: Plan) -> dict[fx.Node, Any]:
        """Compute what a plan needs, and return all values that are there."""
        while self.next <= plan.ready:
            node = self.replay.nodes[self.next]
            self.values[node] = self._value(node)
            self.next += 1
            self._drop([node, *node.all_input_nodes])
        return self.values

    def done(self, plan: Plan) -> None:
        """Forget what only this plan has needed."""
        self.waiting.subtract(plan.needed)
        self._drop(plan.needed)

    def _value(self, node: fx.Node) -> Any:
        if node is self.replay.images:
            return self.images
        return self.replay.execute(node, self._given)

    def _given(self, node: fx.Node) -> Any:
        tensors = self.replay.tensors
        return tensors[node] if node in tensors else self.values[node]

    def _drop(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            if self.waiting[node] <= 0 and self.replay.last_use[node] < self.next:
                self.values.pop(node, None)


def _with(
    value_of: Callable[[fx.Node], Any], source: fx.Node, value: torch.Tensor
) -> Callable[[fx.Node], Any]:
    return lambda node: value if node is source else value_of(node)


def _stack(
    value: torch.Tensor,
    copies: int,
    factors: torch.Tensor | None = None,
    *,
    dim: int = 1,
    own: bool = False,
) -> torch.Tensor:
    """Lay copies of a value one behind the other, each channel times its factor.

    Args:
        value: (N, C, ...) that all copies share, or (copies * N, C, ...) with ``own``.
        copies: how many.
        factors: (copies, C); None for ones.
        dim: the dimension of the value that holds the channels.
        own: each copy has its own values already.

    Returns:
        (copies * N, C, ...) in the memory format of the value.
    """
    parts = _apart(value, copies) if own else value.unsqueeze(0)
    rows = len(value) if own else copies * len(value)
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    stacked = torch.empty(
        (rows, *value.shape[1:]),
        dtype=value.dtype,
        device=value.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    into = _apart(stacked, copies)
    if factors is None:
        into.copy_(parts)
    else:
        shape = [copies] + [1] * value.dim()
        shape[dim if dim < 0 else dim + 1] = -1
        torch.mul(parts, factors.view(shape), out=into)
    return stacked


def _apart(stacked: torch.Tensor, copies: int) -> torch.Tensor:
    """View (copies * N, ...) as (copies, N, ...)."""
    return stacked.view(copies, -1, *stacked.shape[1:])


def _spent(nodes: tuple[fx.Node, ...], again: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return the values that can go after each node; the last one is the result."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last.update(dict.fromkeys((s for s in node.all_input_nodes if s in again), node))
    spent: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
    for source, node in last.items():
        spent[node].append(source)
    return {node: tuple(spent[node]) for node in nodes}
