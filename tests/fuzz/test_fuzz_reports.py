"""Reports and baselines: whatever they say, a sentence or a report that can be judged and shown."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from mutations import CASES, damaged, fuzzed, mutated, refused_in_a_sentence
from rich.console import Console
from whole_report import DOCUMENT, written

from bench.judging.baseline import change_against
from bench.judging.quality_gate import judge
from bench.pages.page import render_page
from bench.pages.publish import render_junit, render_markdown, render_table
from bench.reports.report import MOST_BYTES, load_report, save_report
from compress.errors import CheckpointError
from compress.files.documents import MOST_MISTAKES


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports") / "report.json"


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
@example(document=DOCUMENT)  # most of the others are refused before there is a page
def test_a_page_of_any_report(path: Path, document: Any) -> None:
    def page() -> str:
        report = load_report(written(path, document))
        return render_page(report, [], {"it": report})

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


FORGED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "no MACs": (("networks", "reference", "macs"), 0),
    "huge MACs": (("networks", "pruned", "macs"), 10**400),
    "a huge batch": (("networks", "pruned", "latency", 0, "batch_size"), 10**400),
    "huge groups": (("groups", 0, "dense"), 10**400),
    "huge cores": (("environment", "physical_cores"), 10**5000),
    "endless latency": (("comparison", "latency", 0, "ratio", "ratio"), 1e308),
    "endless call": (("networks", "pruned", "latency", 0, "summary", "median_ms"), 1e308),
    "endless layer": (("layers", 0, "layers", 0, "pruned", "milliseconds"), 1e308),
    "endless rate": (("networks", "pruned", "latency", 0, "images_per_second"), 1e308),
    "year 1": (("created",), "0001-01-01T00:00:00Z"),
    "year 9999": (("created",), "9999-12-31T23:59:59-12:00"),
    "year 1 of the baseline": (("change", "created"), "0001-01-01T00:00:00+14:00"),
    "text for MACs": (("networks", "reference", "macs"), "40800000"),
    "text for a ratio": (("comparison", "latency", 0, "ratio", "ratio"), "0.5"),
    "text for truth": (("comparison", "latency", 0, "converged"), "yes"),
    "a better ratio of MACs": (("comparison", "macs_ratio"), 0.1),
    "a better ratio of parameters": (("comparison", "params_ratio"), 0.1),
    "a better ratio of bytes": (("comparison", "bytes_ratio"), 0.1),
    "a better interval": (("comparison", "latency", 0, "ratio", "at_most"), 0.5),
    "a calmer control": (("comparison", "latency", 0, "control", "ratio"), 1.0),
    "more rounds": (("comparison", "latency", 0, "ratio", "rounds"), 60),
    "a faster median": (("networks", "pruned", "latency", 0, "summary", "median_ms"), 0.01),
    "a faster tail": (("networks", "pruned", "latency", 0, "summary", "p99_ms"), 0.01),
    "faster rounds": (("networks", "pruned", "latency", 0, "block_medians_ms", 0), 0.01),
    "more images a second": (("networks", "pruned", "latency", 0, "images_per_second"), 1e6),
    "no confidence": (("comparison", "latency", 0, "control", "confidence"), 1e-9),
    "a better speed-up": (("comparison", "latency", 0, "speed_up"), 9.0),
    "a better accuracy": (("networks", "pruned", "top1"), 1.0),
    "a narrower drop": (("comparison", "accuracy", "drop", "at_most_pp"), 3.0),
    "fewer flips": (("comparison", "accuracy", "top5_drop", "flips_to_wrong"), 1),
    "negative parity": (("networks", "pruned", "parity", 0, "relative_error"), -1.0),
    "impossible cosine": (("networks", "pruned", "parity", 0, "cosine"), 2.0),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_figures_are_refused(kind: str, path: Path) -> None:
    place, value = FORGED[kind]
    document = json.loads(json.dumps(DOCUMENT))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)  # a forger has no limit
    try:
        written(path, document)
    finally:
        sys.set_int_max_str_digits(limit)
    assert refused_in_a_sentence(lambda: use(path))
