from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.judging.baseline import change_against
from bench.judging.quality_gate import judge, unfit
from bench.judging.verdicts import Verdict, exit_code
from bench.limits import Limits, load_limits, require_baseline, require_resolvable
from bench.measuring.conditions import disturbed
from bench.measuring.records import Conditions, CpuConditions
from bench.reports.schema import Report
from bench.statistics.latency_ratios import RatioInterval
from compress.config import load_config
from compress.errors import ConfigError
from compress.files.documents import named_files

ReportFactory = Callable[..., Report]
ORDER = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}


def limits_of(**sections: dict[str, Any]) -> Limits:
    return Limits.model_validate(sections)


def one(report: Report, **sections: dict[str, Any]) -> Verdict:
    (verdict,) = judge(report, limits_of(**sections))
    return verdict


def with_ratio(
    report: Report, ratio: RatioInterval, control: RatioInterval | None = None
) -> Report:
    (found,) = report.comparison.latency
    changed = found.model_copy(update={"ratio": ratio, "control": control or found.control})
    comparison = report.comparison.model_copy(update={"latency": (changed,)})
    return report.model_copy(update={"comparison": comparison})


def interval(low: float, middle: float, high: float, rounds: int = 20) -> RatioInterval:
    return RatioInterval(
        ratio=middle,
        low=low,
        high=high,
        at_least=low,
        at_most=high,
        confidence=0.95,
        rounds=rounds,
    )


@pytest.mark.parametrize(
    ("skipped", "allowed", "status"),
    [
        (20, 0.01, "PASS"),
        (21, 0.01, "SKIPPED"),
        (21, 0.02, "PASS"),
        (1980, 0.01, "SKIPPED"),
    ],
)
def test_figures_of_what_is_left_of_a_set_are_not_judged(
    skipped: int, allowed: float, status: str, sample_report: ReportFactory
) -> None:
    """Whatever the limits: they may skip what was not measured, and not this."""
    report = sample_report(images=2000)
    seen = report.validation.model_copy(
        update={"images": 2000 - skipped, "skipped": skipped, "max_skipped": allowed}
    )
    report = report.model_copy(update={"validation": seen})
    for key in ("max_drop_pp", "max_top5_drop_pp"):
        verdict = one(report, accuracy={key: 50.0, "allow_skipped": True})
        assert verdict.status == status
        assert not verdict.allowed
        said = f"{skipped} of 2000 images could not be read"
        assert (said in verdict.sentence) == (status == "SKIPPED")
    assert exit_code([verdict]) == (0 if status == "PASS" else 5)
    for key, limit in (("min_same_top1", 0.1), ("max_relative_error", 1.0)):
        verdict = one(report, agreement={key: limit, "allow_skipped": True})
        assert (said in verdict.sentence) == (status == "SKIPPED")


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report(batch_sizes=(1,))


@pytest.fixture(scope="module")
def compared(report: Report) -> Report:
    return report.model_copy(update={"change": change_against(report, report)})


def watched(**cpu: Any) -> Conditions:
    fields = dict.fromkeys(CpuConditions.model_fields)
    return Conditions(seconds=4.0, cpu=CpuConditions(**{**fields, **cpu}), gpu=None)


@pytest.mark.parametrize("name", sorted(named_files("limits")))
def test_every_shipped_file_of_limits_loads_and_judges(name: str, report: Report) -> None:
    assert judge(report, load_limits(name))


def test_the_default_limits() -> None:
    found = load_limits("default")
    assert found.accuracy.max_drop_pp == 1.0
    assert found.latency.max_ratio == 0.95
    assert found.parity.max_relative_error == {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}
    costs = (found.macs, found.params, found.size)  # a budget of time may leave many MACs
    assert [cost.max_ratio for cost in costs] == [None] * 3
    assert (found.latency.p99_ms, found.agreement.min_same_top1) == (None, None)


def test_bad_limits_are_one_sentence(tmp_path: Path) -> None:
    for text, words in (
        ("[latency]\nmax_rato = 0.9\n", "unknown key 'latency.max_rato': did you mean 'max_ratio'"),
        ("[latncy]\nmax_ratio = 0.9\n", "unknown key 'latncy': did you mean 'latency'"),
        ("[latency]\nmax_ratio = -1\n", "latency.max_ratio = -1"),
        ("[latency]\nbatch_sizes = []\nmax_ratio = 1\n", "latency.batch_sizes"),
        ("[latency]\nbatch_sizes = [1]\n", "batch_sizes is set, but there is no limit"),
        ("[size]\nallow_skipped = true\n", "allow_skipped is set, but there is no limit"),
        ("[latency]\nbatch_sizes = [0]\nmax_ratio = 1\n", "latency.batch_sizes.0"),
        ("[latency]\nbatch_sizes = [1, 8, 1]\nmax_ratio = 1\n", "names a batch size twice"),
        ("[latency]\np99_ms = 3\nmedian_ms = 4\n", "p99_ms = 3 is below median_ms = 4"),
        ("[latency]\nmax_regression = 0.03\n", "33.3 times as fast as the baseline's"),
        ("[latency]\nmax_median_regression = 0.05\n", "1.03 allows 3 % slower"),
        ("[accuracy]\nmax_regression_pp = -1\n", "accuracy.max_regression_pp = -1"),
        ("[latency]\nmax_ratio = 1\nallow_skipped = 1.5\n", "latency.allow_skipped = 1.5"),
        ("", "there is no limit to judge by"),
        ("[latency\n", "not valid TOML"),
    ):
        path = tmp_path / "limits.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_limits(str(path))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_name_offers_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no limit is named 'defalt': did you mean 'default'"):
        load_limits("defalt")


def test_limits_of_a_run_lie_over_the_file_and_settings_over_both() -> None:
    config = load_config(settings=["limits.macs.max_ratio=0.5", "limits.size.max_ratio=0.7"])
    found = load_limits(config.bench.limits, ["size.max_ratio=0.8"], above=config.limits)
    assert (found.macs.max_ratio, found.size.max_ratio) == (0.5, 0.8)
    assert found.accuracy == load_limits("default").accuracy
    with pytest.raises(ConfigError, match="did you mean 'max_ratio'"):
        load_limits("default", above={"macs": {"max_ration": 0.5}})


@pytest.mark.parametrize(
    ("ratio", "status"),
    [
        (interval(0.88, 0.90, 0.95), "PASS"),
        (interval(0.90, 0.93, 0.951), "INCONCLUSIVE"),
        (interval(0.95, 0.97, 0.99), "INCONCLUSIVE"),
        (interval(0.951, 0.97, 0.99), "FAIL"),
    ],
)
def test_the_interval_decides(report: Report, ratio: RatioInterval, status: str) -> None:
    verdict = one(with_ratio(report, ratio), latency={"max_ratio": 0.95})
    assert verdict.status == status
    assert verdict.interval == (ratio.at_least, ratio.at_most)
    assert (verdict.name, verdict.batch_size, verdict.limit) == ("latency.max_ratio", 1, 0.95)


def test_sentences_say_what_was_found_and_what_to_do(report: Report) -> None:
    passed = one(report, latency={"max_ratio": 0.95}).sentence
    assert passed.startswith("the latency ratio at batch size 1 is 0.65")
    assert ", at most 0.65" in passed
    assert passed.endswith("with 95 % confidence; the limit is 0.950")
    open_ = one(with_ratio(report, interval(0.9, 0.95, 1.0)), latency={"max_ratio": 0.95}).sentence
    assert open_ == (
        "the latency ratio at batch size 1 lies between 0.900 and 1.000; the limit is 0.950: "
        "measure longer (bench.max_seconds) or on a quieter machine"
    )


EVERY_LATENCY = {
    "max_ratio": 0.95,
    "max_regression": 1.5,
    "max_median_regression": 1.5,
    "median_ms": 50.0,
    "p99_ms": 50.0,
}


@pytest.mark.parametrize(
    ("control", "doubtful"),
    [
        (interval(0.97, 1.0, 1.03), False),
        (interval(1.005, 1.015, 1.03), False),  # excludes 1, by less than the precision asked for
        (interval(1.021, 1.03, 1.04), True),
        (interval(0.95, 0.96, 0.979), True),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_a_control_off_one_makes_the_machine_unfit_whatever_is_allowed(
    compared: Report, control: RatioInterval, doubtful: bool, allow: bool
) -> None:
    judged = with_ratio(compared, interval(0.6, 0.65, 0.7), control)
    verdicts = judge(judged, limits_of(latency={**EVERY_LATENCY, "allow_skipped": allow}))
    expected = "SKIPPED" if doubtful else "PASS"
    assert [verdict.status for verdict in verdicts] == [expected] * 5
    assert exit_code(verdicts) == (5 if doubtful else 0)
    assert all(doubtful == ("against itself" in verdict.sentence) for verdict in verdicts)
    assert all((verdict.measured is None) == doubtful for verdict in verdicts)


def test_who_asks_for_less_precision_allows_a_less_steady_machine(report: Report) -> None:
    judged = with_ratio(report, interval(0.6, 0.65, 0.7), interval(1.021, 1.03, 1.04))
    (comparison,) = judged.comparison.latency
    for precision, fit in ((0.001, False), (0.0209, False), (0.022, True)):
        config = judged.config.model_copy(update={"ratio_precision": precision})
        assert (unfit(comparison, config) is None) == fit


@pytest.mark.parametrize("counts", [False, True])
def test_a_machine_that_throttled_was_not_fit(compared: Report, counts: bool) -> None:
    (found,) = compared.comparison.latency
    conditions = watched(thermal_throttles=3 if counts else 0)
    comparison = compared.comparison.model_copy(
        update={"latency": (found.model_copy(update={"conditions": conditions}),)}
    )
    judged = compared.model_copy(update={"comparison": comparison})
    verdicts = judge(judged, limits_of(latency=EVERY_LATENCY))
    assert {verdict.status for verdict in verdicts} == {"SKIPPED" if counts else "PASS"}
    assert exit_code(verdicts) == (5 if counts else 0)
    reason = disturbed(conditions)
    assert (reason is not None) == counts
    if reason:
        assert verdicts[0].sentence == (
            "the latency ratio at batch size 1 could not be measured here; the limit is 0.950: "
            + reason
        )


@pytest.mark.parametrize(("rounds", "min_blocks"), [(19, 20), (7, 4)])
def test_too_few_rounds_decide_nothing(
    sample_report: ReportFactory, rounds: int, min_blocks: int
) -> None:
    short = sample_report(batch_sizes=(1,), rounds=rounds, config={"min_blocks": min_blocks})
    verdict = one(short, latency={"max_ratio": 0.95})
    assert verdict.status == "INCONCLUSIVE"
    assert f"{rounds} rounds of the" in verdict.sentence
    assert "bench.max_seconds" in verdict.sentence


def test_every_measured_batch_size_is_judged_unless_some_are_named(
    sample_report: ReportFactory,
) -> None:
    two = sample_report(batch_sizes=(1, 8))
    verdicts = judge(two, limits_of(latency={"max_ratio": 0.95}))
    assert [(v.batch_size, v.status) for v in verdicts] == [(1, "PASS"), (8, "PASS")]
    verdicts = judge(two, limits_of(latency={"max_ratio": 0.95, "batch_sizes": [8, 32]}))
    assert [(v.batch_size, v.status) for v in verdicts] == [(8, "PASS"), (32, "SKIPPED")]
    assert "bench.batch_sizes" in verdicts[1].sentence


def test_p99_needs_662_calls(sample_report: ReportFactory) -> None:
    few = sample_report(batch_sizes=(1,), rounds=20, calls=33)  # 660
    many = sample_report(batch_sizes=(1,), rounds=20, calls=34)  # 680
    verdict = one(few, latency={"p99_ms": 50.0})
    assert verdict.status == "INCONCLUSIVE"
    assert "660 calls were timed and a bound on p99 needs 662" in verdict.sentence
    assert one(many, latency={"p99_ms": 50.0}).status == "PASS"
    assert one(many, latency={"p99_ms": 0.1}).status == "FAIL"
    summary = many.networks.pruned.latency[0].summary
    assert one(many, latency={"p99_ms": summary.p99_ms}).status == "INCONCLUSIVE"
    assert "99 % confidence" in one(many, latency={"p99_ms": 50.0}).sentence


def test_accuracy_verdicts(sample_report: ReportFactory) -> None:
    limit = {"max_drop_pp": 1.0}
    good = sample_report(images=10_000, worse=20, better=15)
    assert one(good, accuracy=limit).status == "PASS"
    bad = sample_report(images=10_000, worse=300, better=100)
    assert one(bad, accuracy=limit).status == "FAIL"
    few = one(sample_report(images=360, worse=5, better=2), accuracy=limit)
    assert few.status == "INCONCLUSIVE"
    assert "360 images are too few, about 20000 would decide" in few.sentence


@pytest.mark.parametrize("key", ["max_drop_pp", "max_top5_drop_pp", "max_regression_pp"])
def test_a_limit_below_what_the_images_resolve_is_refused(
    sample_report: ReportFactory, key: str
) -> None:
    alike = sample_report(images=360, worse=0, better=0)
    alike = alike.model_copy(update={"change": change_against(alike, alike)})
    with pytest.raises(ConfigError) as caught:
        judge(alike, limits_of(accuracy={key: 0.5}))
    assert str(caught.value) == (
        f"accuracy.{key} = 0.5 cannot be shown on 360 images: a network that answers each of them "
        "as its reference does may still lose 0.75 pp (95 % confidence); 539 images could show it, "
        "or allow more"
    )
    assert one(alike, accuracy={key: 0.75}).status == "PASS"


def test_limits_are_found_unresolvable_before_anything_is_measured() -> None:
    tight = limits_of(accuracy={"max_drop_pp": 0.5}, latency={"max_ratio": 0.9})
    require_resolvable(tight, 539, 0.95)
    with pytest.raises(ConfigError, match="cannot be shown on 538 images"):
        require_resolvable(tight, 538, 0.95)
    with pytest.raises(ConfigError, match="no number of images can show it"):
        require_resolvable(limits_of(accuracy={"max_top5_drop_pp": 0.0}), 10**6, 0.95)
    require_resolvable(limits_of(latency={"max_ratio": 0.9}), 1, 0.95)


def test_limits_on_a_baseline_need_one(report: Report) -> None:
    wanted = {"max_regression": 1.03, "max_ratio": 1.0, "max_median_regression": 1.03}
    with pytest.raises(ConfigError) as caught:
        judge(report, limits_of(latency=wanted, accuracy={"max_regression_pp": 1}))
    assert str(caught.value) == (
        "accuracy.max_regression_pp and latency.max_regression and latency.max_median_regression "
        "cannot be judged without a baseline; name a stored report of the same reference"
    )
    with pytest.raises(ConfigError, match="max_regression cannot be judged"):
        require_baseline(limits_of(latency={"max_regression": 1.0}), present=False)
    require_baseline(limits_of(latency={"max_ratio": 1.0}), present=False)


@pytest.mark.parametrize(
    ("key", "part"), [("max_regression", "ratio"), ("max_median_regression", "median")]
)
def test_a_regression_is_decided_by_its_interval(compared: Report, key: str, part: str) -> None:
    assert compared.change is not None
    (found,) = compared.change.latency
    for ratio, status in (
        (interval(0.99, 1.0, 1.03), "PASS"),
        (interval(1.0, 1.02, 1.031), "INCONCLUSIVE"),
        (interval(1.031, 1.05, 1.07), "FAIL"),
        (interval(1.031, 1.05, 1.07, rounds=7), "INCONCLUSIVE"),
    ):
        changed = found.model_copy(update={part: ratio})
        change = compared.change.model_copy(update={"latency": (changed,)})
        verdict = one(compared.model_copy(update={"change": change}), latency={key: 1.03})
        assert verdict.status == status
        assert verdict.interval == (ratio.at_least, ratio.at_most)
        assert "that of the baseline at batch size 1" in verdict.sentence


def test_a_median_is_not_compared_across_machines(
    sample_report: ReportFactory, report: Report
) -> None:
    environment = report.environment.model_copy(update={"threads": 7, "governor": "powersave"})
    stored = report.model_copy(update={"environment": environment})
    judged = report.model_copy(update={"change": change_against(report, stored)})
    limits = {"max_regression": 1.5, "max_median_regression": 1.5}
    ratio, median = judge(judged, limits_of(latency=limits))
    assert (ratio.status, median.status, median.allowed) == ("PASS", "SKIPPED", False)
    assert "threads: 7 then, 2 now, governor: powersave then, performance now" in median.sentence
    allowed = judge(judged, limits_of(latency={**limits, "allow_skipped": True}))
    assert [(v.status, v.allowed) for v in allowed] == [("PASS", False), ("SKIPPED", True)]
    assert (exit_code([ratio, median]), exit_code(allowed)) == (5, 0)


def test_a_batch_size_that_the_baseline_lacks_is_skipped(sample_report: ReportFactory) -> None:
    two, stored = sample_report(batch_sizes=(1, 8)), sample_report(batch_sizes=(8,))
    judged = two.model_copy(update={"change": change_against(two, stored)})
    verdicts = judge(judged, limits_of(latency={"max_regression": 1.5}))
    assert [(v.batch_size, v.status) for v in verdicts] == [(1, "SKIPPED"), (8, "PASS")]
    assert "at batch size 1 has no fit measurement in the baseline" in verdicts[0].sentence


def test_an_accuracy_that_the_baseline_lacks_is_skipped_with_the_reason(report: Report) -> None:
    validation = report.validation.model_copy(update={"identity": "f" * 64})
    stored = report.model_copy(update={"validation": validation})
    judged = report.model_copy(update={"change": change_against(report, stored)})
    verdict = one(judged, accuracy={"max_regression_pp": 1.0})
    assert verdict.status == "SKIPPED"
    assert "different validation sets" in verdict.sentence


def test_top_5_is_judged_by_its_own_drop(sample_report: ReportFactory) -> None:
    bad = sample_report(images=10_000, worse=300, better=100)  # top-5 is right of every image
    assert one(bad, accuracy={"max_drop_pp": 1.0}).status == "FAIL"
    verdict = one(bad, accuracy={"max_top5_drop_pp": 1.0})
    assert (verdict.status, verdict.measured) == ("PASS", 0.0)
    assert verdict.sentence.startswith("the top-5 accuracy drop is 0.00 pp, at most 0.03 pp")


def test_the_median_is_judged_in_milliseconds(report: Report) -> None:
    (record,) = report.networks.pruned.latency
    median = record.summary.median_ms
    for share, status in ((1.02, "PASS"), (0.98, "FAIL"), (1.0, "INCONCLUSIVE")):
        verdict = one(report, latency={"median_ms": share * median})
        assert verdict.status == status
    assert verdict.measured == pytest.approx(median, rel=0.005)
    assert " ms" in verdict.sentence


@pytest.mark.parametrize(
    ("runtime", "precision", "gpu", "limit"),
    [
        ("tensorrt", "fp32", {"name": "A100", "sm": "8.0"}, 2e-2),
        ("tensorrt", "fp32", {"name": "B200", "sm": "10.0"}, 2e-2),
        ("tensorrt", "fp32", {"name": "T4", "sm": "7.5"}, 1e-4),
        ("tensorrt", "fp32", {"name": "unknown"}, 1e-4),
        ("tensorrt", "fp32", None, 1e-4),
        ("tensorrt", "fp16", {"name": "A100", "sm": "8.0"}, 2e-2),
        ("onnxruntime-cpu", "fp32", {"name": "A100", "sm": "8.0"}, 1e-4),
    ],
)
def test_parity_of_an_engine_in_tf32_is_held_to_fp16(
    report: Report, runtime: str, precision: str, gpu: dict[str, str] | None, limit: float
) -> None:
    judged = report.model_copy(
        update={
            "precision": precision,
            "config": report.config.model_copy(update={"runtime": runtime}),
            "environment": report.environment.model_copy(update={"gpu": gpu}),
        }
    )
    verdict = one(judged, parity={"max_relative_error": {"fp32": 1e-4, "fp16": 2e-2}})
    assert verdict.limit == limit
    assert ("TF32" in verdict.sentence) == (limit != 1e-4 and precision == "fp32")
    only = one(judged, parity={"max_relative_error": {"fp32": 1e-4, precision: limit}})
    assert only.limit == limit


def test_a_report_keeps_its_limits_whole() -> None:
    given = limits_of(latency={**EVERY_LATENCY, "batch_sizes": [1, 8]}, size={"max_ratio": 0.5})
    assert Limits.model_validate(given.model_dump(mode="json")) == given


def test_a_drop_on_the_limit_is_never_decided(sample_report: ReportFactory) -> None:
    verdict = one(sample_report(images=400, worse=4, better=0), accuracy={"max_drop_pp": 1.0})
    assert verdict.status == "INCONCLUSIVE"
    assert "is the limit itself" in verdict.sentence


@pytest.mark.parametrize("section", ["macs", "params", "size"])
def test_counted_costs_are_exact(report: Report, section: str) -> None:
    name = "bytes" if section == "size" else section
    measured = getattr(report.comparison, f"{name}_ratio")
    assert one(report, **{section: {"max_ratio": measured}}).status == "PASS"
    assert one(report, **{section: {"max_ratio": measured * 0.999}}).status == "FAIL"
    assert one(report, **{section: {"max_ratio": measured}}).interval is None


def test_parity_is_that_of_the_worse_network(sample_report: ReportFactory) -> None:
    found = sample_report(parity=(1e-7, 3e-5))
    assert one(found, parity={"max_relative_error": 3e-5}).status == "PASS"
    assert one(found, parity={"max_relative_error": 2e-5}).status == "FAIL"
    limits = {"fp32": 2e-5, "fp16": 1.0}
    assert one(found, parity={"max_relative_error": limits}).status == "FAIL"
    limits = {"fp32": 3e-5, "int8": 1e-9}
    assert one(found, parity={"max_relative_error": limits}).status == "PASS"


def test_what_is_not_measured_is_skipped(sample_report: ReportFactory) -> None:
    bare = sample_report(batch_sizes=(), parity=())
    nothing = {"accuracy": None, "macs_ratio": None, "params_ratio": None, "bytes_ratio": None}
    bare = bare.model_copy(update={"comparison": bare.comparison.model_copy(update=nothing)})
    everything = {name: {"max_ratio": 0.5} for name in ("macs", "params", "size")}
    verdicts = judge(
        bare,
        limits_of(
            accuracy={"max_drop_pp": 1},
            latency={"max_ratio": 0.9, "p99_ms": 1},
            parity={"max_relative_error": 1e-4},
            **everything,
        ),
    )
    assert len(verdicts) == 7
    assert {verdict.status for verdict in verdicts} == {"SKIPPED"}
    assert {verdict.measured for verdict in verdicts} == {None}
    assert exit_code(verdicts) == 5
    said = {v.name: v.sentence for v in verdicts}["macs.max_ratio"]
    assert said.endswith("no sidecar tells it; macs.allow_skipped = true may skip it")
    allowed = judge(bare, limits_of(macs={"max_ratio": 0.5, "allow_skipped": True}))
    assert (allowed[0].status, exit_code(allowed)) == ("SKIPPED", 0)
    assert allowed[0].sentence.endswith("no sidecar tells it")
    assert exit_code([*allowed, *verdicts]) == 5


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["PASS", "PASS"], 0),
        (["PASS", "FAIL", "INCONCLUSIVE", "SKIPPED"], 3),
        (["SKIPPED", "PASS", "INCONCLUSIVE"], 4),
        (["PASS", "SKIPPED"], 5),
    ],
)
def test_exit_codes(report: Report, statuses: list[Any], code: int) -> None:
    verdict = one(report, macs={"max_ratio": 0.6})
    assert exit_code(replace(verdict, status=status) for status in statuses) == code


def test_nothing_judged_is_an_error(report: Report) -> None:
    with pytest.raises(ConfigError, match="no limit"):
        judge(report, Limits())
    with pytest.raises(ConfigError, match="no limit"):
        exit_code([])


RATIOS = st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3).map(sorted)
LIMITS = st.lists(st.floats(0.05, 4.0), min_size=2, max_size=2).map(sorted)
ACCURACY_LIMITS = st.lists(st.floats(0.14, 4.0), min_size=2, max_size=2).map(sorted)


@given(RATIOS, LIMITS)
def test_a_looser_latency_limit_is_never_worse(
    report: Report, ratios: list[float], limits: list[float]
) -> None:
    judged = with_ratio(report, interval(*ratios))
    tight, loose = (ORDER[one(judged, latency={"max_ratio": x}).status] for x in limits)
    assert tight <= loose


@given(st.integers(0, 60), st.integers(0, 60), ACCURACY_LIMITS)
def test_a_looser_accuracy_limit_is_never_worse(
    sample_report: ReportFactory, worse: int, better: int, limits: list[float]
) -> None:
    judged = sample_report(images=2000, worse=worse, better=better, batch_sizes=())
    tight, loose = (ORDER[one(judged, accuracy={"max_drop_pp": x}).status] for x in limits)
    assert tight <= loose
