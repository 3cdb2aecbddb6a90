"""How a network changed since a stored report, and reports that are kept as baselines on purpose.

A stored report is of the same reference, runtime and precision. Both measured their own reference,
so ratios compare, as closely as the reference took the same time in both; medians only on the same
machine with the same software. Accuracy is compared image by image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench import units
from bench.judging.quality_gate import MEASURE_LONGER, too_few, unfit
from bench.limits import USUAL_REGRESSION
from bench.measuring.records import Environment, Sha256
from bench.reports.report import load_report, sealed
from bench.reports.schema import (
    Against,
    Change,
    LatencyChange,
    LatencyRecord,
    NetworkRecord,
    Report,
)
from bench.reports.summary import told_ratio
from bench.statistics.latency_ratios import (
    Blocks,
    change_interval,
    drift,
    median_change_interval,
)
from bench.statistics.shares import PairedDrop, paired_drop
from compress.config import Precision, Runtime
from compress.errors import CheckpointError, EnvironmentUnfitError, OutputError

_SETTINGS = ("cuda_graph", "channels_last", "compiled")  # of bench, that change what is timed
_DIGITS = 12  # of a digest, enough to tell two apart


def change_against(report: Report, stored: Report) -> Change:
    """Compare a report with a stored one.

    Raises:
        CheckpointError: the stored report is not of the same reference, runtime, precision, target
            and kind of comparison.
    """
    require_same_model(
        stored,
        architecture=report.architecture,
        reference=report.networks.reference.weights_sha256,
        runtimes=_runtimes(report),
        precision=report.precision,
        target=report.target,
        against=report.against,
    )
    different = tuple(_differences(stored, report))
    accuracy, no_accuracy = _accuracy(report, stored)
    return Change(
        created=stored.created,
        sha256=sealed(stored)["sha256"],
        differences=different,
        latency=tuple(_latency(report, stored, medians=not different)),
        accuracy=accuracy,
        no_accuracy=no_accuracy,
    )


def require_same_model(
    stored: Report,
    *,
    architecture: str | None,
    reference: Sha256,
    runtimes: tuple[Runtime, Runtime],
    precision: Precision | None,
    target: str | None,
    against: Against,
) -> None:
    """Refuse a stored report that a measurement, made or still to be made, does not compare with.

    Args:
        stored: the stored report.
        architecture: of the pruned network.
        reference: digest of the reference's weights.
        runtimes: of the reference and of the pruned network.
        precision: of the networks.
        target: of the networks.
        against: what the reference is.

    Raises:
        CheckpointError: naming all that differs.
    """
    weights = stored.networks.reference.weights_sha256
    facts = {
        "architecture": (stored.architecture, architecture),
        "weights of the reference": (weights[:_DIGITS], reference[:_DIGITS]),
        "runtime": tuple(" and ".join(dict.fromkeys(of)) for of in (_runtimes(stored), runtimes)),
        "precision": (stored.precision, precision),
        "target": (stored.target, target),
        "kind of reference": (stored.against, against),
    }
    other = [
        f"{name} {then or 'unknown'} and not {now or 'unknown'}"
        for name, (then, now) in facts.items()
        if then != now
    ]
    if other:
        raise CheckpointError(
            f"the stored report of {stored.created:%Y-%m-%d %H:%M} UTC is not of the same model as "
            f"this one, it has {', '.join(other)}; name one of the same reference, measured alike"
        )


def load_compared(path: Path, baseline: Path | None) -> Report:
    """Read a report, and compare it with a baseline if one is named.

    Raises:
        CheckpointError: a file cannot be read, or the baseline is of another model.
    """
    report = load_report(path)
    if baseline is None:
        return report
    return report.model_copy(update={"change": change_against(report, load_report(baseline))})


def baseline_of(report: Path, baseline: Path, *, overwrite: bool = False) -> Report:
    """Return what may be kept as the baseline, with its change against the one it replaces.

    Raises:
        CheckpointError: a file cannot be read, or the baseline that is there is of another model.
        EnvironmentUnfitError: the machine of the report was not fit to measure latency.
        OutputError: there is a baseline and it is not to be replaced.
    """
    found = load_report(report)
    for comparison in found.comparison.latency:
        reason = unfit(comparison, found.config)
        if reason:
            raise EnvironmentUnfitError(
                f"{report} is no baseline, at batch size {comparison.batch_size} {reason}"
            )
    # What it was once compared with and judged by does not belong to a baseline.
    kept = found.model_copy(update={"change": None, "limits": None})
    replaced = load_report(baseline) if baseline.exists() else None
    if replaced is not None and not overwrite:
        raise OutputError(
            f"{baseline} holds a baseline of {replaced.created:%Y-%m-%d}; "
            "replace it with --overwrite"
        )
    change = change_against(kept, replaced) if replaced is not None else None
    return kept.model_copy(update={"change": change})


def undecided(baseline: Report) -> str | None:
    """Return a sentence if even an unchanged network would be INCONCLUSIVE against a baseline.

    That is where a later measurement without any noise, of the same ratio, would not be within the
    usual limit: its bound is as far above the ratio as the baseline's lies below it.
    """
    parts = []
    for found in baseline.comparison.latency:
        ratio, where = found.ratio, f"at batch size {found.batch_size}"
        least = ratio.ratio / ratio.at_least
        if doubt := too_few(ratio.rounds, baseline.config):
            parts.append(f"{where} {doubt}")
        elif least > USUAL_REGRESSION:
            parts.append(
                f"{where} the ratio is {told_ratio(ratio)}, against which only a limit above "
                f"{units.ratio(least)} can pass; {MEASURE_LONGER}"
            )
    if not parts:
        return None
    return (
        "against this baseline even an unchanged network is INCONCLUSIVE by "
        f"latency.max_regression = {USUAL_REGRESSION:g}: {', and '.join(parts)}"
    )


def _runtimes(report: Report) -> tuple[Runtime, Runtime]:
    """Return what ran the reference and what ran the pruned network."""
    usual, networks = report.config.runtime, report.networks
    return networks.reference.runtime or usual, networks.pruned.runtime or usual


def _differences(then: Report, now: Report) -> Iterator[str]:
    """Yield what differs between two machines, their software and how they were used."""
    before, after = _fingerprint(then), _fingerprint(now)
    for name in dict.fromkeys((*before, *after)):
        was, is_ = before.get(name, "none"), after.get(name, "none")
        if was != is_:
            yield f"{name}: {_known(was)} then, {_known(is_)} now"


def _fingerprint(report: Report) -> dict[str, object]:
    """Return what two reports must share for their milliseconds to compare, by its name.

    The load of the machine is no part of it, nor is which of its cores are allowed.
    """
    found: Environment = report.environment
    gpu = {f"GPU {name}": fact for name, fact in (found.gpu or {"name": "none"}).items()}
    return {
        "processor": found.cpu,
        "physical cores": found.physical_cores,
        "logical cores": found.logical_cores,
        "cores allowed": len(found.affinity),
        "quota of cores": "none" if found.cpu_quota is None else found.cpu_quota,
        "threads": found.threads,
        "governor": found.governor,
        "platform": found.platform,
        "python": found.python,
        "runtime": report.runtime,
        **found.packages,
        **gpu,
        **{f"bench.{name}": getattr(report.config, name) for name in _SETTINGS},
    }


def _known(fact: object) -> str:
    if isinstance(fact, bool):
        return "on" if fact else "off"
    return "unknown" if fact is None else str(fact)


def _latency(report: Report, stored: Report, *, medians: bool) -> Iterator[LatencyChange]:
    """Yield the change at every batch size that both measured, the stored one on a fit machine."""
    then, now = _blocks(stored), _blocks(report)
    for comparison in stored.comparison.latency:
        if unfit(comparison, stored.config):
            then.pop(comparison.batch_size, None)
    confidence = report.config.confidence
    for size in (size for size in now if size in then):
        both = then[size], now[size]
        yield LatencyChange(
            batch_size=size,
            ratio=change_interval(*both, confidence=confidence),
            median=median_change_interval(*both, confidence=confidence) if medians else None,
            reference=drift(*both),
        )


def _blocks(report: Report) -> dict[int, Blocks]:
    reference = _by_size(report.networks.reference)
    return {
        size: Blocks(record.block_medians_ms, reference[size].block_medians_ms)
        for size, record in _by_size(report.networks.pruned).items()
        if size in reference
    }


def _by_size(network: NetworkRecord) -> dict[int, LatencyRecord]:
    return {record.batch_size: record for record in network.latency}


def _accuracy(report: Report, stored: Report) -> tuple[PairedDrop | None, str | None]:
    """Return the drop since then, or why there is none."""
    ours, theirs = report.networks.pruned.outcomes, stored.networks.pruned.outcomes
    if ours is None or theirs is None:
        which = "this report" if ours is None else "the stored report"
        return None, f"{which} does not hold what the network said of every image"
    if report.validation.identity != stored.validation.identity:
        return None, "the two reports are on different validation sets"
    if ours.images != theirs.images:
        return None, f"the stored report is on {theirs.images} images and this one on {ours.images}"
    correct = theirs.read_correct(), ours.read_correct()
    return paired_drop(*correct, confidence=report.config.confidence), None
