"""A captured copy of a network in which no operation writes into the value of another.

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
from torch.nn.utils.fusion import fuse_conv_bn_weights

from compress.errors import ModelError
from compress.networks.walk import operator_name
from compress.oracle.captured import AnyCount, captured_for_any_count

TOLERANCE = 1e-3
"""Largest difference of the copy's logits from the network's, relative to the largest logit."""


class Watched(fx.Interpreter):
    """Runs a captured network and notes the values that each operation overwrites.

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


def values_of(network: fx.GraphModule, images: torch.Tensor) -> dict[fx.Node, Any]:
    """Run a network that overwrites nothing, and return the value of every node."""
    interpreter = fx.Interpreter(network, garbage_collect_values=False)
    interpreter.extra_traceback = False
    interpreter.run(images)
    return interpreter.env


@torch.no_grad()
def unwritten(
    model: nn.Module,
    sample: torch.Tensor,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> AnyCount:
    """Return a captured copy that computes the same and overwrites nothing.

    BatchNorms are folded into the convolutions before them, and what does not depend on the images
    is computed once.

    Args:
        model: the network, in evaluation mode; it is not changed.
        sample: (N, C, H, W) a few images on its device.
        memory_format: of the copy's weights, and of the images that it will be given.

    Raises:
        ModelError: the network returns no logits or cannot be captured, an operation overwrites
            part of a value that is read again, or the copy computes something else.
    """
    sample = sample.to(memory_format=memory_format)
    expected = copy.deepcopy(model)(sample.clone())
    if not isinstance(expected, torch.Tensor) or expected.dim() != 2:
        raise ModelError("the oracle needs a network that returns logits, one row per image")
    own = copy.deepcopy(model).requires_grad_(False).to(memory_format=memory_format)
    network = captured_for_any_count(own, sample)
    module = network.module
    watched = Watched(module)
    watched.run(sample.clone())
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node, changed in watched.overwritten.items():
        _read_result_instead(node, changed, watched.values, order)
        _write_elsewhere(module.graph, node, changed)
    _compute_constants(network, sample)
    _fold_batchnorms(module)
    _drop_unread(module.graph)
    module.graph.lint()
    module.recompile()
    _prove(module, expected, sample)
    return network


def _read_result_instead(
    node: fx.Node, changed: Sequence[fx.Node], values: dict[fx.Node, Any], order: dict[fx.Node, int]
) -> None:
    """Let what runs after an overwriting operation read its result, not the value it took."""
    for source in changed:
        later = [user for user in source.users if order.get(user, -1) > order[node]]
        if later and not _same_memory(values[source], values[node]):
            raise ModelError(
                f"the operation {operator_name(node)} ({node.name}) overwrites part of a value "
                "that is read again, which the oracle cannot follow: write it without the in-place "
                "form"
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


def _write_elsewhere(graph: fx.Graph, node: fx.Node, changed: Sequence[fx.Node]) -> None:
    apart = _without_writing(node.target)
    if apart is not None:
        node.target = apart
        return
    for source in node.all_input_nodes:
        if source in changed:
            with graph.inserting_before(node):
                copied = graph.call_function(torch.ops.aten.clone.default, (source,))
                node.replace_input_with(source, copied)


def _without_writing(target: Any) -> Any:
    """Return ``relu`` for ``relu_``, or None where there is no such operator."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    space, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    apart = getattr(packet, target._overloadname, None) if name.endswith("_") else None
    if (
        apart is None
        or apart._schema.is_mutable
        or _argument_names(apart) != _argument_names(target)
    ):
        return None
    return apart


def _argument_names(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments]


def _compute_constants(network: AnyCount, sample: torch.Tensor) -> None:
    """Compute what does not depend on the images, weights made of others above all, once.

    What reads units stays, so that their removal is seen.
    """
    module = network.module
    values = values_of(module, sample)
    varying: set[fx.Node] = {network.images, *network.reads}
    for node in list(module.graph.nodes):
        if any(source in varying for source in node.all_input_nodes):
            varying.add(node)
    for node, value in values.items():
        plain = node.op == "call_function" and node not in varying
        if plain and isinstance(value, torch.Tensor) and any(u in varying for u in node.users):
            _hold(module, node, value)


def _fold_batchnorms(module: fx.GraphModule) -> None:
    """Fold each BatchNorm into the convolution before it, where nothing else reads that."""
    for node in list(module.graph.nodes):
        if operator_name(node) != "batch_norm" or not _is_plain_convolution(node.args[0]):
            continue
        conv, scale, shift, mean, variance, training, _, epsilon, _ = node.args
        if training or not all(map(_is_held, (mean, variance))):
            continue
        if not all(item is None or _is_held(item) for item in (scale, shift)):
            continue
        found = _held(module, *_weights(conv), mean, variance, scale, shift)
        folded = fuse_conv_bn_weights(
            found[0], found[1], found[2], found[3], epsilon, found[4], found[5]
        )
        with module.graph.inserting_before(conv):
            held = [
                _new_tensor(module, f"{conv.name}_{kind}", tensor.detach())
                for kind, tensor in zip(("weight", "bias"), folded, strict=True)
            ]
        conv.args = (conv.args[0], *held, *conv.args[3:])
        node.replace_all_uses_with(conv)
        module.graph.erase_node(node)


def _is_plain_convolution(node: Any) -> bool:
    """Whether a node is a convolution with tensors as weights, and read once."""
    return (
        isinstance(node, fx.Node)
        and operator_name(node) in ("conv1d", "conv2d", "conv3d")
        and len(node.users) == 1
        and not node.kwargs
        and all(item is None or _is_held(item) for item in _weights(node))
    )


def _weights(conv: fx.Node) -> tuple[Any, Any]:
    return conv.args[1], conv.args[2] if len(conv.args) > 2 else None


def _is_held(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _held(module: fx.GraphModule, *nodes: fx.Node | None) -> list[Any]:
    return [None if node is None else getattr(module, str(node.target)) for node in nodes]


def _hold(module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> None:
    """Put a tensor in the place of what computes it."""
    with module.graph.inserting_before(node):
        node.replace_all_uses_with(_new_tensor(module, f"{node.name}_value", value))


def _new_tensor(module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    module.register_buffer(name, value)
    return module.graph.create_node("get_attr", name)


def _drop_unread(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _prove(module: fx.GraphModule, expected: torch.Tensor, sample: torch.Tensor) -> None:
    """Compare the copy with the network, once plainly and once with other images beside."""
    watched, others = Watched(module), sample.flip(0) / 2
    try:
        found = watched.run(sample.clone())
        alone, together = module(others), module(torch.cat([others, sample]))
    except RuntimeError as error:
        raise ModelError(
            f"the network does not accept any number of images: {str(error).splitlines()[0]}"
        ) from error
    for node, changed in watched.overwritten.items():
        assert all(set(source.users) <= {node} for source in changed), f"{node} still overwrites"
    if not close(found, expected):
        raise ModelError(
            "the oracle's copy of the network computes other logits than the network: "
            "this is a defect of the oracle, please report it"
        )
    if not close(together, torch.cat([alone, expected])):
        raise ModelError(
            "the logits of an image depend on the other images beside it, so removals cannot be "
            "measured side by side"
        )


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have one shape and the same values but for rounding."""
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    found, expected = found.double(), expected.double()
    return float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
