"""Accuracy against cost: the points of one report and of others, and which of them are best.

Only what compares is put side by side: accuracy on the same images, latency on the same machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bench import units
from bench.reports.schema import NetworkRecord, Report

Cost = int | None
"""A batch size, whose median latency in milliseconds is the cost; None for MACs per image."""


@dataclass(frozen=True)
class Point:
    """One network: what it costs and what share of the images it gets right."""

    label: str
    """``dense`` and ``pruned`` of the report itself; a number for those of other reports."""
    role: Literal["reference", "pruned"]
    ours: bool
    """Whether it is of the report itself."""
    cost: float
    top1: float
    """In percent, as both ends of its bar are."""
    cost_bar: tuple[float, float] | None = None
    """Interval of the cost, by that of the ratio to the reference measured beside it."""
    top1_bar: tuple[float, float] | None = None
    """Interval of the accuracy, by that of the drop from the reference on the same images."""


def comparable(report: Report, others: Sequence[Report]) -> tuple[Report, ...]:
    """Return the other reports on the same validation images, without the report itself."""
    images = report.validation.identity
    return tuple(o for o in others if o.validation.identity == images and o != report)


def same_machine(report: Report, other: Report) -> bool:
    """Return whether latencies of two reports may stand in one plot."""
    return _machine(report) == _machine(other)


def points(
    report: Report, others: Sequence[Report], cost: Cost, reference_name: str
) -> tuple[Point, ...]:
    """Return every network with a cost and an accuracy; other reports count from 1.

    A reference that several reports share is one point.
    """
    drawn: set[tuple[object, ...]] = set()
    found: list[Point] = []
    for number, each in enumerate((report, *others)):
        if cost is not None and not same_machine(report, each):
            continue
        ours = "candidate" if report.against == "file" else "pruned"
        names = (ours, reference_name) if number == 0 else (str(number), str(number))
        reference = each.networks.reference
        key = (
            reference.onnx_sha256 or reference.weights_sha256,
            None if cost is None else (each.runtime, each.config.cuda_graph),
        )
        found += _pruned(each, cost, names[0], ours=number == 0)
        if key not in drawn:
            drawn.add(key)
            found += _reference(reference, cost, names[1], ours=number == 0)
    return tuple(found)


def frontier(found: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points that no other one beats, the cheapest first.

    A point is beaten by one that costs no more and is no less accurate, and is better in one.
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.cost, -p.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return tuple(best)


def describe(report: Report, others: Sequence[Report]) -> tuple[str, ...]:
    """Return what tells each other report from the rest: MACs, and whatever else differs."""
    everyone = (report, *others)
    facts = list(zip(*map(_facts, everyone), strict=True))
    telling = [column for column in facts if len(set(column)) > 1]
    texts = [_share_of_macs(each) for each in everyone]
    texts = [", ".join((text, *rest)) for text, *rest in zip(texts, *telling, strict=True)]
    repeated = Counter(texts)
    return tuple(
        f"{text}, measured {each.created:%Y-%m-%d %H:%M:%S}" if repeated[text] > 1 else text
        for each, text in zip(everyone, texts, strict=True)
    )[1:]


def _machine(report: Report) -> tuple[object, ...]:
    found = report.environment
    return found.cpu, (found.gpu or {}).get("name"), found.threads


def _pruned(report: Report, cost: Cost, label: str, *, ours: bool) -> Iterator[Point]:
    network, reference = report.networks.pruned, report.networks.reference
    spent = _cost(network, cost)
    if spent is None or network.top1 is None:
        return
    yield Point(
        label=label,
        role="pruned",
        ours=ours,
        cost=spent,
        top1=100 * network.top1,
        cost_bar=_latency_bar(report, cost),
        top1_bar=_accuracy_bar(report, reference),
    )


def _reference(network: NetworkRecord, cost: Cost, label: str, *, ours: bool) -> Iterator[Point]:
    spent = _cost(network, cost)
    if spent is not None and network.top1 is not None:
        yield Point(label, "reference", ours, spent, 100 * network.top1)


def _cost(network: NetworkRecord, cost: Cost) -> float | None:
    if cost is None:
        return network.macs
    medians = {record.batch_size: record.summary.median_ms for record in network.latency}
    return medians.get(cost)


def _latency_bar(report: Report, cost: Cost) -> tuple[float, float] | None:
    for found in report.comparison.latency:
        if cost is not None and found.batch_size == cost:
            pruned = _cost(report.networks.pruned, cost)
            assert pruned is not None
            scale = pruned / found.ratio.ratio  # so that the point lies where the ratio does
            return found.ratio.low * scale, found.ratio.high * scale
    return None


def _accuracy_bar(report: Report, reference: NetworkRecord) -> tuple[float, float] | None:
    accuracy = report.comparison.accuracy
    if accuracy is None or reference.top1 is None:
        return None
    dense = 100 * reference.top1
    return dense - accuracy.drop.high_pp, dense - accuracy.drop.low_pp


def _share_of_macs(report: Report) -> str:
    ratio = report.comparison.macs_ratio
    return "MACs unknown" if ratio is None else f"{units.share(ratio)} of the MACs"


def _facts(report: Report) -> tuple[str, ...]:
    graph = ", CUDA graph" if report.config.cuda_graph else ""
    return (
        report.architecture or "unnamed",
        f"for {report.target}" if report.target else "for no target",
        report.precision or "unknown precision",
        f"{report.runtime}{graph}",
        f"against {report.against}",
        f"{report.environment.threads} threads",
    )
