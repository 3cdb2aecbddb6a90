"""What a report says first: its main figures as a table, and why latency does not follow MACs.

A runtime fuses layers, adds work of its own, and runs odd widths as if they were wider, so what was
saved of both is set side by side and the difference split among its causes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from bench import units
from bench.reports.precisions import slower_precisions
from compress.terminal.sheet import Row, Sheet, text_lines
from compress.terminal.text import plain

if TYPE_CHECKING:  # a report prints itself by this module
    from bench.measuring.records import LayerFigures, LayerRecord, LayerTimes, Prediction
    from bench.reports.schema import NetworkRecord, Report
    from bench.statistics.latency_ratios import RatioInterval
    from bench.statistics.shares import PairedDrop, Share

NOT_MEASURED = "not measured"

_UNCHANGED = 0.005  # a ratio this close to 1 is said to have stayed
_TELLS = 1.15  # times by which the ratios of layers and of whole calls may differ; 1.09 was seen
_FOLLOWS = 0.02  # share of the pruned time by which it may miss the MACs and still follow them
_WORTH_SAYING = 0.05  # share of what is missing that a layer must hold to be named
_MOST_NAMED = 3
_FASTER = "in layers whose time fell more than their MACs"
_LEAST = 1e-6  # keeps a layer that took no time from dividing by zero

Known = TypeVar("Known")
_Side = Literal["reference", "pruned"]
_Figure = Literal["macs", "milliseconds"]
_Both = tuple[float | None, float | None]
"""A figure of the reference and of the pruned network."""


def headline(report: Report) -> str:
    """Return what the report is about, in a line."""
    name, other = reference_name(report), pruned_name(report)
    precision = f", {report.precision}" if report.precision not in (None, "fp32") else ""
    if report.against == "file":
        networks = report.networks
        return (
            f"{networks.pruned.file or other} against {networks.reference.file or name}{precision}"
        )
    return f"{report.architecture} for {report.target}{precision}: {other} against {name}"


def reference_name(report: Report) -> str:
    """Return what the reference is called: the dense network, another run, or just that."""
    return {"dense": "dense", "run": "other run", "file": "reference"}[report.against]


def pruned_name(report: Report) -> str:
    """Return what the network that is compared with it is called."""
    return "candidate" if report.against == "file" else "pruned"


def comparison_sheet(report: Report) -> Sheet:
    """Return the main table: reference, pruned and the change, one figure a row."""
    rows = (
        *_answer_rows(report),
        *_cost_rows(report),
        *_latency_rows(report),
        *_precision_rows(report),
        *_predicted_rows(report),
    )
    names = (reference_name(report), pruned_name(report))
    notes = (
        *report.notes,
        *slower_precisions(report, names),
        *((told_prediction(report.prediction),) if report.prediction else ()),
    )
    return Sheet("Comparison", ("", *names, "change"), rows, notes)


def summary_text(report: Report) -> str:
    """Return the main table and its notes as plain lines."""
    sheet = comparison_sheet(report)
    return "\n".join((plain(headline(report)), *text_lines(sheet), *map(plain, sheet.notes)))


def told_share(found: Share) -> str:
    """Return a share with its interval."""
    return f"{units.share(found.share)} {units.interval(units.share, found.low, found.high)}"


def told_gain(drop: PairedDrop) -> str:
    """Return a change of accuracy, above 0 for the better, with its interval."""
    return f"{-drop.drop_pp:+.2f} pp [{-drop.high_pp:+.2f}, {-drop.low_pp:+.2f}]"


def told_ratio(found: RatioInterval) -> str:
    """Return a ratio as a factor, with its interval."""
    return f"{units.times(found.ratio)} {units.interval(units.ratio, found.low, found.high)}"


def told_prediction(found: Prediction) -> str:
    """Say in a sentence that a latency is predicted, from what, and how far that misses."""
    return (
        f"What is predicted on {found.device} ({found.runtime}, {found.precision}) was not "
        "measured: it comes from a table that was fitted to other people's measurements; single "
        f"layers are missed by {units.share(found.layer_error_median)} in the median and "
        f"{units.share(found.layer_error_p90)} at the 90th percentile, published whole networks by "
        f"{units.share(found.network_error)} on average."
    )


def known(write: Callable[[Known], str], value: Known | None) -> str:
    """Return a figure, or that it was not measured."""
    return NOT_MEASURED if value is None else write(value)


def explain_layers(report: Report, times: LayerTimes) -> str:
    """Return ``explain`` of one of a report's batch sizes, beside what was measured of it."""
    ratios = {found.batch_size: found.ratio for found in report.comparison.latency}
    return explain(times, ratios.get(times.batch_size))


def explain(times: LayerTimes, measured: RatioInterval | None = None) -> str:
    """Say in a few sentences why the time did not fall as the MACs did.

    Had all time fallen by the ratio of MACs, the pruned network would take so much; what it takes
    beyond that is split among its causes. That is withheld where the layers do not tell of what was
    measured: a profiler takes time of its own, and other programs may come in between.

    Args:
        times: the layers.
        measured: ratio of latencies of whole calls; None where there is none to compare with.
    """
    if measured is not None and _contradict(times.pruned_ms / times.reference_ms, measured):
        return _withheld(times, measured)
    before, after = _sum(times, "reference", "macs"), _sum(times, "pruned", "macs")
    fewer = before / after if before and after else 1.0
    missing = times.pruned_ms - times.reference_ms / fewer
    faster = times.reference_ms / times.pruned_ms
    said = [
        f"{_change('MACs', fewer)} and {_change('the time in layers', faster)} "
        f"({units.milliseconds(times.reference_ms)} to {units.milliseconds(times.pruned_ms)})"
    ]
    if fewer > 1 + _UNCHANGED and missing > _FOLLOWS * times.pruned_ms:
        expected = units.milliseconds(times.reference_ms / fewer)
        said.append(f"Had the time fallen as the MACs did, it would be {expected}")
        reasons = _reasons(times, fewer, missing)
        if reasons:
            said.append(f"The {units.milliseconds(missing)} beyond that are {reasons}")
    weighted = [layer for layer in times.layers if layer.pruned and layer.pruned.macs]
    missed = sum(layer.misses_multiple for layer in weighted)
    if missed:
        said.append(
            f"Of {len(weighted)} layer{'' if len(weighted) == 1 else 's'} with weights, {missed} "
            f"{'has' if missed == 1 else 'have'} channels that are no multiple of {times.multiple}"
        )
    return ". ".join(said) + "."


# The main table


def _answer_rows(report: Report) -> Iterator[Row]:
    """Yield accuracy where there are labels, else how far the two networks agree."""
    networks, agreement = report.networks, report.comparison.agreement
    accuracy = report.comparison.accuracy
    if accuracy is not None or agreement is None:
        tops = (known(units.share, each.top1) for each in (networks.reference, networks.pruned))
        yield ("top-1", *tops, told_gain(accuracy.drop) if accuracy else NOT_MEASURED)
        return
    if agreement.same_top1 is not None:
        yield ("same top-1", "", "", told_share(agreement.same_top1))
    yield ("relative error", "", "", known(units.error, agreement.largest_error))


def _cost_rows(report: Report) -> Iterator[Row]:
    """Yield what is counted; of any two files, what is known of one at least."""
    networks, comparison = report.networks, report.comparison
    one, other = networks.reference, networks.pruned
    costs: tuple[tuple[str, Callable[[float], str], _Both, float | None], ...] = (
        ("MACs", units.count, (one.macs, other.macs), comparison.macs_ratio),
        ("parameters", units.count, (one.params, other.params), comparison.params_ratio),
        ("file size", units.size, (one.bytes, other.bytes), comparison.bytes_ratio),
    )
    for name, write, values, ratio in costs:
        if report.against != "file" or any(value is not None for value in values):
            yield _cost_row(name, write, values, ratio)


def _cost_row(
    name: str,
    write: Callable[[float], str],
    values: _Both,
    ratio: float | None,
) -> Row:
    reference, pruned = values
    return name, known(write, reference), known(write, pruned), known(units.times, ratio)


def _latency_rows(report: Report) -> Iterator[Row]:
    reference, pruned = _medians(report.networks.reference), _medians(report.networks.pruned)
    for comparison in report.comparison.latency:
        size, ratio = comparison.batch_size, comparison.ratio
        yield (
            f"latency, batch {size}",
            units.milliseconds(reference[size]),
            units.milliseconds(pruned[size]),
            told_ratio(ratio),
        )
        faster = units.interval(units.speed_up, 1 / ratio.high, 1 / ratio.low)
        yield (f"speed-up, batch {size}", "", "", f"{units.speed_up(comparison.speed_up)} {faster}")


def _precision_rows(report: Report) -> Iterator[Row]:
    """Yield how long each network takes in its precision, over what it takes in a higher one."""
    by_size: dict[tuple[str, int], dict[str, str]] = {}
    for found in report.precisions:
        name = f"{found.precision} over {found.higher}, batch {found.batch_size}"
        cells = by_size.setdefault((name, found.batch_size), {})
        cells[found.network] = units.times(found.ratio.ratio)
    for (name, _), cells in by_size.items():
        yield name, cells.get("reference", NOT_MEASURED), cells.get("pruned", NOT_MEASURED), ""


def _predicted_rows(report: Report) -> Iterator[Row]:
    for found in report.prediction.latency if report.prediction else ():
        assert report.prediction is not None
        times = (units.milliseconds(ms) for ms in (found.reference_ms, found.pruned_ms))
        where = f"predicted on {report.prediction.device}, batch {found.batch_size}"
        yield where, *times, f"{units.times(found.ratio)} (predicted)"


def _medians(network: NetworkRecord) -> dict[int, float]:
    return {record.batch_size: record.summary.median_ms for record in network.latency}


# Time against MACs


def _contradict(layers: float, measured: RatioInterval) -> bool:
    """Whether the ratio of all layers is another than that of whole calls, or the other way."""
    rose, fell = layers > 1 + _UNCHANGED, layers < 1 - _UNCHANGED
    apart = max(layers / measured.ratio, measured.ratio / layers) > _TELLS
    return apart or (rose and measured.high < 1) or (fell and measured.low > 1)


def _withheld(times: LayerTimes, measured: RatioInterval) -> str:
    layers = units.times(times.pruned_ms / times.reference_ms)
    before, after = (units.milliseconds(ms) for ms in (times.reference_ms, times.pruned_ms))
    whole = told_ratio(measured)
    return (
        f"Where the time goes is left out: the layers add up to {layers} ({before} to {after}), "
        f"and whole calls were measured at {whole}, so what was profiled is not what was measured; "
        "profiling slows short layers, and other programs disturb it."
    )


def _reasons(times: LayerTimes, fewer: float, missing: float) -> str:
    """Return where the time lies beyond what ``fewer`` times less MACs would leave, in words.

    Empty where no part stands out, as when the layers do not add up to the whole.

    A layer with weights takes, beyond its time divided by ``fewer``, what it does not gain from its
    own MACs, and what its own MACs fell less than all of them; the second adds up to nothing if
    every MAC takes the same time.
    """
    weighted = [layer for layer in times.layers if _applies_weights(layer)]
    outside = [layer for layer in times.layers if not _applies_weights(layer)]
    shared = [layer for layer in weighted if layer.reference and layer.pruned]
    added = sum(_figure(layer.pruned, "milliseconds") for layer in weighted if not layer.reference)
    idle = sum(map(_not_gained, shared))
    beyond = [sum(_beyond(layer, fewer) for layer in group) for group in (outside, weighted)]
    elsewhere = "from saving MACs where they take {} time than elsewhere"
    # Each with how it is said of more time, and of less.
    found = [
        (
            beyond[0],
            f"outside of layers with weights{_largest(outside)}",
            "outside of layers with weights",
        ),
        (idle, f"in layers whose time did not follow their MACs{_slowest(shared)}", _FASTER),
        (added, "in layers that the reference lacks", ""),
        (beyond[1] - idle - added, elsewhere.format("less"), elsewhere.format("more")),
    ]
    least = _WORTH_SAYING * missing
    found.sort(reverse=True)
    more = [f"{units.milliseconds(ms)} {words}" for ms, words, _ in found if ms > least]
    less = [f"{units.milliseconds(-ms)} {words}" for ms, _, words in found if ms < -least]
    if not more:
        return ""
    return f"{_listed(more)}{f', less {_listed(less)}' if less else ''}"


def _beyond(layer: LayerRecord, fewer: float) -> float:
    """Return the milliseconds of a layer beyond its time in the reference divided by ``fewer``."""
    before = _figure(layer.reference, "milliseconds")
    return _figure(layer.pruned, "milliseconds") - before / fewer


def _not_gained(layer: LayerRecord) -> float:
    """Return the milliseconds of a layer beyond what its own MACs would leave."""
    assert layer.reference is not None
    return _beyond(layer, layer.reference.macs / max(1.0, _figure(layer.pruned, "macs")))


def _largest(layers: Sequence[LayerRecord]) -> str:
    """Return the operators that take the most time in the pruned network, in brackets."""
    there = [layer for layer in layers if layer.pruned]
    there.sort(key=lambda layer: -_figure(layer.pruned, "milliseconds"))
    return f" ({_listed([layer.name for layer in there[:_MOST_NAMED]])})" if there else ""


def _slowest(layers: Sequence[LayerRecord]) -> str:
    """Return the layers that gained least from their MACs, in brackets."""
    worst = sorted(layers, key=_not_gained, reverse=True)[:_MOST_NAMED]
    named = [
        f"{layer.name} with MACs {_ratio(layer, 'macs')} and time {_ratio(layer, 'milliseconds')}"
        for layer in worst
        if _not_gained(layer) > 0
    ]
    return f" ({', '.join(named)})" if named else ""


def _ratio(layer: LayerRecord, figure: _Figure) -> str:
    return units.speed_up(
        _figure(layer.reference, figure) / max(_figure(layer.pruned, figure), _LEAST)
    )


def _applies_weights(layer: LayerRecord) -> bool:
    return any(side is not None and side.macs for side in (layer.reference, layer.pruned))


def _change(what: str, ratio: float) -> str:
    """Return in words what a ratio, reference over pruned, says."""
    if abs(ratio - 1) < _UNCHANGED:
        return f"{what} stayed the same"
    return f"{what} {'fell' if ratio > 1 else 'rose'} {units.speed_up(max(ratio, 1 / ratio))}"


def _sum(times: LayerTimes, side: _Side, figure: _Figure) -> float:
    return sum(_figure(getattr(layer, side), figure) for layer in times.layers)


def _figure(figures: LayerFigures | None, name: _Figure) -> float:
    return 0 if figures is None else getattr(figures, name)


def _listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
