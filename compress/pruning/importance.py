"""From the scores of minibatches to what is ranked: averages, normalisation, regard to cost."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from compress.config import PruneConfig
from compress.networks import cost
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.masking import Candidate, Scores, weighed_by_depth


class Importance:
    """Averages scores over the minibatches of an interval, and exponentially over intervals.

    Args:
        num_units: length of a score vector.
        momentum: weight of the past intervals; 0 uses the last interval alone.
    """

    def __init__(self, num_units: int, *, momentum: float) -> None:
        self.momentum = momentum
        self.total = torch.zeros(num_units)
        self.minibatches = 0
        self.average: Scores | None = None

    def add(self, scores: torch.Tensor) -> None:
        """Count the scores of one minibatch; they stay on their device."""
        # Scaled fp16 gradients may overflow once in a while; such a minibatch says nothing.
        finite = torch.nan_to_num(scores.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)
        self.total = self.total.to(finite.device) + finite
        self.minibatches += 1

    def close_interval(self) -> Scores:
        """End the interval and return the averaged importance of every unit, (units,)."""
        mean = (self.total / max(1, self.minibatches)).cpu().double().numpy()
        self.total = torch.zeros_like(self.total)
        self.minibatches = 0
        if self.average is None or self.momentum == 0:
            self.average = mean
        else:
            self.average = self.momentum * self.average + (1 - self.momentum) * mean
        return self.average


def ranked(
    importance: Scores,
    kept: Mask,
    allowed: Iterable[Candidate],
    *,
    graph: ChannelGraph,
    config: PruneConfig,
) -> Scores:
    """Return what units are ranked by: importance, as the settings want groups compared.

    Args:
        importance: (units,) importance.
        kept: the present mask.
        allowed: the groups that may lose units.
        graph: the dense channel graph.
        config: ``normalize``, then ``flops_regularization`` (Molchanov et al. 2017, section 2.2,
            here in MACs), or ``rank``.
    """
    scores = weighed_by_depth(importance, kept, graph)
    if config.normalize == "l2":
        for candidate in allowed:
            units = candidate.group.units[kept[candidate.group.units]]
            norm = float(np.linalg.norm(scores[units]))
            scores[units] /= norm if norm > 0 else 1.0
    if config.flops_regularization:
        scores -= config.flops_regularization * cost.macs_saved(graph, kept)
    if config.ranks_per_mac:
        scores /= np.maximum(cost.macs_saved(graph, kept), 1)
    return scores


def summary(importance: Scores, kept: Mask, allowed: Iterable[Candidate]) -> dict[str, float]:
    """Return least, median and largest importance of the units that may still go."""
    units = [c.group.units[kept[c.group.units]] for c in allowed]
    values = importance[np.concatenate(units)]
    return {
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }
