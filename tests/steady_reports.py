"""Reports as a machine without any noise would have measured them: verdicts that do not vary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.reports.report import load_report, save_report
from bench.statistics.latency_ratios import RatioInterval, summary


def steady(path: Path, target: Path, *, slower: float = 1.0, **changes: object) -> Path:
    """Write a report again as a machine without any noise would have measured it.

    Block medians are all alike, those of the pruned network ``slower`` times the reference's.
    """
    report = load_report(path)

    def network(name: str, level: float) -> object:
        found = getattr(report.networks, name)
        latency = tuple(
            record.model_copy(
                update={
                    "block_medians_ms": (level,) * 20,
                    "summary": summary([level] * record.summary.calls),
                    "images_per_second": 1000 * record.batch_size / level,
                }
            )
            for record in found.latency
        )
        return found.model_copy(update={"latency": latency})

    def exactly(interval: RatioInterval, ratio: float) -> RatioInterval:
        bounds = dict.fromkeys(("ratio", "low", "high", "at_least", "at_most"), ratio)
        return replace(interval, rounds=20, **bounds)

    latency = tuple(
        found.model_copy(
            update={
                "ratio": exactly(found.ratio, slower),
                "speed_up": 1 / slower,
                "control": exactly(found.control, 1.0),
                "control_block_medians_ms": (1.0,) * 20,
                "conditions": None,
            }
        )
        for found in report.comparison.latency
    )
    config = report.config.model_copy(update={"min_blocks": 4})
    same = report.model_copy(
        update={
            "networks": report.networks.model_copy(
                update={"reference": network("reference", 1.0), "pruned": network("pruned", slower)}
            ),
            "comparison": report.comparison.model_copy(update={"latency": latency}),
            "config": config,
            **changes,
        }
    )
    save_report(same, target)
    return target


def of_too_few_calls(path: Path, target: Path, *, calls: int) -> Path:
    """Write a report again, steady and with fewer calls of the pruned network than p99 needs."""
    measured = load_report(steady(path, target))
    networks = measured.networks
    latency = tuple(
        record.model_copy(
            update={
                "summary": replace(
                    record.summary, calls=calls, p99_at_least_ms=None, p99_at_most_ms=None
                )
            }
        )
        for record in networks.pruned.latency
    )
    pruned = networks.pruned.model_copy(update={"latency": latency})
    changed = {"networks": networks.model_copy(update={"pruned": pruned})}
    save_report(measured.model_copy(update=changed), target)
    return target
