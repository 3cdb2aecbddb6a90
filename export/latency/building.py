"""A latency table from measurements of layers and of whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.latency.table import (
    Error,
    Grid,
    LatencyTable,
    network_weight_bytes,
)
from compress.latency.times import network_milliseconds
from compress.networks.groups import ChannelGraph, Mask
from compress.networks.layers import LayerShape
from export.latency.correction import Networks, fitted_correction
from export.latency.partial import Partial
from export.latency.rounds import MOST_SPREAD, Effort, Measured, Told, require_quiet
from export.latency.serving import Network, Serving, measure_ms
from export.latency.stairs import fitted_stairs
from export.latency.widths import Span, random_mask, sampled, smallest_mask, spans_of

if TYPE_CHECKING:
    from torch import nn

    from compress.terminal.progress import Progress

Measure = Callable[[Sequence[Network], Told], Measured]
"""Measures networks against each other, and tells the share that is done."""

LEAST_SHARE = 0.2
"""Of its time by itself: no correction makes a layer cheaper."""
_PART_BYTES = 1.5e9  # of weights that are in memory together
_CALL_MACS = 2e7  # of a network that takes as long as all around it does


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    multiple: int = 8
    """Widths are multiples of it."""
    networks: int = 24
    """Random ones that correct the table, beside the dense and the smallest one."""
    held_out: int = 12
    """Random ones that tell its error."""
    seed: int = 0
    effort: Effort = field(default_factory=Effort)


@dataclass(frozen=True)
class Job:
    """One network to be measured."""

    key: str
    build: Callable[[], Network]
    macs: float
    weights: float
    """Bytes."""


class Profile:
    """What is measured of one network, and the table that it makes."""

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, input_size: tuple[int, int, int], plan: Plan
    ) -> None:
        """Decide what to measure.

        Args:
            model: the dense network, on the CPU.
            graph: its channel graph.
            input_size: (C, H, W) of one image.
            plan: how much.
        """
        self.model, self.graph, self.input_size, self.plan = model, graph, input_size, plan
        self.spans = spans_of(graph, plan.multiple)
        rng = np.random.default_rng([plan.seed, 1])
        self.pairs = {
            shape: [sampled(shape, span, rng) for span in spans]
            for shape, spans in self.spans.items()
        }
        masks = [random_mask(graph, plan.multiple, rng) for _ in range(plan.networks)]
        self.masks = [graph.everything(), smallest_mask(graph, plan.multiple), *masks]
        rng = np.random.default_rng([plan.seed, 2])
        self.held_out = [random_mask(graph, plan.multiple, rng) for _ in range(plan.held_out)]

    @property
    def reference(self) -> Job:
        """The network that is measured with every part."""
        return self._network_job("reference", self.masks[1])

    def parts(self) -> Iterator[list[Job]]:
        """Yield what is measured together: the layers of one shape, and whole networks."""
        for number, shape in enumerate(self.spans):
            yield list(self._layer_jobs(number, shape))
        jobs = [
            self._network_job(f"{kind} {number}", mask)
            for kind, masks in (("network", self.masks), ("held out", self.held_out))
            for number, mask in enumerate(masks)
        ]
        part: list[Job] = []
        for index in np.random.default_rng(self.plan.seed).permutation(len(jobs)):
            if sum(job.weights for job in (*part, jobs[index])) > _PART_BYTES and part:
                yield part
                part = []
            part.append(jobs[index])
        yield part

    def table(self, serving: Serving, partial: Partial) -> LatencyTable:
        """Return the table of what was measured."""
        ms = partial.ms
        alone = {shape: self._alone(number, shape, ms) for number, shape in enumerate(self.spans)}
        shapes = list(self.spans)
        networks = self._networks(alone, self.masks)
        correction = fitted_correction(
            networks, [ms[f"network {number}"] for number in range(len(self.masks))]
        )
        grids = {
            shape: _corrected(
                alone[shape], self.spans[shape], correction.scale[i], correction.per_channel[i]
            )
            for i, shape in enumerate(shapes)
        }
        table = LatencyTable(
            fingerprint=serving.fingerprint(self.graph),
            intercept=correction.fixed,
            grids=grids,
            curve=correction.curve,
            error=Error(()),
            spread=partial.spread,
            multiple=self.plan.multiple,
            dense_ms=ms["network 0"],
            dense_weights=network_weight_bytes(self.graph.layers, self.graph.everything()),
        )
        pairs = tuple(
            (network_milliseconds(self.graph, table, mask), ms[f"held out {number}"])
            for number, mask in enumerate(self.held_out)
        )
        return replace(table, error=Error(pairs))

    def _layer_jobs(self, number: int, shape: LayerShape) -> Iterator[Job]:
        from export.latency.alone import copies_of

        around = set()
        for pairs in self.pairs[shape]:
            for read, written in pairs:
                yield _layer_job(number, shape, read, written, copies_of(shape, read, written))
                around.add(read)
        for read in sorted(around):
            yield _layer_job(number, shape, read, read, 0)

    def _network_job(self, key: str, mask: Mask) -> Job:
        from compress.networks import cost
        from compress.networks.shrink import shrink

        return Job(
            key,
            lambda: Network(shrink(self.model, self.graph, mask), self.input_size),
            macs=cost.macs(self.graph, mask),
            weights=network_weight_bytes(self.graph.layers, mask),
        )

    def _alone(self, number: int, shape: LayerShape, ms: dict[str, float]) -> Grid:
        """Return the time of the layers of a shape by themselves, on all of its widths."""
        from export.latency.alone import copies_of

        spans = self.spans[shape]
        paired = any(span.paired for span in spans)
        reads = np.unique(np.concatenate([span.read for span in spans]))
        writes = np.unique(np.concatenate([span.written for span in spans]))
        grid = np.full(len(reads) if paired else (len(reads), len(writes)), np.nan)
        for span, pairs in zip(spans, self.pairs[shape], strict=True):
            times = []
            for read, written in pairs:
                copies = copies_of(shape, read, written)
                around = ms[_layer_key(number, read, read, 0)]
                times.append((ms[_layer_key(number, read, written, copies)] - around) / copies)
            stairs = fitted_stairs(np.array(pairs), np.array(times), self.plan.multiple)
            cells = span.cells
            places = tuple(map(np.searchsorted, (reads, writes), cells))
            grid[places[:1] if paired else places] = stairs.at(*cells)
        return Grid(reads, writes[:0] if paired else writes, grid)

    def _networks(self, alone: dict[LayerShape, Grid], masks: Sequence[Mask]) -> Networks:
        shapes = list(alone)
        times = np.zeros((len(masks), len(shapes)))
        channels = np.zeros_like(times)
        for row, mask in enumerate(masks):
            for layer in self.graph.layers:
                read, written = layer.widths(mask)
                if read and written:
                    column = shapes.index(layer.shape)
                    found = alone[layer.shape].at(np.array(read), np.array(written))
                    times[row, column] += float(found)
                    channels[row, column] += written
        weights = [network_weight_bytes(self.graph.layers, mask) for mask in masks]
        return Networks(times, channels, np.array(weights))


def build_table(
    profile: Profile,
    serving: Serving,
    *,
    partial: Path | None = None,
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> LatencyTable:
    """Measure what a profile wants and return the table.

    Args:
        profile: of one network.
        serving: what serves it.
        partial: file that keeps what was measured so far; it is the caller's to remove.
        progress: told the share done.
        measure: measures networks against each other; by default ``measure_ms``.

    Raises:
        TableError: the machine is too noisy, or a layer cannot be measured by itself.
        ModelError, EnvironmentUnfitError: see ``measure_ms``.
    """
    plan = {
        **asdict(serving.fingerprint(profile.graph)),
        **{key: value for key, value in asdict(profile.plan).items() if key != "effort"},
    }
    kept = Partial.at(partial, plan)
    effort = profile.plan.effort
    run = measure or (lambda networks, told: measure_ms(networks, serving, effort, told=told))
    parts = list(profile.parts())
    costs = [sum(_cost(job, serving) for job in part) for part in parts]
    for number, part in enumerate(parts):
        step = "layers" if number < len(profile.spans) else "networks"
        before, own = sum(costs[:number]) / sum(costs), costs[number] / sum(costs)
        tell = _telling(progress, step, before, own)
        missing = [job for job in part if job.key not in kept.ms]
        if missing:
            _measure_part(missing, profile.reference, run, tell, kept)
        tell(1.0)
    return profile.table(serving, kept)


def _telling(progress: Progress | None, step: str, before: float, part: float) -> Told:
    """Return what tells the share of all by that of one part."""

    def tell(share: float) -> None:
        if progress is not None:
            progress(step, before + part * share)

    return tell


def _measure_part(
    jobs: Sequence[Job], reference: Job, measure: Measure, tell: Told, kept: Partial
) -> None:
    networks = [job.build() for job in (reference, *jobs)]
    found = measure(networks, tell)
    if found.spread > MOST_SPREAD:  # once more: whoever disturbed it may be gone
        found = measure(networks, tell)
    require_quiet(found.spread)
    keys = [job.key for job in jobs]
    kept.add(
        dict(zip(keys, found.ms[1:], strict=True)), reference_ms=found.ms[0], spread=found.spread
    )


def _cost(job: Job, serving: Serving) -> float:
    """Return about how long a job takes, in calls of a network without layers."""
    return 1 + job.macs * serving.batch / _CALL_MACS


def _layer_key(number: int, read: int, written: int, copies: int) -> str:
    return f"layer {number}: {read} to {written}, {copies} times"


def _layer_job(number: int, shape: LayerShape, read: int, written: int, copies: int) -> Job:
    from compress.latency.table import WEIGHT_BYTES, weight_bytes

    def build() -> Network:
        from export.latency.alone import Alone

        model = Alone(shape, read, written, copies).eval()
        return Network(model, model.input_size)

    weights = copies * float(weight_bytes(shape, np.array(read), np.array(written)))
    places = float(np.prod(shape.output_size))
    return Job(
        _layer_key(number, read, written, copies),
        build,
        macs=weights / WEIGHT_BYTES * places,
        weights=weights,
    )


def _corrected(alone: Grid, spans: Sequence[Span], scale: float, per_channel: float) -> Grid:
    written = alone.written
    if alone.milliseconds.ndim == 1:
        written = alone.read * spans[0].written[-1] // spans[0].read[-1]
    found = scale * alone.milliseconds + per_channel * written
    return Grid(alone.read, alone.written, np.maximum(found, LEAST_SHARE * alone.milliseconds))
