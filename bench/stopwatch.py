"""The stopwatch of runs whose budget is time: tables, and networks measured as the gate judges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from bench.measuring.conditions import Watch, disturbed
from bench.measuring.latency import Call, LatencyResult, measure_latency
from bench.statistics.latency_ratios import median
from compress.config import BenchConfig, RunConfig
from compress.latency.fitted import shipped_names
from compress.latency.stopwatch import Comparison, Size
from compress.terminal.console import say, say_error
from export.latency.building import Plan, Profile
from export.latency.command import profiled
from export.latency.serving import Network, Serving, opened, readable

if TYPE_CHECKING:
    from torch import nn

    from compress.latency.table import LatencyTable
    from compress.networks.groups import ChannelGraph

WIDE = 0.02
"""Share of a ratio that its interval may reach to either side; budgets are met as closely."""
ATTEMPTS = 3
"""Measurements at most while the interval is wider, or other programs have the cores."""


@dataclass(frozen=True)
class RuntimeStopwatch:
    """Measures in the runtime that a configuration names; a ``Stopwatch``.

    Attributes:
        serving: the runtime, and how it is asked.
        multiple: widths of a table are multiples of it.
        bench: how long and how precisely two networks are measured.
        seed: of inputs and order.
    """

    serving: Serving
    multiple: int
    bench: BenchConfig
    seed: int = 0

    def table(
        self, model: nn.Module, graph: ChannelGraph, size: Size, folder: Path
    ) -> LatencyTable:
        """See ``Stopwatch``."""
        profile = Profile(model, graph, size, Plan(multiple=self.multiple))
        say(f"latency table for {self.serving.runtime}, batch {self.serving.batch}")
        path = folder / self.serving.table_name
        table = profiled(profile, self.serving, path, overwrite=False).table
        error = table.error
        say(f"it predicts networks within {error.mean:.1%}, at worst {error.largest:.1%}")
        return table

    def compare(self, dense: nn.Module, pruned: nn.Module, size: Size) -> Comparison:
        """See ``Stopwatch``."""
        rng, serving = np.random.default_rng(self.seed), self.serving
        images = rng.standard_normal((serving.batch, *size)).astype(np.float32)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            sources = {
                name: readable(Network(network, size), serving, folder / f"{name}.onnx")
                for name, network in (("reference", dense), ("pruned", pruned))
            }
            # One file, and of TensorRT one engine: built again it may have other kernels.
            sources["control"] = sources["reference"]
            calls = {
                name: Call(stack.enter_context(opened(source, serving)), {"input": images})
                for name, source in sources.items()
            }
            found = steadiest(
                lambda: measure_latency(
                    calls,
                    batch_size=serving.batch,
                    config=self.bench,
                    seed=self.seed,
                    watch=Watch(None),
                )
            )
        dense_ms, pruned_ms = (median(found.samples_ms[name]) for name in ("reference", "pruned"))
        ratio = found.ratio
        return Comparison(dense_ms, pruned_ms, ratio.ratio, ratio.low, ratio.high)


def steadiest(measure: Callable[[], LatencyResult]) -> LatencyResult:
    """Measure again while the interval is wide or the machine is not fit to be judged on.

    A limit is corrected by the upper bound, and what is removed for it does not come back.

    Returns:
        Of the results of a machine that was fit, else of all, that with the narrowest interval.
    """
    best = measure()
    for _ in range(ATTEMPTS - 1):
        doubt = _doubt(best)
        if doubt is None:
            return best
        say(f"{doubt}: measured again")
        best = min(best, measure(), key=_unsteadiness)
    reason = disturbed(best.conditions)
    if reason is not None:
        say_error(f"warning: the measured time may not be that of a quiet machine: {reason}")
    return best


def _doubt(found: LatencyResult) -> str | None:
    if found.ratio.reach > WIDE:
        return f"the ratio is known to {found.ratio.reach:.1%}"
    return "the machine was disturbed" if disturbed(found.conditions) else None


def _unsteadiness(found: LatencyResult) -> tuple[bool, float]:
    return disturbed(found.conditions) is not None, found.ratio.reach


def stopwatch_for(config: RunConfig) -> RuntimeStopwatch | None:
    """Return what measures as a run's configuration says; None where a shipped table is believed.

    Raises:
        ConfigError: a runtime that is none, or that no table is measured for.
    """
    prune = config.prune
    if str(prune.latency_table) in shipped_names():
        say(f"time is predicted by the table {prune.latency_table} and not measured")
        return None
    serving = Serving(
        runtime=prune.latency_runtime,  # type: ignore[arg-type]  # it refuses what is none
        precision=prune.latency_precision,  # type: ignore[arg-type]  # it refuses int8
        batch=prune.latency_batch,
        threads=prune.latency_threads,
        target=config.export.target,
    )
    return RuntimeStopwatch(serving, prune.channel_multiple, config.bench, config.seed)
