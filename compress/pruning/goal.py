"""A budget as a goal: the cost that counts, where it starts and where it must end."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.config import Budget, PruneConfig
from compress.errors import BudgetError, ConfigError, TableError, nearest
from compress.latency.fitted import shipped_names, shipped_table
from compress.latency.table import read_table
from compress.latency.times import Times
from compress.networks import cost
from compress.networks.groups import ChannelGraph, Mask
from compress.pruning.choice.planner import Planner
from compress.pruning.importance import ranked
from compress.pruning.masking import Candidate, CostFunction, Scores, smallest

ROOM = 0.02
"""Share of the limit by which a network may lie below it, where finer pieces can do that."""


@dataclass(frozen=True)
class Goal:
    """A budget for one network: the cost function, where it starts and where it must end."""

    budget: Budget
    cost_of: CostFunction
    channels_of: CostFunction
    dense: float
    limit: float
    planner: Planner | None = None
    """What chooses masks where ranking is not enough: it weighs importance against time itself."""

    @property
    def least(self) -> float:
        """A cost below which the network was pruned further than was asked."""
        return self.limit * (1 - ROOM)

    def at(self, step: int, steps: int) -> float:
        """Return the limit of a step when the cost falls linearly over all steps."""
        if step >= steps:
            return self.limit
        return self.dense + (self.limit - self.dense) * step / steps

    def order(
        self,
        importance: Scores,
        kept: Mask,
        allowed: Sequence[Candidate],
        graph: ChannelGraph,
        config: PruneConfig,
    ) -> Scores:
        """Return what units are ranked by; a planner takes importance as it is.

        Args:
            importance: (units,) importance.
            kept: the present mask.
            allowed: the groups and branches that may go.
            graph: the dense channel graph.
            config: how groups are compared.
        """
        if self.planner is not None:
            return importance
        return ranked(importance, kept, allowed, graph=graph, config=config)


def goal_for(
    graph: ChannelGraph,
    budget: Budget,
    allowed: Sequence[Candidate],
    times: Times | None = None,
) -> Goal:
    """Translate a budget into a cost limit of this network.

    Args:
        graph: its channel graph.
        budget: what it may cost.
        allowed: the groups and branches that may go.
        times: a latency table, for a budget of time.

    Raises:
        ConfigError: a budget of time without a table.
        BudgetError: even with every group at its floor the network would cost more; the message
            names the closest that can be reached.
    """
    if budget.kind == "latency":
        return _time_goal(graph, budget, allowed, times)
    functions = {"macs": cost.macs, "params": cost.params}
    function = functions.get(budget.kind, cost.channels)
    dense = function(graph, graph.everything())
    if budget.kind == "removed":
        limit = dense - budget.value
    else:
        # Costs are whole numbers: 0.29 of 100 is 29, not 28.999999999999996.
        limit = budget.value if budget.absolute else round(budget.value * dense, 3)
    closest = function(graph, smallest(graph, allowed))
    if closest > limit:
        raise BudgetError(_unreachable(budget, dense, closest))
    return Goal(
        budget,
        cost_of=lambda kept: function(graph, graph.closed(kept)),
        channels_of=lambda kept: cost.channels(graph, graph.closed(kept)),
        dense=dense,
        limit=limit,
    )


def times_for(
    config: PruneConfig, graph: ChannelGraph, table: Times | str | Path | None
) -> Times | None:
    """Return the latency table of a budget of time: the one that is given, else the configured.

    Raises:
        TableError: the file is damaged, or was measured for another network.
    """
    path = table or config.latency_table
    if config.budget.kind != "latency" or path is None:
        return None
    if not isinstance(path, str | Path):
        return path
    if str(path) in shipped_names():
        return shipped_table(str(path)).times(config.latency_precision, config.latency_batch)
    if not Path(path).exists() and Path(path).name == str(path) and not Path(path).suffix:
        raise TableError(
            f"no latency table is named {str(path)!r}: {nearest(str(path), shipped_names())}"
        )
    found = read_table(Path(path))
    found.require_network(graph, str(path))
    return found


def _time_goal(
    graph: ChannelGraph, budget: Budget, allowed: Sequence[Candidate], times: Times | None
) -> Goal:
    if times is None:
        raise ConfigError(
            f"the budget {budget} needs a latency table: measure one with compress profile, and "
            "give it as latency_table"
        )

    planner = Planner(graph, times, allowed)
    dense = planner.cost_of(graph.everything())
    limit = budget.value if budget.absolute else budget.value * dense
    closest = planner.fastest()
    if closest > limit:
        raise BudgetError(
            f"the budget {budget} cannot be reached: it is {limit:.4g} ms, and the fastest choice "
            f"takes {closest:.4g} of {dense:.4g} ms, as the latency table predicts, which is "
            f"latency={math.ceil(closest / dense * 1e4) / 1e4:.4f}; lower min_channels, min_share "
            "or channel_multiple"
        )
    channels_of = functools.partial(cost.channels, graph)
    return Goal(budget, planner.cost_of, channels_of, dense, limit, planner)


def _unreachable(budget: Budget, dense: int, closest: int) -> str:
    if budget.kind == "removed":
        nearest_budget = f"removed={dense - closest}"
    else:
        nearest_budget = f"{budget.kind}={math.ceil(closest / dense * 1e4) / 1e4:.4f}"
        if budget.value > 1:
            nearest_budget = f"{budget.kind}={closest}"
    return (
        f"the budget {budget} cannot be reached: with every group at its floor "
        f"the closest is {nearest_budget}; lower min_channels, min_share or channel_multiple"
    )
