from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from bench.quality_gate import Budgets, Verdict, exit_code, judge, load_budgets
from bench.schema import Report
from bench.stats import RatioInterval, median_ratio_interval
from compress.documents import named_files
from compress.errors import ConfigError

ReportFactory = Callable[..., Report]
ORDER = {"FAIL": 0, "INCONCLUSIVE": 1, "PASS": 2}


def budgets(**sections: dict[str, Any]) -> Budgets:
    return Budgets.model_validate(sections)


def one(report: Report, **sections: dict[str, Any]) -> Verdict:
    (verdict,) = judge(report, budgets(**sections))
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


@pytest.fixture(scope="module")
def report(sample_report: ReportFactory) -> Report:
    return sample_report(batch_sizes=(1,))


@pytest.mark.parametrize("name", sorted(named_files("budgets")))
def test_every_shipped_budget_file_loads_and_judges(name: str, report: Report) -> None:
    assert judge(report, load_budgets(name))


def test_the_default_budgets() -> None:
    found = load_budgets("default")
    assert found.accuracy.max_drop_pp == 1.0
    assert found.latency.max_ratio == 0.95
    assert found.macs.max_ratio == 0.6
    assert found.parity.max_relative_error == {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}
    assert (found.params.max_ratio, found.size.max_ratio, found.latency.p99_ms) == (None,) * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[latency]\nmax_rato = 0.9\n", "unknown key 'latency.max_rato': did you mean 'max_ratio'"),
        ("[latncy]\nmax_ratio = 0.9\n", "unknown key 'latncy': did you mean 'latency'"),
        ("[latency]\nmax_ratio = -1\n", "latency.max_ratio = -1"),
        ("[latency]\nbatch_sizes = []\nmax_ratio = 1\n", "latency.batch_sizes"),
        ("[latency]\nbatch_sizes = [1]\n", "there is no budget to judge"),
        ("", "there is no budget to judge"),
        ("[latency\n", "not valid TOML"),
    ],
)
def test_bad_budgets_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "budgets.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_budgets(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_offers_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no budget is named 'defalt': did you mean 'default'"):
        load_budgets("defalt")


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
    assert (verdict.budget, verdict.batch_size, verdict.limit) == ("latency.max_ratio", 1, 0.95)


def test_sentences_say_what_was_found_and_what_to_do(report: Report) -> None:
    passed = one(report, latency={"max_ratio": 0.95}).sentence
    assert passed.startswith("the latency ratio at batch size 1 is 0.650, at most 0.65")
    assert passed.endswith("with 95 % confidence; the budget is 0.950")
    open_ = one(with_ratio(report, interval(0.9, 0.95, 1.0)), latency={"max_ratio": 0.95}).sentence
    assert open_ == (
        "the latency ratio at batch size 1 lies between 0.900 and 1.000; the budget is 0.950: "
        "measure longer (bench.max_seconds) or on a quieter machine"
    )


@pytest.mark.parametrize(
    ("control", "doubtful"),
    [
        (interval(0.97, 1.0, 1.03), False),
        (interval(1.005, 1.015, 1.03), False),  # excludes 1, by less than the precision asked for
        (interval(1.021, 1.03, 1.04), True),
        (interval(0.95, 0.96, 0.979), True),
    ],
)
def test_a_control_off_one_makes_latency_doubtful(
    report: Report, control: RatioInterval, doubtful: bool
) -> None:
    judged = with_ratio(report, interval(0.6, 0.65, 0.7), control)
    verdicts = judge(judged, budgets(latency={"max_ratio": 0.95, "p99_ms": 50.0}))
    expected = "INCONCLUSIVE" if doubtful else "PASS"
    assert [verdict.status for verdict in verdicts] == [expected] * 2
    assert doubtful == ("against itself" in verdicts[0].sentence)


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
    verdicts = judge(two, budgets(latency={"max_ratio": 0.95}))
    assert [(v.batch_size, v.status) for v in verdicts] == [(1, "PASS"), (8, "PASS")]
    verdicts = judge(two, budgets(latency={"max_ratio": 0.95, "batch_sizes": [8, 32]}))
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


def test_a_budget_below_what_the_images_resolve_is_open_even_without_flips(
    sample_report: ReportFactory,
) -> None:
    alike = sample_report(images=360, worse=0, better=0)
    verdict = one(alike, accuracy={"max_drop_pp": 0.5})
    assert verdict.status == "INCONCLUSIVE"
    assert "360 images are too few, about 540 would decide" in verdict.sentence
    assert one(alike, accuracy={"max_drop_pp": 0.75}).status == "PASS"


def test_a_drop_on_the_budget_is_never_decided(sample_report: ReportFactory) -> None:
    verdict = one(sample_report(images=400, worse=4, better=0), accuracy={"max_drop_pp": 1.0})
    assert verdict.status == "INCONCLUSIVE"
    assert "is the budget itself" in verdict.sentence


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
        budgets(
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
    with pytest.raises(ConfigError, match="no budget"):
        judge(report, Budgets())
    with pytest.raises(ConfigError, match="no budget"):
        exit_code([])


RATIOS = st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3).map(sorted)
LIMITS = st.lists(st.floats(0.05, 4.0), min_size=2, max_size=2).map(sorted)


@given(RATIOS, LIMITS)
def test_a_looser_latency_budget_is_never_worse(
    report: Report, ratios: list[float], limits: list[float]
) -> None:
    judged = with_ratio(report, interval(*ratios))
    tight, loose = (ORDER[one(judged, latency={"max_ratio": x}).status] for x in limits)
    assert tight <= loose


@given(st.integers(0, 60), st.integers(0, 60), LIMITS)
def test_a_looser_accuracy_budget_is_never_worse(
    sample_report: ReportFactory, worse: int, better: int, limits: list[float]
) -> None:
    judged = sample_report(images=2000, worse=worse, better=better, batch_sizes=())
    tight, loose = (ORDER[one(judged, accuracy={"max_drop_pp": x}).status] for x in limits)
    assert tight <= loose


@pytest.mark.parametrize(
    ("truth", "status", "most", "least"),
    [
        (1.0, "FAIL", 0.05, 0.0),  # false alarm: exactly on the budget
        (1.0, "PASS", 0.05, 0.0),  # false pass: exactly on the budget
        (1.1, "FAIL", 1.0, 0.95),  # a slowdown of 10 % is found
        (1.1, "PASS", 0.0, 0.0),
        (0.9, "PASS", 1.0, 0.95),
    ],
)
def test_error_rates_of_the_latency_verdict(
    report: Report, truth: float, status: str, most: float, least: float
) -> None:
    runs, rng = 300, np.random.default_rng(5)
    count = 0
    for run in range(runs):
        busy = rng.normal(0, 0.05, 20)
        dense, pruned, control = np.exp(busy + rng.normal(0, 0.05, (3, 20)))
        ratios = [
            median_ratio_interval(dense, blocks, confidence=0.95, seed=run, resamples=300)
            for blocks in (truth * pruned, control)
        ]
        count += one(with_ratio(report, *ratios), latency={"max_ratio": 1.0}).status == status
    assert binom.ppf(0.001, runs, least) <= count <= binom.ppf(0.999, runs, most)
