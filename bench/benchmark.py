"""The whole comparison of a run directory: both exports, the same images, one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.accuracy import LabelledImages, Predictions, compare, measure_accuracy
from bench.environment import default_threads, fingerprint
from bench.latency import Images, LatencyResult, measure_latency
from bench.report import build_report
from bench.schema import Artefact, ParityRecord, Report
from compress.config import BenchConfig
from compress.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from export.runners import Runner

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it that is done, 0 to 1."""

_SAME = ("architecture", "target", "num_classes", "input_size", "mean", "std")


def benchmark(
    run_dir: Path,
    *,
    config: BenchConfig,
    batches_factory: Callable[[], Iterable[LabelledImages]],
    identity: str,
    pruning: dict[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    open_runner: Callable[[Path, int], Runner] | None = None,
) -> Report:
    """Measure ``export/pruned.onnx`` against ``export/dense.onnx`` of a run directory.

    Args:
        run_dir: Run directory; both exports lie there with their sidecars.
        config: How to measure.
        batches_factory: Returns the validation batches anew; read once per network.
        identity: Digest of the validation set.
        pruning: What the pruning stage says of itself; passed through.
        progress: Told about every step.
        seed: Of the order within rounds and of the bootstrap.
        open_runner: Loads an ONNX file for so many threads; default ONNX Runtime on the CPU.

    Raises:
        CheckpointError: an export is missing or damaged, or the two do not belong together.
        DataError: no image can be read, or the images are not those of the networks.
    """
    paths = {name: run_dir / "export" / f"{name}.onnx" for name in ("dense", "pruned")}
    sidecars = {name: _read_sidecar(path) for name, path in paths.items()}
    _check_pair(sidecars["dense"], sidecars["pruned"])
    threads = config.threads or default_threads()
    # Before anything runs: the load average must not show our own work.
    environment = fingerprint(threads=threads)
    tell = progress or (lambda step, share: None)
    with ExitStack() as stack:
        opener = open_runner or _onnx_runner
        runners = {name: stack.enter_context(opener(path, threads)) for name, path in paths.items()}
        predictions = _predict(runners, batches_factory, tell)
        accuracy = compare(*predictions, config.confidence)
        latency = _time(runners, batches_factory, config=config, seed=seed, tell=tell)
        runtime = runners["pruned"].name
    return build_report(
        architecture=sidecars["pruned"]["architecture"],
        target=sidecars["pruned"]["target"],
        runtime=runtime,
        identity=identity,
        artefacts=(_artefact(sidecars["dense"]), _artefact(sidecars["pruned"])),
        predictions=predictions,
        accuracy=accuracy,
        latency=latency,
        environment=environment,
        config=config,
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


def _predict(
    runners: dict[str, Runner],
    batches_factory: Callable[[], Iterable[LabelledImages]],
    tell: Progress,
) -> tuple[Predictions, Predictions]:
    found = []
    for name in ("dense", "pruned"):
        tell(f"accuracy, {name}", 0.0)
        found.append(measure_accuracy(runners[name], batches_factory()))
        tell(f"accuracy, {name}", 1.0)
    return found[0], found[1]


def _time(
    runners: dict[str, Runner],
    batches_factory: Callable[[], Iterable[LabelledImages]],
    *,
    config: BenchConfig,
    seed: int,
    tell: Progress,
) -> Sequence[LatencyResult]:
    images = timing_batch(batches_factory(), max(config.batch_sizes))
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
            progress=partial(tell, f"latency, batch {size}"),
        )
        for size in config.batch_sizes
    ]


def _read_sidecar(path: Path) -> dict[str, Any]:
    from export.exporter import read_sidecar

    return read_sidecar(path)


def _onnx_runner(path: Path, threads: int) -> Runner:
    from export.runners import OnnxRunner

    return OnnxRunner(path, threads=threads)


def _check_pair(dense: dict[str, Any], pruned: dict[str, Any]) -> None:
    for key in _SAME:
        if dense[key] != pruned[key]:
            raise CheckpointError(
                f"dense.onnx and pruned.onnx differ in {key} ({dense[key]} and {pruned[key]}), "
                "so one is not the parent of the other; export both again"
            )


def _artefact(sidecar: dict[str, Any]) -> Artefact:
    return Artefact(
        onnx_sha256=sidecar["onnx"]["sha256"],
        weights_sha256=sidecar["weights_sha256"],
        bytes=sidecar["onnx"]["bytes"],
        macs=sidecar["macs"],
        params=sidecar["params"],
        parity=tuple(
            ParityRecord(**{name: found[name] for name in ParityRecord.model_fields})
            for found in sidecar["parity"]
        ),
    )
