"""Several reports in one table: how each is called, and what it found against its reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench import units
from bench.reports.report import REPORT
from bench.reports.schema import Report
from bench.reports.summary import known, told_gain, told_ratio
from compress.terminal.sheet import Row, Sheet


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """Return a name for each of several files, none of them twice.

    A report.json is called as its folder, any other file as itself; where that is not enough, the
    folders above come before it.
    """
    parts = [_parts(path.resolve()) for path in paths]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        counted = Counter(names)
        deeper = [
            depth + (counted[name] > 1 and depth < len(part))
            for name, depth, part in zip(names, depths, parts, strict=True)
        ]
        if deeper == depths:
            return tuple(names)
        depths = deeper


def reports_sheet(reports: Mapping[str, Report]) -> Sheet:
    """Return one row for each report: its pruned network against its own reference."""
    sizes = sorted(
        {found.batch_size for each in reports.values() for found in each.comparison.latency}
    )
    apart = differences(reports)
    differ = ("measured",) if any(apart) else ()
    header = ("", "top-1", "change", "MACs", *(f"latency, batch {size}" for size in sizes), *differ)
    rows = tuple(
        (*_row(name, report, sizes), *([what] if differ else []))
        for (name, report), what in zip(reports.items(), apart, strict=True)
    )
    return Sheet("Reports", header, rows, tuple(_notes(reports)))


def same_images(report: Report, other: Report) -> bool:
    """Return whether accuracies of two reports may stand in one plot."""
    return report.validation.identity == other.validation.identity


def same_machine(report: Report, other: Report) -> bool:
    """Return whether latencies of two reports may stand in one plot."""
    return _machine(report) == _machine(other)


def differences(reports: Mapping[str, Report]) -> tuple[str, ...]:
    """Return what tells each report from the others by its facts; empty where nothing does."""
    facts = list(zip(*map(facts_of, reports.values()), strict=True))
    telling = [column for column in facts if len(set(column)) > 1]
    return tuple(", ".join(row) for row in zip(*telling, strict=True)) or ("",) * len(reports)


def facts_of(report: Report) -> tuple[str, ...]:
    """Return what besides its figures tells a report from others: target, precision, ..."""
    graph = ", CUDA graph" if report.config.cuda_graph else ""
    return (
        report.architecture or "unnamed",
        f"for {report.target}" if report.target else "for no target",
        report.precision or "unknown precision",
        f"{report.runtime}{graph}",
        f"against {report.against}",
        f"{report.environment.threads} threads",
    )


def _row(name: str, report: Report, sizes: Sequence[int]) -> Row:
    accuracy = report.comparison.accuracy
    drop = accuracy.drop if accuracy else None
    ratios = {found.batch_size: found.ratio for found in report.comparison.latency}
    return (
        name,
        known(units.share, report.networks.pruned.top1),
        known(told_gain, drop),
        known(units.times, report.comparison.macs_ratio),
        *(known(told_ratio, ratios.get(size)) for size in sizes),
    )


def _notes(reports: Mapping[str, Report]) -> Iterator[str]:
    (first, report), *others = reports.items()
    yield (
        "Each is compared with its own reference, measured beside it; "
        "milliseconds of two measurements do not compare."
    )
    for name, other in others:
        if not same_images(report, other):
            yield f"{name} saw other images than {first}: their accuracies do not compare."
        if not same_machine(report, other):
            yield f"{name} was measured on another machine than {first}."


def _parts(path: Path) -> tuple[str, ...]:
    return path.parts[:-1] if path.name == REPORT and len(path.parts) > 1 else path.parts


def _machine(report: Report) -> tuple[object, ...]:
    found = report.environment
    return found.cpu, (found.gpu or {}).get("name"), found.threads
