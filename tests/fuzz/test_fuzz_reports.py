"""Reports and baselines: whatever they say, a sentence or a report that can be judged and shown."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from mutations import CASES, damaged, fuzzed, mutated, refused_in_a_sentence
from rich.console import Console

from bench.judging.baseline import change_against
from bench.judging.quality_gate import judge
from bench.limits import Limits
from bench.measuring.records import CpuConditions, GpuConditions
from bench.pages.page import render_page
from bench.pages.publish import render_junit, render_markdown, render_table
from bench.reports.report import MOST_BYTES, load_report, save_report, sealed
from compress.errors import CheckpointError
from compress.files.documents import MOST_MISTAKES

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
    place = Path(__file__).parents[1] / "bench" / "conftest.py"
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


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports") / "report.json"


def written(path: Path, document: Any) -> Path:
    """Write a document with the digest that belongs to it, as a forger would."""
    if isinstance(document, dict):
        document = {key: value for key, value in document.items() if key != "sha256"}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))
    return path


def use(path: Path) -> None:
    """Do with a report what the commands do: judge it, show it, compare it, keep it."""
    report = load_report(path)
    verdicts = judge(report, report.limits) if report.limits else []
    Console(file=io.StringIO()).print(render_table(report, verdicts))
    render_markdown(report, verdicts).encode()
    render_junit(report, verdicts).encode()
    change_against(report, report)
    save_report(report, path)


@fuzzed
@given(document=mutated(DOCUMENT))
def test_a_report_of_any_structure(path: Path, document: Any) -> None:
    refused_in_a_sentence(lambda: use(written(path, document)))


@fuzzed
@given(data=damaged(json.dumps(DOCUMENT).encode(), head=2000))
def test_a_report_of_any_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused_in_a_sentence(lambda: load_report(path))


@settings(fuzzed, max_examples=max(CASES // 20, 5))  # it draws figures
@given(document=mutated(DOCUMENT))
def test_a_page_of_any_report(path: Path, document: Any) -> None:
    def page() -> str:
        report = load_report(written(path, document))
        return render_page(report, [], [report])

    refused_in_a_sentence(page)


def test_the_report_that_is_mutated_is_good(path: Path) -> None:
    use(written(path, DOCUMENT))
    assert load_report(path).change is not None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("NaN", "JSON does not hold it"),
        ("1e999", "JSON does not hold it"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": 1, "a": 1}', "is there twice"),
        ("9" * 5000, "is not JSON"),
        ('"' + "x" * MOST_BYTES + '"', "none is larger"),
        ('"edited"', "was changed after it was written"),
    ],
    ids=lambda text: text[:12],
)
def test_a_bomb_in_a_report(path: Path, value: str, says: str) -> None:
    written(path, DOCUMENT)
    path.write_text(path.read_text().replace('"taylor-gate"', value))
    assert refused_in_a_sentence(lambda: load_report(path))
    with pytest.raises(CheckpointError, match=says):
        load_report(path)


def test_thousands_of_mistakes_are_counted_and_not_described(path: Path) -> None:
    rows = [{"name": "a", "dense": 0, "kept": -1}] * MOST_MISTAKES
    with pytest.raises(CheckpointError, match=f"it has {2 * MOST_MISTAKES} mistakes"):
        load_report(written(path, {**DOCUMENT, "groups": rows}))
