"""The whole comparison: two networks, the same inputs, one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench.budgets import Budgets, require_judgeable
from bench.inputs.sources import Batch, Inputs
from bench.inputs.wiring import Wiring, wired
from bench.judging.change import change_against, require_same_model
from bench.measuring.answers import Answers, ask_both
from bench.measuring.conditions import Watch
from bench.measuring.environment import default_threads, fingerprint
from bench.measuring.latency import Call, LatencyResult, measure_latency
from bench.measuring.layers import profile_layers
from bench.reports.report import build_report
from bench.reports.schema import Against, Artefact, Report, ValidationSet
from bench.subject import Pair, Subject
from compress.config import BenchConfig
from compress.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

    from bench.inputs.wiring import Specs
    from bench.measuring.layer_records import LayerTimes
    from compress.progress import Progress
    from export.runners import Runner

Source = Callable[[Wiring], Inputs]
"""Returns what both networks are fed, once it is known what they read."""

ANSWERED_AT_ONCE = 64
"""Inputs in a batch that is answered and not timed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How two networks are compared, and by what they are judged."""

    config: BenchConfig
    against: Against
    batch_sizes: Sequence[int] | None = None
    """That were asked for; None leaves the choice to the files, then to the configuration."""
    at_once: int = ANSWERED_AT_ONCE
    """Inputs in a batch that is answered and not timed."""
    output: str | None = None
    """From which classes are read; default the first of shape (N, classes)."""
    budgets: Budgets | None = None
    """What the report will be judged by; those that nothing could meet are refused at once."""
    stored: Report | None = None
    """What the report is compared with besides."""
    seed: int = 0
    """Of the order within rounds."""
    notes: tuple[str, ...] = ()
    """For the report, one sentence each."""
    given: Specs | None = None
    """What is fed, where neither network says what it reads."""


def measure(pair: Pair, source: Source, plan: Plan, *, progress: Progress | None = None) -> Report:
    """Measure a pruned network against its reference, and put the budgets in, unjudged.

    Args:
        pair: both networks.
        source: what they are fed.
        plan: how.
        progress: told about every step.

    Raises:
        CheckpointError: a file is damaged, or the stored report is of another model.
        ConfigError: batch sizes that the files do not take, or budgets that nothing could meet.
        DataError: nothing can be read, or the two do not read or return the same.
        EnvironmentUnfitError: a runtime cannot work here.
        ModelError: a network cannot be computed, or answers with NaN.
    """
    tell = progress or (lambda step, share: None)
    _refuse_stored(pair, plan)
    threads = plan.config.threads or default_threads()
    # Before anything runs: the load average must not show our own work.
    environment = fingerprint(threads=threads)
    with ExitStack() as stack:
        runners = {
            slot: stack.enter_context(subject.open(threads))
            for slot, subject in (*pair._asdict().items(), ("control", pair.reference))
        }
        wiring = wired(
            runners["reference"].inputs or plan.given, runners["pruned"].inputs, pair.names
        )
        sizes = wiring.batch_sizes(plan.batch_sizes, plan.config.batch_sizes, pair.names)
        inputs = source(wiring)
        _refuse_budgets(plan, inputs)
        answers = _ask(runners, wiring, inputs, pair=pair, plan=plan, tell=tell)
        feeds = {size: inputs.first(size, wiring) for size in sizes}
        latency = _time(runners, wiring, feeds, plan=plan, tell=tell)
        names = runners["reference"].name, runners["pruned"].name
    # Afterwards: a profiler disturbs whatever else is timed.
    layers, unprofiled = _profile(pair, wiring, feeds, plan=plan, threads=threads, tell=tell)
    facts = pair.pruned.facts
    report = build_report(
        architecture=facts.get("architecture"),
        target=facts.get("target"),
        precision=facts.get("precision"),
        against=plan.against,
        runtime=" against ".join(dict.fromkeys(reversed(names))),
        validation=ValidationSet(
            kind=inputs.kind,
            identity=inputs.identity(),
            images=answers.agreement.inputs,
            skipped=answers.skipped,
        ),
        artefacts=(_artefact(pair.reference, names[0]), _artefact(pair.pruned, names[1])),
        predictions=answers.predictions,
        accuracy=answers.accuracy,
        agreement=answers.agreement,
        latency=latency,
        environment=environment,
        config=plan.config.model_copy(
            update={"runtime": pair.pruned.runtime, "batch_sizes": tuple(sizes)}
        ),
        notes=(*plan.notes, *inputs.notes, *unprofiled),
        layers=layers,
        groups=pair.pruned.groups,
        pruning=facts.get("pruning"),
    )
    change = change_against(report, plan.stored) if plan.stored else None
    return report.model_copy(update={"budgets": plan.budgets, "change": change})


def _artefact(subject: Subject, runtime: str) -> Artefact:
    return subject.artefact.model_copy(update={"runtime": runtime})


def _refuse_stored(pair: Pair, plan: Plan) -> None:
    """Refuse a stored report of another model before any time is spent on measuring."""
    if plan.stored is None:
        return
    facts = pair.pruned.facts
    require_same_model(
        plan.stored,
        architecture=facts.get("architecture"),
        reference=pair.reference.digest,
        config=pair.pruned.config,
        precision=facts.get("precision"),
        target=facts.get("target"),
        against=plan.against,
    )


def _refuse_budgets(plan: Plan, inputs: Inputs) -> None:
    """Refuse budgets that so many inputs cannot decide before any time is spent on measuring."""
    if plan.budgets is not None:
        count = inputs.count or 0
        require_judgeable(
            plan.budgets,
            images=count if inputs.kind == "labelled" else 0,
            inputs=count,
            confidence=plan.config.confidence,
            baseline=plan.stored is not None,
        )


def _ask(
    runners: dict[str, Runner],
    wiring: Wiring,
    inputs: Inputs,
    *,
    pair: Pair,
    plan: Plan,
    tell: Progress,
) -> Answers:
    """Let both networks answer to all inputs, in batches that both take."""
    reference, pruned = runners["reference"], runners["pruned"]
    most = [each for each in (wiring.fixed, reference.most, pruned.most) if each]
    size = min(most, default=plan.at_once)
    # Batches of an engine lie between bounds, and full ones do; elsewhere only a fixed one must be.
    size = size if wiring.fixed else min(size, plan.at_once)
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
        reference,
        pruned,
        wiring,
        told(),
        size=size if most else None,
        names=pair.names,
        confidence=plan.config.confidence,
        output=plan.output,
    )


def _time(
    runners: dict[str, Runner],
    wiring: Wiring,
    feeds: dict[int, dict[str, np.ndarray]],
    *,
    plan: Plan,
    tell: Progress,
) -> list[LatencyResult]:
    config, gpu = plan.config, _gpu_of(runners["pruned"])
    found = []
    for size, batch in feeds.items():
        fed = {"reference": wiring.for_reference, "pruned": wiring.for_pruned}
        calls = {
            slot: Call(runner, fed.get(slot, wiring.for_reference)(batch))
            for slot, runner in runners.items()
        }
        result = measure_latency(
            calls,
            batch_size=size,
            block_ms=config.block_ms,
            min_blocks=config.min_blocks,
            max_seconds=config.max_seconds,
            ratio_precision=config.ratio_precision,
            confidence=config.confidence,
            seed=plan.seed,
            watch=Watch(gpu),
            progress=partial(tell, f"latency, batch {size}"),
        )
        found.append(result)
    return found


def _gpu_of(runner: Runner) -> int | None:
    """Return NVML's number of the GPU that a runner works on; None on the CPU."""
    from export.nvml import nvml_index
    from export.runners import stages_of

    return None if stages_of(runner) is None else nvml_index()


def _profile(
    pair: Pair,
    wiring: Wiring,
    feeds: dict[int, dict[str, np.ndarray]],
    *,
    plan: Plan,
    threads: int,
    tell: Progress,
) -> tuple[list[LayerTimes], tuple[str, ...]]:
    """Find out where the time goes, as far as the runtime tells, or why it does not."""
    if not plan.config.layer_calls or not _is_profiled(pair, wiring):
        return [], ()
    profiles = []
    for size, batch in feeds.items():
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
