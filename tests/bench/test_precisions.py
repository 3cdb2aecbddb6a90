"""A lower precision that is the slower one: measured beside the rest, and said in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from bench.measuring import precisions
from bench.measuring.discovery import higher_precisions, subjects
from bench.measuring.latency import Call, measure_latency
from bench.measuring.precisions import SHARE, measure_precisions
from bench.pages.page import render_page
from bench.pages.publish import render_markdown, render_table
from bench.reports.precisions import slower_precisions
from bench.reports.report import load_report, save_report
from bench.reports.schema import PrecisionRatio, Report
from bench.statistics.latency_ratios import RatioInterval
from compress.config import BenchConfig

ReportFactory = Callable[..., Report]
CONFIG = BenchConfig(
    batch_sizes=(1, 3), threads=1, block_ms=0.2, min_blocks=4, max_seconds=1.0, ratio_precision=1.0
)


def interval(low: float, ratio: float, high: float) -> RatioInterval:
    return RatioInterval(
        ratio=ratio, low=low, high=high, at_least=low, at_most=high, confidence=0.95, rounds=20
    )


def gain(network: str, *bounds: float, size: int = 1, higher: str = "fp32") -> PrecisionRatio:
    return PrecisionRatio(
        network=network,  # type: ignore[arg-type]
        precision="int8",
        higher=higher,  # type: ignore[arg-type]
        batch_size=size,
        ratio=interval(*bounds),
    )


# What is said


def said(report: Report) -> list[str]:
    return list(slower_precisions(report, ("dense", "pruned")))


def test_one_sentence_names_what_is_slower_and_only_that(sample_report: ReportFactory) -> None:
    report = sample_report().model_copy(
        update={
            "precision": "int8",
            "precisions": (
                gain("reference", 1.9, 2.0, 2.1),
                gain("reference", 0.98, 1.05, 1.1, size=8),  # could be either
                gain("pruned", 1.4, 1.5, 1.6),
                gain("pruned", 0.5, 0.6, 0.7, higher="fp16"),  # gains
            ),
        }
    )
    (sentence,) = said(report)
    assert sentence == (
        "int8 is slower here than fp32, though less precise: dense x 2.000 [1.900, 2.100] at batch "
        "1, pruned x 1.500 [1.400, 1.600] at batch 1; fp32 is the better choice there."
    )
    terminal = Console(width=200, file=io.StringIO(), record=True)
    terminal.print(render_table(report, []))
    for way in (str(report), terminal.export_text(), render_markdown(report, [])):
        assert " ".join(way.split()).count(sentence) == 1
    page = re.sub(r"<[^>]*>", "", render_page(report, [])).replace("\N{NO-BREAK SPACE}", " ")
    assert " ".join(page.split()).count(sentence) == 1
    assert re.search(r"int8 over fp32, batch 8 +x 1.050 +not measured", str(report))
    assert re.search(r"int8 over fp16, batch 1 +not measured +x 0.600", str(report))


def test_a_precision_that_pays_needs_no_sentence(sample_report: ReportFactory) -> None:
    assert said(sample_report()) == []
    gains = (gain("reference", 0.5, 0.6, 0.7), gain("pruned", 0.9, 1.02, 1.2))
    assert said(sample_report().model_copy(update={"precisions": gains})) == []


@pytest.mark.parametrize(
    ("pair", "ratio", "told"),
    [
        (("fp32", "int8"), 1.9, "int8 is slower here than fp32.*this network x 1[.][89]"),
        (("int8", "fp32"), 0.5, "int8 is slower here than fp32.*this network x (1[.]9|2[.]0)"),
        (("fp16", "int8"), 1.9, "int8 is slower here than fp16"),
        (("fp32", "int8"), 0.5, None),
        (("int8", "fp32"), 1.9, None),
        (("fp32", "fp32"), 1.9, None),
        (("fp32", None), 1.9, None),
    ],
)
@pytest.mark.parametrize("same", [True, False])
def test_two_files_of_one_network_in_two_precisions(
    sample_report: ReportFactory,
    pair: tuple[str | None, str | None],
    ratio: float,
    told: str | None,
    same: bool,
) -> None:
    report = sample_report(ratio=ratio, batch_sizes=(1,))
    networks = report.networks
    sides = {
        name: getattr(networks, name).model_copy(
            update={
                "precision": precision,
                "weights_sha256": ("a" if same or name == "pruned" else "b") * 64,
            }
        )
        for name, precision in zip(("reference", "pruned"), pair, strict=True)
    }
    found = said(report.model_copy(update={"networks": networks.model_copy(update=sides)}))
    assert len(found) == (told is not None and same)
    assert not found or re.match(told or "", found[0])


def test_reports_keep_what_was_measured_and_older_ones_lack_it(
    sample_report: ReportFactory, tmp_path: Path
) -> None:
    report = sample_report().model_copy(update={"precisions": (gain("pruned", 1.4, 1.5, 1.6),)})
    save_report(report, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report
    stored = sorted((Path(__file__).parents[1] / "fixtures").rglob("report*.json"))
    assert stored
    for path in stored:
        assert load_report(path).precisions == ()


# What is measured


def save_network(path: Path, name: str, precision: str, work: int) -> None:
    """Write a network that multiplies ``work`` times, and its sidecar."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat0"])]
    nodes += [
        helper.make_node("Gemm", [f"flat{n}", "weight"], [f"flat{n + 1}"]) for n in range(work)
    ]
    nodes.append(helper.make_node("Identity", [f"flat{work}"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 2, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(np.eye(6, dtype=np.float32), "weight")],
    )
    opsets = [helper.make_opsetid("", 17)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    onnx.checker.check_model(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    file = {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    sidecar = {
        "schema_version": 2,
        "onnx": {**file, "opset": 17, "ir_version": 8},
        "target": "cpu",
        "precision": precision,
        "architecture": "linear",
        "num_classes": 6,
        "classes": list("abcdef"),
        "input_size": [1, 2, 3],
        "mean": [0.5],
        "std": [0.25],
        "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "macs": 36,
        "params": 36,
        "parity": [],
        **dict.fromkeys(("groups", "pruning", "tools", "conversion")),
    }
    path.with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose int8 is slower than its fp32: it multiplies eighty times as often."""
    for name in ("dense", "pruned"):
        save_network(tmp_path / "export" / f"{name}.onnx", name, "fp32", 1)
        save_network(tmp_path / "export" / f"{name}.int8.onnx", name, "int8", 80)
    return tmp_path


def test_both_networks_are_measured_against_themselves_in_fp32(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[dict[str, str], float]] = []

    def measured(calls: dict[str, Call], *, config: BenchConfig, **rest: Any) -> Any:
        files = {slot: call.runner._path.name for slot, call in calls.items()}  # type: ignore[attr-defined]
        asked.append((files, config.max_seconds))
        return measure_latency(calls, config=config, **rest)

    monkeypatch.setattr(precisions, "measure_latency", measured)
    pair = subjects(run_dir, config=CONFIG, precision="int8")
    steps: list[str] = []
    gains, notes = measure_precisions(pair, CONFIG, progress=lambda step, share: steps.append(step))
    assert notes == ()
    assert [(one.network, one.precision, one.higher, one.batch_size) for one in gains] == [
        (network, "int8", "fp32", size) for network in ("reference", "pruned") for size in (1, 3)
    ]
    assert all(one.ratio.low > 1 for one in gains)
    assert steps[0] == "int8 against fp32, dense.int8.onnx, batch 3"  # engines are tuned for it
    assert [files for files, _ in asked] == [
        {"reference": f"{name}.onnx", "pruned": f"{name}.int8.onnx", "control": f"{name}.onnx"}
        for name in ("dense", "dense", "pruned", "pruned")
    ]
    assert {seconds for _, seconds in asked} == {SHARE * CONFIG.max_seconds}


def test_in_fp32_there_is_nothing_higher(run_dir: Path) -> None:
    pair = subjects(run_dir, config=CONFIG, precision="fp32")
    assert measure_precisions(pair, CONFIG) == ((), ())


def test_what_is_not_there_or_of_other_weights_is_not_measured_and_said(run_dir: Path) -> None:
    (run_dir / "export" / "dense.onnx").unlink()
    save_network(run_dir / "export" / "pruned.onnx", "another", "fp32", 1)
    pair = subjects(run_dir, config=CONFIG, precision="int8")
    assert [list(higher_precisions(subject)) for subject in pair] == [[], []]
    gains, (note,) = measure_precisions(pair, CONFIG)
    assert gains == ()
    assert note.startswith("Whether int8 is faster here than a higher precision was not measured")


def test_a_damaged_file_beside_it_costs_the_comparison_and_no_more(run_dir: Path) -> None:
    file = run_dir / "export" / "pruned.onnx"
    file.write_bytes(file.read_bytes()[:-3])
    pair = subjects(run_dir, config=CONFIG, precision="int8")
    gains, (note,) = measure_precisions(pair, CONFIG)
    assert {one.network for one in gains} == {"reference"}
    assert note.startswith("int8 was not measured against a higher precision: ")
