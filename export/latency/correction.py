"""Whole networks correct what layers take by themselves.

    milliseconds = fixed + scale * sum over layers (1 + a_shape) * alone + b_shape * written
                 + curve(bytes of all weights)

``scale`` is near 1. The deviations ``a`` and ``b`` of each shape are kept small (ridge), ``b``
stands for what follows a layer unfused: pooling, a normalisation that cannot be folded. The curve
rises where the weights of a network no longer stay in a cache from call to call, which no layer by
itself can tell; it is convex between knots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.latency.table import Curve, Milliseconds

_KNOTS_MB = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0, 64.0, 96.0)
_RIDGE = 0.03
"""Weight of the squared deviations of shapes against the mean squared relative error."""
_CURVE_RIDGE = 1e-4
_FEWEST = 4
"""Networks beyond a knot, for it to be one."""
_MS_PER_MB = 0.1
"""Scale of the curve's slopes: 10 GB/s."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Networks:
    """Whole networks, by what the correction needs."""

    alone: Numbers
    """(networks, shapes): milliseconds of the layers of each shape by themselves."""
    written: Numbers
    """(networks, shapes): channels that they write."""
    weights: Numbers
    """(networks,): bytes of all weights."""


@dataclass(frozen=True)
class Correction:
    """What was fitted."""

    fixed: float
    scale: Numbers
    """(shapes,)"""
    per_channel: Numbers
    """(shapes,): milliseconds per channel written."""
    curve: Curve

    def milliseconds(self, networks: Networks) -> Milliseconds:
        """Return the predicted time of each network."""
        curved = np.array([self.curve.tangent(weights)[0] for weights in networks.weights])
        layers = networks.alone @ self.scale + networks.written @ self.per_channel
        return self.fixed + layers + curved


def fitted_correction(networks: Networks, milliseconds: Sequence[float]) -> Correction:
    """Fit the correction to measured networks."""
    from scipy.optimize import lsq_linear

    times = np.asarray(milliseconds, dtype=float)
    shapes = networks.alone.shape[1]
    usual = float(np.median(times))
    widest = np.maximum(networks.written.max(axis=0), 1.0)
    knots = [0.0, *(mb for mb in _KNOTS_MB if np.sum(networks.weights > 1e6 * mb) >= _FEWEST)]
    bends = knots[1:]
    megabytes = networks.weights[:, None] / 1e6
    terms = np.concatenate(
        [
            np.full((len(times), 1), usual),
            networks.alone.sum(axis=1, keepdims=True),
            np.maximum(0.0, megabytes - np.array(bends)) * _MS_PER_MB,
            networks.alone,
            networks.written / widest * usual / shapes,
        ],
        axis=1,
    )
    free = 2 + len(bends)
    ridge = np.array([1e-9, 1e-9, *[_CURVE_RIDGE] * len(bends), *[_RIDGE] * (2 * shapes)])
    rows = np.concatenate([terms / times[:, None], np.diag(np.sqrt(ridge * len(times) / 40))])
    wanted = np.concatenate([np.ones(len(times)), np.zeros(len(ridge))])
    lowest = np.concatenate([np.zeros(free), np.full(2 * shapes, -np.inf)])
    found = lsq_linear(rows, wanted, bounds=(lowest, np.inf)).x
    return Correction(
        fixed=float(found[0] * usual),
        scale=found[1] + found[free : free + shapes],
        per_channel=found[free + shapes :] / widest * usual / shapes,
        curve=_curve(knots, found[2:free] * _MS_PER_MB),
    )


def _curve(knots: Sequence[float], slopes: Numbers) -> Curve:
    """Return the curve of slopes that are added at each knot but the first."""
    places = [*knots, 2 * knots[-1] + 1.0]
    heights = [
        float(sum(s * max(0.0, at - k) for s, k in zip(slopes, knots[1:], strict=True)))
        for at in places
    ]
    return Curve(tuple(1e6 * at for at in places), tuple(heights))
