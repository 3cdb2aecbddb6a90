"""A report from made-up measurements, with every figure under the test's control."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from bench.measuring.answers import Predictions, compare_predictions
from bench.measuring.latency import SLOTS, LatencyResult, Warmup
from bench.measuring.records import Artefact, Environment, ParityRecord, ValidationSet
from bench.measuring.session import Measured
from bench.measuring.subject import About
from bench.reports.report import build_report
from bench.reports.schema import Report
from bench.statistics.latency_ratios import median_ratio_interval
from compress.config import BenchConfig

ReportFactory = Callable[..., Report]


def sample_report(
    *,
    images: int = 2000,
    worse: int = 24,
    better: int = 14,
    ratio: float = 0.65,
    control: float = 1.0,
    noise: float = 0.01,
    rounds: int = 20,
    calls: int = 40,
    batch_sizes: tuple[int, ...] = (1, 8),
    parity: tuple[float, ...] = (2e-7, 5e-7),
    config: dict[str, Any] | None = None,
) -> Report:
    """Both networks err on the last tenth of the images, but for the flips asked for."""
    settings = BenchConfig(**(config or {}))
    dense, pruned = _predictions(images, worse, better)
    latency = [
        _latency(size, settings, ratio, control, noise, rounds, calls) for size in batch_sizes
    ]
    about = About(
        architecture="resnet20",
        target="cpu",
        artefacts=(
            _artefact("a", 1_084_121, 40_813_184, 270_896, parity),
            _artefact("b", 512_004, 20_325_376, 121_034, parity),
        ),
        pruning={"criterion": "taylor-gate"},
    )
    measured = Measured(
        runtime="ONNX Runtime (CPU)",
        validation=ValidationSet(identity="0123456789abcdef" * 4, images=images, skipped=3),
        environment=_environment(),
        config=settings,
        latency=latency,
        predictions=(dense, pruned),
        accuracy=compare_predictions(dense, pruned, settings.confidence),
    )
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    return build_report(about, measured, created=created)


@pytest.fixture(name="sample_report", scope="session")
def _sample_report() -> ReportFactory:
    return sample_report


def _predictions(images: int, worse: int, better: int) -> tuple[Predictions, Predictions]:
    labels = np.zeros(images, dtype=np.int64)
    right = images - images // 10
    dense, pruned = np.arange(images) >= right, np.arange(images) >= right
    pruned[:worse] = True
    pruned[right : right + better] = False
    return tuple(  # type: ignore[return-value]
        Predictions(
            top1=wrong.astype(np.int64),
            correct=~wrong,
            top5_correct=np.ones(images, dtype=bool),
            labels=labels,
            skipped=3,
        )
        for wrong in (dense, pruned)
    )


def _artefact(
    letter: str, size: int, macs: int, params: int, parity: tuple[float, ...]
) -> Artefact:
    return Artefact(
        onnx_sha256=letter * 64,
        weights_sha256=letter.upper() * 64,
        bytes=size,
        macs=macs,
        params=params,
        parity=tuple(
            ParityRecord(batch_size=n, relative_error=e, cosine=1.0, top1_agreement=1.0)
            for n, e in enumerate(parity, start=1)
        ),
    )


def _latency(
    size: int,
    config: BenchConfig,
    ratio: float,
    control: float,
    noise: float,
    rounds: int,
    calls: int,
) -> LatencyResult:
    rng = np.random.default_rng(size)
    scale = {"reference": 1.0, "pruned": ratio, "control": control}
    samples = {
        slot: 0.8 * size * scale[slot] * np.exp(rng.normal(0, noise, (rounds, calls)))
        for slot in SLOTS
    }
    blocks = {slot: np.median(samples[slot], axis=1) for slot in SLOTS}

    def interval(slot: str) -> Any:
        return median_ratio_interval(
            blocks["reference"], blocks[slot], confidence=config.confidence
        )

    return LatencyResult(
        batch_size=size,
        samples_ms={slot: tuple(samples[slot].ravel().tolist()) for slot in SLOTS},
        stages_ms={slot: {} for slot in SLOTS},
        blocks_ms={slot: tuple(blocks[slot].tolist()) for slot in SLOTS},
        iterations=dict.fromkeys(SLOTS, calls),
        warmup=dict.fromkeys(
            ("reference", "pruned"), Warmup(calls=99, seconds=0.2, stationary=True)
        ),
        ratio=interval("pruned"),
        control=interval("control"),
        seconds=4.2,
        converged=True,
    )


def _environment() -> Environment:
    return Environment(
        cpu="Example CPU 3000",
        physical_cores=8,
        logical_cores=16,
        affinity=(0, 1),
        cpu_quota=None,
        threads=2,
        load_average=0.12,
        governor="performance",
        platform="Linux 6.1.0 x86_64",
        python="3.11.9",
        packages={"torch": "2.6.0", "numpy": "2.0.0"},
        gpu=None,
    )
