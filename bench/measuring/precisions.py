"""What a lower precision gains here: networks against themselves in higher precisions.

Fewer bits are not always faster: a processor without the instructions, a runtime that converts back
and forth, layers too small to gain. So what lies beside the files of a run is measured with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import numpy as np

from bench.measuring.discovery import higher_precisions
from bench.measuring.environment import default_threads
from bench.measuring.latency import Call, measure_latency
from bench.statistics.latency_ratios import RatioInterval
from compress.config import BenchConfig, Precision
from compress.errors import CompressError

if TYPE_CHECKING:
    from bench.measuring.subject import Pair, Subject
    from compress.terminal.progress import Progress

SHARE = 0.25
"""Of ``bench.max_seconds``, that a network takes at a batch size: faster or slower is enough."""
Slot = Literal["reference", "pruned"]
_PRECISE = 0.02  # as precise as the ratio has to be for that, or as ``bench.ratio_precision``


@dataclass(frozen=True, kw_only=True)
class PrecisionGain:
    """One network in two precisions, in alternating blocks of one process."""

    network: Slot
    precision: Precision
    higher: Precision
    batch_size: int
    ratio: RatioInterval
    """Latency in ``precision`` over that in ``higher``."""


def measure_precisions(
    pair: Pair, config: BenchConfig, *, seed: int = 0, progress: Progress | None = None
) -> tuple[tuple[PrecisionGain, ...], tuple[str, ...]]:
    """Measure both networks against themselves in each higher precision that lies beside them.

    Args:
        pair: both networks; in fp32 there is nothing higher.
        config: how, and at which batch sizes.
        seed: of inputs and order.
        progress: told about every step.

    Returns:
        What was measured, and what was not and why, one sentence each.
    """
    precision = pair.pruned.facts.get("precision")
    if precision in (None, "fp32"):
        return (), ()
    slots: list[tuple[Slot, Subject]] = [("reference", pair.reference), ("pruned", pair.pruned)]
    found: list[PrecisionGain] = []
    try:
        for slot, subject in slots:
            for higher in higher_precisions(subject):
                gains = _measured(slot, subject, higher, config, seed=seed, progress=progress)
                found += sorted(gains, key=lambda gain: config.batch_sizes.index(gain.batch_size))
    except CompressError as error:
        return tuple(found), (f"{precision} was not measured against a higher precision: {error}.",)
    if found:
        return tuple(found), ()
    return (), (
        f"Whether {precision} is faster here than a higher precision was not measured: no other "
        "export of these networks lies beside theirs.",
    )


def _measured(
    slot: Slot,
    subject: Subject,
    higher: Subject,
    config: BenchConfig,
    *,
    seed: int,
    progress: Progress | None,
) -> Iterator[PrecisionGain]:
    """Yield the gain of one network at every batch size."""
    threads = config.threads or default_threads()
    quick = config.model_copy(
        update={
            "max_seconds": SHARE * config.max_seconds,
            "ratio_precision": max(_PRECISE, config.ratio_precision),
        }
    )
    with ExitStack() as stack:
        builds = Path(stack.enter_context(TemporaryDirectory()))
        runners = {
            name: stack.enter_context(one.open(threads, builds))
            for name, one in (("reference", higher), ("pruned", subject), ("control", higher))
        }
        names = [str(one.facts["precision"]) for one in (subject, higher)]
        for size in sorted(config.batch_sizes, reverse=True):  # engines are tuned for the first
            rng = np.random.default_rng(seed)
            images = rng.standard_normal((size, *subject.facts["input_size"])).astype(np.float32)
            calls = {
                name: Call(runner, {(runner.inputs or ())[0].name: images})
                for name, runner in runners.items()
            }
            step = f"{' against '.join(names)}, {subject.name}, batch {size}"
            ratio = measure_latency(
                calls,
                batch_size=size,
                config=quick,
                seed=seed,
                progress=None if progress is None else partial(progress, step),
            ).ratio
            yield PrecisionGain(
                network=slot,
                precision=subject.facts["precision"],
                higher=higher.facts["precision"],
                batch_size=size,
                ratio=ratio,
            )
