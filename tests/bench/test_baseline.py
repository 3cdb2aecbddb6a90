from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import configs
from bench.judging.baseline import change_against, undecided
from bench.judging.quality_gate import judge
from bench.limits import USUAL_REGRESSION
from bench.measuring.records import pack_outcomes
from bench.reports.report import load_report, save_report, sealed
from bench.reports.schema import NetworkRecord, Report
from bench.statistics.latency_ratios import median_ratio_interval
from compress.config import BenchConfig
from compress.errors import CheckpointError

ReportFactory = Callable[..., Report]


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report()


def with_environment(report: Report, **facts: Any) -> Report:
    environment = report.environment.model_copy(update=facts)
    return report.model_copy(update={"environment": environment})


def with_network(report: Report, name: str, **facts: Any) -> Report:
    network: NetworkRecord = getattr(report.networks, name).model_copy(update=facts)
    return report.model_copy(
        update={"networks": report.networks.model_copy(update={name: network})}
    )


def slowed(report: Report, **factors: float) -> Report:
    """Multiply every block of a network."""
    for name, factor in factors.items():
        records = tuple(
            record.model_copy(
                update={"block_medians_ms": tuple(factor * x for x in record.block_medians_ms)}
            )
            for record in getattr(report.networks, name).latency
        )
        report = with_network(report, name, latency=records)
    return report


def test_nothing_changed_against_itself(report: Report) -> None:
    found = change_against(report, report)
    assert found.differences == ()
    assert (found.created, found.sha256) == (report.created, sealed(report)["sha256"])
    assert [change.batch_size for change in found.latency] == [1, 8]
    for change in found.latency:
        assert change.ratio.ratio == pytest.approx(1.0)
        assert change.median is not None
        assert change.median.ratio == pytest.approx(1.0)
    assert found.accuracy is not None
    assert (found.accuracy.flips_to_wrong, found.accuracy.flips_to_right) == (0, 0)
    assert found.no_accuracy is None


def test_a_slower_network_changes_ratio_and_median(report: Report) -> None:
    found = change_against(slowed(report, pruned=1.1), report)
    for change in found.latency:
        assert change.ratio.ratio == pytest.approx(1.1)
        assert change.ratio.at_least < 1.1 < change.ratio.at_most
        assert change.median is not None
        assert change.median.ratio == pytest.approx(1.1)


def test_a_slower_machine_changes_the_median_alone(report: Report) -> None:
    found = change_against(slowed(report, pruned=1.3, reference=1.3), report)
    for change in found.latency:
        assert change.ratio.ratio == pytest.approx(1.0)
        assert change.median is not None
        assert change.median.ratio == pytest.approx(1.3)


def test_the_change_of_the_ratio_is_that_of_the_two_reports(sample_report: ReportFactory) -> None:
    then, now = sample_report(ratio=0.6, rounds=30), sample_report(ratio=0.7, noise=0.03)
    for change in change_against(now, then).latency:
        ratios = [
            next(c.ratio for c in one.comparison.latency if c.batch_size == change.batch_size)
            for one in (then, now)
        ]
        assert change.ratio.ratio == pytest.approx(ratios[1].ratio / ratios[0].ratio)
        assert change.ratio.low < 0.7 / 0.6 < change.ratio.high
        assert change.ratio.rounds == 20


def test_it_is_the_same_from_disk_and_every_time(report: Report, tmp_path: Any) -> None:
    save_report(report, tmp_path / "baseline.json")
    stored = load_report(tmp_path / "baseline.json")
    assert change_against(report, stored) == change_against(report, report)


def test_batch_sizes_of_one_side_are_left_out(sample_report: ReportFactory) -> None:
    found = change_against(sample_report(batch_sizes=(1, 8)), sample_report(batch_sizes=(8, 32)))
    assert [change.batch_size for change in found.latency] == [8]


def test_what_the_stored_report_measured_on_an_unfit_machine_is_left_out(
    sample_report: ReportFactory,
) -> None:
    steady, unsteady = sample_report(), sample_report(control=1.1)
    assert change_against(steady, unsteady).latency == ()
    # Of this report it is the verdict that says so.
    assert len(change_against(unsteady, steady).latency) == 2


def test_machines_that_differ_are_told_apart(report: Report) -> None:
    for facts, words in (
        ({"cpu": "Other CPU"}, "processor: Other CPU then, Example CPU 3000 now"),
        ({"cpu": None}, "processor: unknown then, Example CPU 3000 now"),
        ({"physical_cores": 4}, "physical cores: 4 then, 8 now"),
        ({"logical_cores": 8}, "logical cores: 8 then, 16 now"),
        ({"affinity": (0, 1, 2)}, "cores allowed: 3 then, 2 now"),
        ({"cpu_quota": 1.5}, "quota of cores: 1.5 then, none now"),
        ({"threads": 4}, "threads: 4 then, 2 now"),
        ({"governor": "powersave"}, "governor: powersave then, performance now"),
        ({"platform": "Linux 5.4.0 x86_64"}, "platform: Linux 5.4.0 x86_64 then, Linux 6.1.0 x86"),
        ({"python": "3.10.1"}, "python: 3.10.1 then, 3.11.9 now"),
        ({"packages": {"torch": "2.5.0", "numpy": "2.0.0"}}, "torch: 2.5.0 then, 2.6.0 now"),
        ({"packages": {"torch": "2.6.0"}}, "numpy: none then, 2.0.0 now"),
        ({"gpu": {"name": "T4"}}, "GPU name: T4 then, none now"),
    ):
        found = change_against(report, with_environment(report, **facts))
        (difference,) = found.differences
        assert difference.startswith(words)
        assert [change.median for change in found.latency] == [None, None]
        assert [change.ratio.ratio for change in found.latency] == pytest.approx([1, 1])


@pytest.mark.parametrize("facts", [{"load_average": 7.5}, {"affinity": (4, 5)}])
def test_load_and_which_cores_do_not_make_another_machine(
    report: Report, facts: dict[str, Any]
) -> None:
    found = change_against(report, with_environment(report, **facts))
    assert found.differences == ()
    assert all(change.median for change in found.latency)


def test_facts_of_a_gpu_are_compared_one_by_one(report: Report) -> None:
    then, now = (
        with_environment(report, gpu={"name": "T4", "driver": driver}) for driver in ("1", "2")
    )
    assert change_against(now, then).differences == ("GPU driver: 1 then, 2 now",)


def test_how_calls_were_timed_belongs_to_the_median(report: Report) -> None:
    config = report.config.model_copy(update={"cuda_graph": True})
    found = change_against(report, report.model_copy(update={"config": config}))
    assert found.differences == ("bench.cuda_graph: on then, off now",)
    assert [change.median for change in found.latency] == [None, None]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"architecture": "resnet56"}, "architecture resnet56 and not resnet20"),
        ({"config": BenchConfig(runtime="tensorrt")}, "runtime tensorrt and not onnxruntime-cpu"),
        ({"precision": "int8"}, "precision int8 and not fp32"),
        ({"target": "v100"}, "target v100 and not cpu"),
        ({"against": "run"}, "kind of reference run and not dense"),
    ],
)
def test_a_report_of_another_model_is_refused(
    report: Report, facts: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        change_against(report, report.model_copy(update=facts))
    assert str(caught.value) == (
        "the stored report of 2026-01-02 03:04 UTC is not of the same model as this one, it has "
        f"{words}; name one of the same reference, measured alike"
    )


def test_another_release_of_the_runtime_is_a_difference(report: Report) -> None:
    found = change_against(report, report.model_copy(update={"runtime": "TensorRT 10.4.0"}))
    assert found.differences == ("runtime: TensorRT 10.4.0 then, ONNX Runtime (CPU) now",)
    assert found.latency


def test_a_report_of_another_reference_is_refused(report: Report) -> None:
    stored = with_network(report, "reference", weights_sha256="c" * 64)
    with pytest.raises(CheckpointError, match=r"weights of the reference c{12} and not A{12};"):
        change_against(report, stored)
    other = stored.model_copy(update={"target": "t4"})
    with pytest.raises(CheckpointError, match=r"not A{12}, target t4 and not cpu;"):
        change_against(report, other)


def test_another_pruned_network_is_what_it_is_for(report: Report) -> None:
    stored = with_network(report, "pruned", weights_sha256="c" * 64, onnx_sha256="d" * 64)
    assert change_against(report, stored).latency


def test_accuracy_is_compared_image_by_image(report: Report) -> None:
    rng = np.random.default_rng(3)
    then, now = rng.random((2, 2000)) < 0.9
    zeros = np.zeros(2000, dtype=np.int64)
    reports = [
        with_network(report, "pruned", outcomes=pack_outcomes(zeros, correct, correct))
        for correct in (then, now)
    ]
    drop = change_against(reports[1], reports[0]).accuracy
    assert drop is not None
    assert drop.drop_pp == pytest.approx(100 * (then.mean() - now.mean()))
    assert drop.flips_to_wrong == np.sum(then & ~now)
    assert drop.flips_to_right == np.sum(~then & now)
    assert drop.confidence == report.config.confidence


def test_accuracy_that_cannot_be_compared_says_why(
    report: Report, sample_report: ReportFactory
) -> None:
    validation = report.validation.model_copy(update={"identity": "f" * 64})
    cases = {
        "the stored report does not hold what the network said of every image": (
            report,
            with_network(report, "pruned", outcomes=None),
        ),
        "this report does not hold what the network said of every image": (
            with_network(report, "pruned", outcomes=None),
            report,
        ),
        "the two reports are on different validation sets": (
            report,
            report.model_copy(update={"validation": validation}),
        ),
        "the stored report is on 1000 images and this one on 2000": (
            report,
            sample_report(images=1000),
        ),
    }
    for words, (now, then) in cases.items():
        found = change_against(now, then)
        assert (found.accuracy, found.no_accuracy) == (None, words)
        assert found.latency, "latency does not need the images"


def test_the_confidence_is_that_of_the_report_at_hand(report: Report) -> None:
    config = report.config.model_copy(update={"confidence": 0.8})
    found = change_against(report.model_copy(update={"config": config}), report)
    assert {change.ratio.confidence for change in found.latency} == {0.8}
    wide = change_against(report, report).latency[0].ratio
    assert found.latency[0].ratio.high < wide.high


def test_it_agrees_with_the_interval_of_each_report(report: Report) -> None:
    # Against a baseline without noise nothing is left but the noise of this report.
    exact = slowed(report, pruned=1.0)
    level = float(np.median(report.networks.reference.latency[0].block_medians_ms))
    for name in ("reference", "pruned"):
        records = tuple(
            record.model_copy(update={"block_medians_ms": (level,) * 20})
            for record in getattr(exact.networks, name).latency
        )
        exact = with_network(exact, name, latency=records)
    found = change_against(report, exact).latency[0].ratio
    alone = median_ratio_interval(
        report.networks.reference.latency[0].block_medians_ms,
        report.networks.pruned.latency[0].block_medians_ms,
        confidence=report.config.confidence,
    )
    assert (found.low, found.at_most) == pytest.approx((alone.low, alone.at_most))


def exactly(report: Report, ratio: float) -> Report:
    """Return a report whose rounds all gave the same ratio."""
    levels = {"reference": 0.8, "pruned": 0.8 * ratio}
    for name, level in levels.items():
        records = tuple(
            record.model_copy(update={"block_medians_ms": (level,) * 20})
            for record in getattr(report.networks, name).latency
        )
        report = with_network(report, name, latency=records)
    return report


def test_a_wide_baseline_says_which_limit_even_an_unchanged_network_cannot_pass(
    sample_report: ReportFactory,
) -> None:
    wide = sample_report(noise=0.4, batch_sizes=(1,))
    then = wide.comparison.latency[0].ratio
    least = then.ratio / then.at_least
    said = undecided(wide)
    assert least > USUAL_REGRESSION
    assert said is not None
    assert f"only a limit above {least:.3f} can pass" in said
    # The best that can come later: no noise, the same ratio, a reference that took as long.
    best = exactly(wide, then.ratio)
    best = best.model_copy(update={"change": change_against(best, wide)})
    for limit, status in ((0.999 * least, "INCONCLUSIVE"), (1.001 * least, "PASS")):
        (verdict,) = judge(best, {"latency": {"max_regression": limit}})
        assert verdict.status == status


def test_a_baseline_of_too_few_rounds_decides_nothing(sample_report: ReportFactory) -> None:
    said = undecided(sample_report(noise=0.001, rounds=9, batch_sizes=(1, 8)))
    assert said is not None
    assert said.count("9 rounds of the 20 needed") == 2


def test_a_narrow_baseline_is_kept_without_a_word(report: Report) -> None:
    assert undecided(report) is None


def test_the_usual_regression_is_that_of_the_default_limits() -> None:
    text = (Path(configs.__file__).parent / "limits" / "default.toml").read_text(encoding="utf-8")
    (suggested,) = re.findall(r"^# max_regression += ([\d.]+)", text, re.MULTILINE)
    assert float(suggested) == USUAL_REGRESSION
