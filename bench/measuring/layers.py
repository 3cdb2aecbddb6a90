"""Where the time of two networks goes: their layers side by side, each with its profile and MACs.

The profile of both is set against the MACs that their ONNX files hold, and whatever applies no
weights is summed up by operator. Layers of one name in both are one row. What a runtime ran for
several layers at once cannot be split, so these layers are one row in both networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.measuring.latency import Images
from bench.measuring.records import LayerFigures, LayerRecord, LayerTimes

if TYPE_CHECKING:
    from bench.measuring.subject import Subject
    from export.profiling import LayerTime, Profile
    from export.profiling.onnx_layers import OnnxLayer

_ROUNDS = 3  # in turns, so that what slows the machine for a while slows both networks
_REPEATED = re.compile(r"_\d+$")  # torch's exporter adds it to a module that is called once more
_MOST_NAMED = 3


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


def layer_times(
    reference: tuple[Sequence[OnnxLayer], Profile],
    pruned: tuple[Sequence[OnnxLayer], Profile],
    *,
    batch_size: int,
    multiple: int,
) -> LayerTimes | None:
    """Set the layers of two networks, each with its profile, side by side.

    None if a profile shows no trace of a layer that multiplies, for then its time would be taken
    for that of something else.
    """
    left, right = _placed(*reference), _placed(*pruned)
    if left is None or right is None:
        return None
    shared = [names for network in (left, right) for names, _ in network.work if names]
    groups = _joined(_in_order(list(left.layers), list(right.layers)), shared)
    rows = [_layer_row(names, left, right, multiple) for names in groups]
    kinds = dict.fromkeys(time.kind for network in (left, right) for time in network.others)
    return LayerTimes(
        batch_size=batch_size,
        calls=left.profile.calls,
        multiple=multiple,
        reference_ms=left.profile.total_ms,
        pruned_ms=right.profile.total_ms,
        layers=(*rows, *(_other_row(kind, left, right) for kind in kinds)),
    )


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


@dataclass(frozen=True)
class _Network:
    """The layers of one network, and which of them each part of its profile computes."""

    layers: dict[str, OnnxLayer]
    profile: Profile
    work: list[tuple[tuple[str, ...], LayerTime]]
    """Names of layers, and what was run for them together."""

    @property
    def others(self) -> list[LayerTime]:
        """What was run for none of the layers."""
        return [time for names, time in self.work if not names]

    def figures(self, names: tuple[str, ...]) -> LayerFigures | None:
        """Return what layers have together; None if there is none of them."""
        present = [self.layers[name] for name in names if name in self.layers]
        if not present:
            return None
        return LayerFigures(
            macs=sum(layer.macs for layer in present),
            milliseconds=sum(time.milliseconds for of, time in self.work if set(of) & set(names)),
            channels=present[0].outputs if len(names) == 1 else None,
        )

    def other_figures(self, kind: str) -> LayerFigures | None:
        """Return what all other work of one operator takes; None if there is none."""
        times = [time.milliseconds for time in self.others if time.kind == kind]
        return LayerFigures(macs=0, milliseconds=sum(times), channels=None) if times else None


def _placed(layers: Sequence[OnnxLayer], profile: Profile) -> _Network | None:
    """Return a network whose layers are all found in its profile, else None."""
    reported = {node for time in profile.layers for node in time.nodes}
    computed: dict[str, list[str]] = {}
    for layer in layers:
        # A node of the file, or a module by its path, which may have been called once more.
        known_as = (layer.node, layer.name, _REPEATED.sub("", layer.name))
        node = next(filter(reported.__contains__, known_as), None)
        if node is None:
            return None
        computed.setdefault(node, []).append(layer.name)
    work = [
        (tuple(dict.fromkeys(name for node in time.nodes for name in computed.get(node, ()))), time)
        for time in profile.layers
    ]
    return _Network({layer.name: layer for layer in layers}, profile, work)


def _in_order(reference: list[str], pruned: list[str]) -> list[str]:
    """Return all names; those that only the pruned network has come after what they follow."""
    order = list(reference)
    for before, name in zip([None, *pruned], pruned, strict=False):
        if name not in order:
            order.insert(0 if before is None else order.index(before) + 1, name)
    return order


def _joined(order: list[str], together: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return names in groups: those that were run together, in either network, are in one."""
    groups = {name: {name} for name in order}
    for names in together:
        group = set().union(*(groups[name] for name in names))
        groups.update(dict.fromkeys(group, group))
    return list(dict.fromkeys(tuple(filter(groups[name].__contains__, order)) for name in order))


def _layer_row(
    names: tuple[str, ...], reference: _Network, pruned: _Network, multiple: int
) -> LayerRecord:
    known = {**pruned.layers, **reference.layers}
    rest = f"{len(names) - 1} more" if len(names) > _MOST_NAMED else " + ".join(names[1:])
    return LayerRecord(
        name=f"{names[0]} + {rest}" if rest else names[0],
        kind=" + ".join(dict.fromkeys(known[name].kind for name in names)),
        reference=reference.figures(names),
        pruned=pruned.figures(names),
        misses_multiple=any(
            _misses(pruned.layers[name], multiple) for name in names if name in pruned.layers
        ),
    )


def _misses(layer: OnnxLayer, multiple: int) -> bool:
    """Whether a layer runs on channels that pruning chose and that are no multiple."""
    reads = layer.inputs % multiple and not layer.reads_image
    writes = layer.outputs % multiple and not layer.writes_logits
    return bool(reads or writes)


def _other_row(kind: str, reference: _Network, pruned: _Network) -> LayerRecord:
    weighted = {layer.kind for layer in (*reference.layers.values(), *pruned.layers.values())}
    return LayerRecord(
        name=f"other {kind}" if kind in weighted else kind,
        kind=kind,
        reference=reference.other_figures(kind),
        pruned=pruned.other_figures(kind),
        misses_multiple=False,
    )
