"""Predictions beside measurements: shown as such, judged by their own limit and by no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import lived_in
from pydantic import ValidationError

from bench.judging.quality_gate import judge
from bench.judging.verdicts import exit_code
from bench.limits import Limits
from bench.measuring.prediction import predict
from bench.measuring.records import PredictedLatency, Prediction
from bench.pages.page import render_page
from bench.pages.publish import render_markdown
from bench.reports.report import load_report, save_report
from bench.reports.schema import Report
from bench.reports.summary import comparison_sheet
from compress.checkpoints.checkpoint import save_checkpoint
from compress.checkpoints.description import Description
from compress.latency.fitted import shipped_table
from compress.latency.times import network_milliseconds
from compress.networks.analysis import analyse
from compress.networks.models import build_model

ReportFactory = Callable[..., Report]
PREDICTED = "latency.predicted_max_ratio"


def prediction(ratio: float = 0.8, batch_sizes: tuple[int, ...] = (1, 8)) -> Prediction:
    found = tuple(
        PredictedLatency(batch_size=size, reference_ms=2.0, pruned_ms=2.0 * ratio, ratio=ratio)
        for size in batch_sizes
    )
    return Prediction(
        device="NVIDIA V100",
        runtime="TensorRT",
        precision="fp16",
        source="others",
        layer_error_median=0.05,
        layer_error_p90=0.2,
        network_error=0.1,
        latency=found,
    )


@pytest.fixture(scope="module")
def measured(sample_report: ReportFactory) -> Report:
    return sample_report(ratio=0.65)


@pytest.fixture(scope="module")
def report(measured: Report) -> Report:
    return measured.model_copy(update={"prediction": prediction()})


def verdicts(report: Report, **latency: Any) -> dict[tuple[str, int | None], str]:
    limits = Limits.model_validate({"latency": latency})
    return {(v.name, v.batch_size): v.status for v in judge(report, limits)}


def test_it_is_called_a_prediction_wherever_it_stands(report: Report, measured: Report) -> None:
    sheet = comparison_sheet(report)
    rows = [row for row in sheet.rows if "predicted" in row[0]]
    assert rows[0] == (
        *("predicted on NVIDIA V100, batch 1", "2.000 ms", "1.600 ms", "x 0.800 (predicted)"),
    )
    assert len(rows) == 2
    assert "not measured" in sheet.notes[-1]
    assert "5.00 % in the median" in sheet.notes[-1]
    found = judge(report, {"latency": {"predicted_max_ratio": 0.9}})
    for text in (render_markdown(report, found), render_page(report, found), str(report)):
        assert "predicted on NVIDIA V100, batch 8" in text.replace("\N{NO-BREAK SPACE}", " ")
        assert "was not measured" in text
    assert "0.800 (predicted)" in render_markdown(report, found)
    assert "predicted" not in str(measured)


def test_only_its_own_limit_judges_it(report: Report) -> None:
    assert verdicts(report, predicted_max_ratio=0.8) == {
        (PREDICTED, 1): "PASS",
        (PREDICTED, 8): "PASS",
    }
    # Measured 0.65, predicted 0.8: each limit sees its own figure.
    assert verdicts(report, predicted_max_ratio=0.7, max_ratio=0.7, batch_sizes=(1,)) == {
        ("latency.max_ratio", 1): "PASS",
        (PREDICTED, 1): "FAIL",
    }
    slower = report.model_copy(update={"prediction": prediction(ratio=0.5)})
    assert verdicts(slower, predicted_max_ratio=0.6, max_ratio=0.6, batch_sizes=(1,)) == {
        ("latency.max_ratio", 1): "FAIL",
        (PREDICTED, 1): "PASS",
    }


def test_without_a_prediction_it_cannot_be_judged(report: Report, measured: Report) -> None:
    limits = {"latency": {"predicted_max_ratio": 0.9}}
    (found,) = judge(measured, limits)
    assert (found.status, exit_code([found])) == ("SKIPPED", 5)
    assert "latency table" in found.sentence
    limits["latency"]["allow_skipped"] = True
    assert exit_code(judge(measured, limits)) == 0
    assert verdicts(report, predicted_max_ratio=0.9, batch_sizes=(32,)) == {
        (PREDICTED, 32): "SKIPPED"
    }


def test_its_verdict_says_so(report: Report) -> None:
    found = judge(report, {"latency": {"predicted_max_ratio": 0.7}})[0]
    assert found.sentence == (
        "the latency ratio predicted on the target at batch size 1 is 0.800; the limit is 0.700: "
        "a prediction for NVIDIA V100, not measured"
    )


def test_it_is_kept_in_the_report(report: Report, tmp_path: Path) -> None:
    save_report(report, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report


def test_figures_that_disagree_are_refused() -> None:
    with pytest.raises(ValidationError, match="is not that of its latencies"):
        PredictedLatency(batch_size=1, reference_ms=2.0, pruned_ms=1.0, ratio=0.6)
    with pytest.raises(ValidationError, match="predicted twice"):
        prediction(batch_sizes=(1, 1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two networks as those of a run lie there; the second has fewer blocks."""
    folder = tmp_path_factory.mktemp("run")
    for name, architecture in (("dense", "resnet32"), ("pruned", "resnet20")):
        model = lived_in(build_model(architecture, num_classes=10))
        save_checkpoint(folder / f"{name}.safetensors", model, description=described(architecture))
    return folder / "dense.safetensors", folder / "pruned.safetensors"


def described(architecture: str) -> Description:
    return Description(
        architecture=architecture,
        input_size=(3, 32, 32),
        classes=tuple("abcdefghij"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


@pytest.mark.slow
def test_both_networks_are_predicted_from_their_own_graphs(files: tuple[Path, Path]) -> None:
    found, notes = predict("v100", precision="fp16", files=files, batch_sizes=(1, 8, 256))
    assert found is not None
    assert [one.batch_size for one in found.latency] == [1, 8]
    assert notes == (
        "No latency at batch size 256 is predicted: the NVIDIA V100 table does not cover batch "
        "256: it covers 1 to 128.",
    )
    for one in found.latency:
        times = shipped_table("v100").times("fp16", one.batch_size)
        by_hand = []
        for architecture in ("resnet32", "resnet20"):
            graph = analyse(build_model(architecture, num_classes=10), (3, 32, 32))
            by_hand.append(network_milliseconds(graph, times, graph.everything()))
        assert [one.reference_ms, one.pruned_ms] == pytest.approx(by_hand)
    errors = shipped_table("v100").document.held_out["fp16"]
    assert (found.layer_error_median, found.layer_error_p90) == (errors.median, errors.p90)


def test_other_targets_have_none(files: tuple[Path, Path]) -> None:
    for target in ("cpu", "t4", None):
        assert predict(target, precision="fp32", files=files, batch_sizes=(1,)) == (None, ())


def test_a_network_that_is_not_covered_is_a_note(tmp_path: Path, files: tuple[Path, Path]) -> None:
    missing = (files[0], tmp_path / "gone.safetensors")
    found, notes = predict("v100", precision="fp16", files=missing, batch_sizes=(1,))
    assert found is None
    assert notes[0].startswith("No latency is predicted on NVIDIA V100: ")
