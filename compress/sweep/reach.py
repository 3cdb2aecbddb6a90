"""How small a network can become under the limits of its configuration."""

from __future__ import annotations

import math

from compress.config import RunConfig
from compress.data.batches import ImageData
from compress.networks import cost
from compress.networks.trial import tried_graph
from compress.pruning.decision import prunable
from compress.pruning.masking import smallest
from compress.runs.dense import fresh_network
from compress.sweep.plan import DECIMALS


def least_share(config: RunConfig, data: ImageData, kind: str) -> float:
    """Return the share of a cost that is left with every group at its floor, rounded up.

    Args:
        config: of the run.
        data: gives the size of the images and the classes.
        kind: ``macs``, ``params`` or ``channels``.

    Raises:
        ModelError: there is nothing to prune, or the network cannot be built or traced.
    """
    model = fresh_network(config, data)
    graph = tried_graph(model, data.input_size)
    dense = cost.totals(graph, graph.everything())[kind]
    least = cost.totals(graph, smallest(graph, prunable(model, graph, config.prune)))[kind]
    scale = 10**DECIMALS
    return math.ceil(least / dense * scale) / scale
