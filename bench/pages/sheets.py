"""The tables of a report as data: the terminal, the Markdown and the page print the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import units
from bench.judging.verdicts import Verdict
from bench.measuring.device_timing import advice
from bench.measuring.latency import HOST
from bench.measuring.records import (
    AgreementRecord,
    Conditions,
    Environment,
    LayerFigures,
    LayerRecord,
    LayerTimes,
)
from bench.reports.schema import Change, LatencyRecord, NetworkRecord, Report
from bench.reports.summary import (
    NOT_MEASURED,
    comparison_sheet,
    explain_layers,
    known,
    pruned_name,
    reference_name,
    told_ratio,
    told_share,
)
from bench.statistics.latency_ratios import RatioInterval
from bench.statistics.shares import PairedDrop
from compress.terminal.sheet import Row, Sheet

MOST_LAYERS = 30
"""Rows of a table of layers; what takes less time is summed up."""

PREDICTED = "latency.predicted_max_ratio"
_MISSES = " *"


def verdict_sheet(verdicts: Sequence[Verdict]) -> Sheet:
    """Return one row per verdict; what did not pass is explained under the table."""
    rows = []
    for verdict in verdicts:
        write = units.of_limit(verdict.name)
        where = f", batch {verdict.batch_size}" if verdict.batch_size is not None else ""
        skipped = verdict.status == "SKIPPED"  # it may have been measured, and not be fit to judge
        measured = "not judged" if skipped else known(write, verdict.measured)
        if verdict.interval is not None:
            measured += f" {units.interval(write, *verdict.interval)}"
        if verdict.name == PREDICTED and verdict.measured is not None:
            measured += " (predicted)"
        rows.append((verdict.name + where, write(verdict.limit), measured, verdict.status))
    notes = tuple(f"{v.status}: {v.sentence}." for v in verdicts if v.status != "PASS")
    return Sheet("Verdicts", ("judged", "limit", "measured", "verdict"), tuple(rows), notes)


def sheets(report: Report, verdicts: Sequence[Verdict]) -> Iterator[Sheet]:
    """Yield every table of a report, the most important first."""
    yield comparison_sheet(report)
    if verdicts:
        yield verdict_sheet(verdicts)
    if report.comparison.accuracy is not None:
        yield _accuracy_sheet(report)
    if report.comparison.agreement is not None:
        yield _agreement_sheet(report, report.comparison.agreement)
    if report.comparison.latency:
        names = (reference_name(report), pruned_name(report))
        yield from _latency_sheets(report, names)
    for times in report.layers:
        yield layer_sheet(times, explain_layers(report, times))
    if report.change is not None:
        yield change_sheet(report.change)
    if report.networks.reference.parity or report.networks.pruned.parity:
        yield _parity_sheet(report)
    yield _environment_sheet(report.environment)


def measured_on(report: Report) -> str:
    """Return when, where and on what it was measured, and what the marks in the tables mean."""
    validation = report.validation
    skipped = f" ({validation.skipped} unreadable)" if validation.skipped else ""
    kind = {
        "labelled": "validation images" if report.against != "file" else "labelled inputs",
        "images": "images without labels",
        "arrays": "inputs without labels",
        "random": "random inputs",
    }[validation.kind]
    return (
        f"Measured {report.created:%Y-%m-%d %H:%M} UTC in {report.runtime} on {validation.images} "
        f"{kind}{skipped}; set {validation.identity[:12]}. "
        f"Intervals hold {units.level(report.config.confidence)}; those of verdicts are one-sided. "
        f"x is {pruned_name(report)} over {reference_name(report)}; MB is 10^6 bytes; "
        "a multiply-add counts as one MAC."
    )


def both_networks(report: Report) -> tuple[tuple[str, NetworkRecord], tuple[str, NetworkRecord]]:
    """Return what is compared, by name."""
    networks = report.networks
    return (reference_name(report), networks.reference), (pruned_name(report), networks.pruned)


def _drop(drop: PairedDrop) -> str:
    return f"{units.points(drop.drop_pp)} {units.interval(units.points, drop.low_pp, drop.high_pp)}"


def _accuracy_sheet(report: Report) -> Sheet:
    accuracy = report.comparison.accuracy
    assert accuracy is not None
    drop, networks = accuracy.drop, report.networks
    rows = (
        (f"top-5, {reference_name(report)}", known(units.share, networks.reference.top5)),
        (f"top-5, {pruned_name(report)}", known(units.share, networks.pruned.top5)),
        ("top-1 drop", _drop(drop)),
        ("top-5 drop", _drop(accuracy.top5_drop)),
        ("images right to wrong", str(drop.flips_to_wrong)),
        ("images wrong to right", str(drop.flips_to_right)),
        ("exact McNemar p", f"{drop.mcnemar_p:.3g}"),
        ("same predicted class", units.share(accuracy.same_prediction)),
        ("smallest drop these images can rule out", units.points(drop.resolution_pp)),
    )
    return Sheet("Accuracy", ("", "value"), rows)


def _agreement_sheet(report: Report, agreement: AgreementRecord) -> Sheet:
    rows = tuple(
        (
            output.name,
            known(units.error, output.relative_error),
            f"{output.cosine:.6f}",
            told_share(output.same_top1) if output.same_top1 else "",
        )
        for output in agreement.outputs
    )
    title = f"Agreement of {pruned_name(report)} with {reference_name(report)}"
    return Sheet(title, ("output", "relative error", "cosine", "same top-1"), rows)


def _parity_sheet(report: Report) -> Sheet:
    rows = tuple(
        (
            f"{name}, batch {found.batch_size}",
            units.error(found.relative_error),
            f"{found.cosine:.6f}",
            units.share(found.top1_agreement),
        )
        for name, network in both_networks(report)
        for found in network.parity
    )
    return Sheet("Agreement with torch", ("", "relative error", "cosine", "same top-1"), rows)


def change_sheet(change: Change) -> Sheet:
    """Return how latency and accuracy changed since a stored report."""
    rows: list[Row] = []
    for found in change.latency:
        size = found.batch_size
        rows.append((f"latency ratio, batch {size}", told_ratio(found.ratio)))
        if found.median is not None:
            rows.append((f"median of the pruned network, batch {size}", told_ratio(found.median)))
    drop = change.accuracy
    rows.append(("top-1 drop", NOT_MEASURED if drop is None else _drop(drop)))
    notes = [
        f"Now over then: above x 1 is slower. The stored report is of {change.created:%Y-%m-%d}."
    ]
    if change.differences:
        differ = ", ".join(change.differences)
        notes.append(f"Absolute latencies do not compare, for these differ: {differ}.")
    if change.no_accuracy:
        notes.append(f"No drop: {change.no_accuracy}.")
    return Sheet("Against the stored report", ("", "change"), tuple(rows), tuple(notes))


# Time, and the machine meanwhile


def _latency_sheets(report: Report, names: tuple[str, str]) -> Iterator[Sheet]:
    """Yield what was timed: calls, their steps on a GPU, the ratios, and the machine meanwhile.

    ``names`` are those of the reference and of the pruned network.
    """
    networks = (report.networks.reference, report.networks.pruned)
    named = [
        (f"{name}, batch {record.batch_size}", record)
        for records in zip(*(network.latency for network in networks), strict=True)
        for name, record in zip(names, records, strict=True)
    ]
    yield _latency_sheet(named)
    if staged := [(name, record) for name, record in named if record.stages]:
        yield _stages_sheet(staged, cuda_graph=report.config.cuda_graph)
    yield _control_sheet(report, names)
    watched = [
        (f"batch {found.batch_size}", found.conditions)
        for found in report.comparison.latency
        if found.conditions is not None
    ]
    if watched:
        yield _conditions_sheet(watched)


def layer_sheet(times: LayerTimes, reason: str) -> Sheet:
    """Return where the time of both networks goes, layer by layer, with the reason in words."""
    order = sorted(times.layers, key=_milliseconds, reverse=True)
    shown, rest = order[:MOST_LAYERS], order[MOST_LAYERS:]
    rows = [_layer_row(layer) for layer in times.layers if layer in shown]
    if rest:
        rows.append(_rest_row(rest))
    notes = [reason]
    if any(layer.misses_multiple for layer in times.layers):
        notes.append(f"* channels that are no multiple of {times.multiple}.")
    header = ("", "channels", "MACs before", "after", "ms before", "after", "ms saved")
    title = f"Time of each layer, batch {times.batch_size}"
    return Sheet(title, header, tuple(rows), tuple(notes))


def _environment_sheet(found: Environment) -> Sheet:
    """Return what the figures were measured on."""
    gpu = found.gpu["name"] if found.gpu else "none"
    facts: tuple[tuple[str, object], ...] = (
        ("processor", found.cpu),
        ("physical / logical cores", f"{found.physical_cores} / {found.logical_cores}"),
        ("cores this process may use", len(found.affinity)),
        ("container quota, cores", "none" if found.cpu_quota is None else found.cpu_quota),
        ("threads of the runtime", found.threads),
        ("load average before", found.load_average),
        ("frequency governor", found.governor),
        ("GPU present", gpu),
        ("platform", found.platform),
        ("python", found.python),
        *found.packages.items(),
    )
    rows = tuple((name, "unknown" if fact is None else str(fact)) for name, fact in facts)
    return Sheet("Environment", ("", "value"), rows)


def _latency_sheet(named: list[tuple[str, LatencyRecord]]) -> Sheet:
    """Return one column for each network and batch size: on a phone there is room for that."""
    figures = ("median", "mean", "min", "max", "p90", "p95", "p99")
    columns = [
        (
            *(units.milliseconds(getattr(record.summary, f"{name}_ms")) for name in figures),
            units.share(record.summary.variation),
            str(record.summary.calls),
            units.count(record.images_per_second),
        )
        for _, record in named
    ]
    names = (*figures, "CV", "calls", "images/s")
    rows = tuple((name, *cells) for name, *cells in zip(names, *columns, strict=True))
    return Sheet("Latency per call", ("", *(name for name, _ in named)), rows)


def _control_sheet(report: Report, names: tuple[str, str]) -> Sheet:
    reference, pruned = names
    latency = report.comparison.latency
    rows = (
        (f"{pruned} / {reference}", *(_ratio(found.ratio) for found in latency)),
        (f"{reference} / {reference}", *(_ratio(found.control) for found in latency)),
        ("rounds", *(str(found.ratio.rounds) for found in latency)),
        ("took", *(f"{found.seconds:.1f} s" for found in latency)),
        (
            "as precise as asked",
            *("yes" if found.converged else "no, time was up" for found in latency),
        ),
    )
    header = ("", *(f"batch {found.batch_size}" for found in latency))
    return Sheet("Latency ratio and its control", header, rows)


def _stages_sheet(named: list[tuple[str, LatencyRecord]], *, cuda_graph: bool) -> Sheet:
    stages = ("h2d", "compute", "d2h", "enqueue", HOST)
    rows, notes = [], []
    for name, record in named:
        medians = {stage: found.median_ms for stage, found in record.stages.items()}
        rows.append((name, *(units.milliseconds(medians[stage]) for stage in stages)))
        notes += [f"{name}: {sentence}" for sentence in advice(medians, cuda_graph=cuda_graph)]
    graph = "with" if cuda_graph else "without"
    title = f"Steps of a call on the GPU, {graph} a CUDA graph, medians"
    return Sheet(title, ("", "H2D", "compute", "D2H", "enqueue", "host"), tuple(rows), tuple(notes))


def _conditions_sheet(watched: list[tuple[str, Conditions]]) -> Sheet:
    facts = [_conditions_facts(found) for _, found in watched]
    rows = tuple((name, *(fact[name] for fact in facts)) for name in facts[0])
    return Sheet("The machine meanwhile", ("", *(name for name, _ in watched)), rows)


def _conditions_facts(found: Conditions) -> dict[str, str]:
    cpu, gpu = found.cpu, found.gpu
    facts = {
        "load average after": _told(cpu.load_average_after, "{:.2f}"),
        "stopped by a CPU quota": _told(cpu.quota_throttled_ms, "{:.0f} ms"),
        "clocks lowered for heat": _told(cpu.thermal_throttles, "{:d} times"),
        "time given to other guests": _told(cpu.stolen_share, "{:.2%}").replace("%", " %"),
        "longest wait for a core": _told(cpu.waited_share, "{:.2%}").replace("%", " %"),
        "clock of the core": _span(cpu.frequency_mhz_min, cpu.frequency_mhz_max),
    }
    if gpu is not None:
        facts |= {
            "SM clock": _span(gpu.sm_clock_mhz_min, gpu.sm_clock_mhz_max),
            "memory clock": _span(gpu.memory_clock_mhz_min, gpu.memory_clock_mhz_max),
            "GPU, hottest": _told(gpu.temperature_c_max, "{:d} C"),
            "GPU, most power": _told(gpu.power_w_max, "{:.0f} W"),
            "GPU throttled for": ", ".join(gpu.throttle_reasons) or "nothing",
        }
    return facts


def _told(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _span(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "unknown"
    return f"{low:.0f} MHz" if round(low) == round(high) else f"{low:.0f} to {high:.0f} MHz"


def _layer_row(layer: LayerRecord) -> Row:
    sides = layer.reference, layer.pruned
    channels = [str(side.channels) for side in sides if side is not None and side.channels]
    name = layer.name + _MISSES * layer.misses_multiple
    return (name, " to ".join(dict.fromkeys(channels)), *_layer_cells([sides]))


def _rest_row(rest: list[LayerRecord]) -> Row:
    cells = _layer_cells([(layer.reference, layer.pruned) for layer in rest])
    return (f"{len(rest)} more, each with less time", "", *cells)


def _layer_cells(sides: list[tuple[LayerFigures | None, LayerFigures | None]]) -> tuple[str, ...]:
    macs, spent = [], []
    for one in zip(*sides, strict=True):
        macs.append(sum(side.macs for side in one if side is not None))
        spent.append(sum(side.milliseconds for side in one if side is not None))
    return (
        *(units.count(value) if value else "" for value in macs),
        *(f"{value:.4f}" for value in (*spent, spent[0] - spent[1])),
    )


def _milliseconds(layer: LayerRecord) -> float:
    return max(side.milliseconds for side in (layer.reference, layer.pruned) if side is not None)


def _ratio(found: RatioInterval) -> str:
    return f"{units.ratio(found.ratio)} {units.interval(units.ratio, found.low, found.high)}"
