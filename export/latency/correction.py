"""Whole networks correct what layers take by themselves.

    milliseconds = fixed + scale * sum over layers (1 + a_shape) * alone + b_shape * written
                 + curve(bytes of all weights)

``scale`` is near 1. The deviations ``a`` and ``b`` of each shape are kept small (ridge), ``b``
stands for what follows a layer unfused: pooling, a normalisation that cannot be folded. The curve
rises where the weights of a network no longer stay in a cache from call to call, which no layer by
itself can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.latency.table import Curve, Milliseconds

_KNOTS = tuple(1e6 * mb for mb in (0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96))
"""Bytes of weights between which the curve is straight."""
_RIDGE = 0.03
"""Weight of the squared deviations of shapes against the mean squared relative error."""
_CURVE_RIDGE = 1e-3
"""The same, of the differences of slopes of the curve."""
_FEWEST = 4
"""Networks beyond a knot, for it to be one."""
_MS_PER_BYTE = 1e-7
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
    knots = np.array([k for k in _KNOTS if k == 0 or np.sum(networks.weights > k) >= _FEWEST])
    bends = len(knots)
    terms = np.concatenate(
        [
            np.full((len(times), 1), usual),
            networks.alone.sum(axis=1, keepdims=True),
            _rises(networks.weights, knots) * _MS_PER_BYTE,
            networks.alone,
            networks.written / widest * usual / shapes,
        ],
        axis=1,
    )
    free = 2 + bends
    ridge = np.array([1e-9, 1e-9, *[0.0] * bends, *[_RIDGE] * (2 * shapes)])
    share = len(times) / 40
    smooth = np.zeros((bends, terms.shape[1]))  # slopes that follow each other are alike
    smooth[:, 2:free] = np.sqrt(_CURVE_RIDGE * share) * np.diff(np.eye(bends + 1), axis=0)[:, 1:]
    rows = np.concatenate([terms / times[:, None], np.diag(np.sqrt(ridge * share)), smooth])
    wanted = np.concatenate([np.ones(len(times)), np.zeros(len(ridge) + bends)])
    lowest = np.concatenate([np.zeros(free), np.full(2 * shapes, -np.inf)])
    found = lsq_linear(rows, wanted, bounds=(lowest, np.inf)).x
    return Correction(
        fixed=float(found[0] * usual),
        scale=found[1] + found[free : free + shapes],
        per_channel=found[free + shapes :] / widest * usual / shapes,
        curve=_curve(knots, found[2:free] * _MS_PER_BYTE),
    )


def _rises(weights: Numbers, knots: Numbers) -> Numbers:
    """Return (networks, knots): the bytes that lie between each knot and the next."""
    ends = np.append(knots[1:], np.inf)
    return np.clip(weights[:, None], knots, ends) - knots


def _curve(knots: Numbers, slopes: Numbers) -> Curve:
    """Return the curve that has a slope from each knot on."""
    places = np.append(knots, 2 * knots[-1] + 1e6)
    heights = _rises(places, knots) @ slopes
    return Curve(tuple(map(float, places)), tuple(map(float, heights)))
