"""Says when a network is slower in a lower precision than in a higher one, on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from bench import units

if TYPE_CHECKING:  # a report prints itself by this module
    from bench.reports.schema import Report
    from compress.config import Precision

_ORDER: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""From the highest precision to the lowest."""


class _Slower(NamedTuple):
    """One network that takes longer in the lower of two precisions."""

    network: str
    batch_size: int
    ratio: tuple[float, float, float]
    """Lower over higher precision, and the bounds of its interval."""


def slower_precisions(report: Report, names: tuple[str, str]) -> Iterator[str]:
    """Yield a sentence for each pair of precisions whose lower is the slower one.

    That is, where the whole interval says so; what could be either is not told.

    Args:
        report: the report.
        names: what its reference and its pruned network are called.
    """
    found: dict[tuple[str, str], list[_Slower]] = {}
    for lower, higher, slower in (*_beside(report, names), *_against(report)):
        if slower.ratio[1] > 1:
            found.setdefault((lower, higher), []).append(slower)
    for (lower, higher), those in found.items():
        told = ", ".join(
            f"{one.network} {units.times(one.ratio[0])} "
            f"{units.interval(units.ratio, *one.ratio[1:])} at batch {one.batch_size}"
            for one in those
        )
        yield (
            f"{lower} is slower here than {higher}, though less precise: {told}; {higher} is the "
            "better choice there."
        )


def _beside(report: Report, names: tuple[str, str]) -> Iterator[tuple[str, str, _Slower]]:
    """Yield what was measured of each network beside the comparison itself."""
    called = dict(zip(("reference", "pruned"), names, strict=True))
    for found in report.precisions:
        ratio = (found.ratio.ratio, found.ratio.low, found.ratio.high)
        slower = _Slower(called[found.network], found.batch_size, ratio)
        yield found.precision, found.higher, slower


def _against(report: Report) -> Iterator[tuple[str, str, _Slower]]:
    """Yield the comparison itself, where both networks are one in two precisions."""
    one, other = report.networks.reference, report.networks.pruned
    if one.weights_sha256 != other.weights_sha256 or None in (one.precision, other.precision):
        return
    ranks = [_ORDER.index(each.precision) for each in (one, other) if each.precision]
    if ranks[0] == ranks[1]:
        return
    for found in report.comparison.latency:
        ratio = (found.ratio.ratio, found.ratio.low, found.ratio.high)
        if ranks[0] > ranks[1]:  # the reference is the less precise
            ratio = (1 / ratio[0], 1 / ratio[2], 1 / ratio[1])
        lower, higher = (_ORDER[rank] for rank in sorted(ranks, reverse=True))
        yield lower, higher, _Slower("this network", found.batch_size, ratio)
