"""A report that has something in every field, and how a forger would write one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from bench.judging.baseline import change_against
from bench.limits import Limits
from bench.measuring.records import CpuConditions, GpuConditions
from bench.reports.report import sealed

LIMITS = Limits.model_validate(
    {
        "accuracy": {"max_drop_pp": 20, "max_top5_drop_pp": 20, "max_regression_pp": 20},
        "latency": {"max_ratio": 0.9, "max_regression": 1.03, "median_ms": 3, "p99_ms": 9},
        "macs": {"max_ratio": 0.6},
        "params": {"max_ratio": 0.6},
        "size": {"max_ratio": 0.6},
        "parity": {"max_relative_error": 1e-4},
    }
)


def _whole_report() -> dict[str, Any]:
    """Return a report that has something in every field, as JSON holds it."""
    place = Path(__file__).parent / "bench" / "conftest.py"
    spec = importlib.util.spec_from_file_location("made_up_reports", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = module.sample_report(
        images=40, worse=2, better=1, rounds=6, calls=8, batch_sizes=(1,), parity=(2e-7,)
    )
    report = report.model_copy(update={"limits": LIMITS, "change": change_against(report, report)})
    document = json.loads(json.dumps(sealed(report)))
    figures = {"macs": 100, "milliseconds": 0.5, "channels": 16}
    row = {"name": "conv1", "kind": "Conv", "reference": figures, "pruned": figures}
    document["layers"] = [
        {
            "batch_size": 1,
            "calls": 20,
            "multiple": 8,
            "reference_ms": 0.6,
            "pruned_ms": 0.5,
            "layers": [{**row, "misses_multiple": False}],
        }
    ]
    document["groups"] = [{"name": "conv1", "dense": 16, "kept": 9, "residual": True}]
    cpu = dict.fromkeys(CpuConditions.model_fields, 0)
    gpu = dict.fromkeys(GpuConditions.model_fields, 1) | {"throttle_reasons": []}
    document["comparison"]["latency"][0]["conditions"] = {"seconds": 1.0, "cpu": cpu, "gpu": gpu}
    return document


DOCUMENT = _whole_report()


def written(path: Path, document: Any) -> Path:
    """Write a document with the digest that belongs to it, as a forger would."""
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key != "sha256"}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))
    return path
