"""The time of a layer by its widths, as a sum of stairs, from measurements at some widths.

Kernels compute channels in blocks, and blocks in sets; what is left over costs a whole one. So a
layer's time is a sum of products of ``ceil(width / step)`` of both its widths, with steps that
double from the channel multiple on, and coefficients that are not negative: more channels never
take less time. Least squares of relative errors (scipy's ``nnls``) find the coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.latency.table import Milliseconds, Widths

_LARGEST_STEP = 128
_FACTORS = (4, 2)
"""From step to step, of what is read and of what is written; the stairs of the first are gentle."""
LEAST_MS = 1e-6
"""A difference of two measurements may come out below nothing."""


@dataclass(frozen=True)
class Stairs:
    """A fitted sum of stairs."""

    multiple: int
    largest: tuple[int, int]
    """Widths of the largest layer; they scale the terms."""
    coefficients: NDArray[np.float64]

    def at(self, read: Widths, written: Widths) -> Milliseconds:
        """Return the time at widths."""
        return np.maximum(
            _terms(read, written, self.multiple, self.largest) @ self.coefficients, LEAST_MS
        )


def fitted_stairs(pairs: Widths, milliseconds: Milliseconds, multiple: int) -> Stairs:
    """Fit stairs to measurements.

    Args:
        pairs: (measurements, 2), channels read and written.
        milliseconds: what each measurement gave.
        multiple: the channel multiple.
    """
    from scipy.optimize import nnls

    read, written = pairs.T
    largest = int(read.max()), int(written.max())
    times = np.maximum(milliseconds, LEAST_MS)
    terms = _terms(read, written, multiple, largest)
    coefficients, _ = nnls(terms / times[:, None], np.ones(len(times)))
    return Stairs(multiple, largest, coefficients)


def _terms(
    read: Widths, written: Widths, multiple: int, largest: tuple[int, int]
) -> NDArray[np.float64]:
    sides = []
    for widths, most, factor in zip((read, written), largest, _FACTORS, strict=True):
        sizes = [multiple]
        while sizes[-1] * factor <= min(most, _LARGEST_STEP):
            sizes.append(sizes[-1] * factor)
        stairs = [np.ceil(np.asarray(widths) / size) * size / most for size in sizes]
        sides.append([np.ones(np.shape(widths)), *stairs])
    return np.stack([one * other for one in sides[0] for other in sides[1]], axis=-1)
