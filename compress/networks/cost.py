"""MACs and parameters of a network under a mask, in closed form.

One multiply-add counts as one MAC. Convolutions and products of matrices are counted, for one
image, as torch's FlopCounterMode does, which counts two operations for each; BatchNorm is folded
away and costs nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compress.networks.capture import Example
from compress.networks.copies import copied
from compress.networks.groups import ChannelGraph, Mask, Term


def macs(graph: ChannelGraph, kept: Mask) -> int:
    """Return the multiply-adds of one image when only the ``kept`` units remain."""
    return round(sum(_amount(term, kept) for term in graph.macs))


def params(graph: ChannelGraph, kept: Mask) -> int:
    """Return the parameters when only the ``kept`` units remain."""
    return round(sum(_amount(term, kept) for term in graph.params))


def channels(graph: ChannelGraph, kept: Mask) -> int:
    """Return the number of channels kept in all groups that may be pruned."""
    return sum(_count(group.units, kept) * group.width for group in graph.prunable)


def macs_saved(graph: ChannelGraph, kept: Mask) -> NDArray[np.float64]:
    """Return (units,) the multiply-adds that each removal would save, all other units as they are.

    Units that are not kept save nothing.
    """
    saved = np.zeros(graph.num_units)
    for term in graph.macs:
        lengths = [_count(units, kept) for units in term.axes]
        counts = [np.bincount(units, minlength=graph.num_units) for units in term.axes]
        before = float(math.prod(lengths))
        after = math.prod(
            (length - count for length, count in zip(lengths, counts, strict=True)),
            start=np.ones(graph.num_units),
        )
        saved += term.coefficient * (before - after)
    return np.where(kept, saved, 0.0)


def totals(graph: ChannelGraph, kept: Mask) -> dict[str, int]:
    """Return all three costs by name, for a JSON document."""
    return {
        "macs": macs(graph, kept),
        "params": params(graph, kept),
        "channels": channels(graph, kept),
    }


def measured(model: nn.Module, example: Example) -> dict[str, int]:
    """Return MACs and parameters of a network as it is, as torch counts them.

    The network is run on its example with fake tensors: without memory or arithmetic.

    Args:
        model: the network; it is not changed.
        example: inputs; MACs are those of one of its rows.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)  # forward may hold tensors of its own
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters())}
    tensors |= dict(model.named_buffers())
    faked: dict[str, torch.Tensor] = {n: fake.from_tensor(t) for n, t in tensors.items()}
    inputs = example.beside(model).map(fake.from_tensor)
    counting = FlopCounterMode(display=False)
    plainly = sdpa_kernel([SDPBackend.MATH])  # torch does not count the attention of CPUs
    apart = copied(model).eval()  # forward may keep tensors, and eval may change weights
    with torch.no_grad(), plainly, fake, counting:
        functional_call(apart, faked, inputs.args, dict(inputs.kwargs))
    return {
        "macs": counting.get_total_flops() // 2 // example.batch,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def _amount(term: Term, kept: Mask) -> float:
    return term.coefficient * math.prod(_count(units, kept) for units in term.axes)


def _count(units: np.ndarray, kept: Mask) -> int:
    return int(np.count_nonzero(kept[units]))
