"""The whole comparison: a pruned network and its reference, the same images, one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measuring.accuracy import LabelledImages, Predictions, compare, measure_accuracy
from bench.measuring.conditions import Watch
from bench.measuring.environment import default_threads, fingerprint
from bench.measuring.latency import Images, LatencyResult, measure_latency
from bench.measuring.layer_records import LayerTimes
from bench.measuring.layers import profile_layers
from bench.reports.report import build_report
from bench.reports.schema import GroupRecord, Report
from bench.subject import Subject, subjects
from compress.config import BenchConfig, ModelConfig, Precision
from compress.errors import DataError

if TYPE_CHECKING:
    from compress.progress import Progress
    from export.runners import Runner


def benchmark(
    run_dir: Path,
    *,
    config: BenchConfig,
    batches_factory: Callable[[], Iterable[LabelledImages]],
    identity: str,
    precision: Precision = "fp32",
    against: Path | None = None,
    typed: ModelConfig | None = None,
    groups: Sequence[GroupRecord] = (),
    pruning: dict[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    open_runner: Callable[[Subject, int], Runner] = Subject.open,
) -> Report:
    """Measure the pruned network of a run directory against its reference, in one runtime.

    Args:
        run_dir: Run directory; both exports lie there with their sidecars.
        config: How to measure.
        batches_factory: Returns the validation batches anew; read once per network.
        identity: Digest of the validation set.
        precision: Of the exports that are measured.
        against: Another run directory, whose pruned network is the reference; default the dense
            network of this run.
        typed: The network that the user asked for, where it is not built in.
        groups: Channel groups of the pruned network; passed through.
        pruning: What the pruning stage says of itself; passed through.
        progress: Told about every step.
        seed: Of the order within rounds.
        open_runner: Loads a network for so many threads, in the runtime of the configuration.

    Raises:
        CheckpointError: an export is missing or damaged, or the two do not belong together.
        EnvironmentUnfitError: the runtime cannot work here.
        DataError: no image can be read, or the images are not those of the networks.
    """
    found = subjects(run_dir, config=config, precision=precision, against=against, typed=typed)
    threads = config.threads or default_threads()
    # Before anything runs: the load average must not show our own work.
    environment = fingerprint(threads=threads)
    tell = progress or (lambda step, share: None)
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(subject, threads))
            for name, subject in {**found, "control": found["reference"]}.items()
        }
        predictions = _predict(runners, batches_factory, tell)
        accuracy = compare(*predictions, config.confidence)
        images = timing_batch(batches_factory(), max(config.batch_sizes))
        latency = _time(runners, images, config=config, seed=seed, tell=tell)
        runtime = runners["pruned"].name
    # Afterwards: a profiler disturbs whatever else is timed.
    layers = _profile(found, images, config=config, threads=threads, tell=tell)
    return build_report(
        architecture=found["pruned"].facts["architecture"],
        target=found["pruned"].facts["target"],
        precision=precision,
        against="dense" if against is None else "run",
        runtime=runtime,
        identity=identity,
        artefacts=(found["reference"].artefact, found["pruned"].artefact),
        predictions=predictions,
        accuracy=accuracy,
        latency=latency,
        environment=environment,
        config=config,
        layers=layers,
        groups=groups,
        pruning=pruning,
    )


def timing_batch(batches: Iterable[LabelledImages], size: int) -> Images:
    """Return one batch (size, C, H, W) of real images, repeated if there are fewer.

    Raises:
        DataError: there is no image at all.
    """
    found: list[Images] = []
    for batch in batches:
        found.append(np.asarray(batch.images, dtype=np.float32))
        if sum(map(len, found)) >= size:
            break
    images = np.concatenate(found) if found else np.empty((0, 1, 1, 1), dtype=np.float32)
    if not len(images):
        raise DataError("latency is measured on validation images, and none could be read")
    return np.ascontiguousarray(images[np.arange(size) % len(images)])


def _profile(
    found: dict[str, Subject],
    images: Images,
    *,
    config: BenchConfig,
    threads: int,
    tell: Progress,
) -> tuple[LayerTimes, ...]:
    """Find out where the time goes, as far as the runtime tells."""
    reference, pruned = found["reference"], found["pruned"]
    if not config.layer_calls or not (reference.onnx.is_file() and pruned.onnx.is_file()):
        return ()
    profiles = []
    for size in config.batch_sizes:
        tell(f"layers, batch {size}", 0.0)
        profile = profile_layers(
            reference,
            pruned,
            onnx_paths=(reference.onnx, pruned.onnx),
            images=images[:size],
            calls=config.layer_calls,
            multiple=pruned.channel_multiple,
            threads=threads,
        )
        profiles += [profile] if profile is not None else []
        tell(f"layers, batch {size}", 1.0)
    return tuple(profiles)


def _gpu_of(runner: Runner) -> int | None:
    """Return NVML's number of the GPU that a runner works on; None on the CPU."""
    from export.nvml import nvml_index
    from export.runners import stages_of

    return None if stages_of(runner) is None else nvml_index()


def _predict(
    runners: dict[str, Runner],
    batches_factory: Callable[[], Iterable[LabelledImages]],
    tell: Progress,
) -> tuple[Predictions, Predictions]:
    found = []
    for name in ("reference", "pruned"):
        tell(f"accuracy, {name}", 0.0)
        found.append(measure_accuracy(runners[name], batches_factory()))
        tell(f"accuracy, {name}", 1.0)
    return found[0], found[1]


def _time(
    runners: dict[str, Runner],
    images: Images,
    *,
    config: BenchConfig,
    seed: int,
    tell: Progress,
) -> Sequence[LatencyResult]:
    gpu = _gpu_of(runners["pruned"])
    return [
        measure_latency(
            runners,
            images[:size],
            block_ms=config.block_ms,
            min_blocks=config.min_blocks,
            max_seconds=config.max_seconds,
            ratio_precision=config.ratio_precision,
            confidence=config.confidence,
            seed=seed,
            watch=Watch(gpu),
            progress=partial(tell, f"latency, batch {size}"),
        )
        for size in config.batch_sizes
    ]
