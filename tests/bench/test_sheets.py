"""The tables that tell of time and of a stored report; those of the rest are in test_report."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone

import pytest

from bench.measuring.records import (
    Conditions,
    CpuConditions,
    GpuConditions,
    LayerFigures,
    LayerRecord,
    LayerTimes,
)
from bench.pages.sheets import MOST_LAYERS, layer_sheet, sheets
from bench.reports.schema import Change, LatencyChange, Report
from bench.statistics.latency_ratios import RatioInterval, summary
from compress.terminal.sheet import Sheet

ReportFactory = Callable[..., Report]


def layers(count: int) -> LayerTimes:
    """Layer n takes n + 1 ms before and half of it after, and a fifth of the MACs."""
    rows = tuple(
        LayerRecord(
            name=f"layer{n}",
            kind="Conv",
            reference=LayerFigures(macs=1000 * (n + 1), milliseconds=n + 1, channels=16),
            pruned=LayerFigures(macs=200 * (n + 1), milliseconds=(n + 1) / 2, channels=9),
            misses_multiple=n == 3,
        )
        for n in range(count)
    )
    before = sum(range(1, count + 1))
    return LayerTimes(
        batch_size=2,
        calls=20,
        multiple=8,
        reference_ms=before,
        pruned_ms=before / 2,
        layers=rows,
    )


@pytest.mark.parametrize("count", [4, MOST_LAYERS, MOST_LAYERS + 7])
def test_a_table_of_layers_adds_up_and_keeps_the_order_of_the_network(count: int) -> None:
    found = layer_sheet(layers(count), "why")
    total = count * (count + 1) / 2
    assert len(found.rows) == min(count, MOST_LAYERS + 1)
    assert sum(float(row[4]) for row in found.rows) == pytest.approx(total)
    assert sum(float(row[5]) for row in found.rows) == pytest.approx(total / 2)
    assert sum(float(row[6]) for row in found.rows) == pytest.approx(total / 2)
    named = [row[0].rstrip(" *") for row in found.rows if row[0].startswith("layer")]
    assert named == sorted(named, key=lambda name: int(name.removeprefix("layer")))
    if count > MOST_LAYERS:
        assert found.rows[-1][0] == "7 more, each with less time"


def test_a_layer_that_misses_the_multiple_is_marked() -> None:
    found = layer_sheet(layers(5), "why")
    assert [row[0] for row in found.rows if row[0].endswith("*")] == ["layer3 *"]
    assert found.notes[-1] == "* channels that are no multiple of 8."
    assert found.rows[0][1:4] == ("16 to 9", "1.00 k", "200")


def test_a_layer_of_one_network_alone() -> None:
    both = layers(2)
    alone = both.layers[0].model_copy(update={"pruned": None})
    added = both.layers[1].model_copy(update={"reference": None})
    found = layer_sheet(both.model_copy(update={"layers": (alone, added)}), "why")
    assert [row[1:] for row in found.rows] == [
        ("16", "1.00 k", "", "1.0000", "0.0000", "1.0000"),
        ("9", "", "400", "0.0000", "1.0000", "-1.0000"),
    ]


def named(report: Report, title: str) -> Sheet:
    (found,) = [sheet for sheet in sheets(report, []) if sheet.title.startswith(title)]
    return found


def test_steps_on_a_gpu_and_what_the_machine_did(sample_report: ReportFactory) -> None:
    report = sample_report(batch_sizes=(8,))
    medians = {"h2d": 0.5, "compute": 0.25, "d2h": 0.125, "enqueue": 0.24, "host": 1.5}
    stages = {name: summary([ms] * 9) for name, ms in medians.items()}
    pruned = report.networks.pruned
    latency = (pruned.latency[0].model_copy(update={"stages": stages}),)
    both = pruned.model_copy(update={"latency": latency})
    conditions = Conditions(
        seconds=4,
        cpu=CpuConditions(
            load_average_after=0.5,
            quota_throttled_ms=None,
            thermal_throttles=0,
            stolen_share=0.0125,
            waited_share=0.004,
            frequency_mhz_min=2400.2,
            frequency_mhz_max=3100,
        ),
        gpu=GpuConditions(
            readings=20,
            sm_clock_mhz_min=1380,
            sm_clock_mhz_max=1380,
            memory_clock_mhz_min=877,
            memory_clock_mhz_max=877,
            temperature_c_max=61,
            power_w_max=212.4,
            throttle_reasons=("software power cap",),
        ),
    )
    watched = report.comparison.latency[0].model_copy(update={"conditions": conditions})
    report = report.model_copy(
        update={
            "networks": report.networks.model_copy(update={"reference": both, "pruned": both}),
            "comparison": report.comparison.model_copy(update={"latency": (watched,)}),
        }
    )
    steps = named(report, "Steps of a call")
    assert steps.title == "Steps of a call on the GPU, without a CUDA graph, medians"
    row = ("0.500 ms", "0.250 ms", "0.125 ms", "0.240 ms", "1.500 ms")
    assert steps.rows == (("dense, batch 8", *row), ("pruned, batch 8", *row))
    assert len(steps.notes) == 4
    assert all("bench.cuda_graph" in note for note in (steps.notes[0], steps.notes[2]))
    assert dict(named(report, "The machine meanwhile").rows) == {
        "load average after": "0.50",
        "stopped by a CPU quota": "unknown",
        "clocks lowered for heat": "0 times",
        "time given to other guests": "1.25 %",
        "longest wait for a core": "0.40 %",
        "clock of the core": "2400 to 3100 MHz",
        "SM clock": "1380 MHz",
        "memory clock": "877 MHz",
        "GPU, hottest": "61 C",
        "GPU, most power": "212 W",
        "GPU throttled for": "software power cap",
    }


def interval(ratio: float) -> RatioInterval:
    bounds = {"low": ratio - 0.01, "high": ratio + 0.01, "at_least": ratio, "at_most": ratio}
    return RatioInterval(ratio=ratio, confidence=0.95, rounds=20, **bounds)


def test_the_change_against_a_stored_report(sample_report: ReportFactory) -> None:
    report = sample_report()
    accuracy = report.comparison.accuracy
    assert accuracy is not None
    change = Change(
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        sha256="0" * 64,
        differences=(),
        latency=(LatencyChange(batch_size=8, ratio=interval(1.02), median=interval(0.98)),),
        accuracy=accuracy.drop,
        no_accuracy=None,
    )
    found = named(report.model_copy(update={"change": change}), "Against the stored report")
    assert found.rows == (
        ("latency ratio, batch 8", "x 1.020 [1.010, 1.030]"),
        ("median of the pruned network, batch 8", "x 0.980 [0.970, 0.990]"),
        ("top-1 drop", "0.50 pp [-0.11, 1.15]"),
    )
    elsewhere = change.model_copy(
        update={
            "differences": ("processor (A and B)",),
            "latency": (LatencyChange(batch_size=8, ratio=interval(1.02), median=None),),
            "accuracy": None,
            "no_accuracy": "the images differ",
        }
    )
    found = named(report.model_copy(update={"change": elsewhere}), "Against the stored report")
    assert [row[1] for row in found.rows] == ["x 1.020 [1.010, 1.030]", "not measured"]
    assert "processor (A and B)" in found.notes[1]
    assert found.notes[2] == "No drop: the images differ."


def test_the_reference_is_called_what_it_is(sample_report: ReportFactory) -> None:
    report = sample_report().model_copy(update={"against": "run"})
    text = [
        cell for sheet in sheets(report, []) for row in (sheet.header, *sheet.rows) for cell in row
    ]
    assert any("other run" in cell for cell in text)
    assert not any("dense" in cell for cell in text)
