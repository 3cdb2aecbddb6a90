"""A traced copy of a network in which no operation writes into the value of another.

``nn.ReLU(inplace=True)``, ``x += y`` and ``x.relu_()`` overwrite values that the oracle keeps and
reads again. Which operations do so is observed, not looked up: torch counts the writes into every
tensor. What reads an overwritten value afterwards must see the new one, as it does in the network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compress.errors import ModelError
from compress.networks.tracing import operation, trace

TOLERANCE = 1e-3
"""Largest difference of the copy's logits from the network's, relative to the largest logit."""


class Watched(fx.Interpreter):
    """Runs a traced network and notes the values that each operation overwrites.

    Attributes:
        values: the value of every node after the run.
        overwritten: for each operation that overwrites, the earlier nodes that lose their value.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.extra_traceback = False
        self.overwritten: dict[fx.Node, list[fx.Node]] = {}

    @property
    def values(self) -> dict[fx.Node, Any]:
        """The value of every node."""
        return self.env

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation and look for counters that moved."""
        before = {m: v._version for m, v in self.env.items() if isinstance(v, torch.Tensor)}
        result = super().run_node(n)
        changed = [m for m, version in before.items() if self.env[m]._version != version]
        if changed:
            self.overwritten[n] = changed
        return result


@torch.no_grad()
def unwritten(model: nn.Module, sample: torch.Tensor) -> fx.GraphModule:
    """Return a traced copy that computes the same and overwrites nothing.

    BatchNorms are folded into the convolutions before them. Nodes keep the names that the channel
    graph knows.

    Args:
        model: the network, in evaluation mode; it is not changed.
        sample: (N, C, H, W) a few images on its device.

    Raises:
        ModelError: an operation overwrites part of a value that is read again, or the copy computes
            something else.
    """
    network = trace(copy.deepcopy(model).requires_grad_(False))
    expected = copy.deepcopy(model)(sample.clone())
    watched = Watched(network)
    watched.run(sample.clone())
    order = {node: index for index, node in enumerate(network.graph.nodes)}
    for node, changed in watched.overwritten.items():
        _read_result_instead(node, changed, watched.values, order)
        _write_elsewhere(network, node, changed)
    _fold_batchnorms(network)
    network.graph.lint()
    network.recompile()
    _prove(network, expected, sample)
    return network


def _read_result_instead(
    node: fx.Node, changed: Sequence[fx.Node], values: dict[fx.Node, Any], order: dict[fx.Node, int]
) -> None:
    """Let what runs after an overwriting operation read its result, not the value it took."""
    for source in changed:
        later = [user for user in source.users if order.get(user, -1) > order[node]]
        if later and not _same_memory(values[source], values[node]):
            raise ModelError(
                f"the operation {operation(node)} ({node.name}) overwrites part of a value that is "
                "read again, which the oracle cannot follow: write it without the in-place form"
            )
        for user in later:
            user.replace_input_with(source, node)


def _same_memory(first: Any, second: Any) -> bool:
    return (
        isinstance(second, torch.Tensor)
        and first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )


def _write_elsewhere(network: fx.GraphModule, node: fx.Node, changed: Sequence[fx.Node]) -> None:
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    if getattr(module, "inplace", False):
        apart: Any = copy.copy(module)  # the same parameters
        apart.inplace = False
        node.target = f"{node.name}_apart"
        network.add_submodule(node.target, apart)
        return
    for source in node.all_input_nodes:
        if source in changed:
            with network.graph.inserting_before(node):
                node.replace_input_with(source, network.graph.call_method("clone", (source,)))


def _fold_batchnorms(network: fx.GraphModule) -> None:
    """Fold each BatchNorm into the convolution before it, where nothing else reads or shares it."""
    modules = dict(network.named_modules(remove_duplicate=False))
    calls = [str(node.target) for node in network.graph.nodes if node.op == "call_module"]
    for node in list(network.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(norm) is not nn.BatchNorm2d or norm.running_var is None:
            continue
        source = node.all_input_nodes[0]
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        once = calls.count(str(source.target)) == 1 and len(source.users) == 1
        if type(conv) is nn.Conv2d and once:
            name = f"{source.name}_folded"
            network.add_submodule(name, fuse_conv_bn_eval(conv, norm))
            source.target = name
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)


def _prove(network: fx.GraphModule, expected: Any, sample: torch.Tensor) -> None:
    """Compare the copy with the network, once plainly and once with other images beside."""
    if not isinstance(expected, torch.Tensor) or expected.dim() != 2:
        raise ModelError("the oracle needs a network that returns logits, one row per image")
    watched, others = Watched(network), sample.flip(0) / 2
    try:
        found = watched.run(sample.clone())
        alone, together = network(others), network(torch.cat([others, sample]))
    except RuntimeError as error:
        raise ModelError(
            f"the network does not accept any number of images: {str(error).splitlines()[0]}"
        ) from error
    for node, changed in watched.overwritten.items():
        assert all(set(source.users) <= {node} for source in changed), f"{node} still overwrites"
    if not _close(found, expected):
        raise ModelError(
            "the oracle's copy of the network computes other logits than the network: "
            "this is a defect of the oracle, please report it"
        )
    if not _close(together, torch.cat([alone, expected])):
        raise ModelError(
            "the logits of an image depend on the other images beside it, so removals cannot be "
            "measured side by side"
        )


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
