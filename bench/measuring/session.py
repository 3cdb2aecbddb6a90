"""One session: two networks, the same inputs; both answer, are timed and are profiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from bench.measuring.answers import AccuracyComparison, Answers, Predictions, ask_both
from bench.measuring.conditions import Watch
from bench.measuring.environment import default_threads, fingerprint
from bench.measuring.inputs import Arrays, Batch, Inputs
from bench.measuring.latency import Call, LatencyResult, measure_latency
from bench.measuring.layers import profile_layers
from bench.measuring.records import AgreementRecord, Environment, LayerTimes, ValidationSet
from bench.measuring.wiring import Wiring, wired
from compress.config import BenchConfig
from compress.errors import ModelError

if TYPE_CHECKING:
    from bench.measuring.subject import Pair
    from bench.measuring.wiring import Specs
    from compress.terminal.progress import Progress
    from export.runners import Runner

Source = Callable[[Wiring], Inputs]
"""Returns what both networks are fed, once it is known what they read."""

_APART = (
    "One network ran on a GPU and the other on the CPU, so the ratio of latencies is that of two "
    "machines as well."
)
_MOST_AT_ONCE = 64
_MOST_BYTES = 2**25  # of inputs answered at once; what is computed of them takes many times that


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How two networks are measured."""

    config: BenchConfig
    batch_sizes: Sequence[int] | None = None
    """That were asked for; None leaves the choice to the files, then to the configuration."""
    at_once: int | None = None
    """Inputs in a batch that is answered and not timed; default as many as memory will bear."""
    output: str | None = None
    """From which classes are read; default the first of shape (N, classes)."""
    seed: int = 0
    """Of the order within rounds."""
    given: Specs | None = None
    """What is fed, where neither network says what it reads."""
    check: Callable[[Inputs], None] = lambda inputs: None
    """Refuses inputs that cannot decide what they are for, before any time is spent on them."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a session gave; pairs are (reference, pruned)."""

    runtime: str
    """What ran the networks, as the runners name it."""
    validation: ValidationSet
    environment: Environment
    config: BenchConfig
    """How it was measured, with the runtime and the batch sizes that it came to."""
    latency: Sequence[LatencyResult]
    predictions: tuple[Predictions, Predictions] | None = None
    accuracy: AccuracyComparison | None = None
    agreement: AgreementRecord | None = None
    layers: Sequence[LayerTimes] = ()
    notes: tuple[str, ...] = ()
    """What is missing and why, and what was assumed, one sentence each."""


def measure(
    pair: Pair, source: Source, plan: Plan, *, progress: Progress | None = None
) -> Measured:
    """Measure a pruned network against its reference.

    Args:
        pair: both networks.
        source: what they are fed.
        plan: how.
        progress: told about every step.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: batch sizes that the files do not take, or what ``plan.check`` refuses.
        DataError: nothing can be read, or the two do not read or return the same.
        EnvironmentUnfitError: a runtime cannot work here.
        ModelError: a network cannot be computed, or answers with NaN.
    """
    tell = progress or (lambda step, share: None)
    threads = plan.config.threads or default_threads()
    # Before anything runs: the load average must not show our own work.
    environment = fingerprint(threads=threads)
    found = _run(pair, source, plan, threads=threads, tell=tell)
    # Afterwards: a profiler disturbs whatever else is timed.
    layers, unprofiled = _profile(pair, found, plan=plan, threads=threads, tell=tell)
    inputs, answers = found.inputs, found.answers
    return Measured(
        runtime=found.runtime,
        validation=ValidationSet(
            kind=inputs.kind,
            identity=inputs.identity(),
            images=answers.agreement.inputs,
            skipped=answers.skipped,
            **({"max_skipped": inputs.readable.max_skipped} if inputs.readable else {}),
        ),
        environment=environment,
        config=plan.config.model_copy(
            update={"runtime": pair.pruned.runtime, "batch_sizes": tuple(found.feeds)}
        ),
        latency=found.latency,
        predictions=answers.predictions,
        accuracy=answers.accuracy,
        agreement=answers.agreement,
        layers=layers,
        notes=(*inputs.notes, *found.notes, *unprofiled),
    )


@dataclass(frozen=True)
class _Found:
    """What was measured while both networks were loaded."""

    wiring: Wiring
    inputs: Inputs
    answers: Answers
    feeds: dict[int, Arrays]
    """What was timed, by batch size."""
    latency: list[LatencyResult]
    runtime: str
    notes: tuple[str, ...]


def _run(pair: Pair, source: Source, plan: Plan, *, threads: int, tell: Progress) -> _Found:
    """Load both networks, the reference twice, let them answer and time them."""
    with ExitStack() as stack:
        builds = Path(stack.enter_context(TemporaryDirectory()))
        runners = {
            slot: stack.enter_context(subject.open(threads, builds))
            for slot, subject in (*pair._asdict().items(), ("control", pair.reference))
        }
        reference, pruned = runners["reference"], runners["pruned"]
        wiring = wired(reference.inputs or plan.given, pruned.inputs, pair.names)
        sizes = wiring.batch_sizes(plan.batch_sizes, plan.config.batch_sizes, pair.names)
        inputs = source(wiring)
        plan.check(inputs)
        most = max(sizes) if any(one.builds_for_sizes for one in runners.values()) else None
        answers = _ask(
            *((reference, pruned), wiring, inputs), most=most, pair=pair, plan=plan, tell=tell
        )
        _require_readable(inputs, answers)
        feeds = {size: inputs.first(size, wiring) for size in sizes}
        latency = _time(runners, wiring, feeds, plan=plan, tell=tell)
        names = dict.fromkeys((pruned.name, reference.name))
        apart = (reference.stages is None) != (pruned.stages is None)
    notes = (_APART,) if apart else ()
    return _Found(wiring, inputs, answers, feeds, latency, " against ".join(names), notes)


def _ask(
    both: tuple[Runner, Runner],
    wiring: Wiring,
    inputs: Inputs,
    *,
    most: int | None,
    pair: Pair,
    plan: Plan,
    tell: Progress,
) -> Answers:
    """Let both networks answer to all inputs, in batches of ``most`` at most that both take."""
    # A fixed batch must be full, and of an engine the largest is sure to lie within its bounds.
    bounds = [each for each in (most, wiring.fixed, *(runner.most for runner in both)) if each]
    size = min(bounds) if bounds else plan.at_once or _at_once(wiring)
    what = "accuracy" if inputs.kind == "labelled" else "agreement"

    def told() -> Iterator[Batch]:
        done = 0
        tell(what, 0.0)
        for batch in inputs.read(size):
            yield batch
            done += len(batch) + batch.skipped
            tell(what, min(1.0, done / inputs.count) if inputs.count else 0.0)
        tell(what, 1.0)

    return ask_both(
        *both,
        wiring,
        told(),
        size=size if bounds else None,
        names=pair.names,
        confidence=plan.config.confidence,
        output=plan.output,
    )


def _require_readable(inputs: Inputs, answers: Answers) -> None:
    """Refuse answers to what is left of a set that cannot be read, before anything is timed."""
    if inputs.readable is None:
        return
    labels = answers.predictions[0].labels if answers.predictions else np.empty(0, dtype=np.int64)
    read = np.bincount(labels, minlength=len(inputs.readable.classes))
    inputs.readable.require(answers.skipped, read)


def _at_once(wiring: Wiring) -> int:
    """Return how many inputs to answer at once: no more than memory will bear."""
    sizes = (
        np.dtype(spec.dtype).itemsize
        * math.prod(size for size in (spec.shape or ())[1:] if isinstance(size, int))
        for spec in wiring.inputs
    )
    return max(1, min(_MOST_AT_ONCE, _MOST_BYTES // max(1, sum(sizes))))


def _time(
    runners: dict[str, Runner],
    wiring: Wiring,
    feeds: dict[int, Arrays],
    *,
    plan: Plan,
    tell: Progress,
) -> list[LatencyResult]:
    gpu = next((found for found in map(_gpu_of, runners.values()) if found is not None), None)
    fed = {"pruned": wiring.for_pruned}
    calls = {
        size: {
            slot: Call(runner, fed.get(slot, wiring.for_reference)(batch))
            for slot, runner in runners.items()
        }
        for size, batch in feeds.items()
    }
    _build(runners, calls)
    found = []
    for size in feeds:
        result = measure_latency(
            calls[size],
            batch_size=size,
            config=plan.config,
            seed=plan.seed,
            watch=Watch(gpu),
            progress=partial(tell, f"latency, batch {size}"),
        )
        found.append(result)
    return found


def _build(runners: dict[str, Runner], calls: dict[int, dict[str, Call]]) -> None:
    """Let runtimes build the engines of all batch sizes, before anything is timed.

    The largest comes first, as what engines are tuned for, and the control last: it then loads the
    engine of the reference, and builds none of its own with other kernels.
    """
    for slot, runner in runners.items():
        if runner.builds_for_sizes:
            for size in dict.fromkeys((max(calls), min(calls))):
                calls[size][slot]()


def _gpu_of(runner: Runner) -> int | None:
    """Return NVML's number of the GPU that a runner works on; None on the CPU."""
    from export.nvml import nvml_index
    from export.runners import stages_of

    return None if stages_of(runner) is None else nvml_index()


def _profile(
    pair: Pair,
    found: _Found,
    *,
    plan: Plan,
    threads: int,
    tell: Progress,
) -> tuple[list[LayerTimes], tuple[str, ...]]:
    """Find out where the time goes, as far as the runtime tells, or why it does not."""
    if not plan.config.layer_calls or not _is_profiled(pair, found.wiring):
        return [], ()
    profiles = []
    for size, batch in found.feeds.items():
        tell(f"layers, batch {size}", 0.0)
        try:
            profile = profile_layers(
                pair.reference,
                pair.pruned,
                images=next(iter(batch.values())),
                calls=plan.config.layer_calls,
                multiple=pair.pruned.channel_multiple,
                threads=threads,
            )
        except ModelError as error:
            return [], (f"The time of each layer is left out: {error}.",)
        profiles += [profile] if profile is not None else []
        tell(f"layers, batch {size}", 1.0)
    return profiles, ()


def _is_profiled(pair: Pair, wiring: Wiring) -> bool:
    """Tell whether the layers of both can be set side by side: classifiers in one runtime."""
    alone = len(wiring.inputs) == 1 and len(wiring.inputs[0].shape or ()) == 4
    plain = alone and wiring.inputs[0].dtype == "float32" and wiring.fixed in (None, 1)
    files = all(subject.onnx is not None and subject.onnx.is_file() for subject in pair)
    return plain and files and len({subject.runtime for subject in pair}) == 1
