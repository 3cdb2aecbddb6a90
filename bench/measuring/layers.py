"""Why latency does not follow MACs: both saved, layer by layer.

A runtime fuses layers, adds work of its own, and runs odd widths as if they were wider. So the
profile of both networks is set against the MACs that their ONNX files hold, and whatever applies
no weights is summed up by operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bench.measuring.latency import Images
from bench.measuring.layer_matching import layer_times
from bench.measuring.layer_records import LayerFigures, LayerRecord, LayerTimes
from bench.units import milliseconds, speed_up

if TYPE_CHECKING:
    from bench.subject import Subject
    from export.profiling import Profile

Side = Literal["reference", "pruned"]
Figure = Literal["macs", "milliseconds"]

_ROUNDS = 3  # in turns, so that what slows the machine for a while slows both networks
_UNCHANGED = 0.005  # a ratio this close to 1 is said to have stayed
_FOLLOWS = 0.02  # share of the pruned time by which it may miss the MACs and still follow them
_WORTH_SAYING = 0.05  # share of what is missing that a layer must hold to be named
_MOST_NAMED = 3
_FASTER = "in layers whose time fell more than their MACs"
_LEAST = 1e-6  # keeps a layer that took no time from dividing by zero


def profile_layers(
    reference: Subject,
    pruned: Subject,
    *,
    images: Images,
    calls: int,
    multiple: int,
    threads: int | None = None,
) -> LayerTimes | None:
    """Profile both networks in turns, and set their layers side by side.

    Args:
        reference: what pruning is compared with; both have an ONNX file, which tells MACs and
            channels.
        pruned: the pruned network.
        images: one batch (N, C, H, W).
        calls: how many of each network are profiled.
        multiple: of channels, that the target wants for the precision.
        threads: of a runtime on the CPU; None leaves the choice to it.

    Returns:
        None where the runtime cannot tell; see ``export.profiling.profile_network``.

    Raises:
        ConfigError: fewer calls than one.
        CheckpointError: a file is missing or damaged.
        EnvironmentUnfitError: the runtime or its device is not there.
        DataError: the images are not what the networks read.
        ModelError: a network cannot be computed, or its ONNX file leaves shapes open.
    """
    from export.profiling import joined_profiles
    from export.profiling.onnx_layers import read_layers

    layers = [read_layers(subject.onnx) for subject in (reference, pruned) if subject.onnx]
    found: tuple[list[Profile], list[Profile]] = ([], [])
    rounds = max(1, min(_ROUNDS, calls))
    for index in range(rounds):
        share = calls // rounds + (index < calls % rounds)
        for subject, profiles in zip((reference, pruned), found, strict=True):
            profile = _profile(subject, images, calls=share, threads=threads)
            if profile is None:
                return None
            profiles.append(profile)
    both = [(of, joined_profiles(profiles)) for of, profiles in zip(layers, found, strict=True)]
    return layer_times(both[0], both[1], batch_size=len(images), multiple=multiple)


def explain(times: LayerTimes) -> str:
    """Say in a few sentences why the time did not fall as the MACs did.

    Had all time fallen by the ratio of MACs, the pruned network would take so much; what it takes
    beyond that is split among its causes.
    """
    before, after = _sum(times, "reference", "macs"), _sum(times, "pruned", "macs")
    fewer = before / after if before and after else 1.0
    missing = times.pruned_ms - times.reference_ms / fewer
    faster = times.reference_ms / times.pruned_ms
    said = [
        f"{_change('MACs', fewer)} and {_change('the time in layers', faster)} "
        f"({milliseconds(times.reference_ms)} to {milliseconds(times.pruned_ms)})"
    ]
    if fewer > 1 + _UNCHANGED and missing > _FOLLOWS * times.pruned_ms:
        expected = milliseconds(times.reference_ms / fewer)
        said.append(f"Had the time fallen as the MACs did, it would be {expected}")
        reasons = _reasons(times, fewer, missing)
        if reasons:
            said.append(f"The {milliseconds(missing)} beyond that are {reasons}")
    weighted = [layer for layer in times.layers if layer.pruned and layer.pruned.macs]
    missed = sum(layer.misses_multiple for layer in weighted)
    if missed:
        said.append(
            f"Of {len(weighted)} layer{'' if len(weighted) == 1 else 's'} with weights, {missed} "
            f"{'has' if missed == 1 else 'have'} channels that are no multiple of {times.multiple}"
        )
    return ". ".join(said) + "."


def _profile(
    subject: Subject, images: Images, *, calls: int, threads: int | None
) -> Profile | None:
    from export.profiling import profile_network

    return profile_network(
        subject.source,
        subject.runtime,
        images,
        calls=calls,
        threads=threads,
        precision=subject.torch_precision,
        channels_last=subject.config.channels_last,
        compiled=subject.config.compiled,
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
    more = [f"{milliseconds(ms)} {words}" for ms, words, _ in found if ms > least]
    less = [f"{milliseconds(-ms)} {words}" for ms, _, words in found if ms < -least]
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


def _ratio(layer: LayerRecord, figure: Figure) -> str:
    return speed_up(_figure(layer.reference, figure) / max(_figure(layer.pruned, figure), _LEAST))


def _applies_weights(layer: LayerRecord) -> bool:
    return any(side is not None and side.macs for side in (layer.reference, layer.pruned))


def _change(what: str, ratio: float) -> str:
    """Return in words what a ratio, reference over pruned, says."""
    if abs(ratio - 1) < _UNCHANGED:
        return f"{what} stayed the same"
    return f"{what} {'fell' if ratio > 1 else 'rose'} {speed_up(max(ratio, 1 / ratio))}"


def _sum(times: LayerTimes, side: Side, figure: Figure) -> float:
    return sum(_figure(getattr(layer, side), figure) for layer in times.layers)


def _figure(figures: LayerFigures | None, name: Figure) -> float:
    return 0 if figures is None else getattr(figures, name)


def _listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
