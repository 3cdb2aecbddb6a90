"""Budgets of time in a run: planned with a table, measured, and corrected by what was measured."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from compress.config import RunConfig
from compress.distributed.world import World
from compress.errors import BudgetError, ConfigError
from compress.latency.stopwatch import Comparison, Size, Stopwatch
from compress.latency.table import document_of, table_of
from compress.latency.times import Times
from compress.networks.groups import ChannelGraph
from compress.networks.shrink import shrink
from compress.pruning.goal import times_for
from compress.pruning.pruner import Pruner
from compress.runs.rundirectory import RunDirectory

CALIBRATED_AT = (0.85, 0.95)
"""Shares of the pruning steps after which the network is measured on the way: early enough to
turn, and then nearly as it will be."""
MARGIN = 0.005
"""Share by which a corrected limit lies below what was computed: measurements differ."""

log = logging.getLogger("compress")


def run_times(
    config: RunConfig,
    model: nn.Module,
    graph: ChannelGraph,
    size: Size,
    run: RunDirectory,
    stopwatch: Stopwatch | None,
    world: World,
) -> Times | None:
    """Return the latency table of a run whose budget is time: a file, or measured.

    One process measures for all, and all plan with the same numbers.

    Raises:
        ConfigError: there is neither a file nor anything that measures.
        TableError: the file is of something else, or the machine is too noisy.
    """
    if config.prune.budget.kind != "latency":
        return None
    given = times_for(config.prune, graph, None)
    if given is not None:
        return given
    if stopwatch is None:
        raise ConfigError(
            f"the budget {config.prune.budget} needs a latency table, and nothing measures one "
            "here: set prune.latency_table"
        )
    folder = config.prune.latency_cache or run.latency
    if world.alone:
        return stopwatch.table(model, graph, size, folder)
    text = ""
    if world.main:
        text = json.dumps(document_of(stopwatch.table(model, graph, size, folder)))
    return table_of(json.loads(world.text_from_first(text)))


class TimeBudget:
    """The measurements of a run whose budget is time.

    Args:
        pruner: of the run.
        dense: the dense network; it is copied.
        size: (C, H, W) of one image.
        stopwatch: what measures; None measures nothing, and the table is believed.
        world: the processes; the main one measures for all.
        rounds: how often the limit is corrected at most.
    """

    def __init__(
        self,
        pruner: Pruner,
        dense: nn.Module,
        size: Size,
        stopwatch: Stopwatch | None,
        world: World,
        rounds: int,
    ) -> None:
        self.pruner, self.size, self.stopwatch = pruner, size, stopwatch
        self.world, self.rounds = world, rounds
        self.dense = copy.deepcopy(dense).cpu().eval()
        self.budget = pruner.settings.budget
        goal = pruner.decisions.goal
        self.asked = self.budget.value * (1 if self.budget.absolute else goal.dense)
        """Milliseconds, as the table predicts them."""
        self.measured: Comparison | None = None
        self.calibrated: list[int] = []
        """The pruning steps after which the network was measured on the way."""
        self.settled = False
        """Whether nothing more may go, whatever is measured."""

    @property
    def calibrates(self) -> bool:
        """Whether it is time to measure on the way."""
        done, step = self.calibrated, self.pruner.at.step
        if self.stopwatch is None or self.pruner.done or len(done) == len(CALIBRATED_AT):
            return False
        settings = self.pruner.settings
        due = settings.start_after + math.floor(CALIBRATED_AT[len(done)] * settings.steps)
        return step >= due and step not in done

    def calibrate(self) -> dict[str, Any]:
        """Measure on the way; return the facts."""
        self.calibrated.append(self.pruner.at.step)
        return self.measure()

    def measure(self) -> dict[str, Any]:
        """Measure the network as it is, and correct the limit; return the facts."""
        assert self.stopwatch is not None
        graph, kept = self.pruner.dense_graph, self.pruner.at.kept
        numbers = torch.zeros(5, dtype=torch.float64)
        if self.world.main:
            found = self.stopwatch.compare(self.dense, shrink(self.dense, graph, kept), self.size)
            numbers = torch.tensor(
                [found.dense_ms, found.pruned_ms, found.ratio, found.low, found.high],
                dtype=torch.float64,
            )
        self.measured = Comparison(*self.world.from_first(numbers).tolist())
        predicted = self.pruner.decisions.goal.cost_of(kept)
        limit = self.asked * predicted / self._in_table_ms(self.measured) * (1 - MARGIN)
        self.pruner.limit(limit)
        return self.facts

    def settle(self) -> None:
        """Let what is reached be the end."""
        self.settled = True
        self.pruner.limit(self.pruner.decisions.goal.cost_of(self.pruner.at.kept))

    @property
    def holds(self) -> bool:
        """Whether the interval of what was measured lies within the budget."""
        return self.measured is None or self._in_table_ms(self.measured) <= self.asked

    @property
    def facts(self) -> dict[str, Any]:
        """What is predicted and what was measured, of the network as it is."""
        goal, kept = self.pruner.decisions.goal, self.pruner.at.kept
        facts: dict[str, Any] = {
            "predicted_ms": goal.cost_of(kept),
            "predicted_share": goal.cost_of(kept) / goal.dense,
        }
        if self.measured is not None:
            m = self.measured
            facts |= {"measured_ms": m.pruned_ms, "measured_dense_ms": m.dense_ms}
            facts |= {"measured_share": m.ratio, "measured_interval": [m.low, m.high]}
        return facts

    def state(self) -> dict[str, Any]:
        """Return what was measured, to go on from."""
        measured = None if self.measured is None else list(astuple(self.measured))
        return {"measured": measured, "calibrated": self.calibrated, "settled": self.settled}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` returned."""
        if (measured := state["measured"]) is not None:
            self.measured = Comparison(*measured)
        self.calibrated, self.settled = list(state["calibrated"]), state["settled"]

    def missed(self) -> BudgetError:
        """Return the error of a network that is finished and too slow."""
        assert self.measured is not None
        m = self.measured
        return BudgetError(
            f"the budget {self.budget} is missed: the network takes {m.pruned_ms:.4g} ms, "
            f"{m.ratio:.3f} of the dense network's time ({m.low:.3f} to {m.high:.3f}), after "
            f"{self.rounds} corrections; it is finished and kept"
        )

    def _in_table_ms(self, found: Comparison) -> float:
        """Return what was measured, its upper bound, in the table's milliseconds."""
        if self.budget.absolute:
            return found.pruned_ms * found.high / found.ratio
        return found.high * self.pruner.decisions.goal.dense


def recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts for history and header, rounded to what was measured."""
    return {
        key: [float(f"{n:.5g}") for n in value]
        if isinstance(value, list)
        else float(f"{value:.5g}")
        for key, value in facts.items()
    }
