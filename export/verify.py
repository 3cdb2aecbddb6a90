"""Do two runtimes, or two networks, compute the same function?

Conventions. An output is compared in float64, over all inputs at once. The relative error is the
largest difference of any of its values over the largest magnitude among the reference's values, so
it has no unit and small values cannot inflate it. A reference of zeros alone has no magnitude: the
error is 0 where the candidate gives zeros too, and infinite where it does not. The cosine
similarity is that of all values as one vector. Top-1 agreement is the share of rows, of an output
of shape (N, classes), for which both name the same class; two logits that nearly tie may trade
places within the limit on the error. Integers and truth values are decisions, as those of an
argmax, and two values that nearly tie may be decided otherwise: of these, one in ``TIES`` may
differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import numpy as np

from compress.config import ParityLimits
from compress.errors import ConfigError, DataError, ParityError
from export.runners import Runner

TIES = 1000
"""Of so many decisions one may differ."""


@dataclass
class Agreement:
    """How closely one output of a candidate follows that of its reference, batch by batch."""

    rows: int = 0
    """Rows of (N, classes) that were compared; 0 for an output of another shape."""
    same: int = 0
    """Rows with the same largest value."""
    classes: int = 0
    """Values in such a row."""
    _difference: float = field(default=0.0, repr=False)
    _scale: float = field(default=0.0, repr=False)
    _product: float = field(default=0.0, repr=False)
    _squares: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def add(self, expected: np.ndarray, actual: np.ndarray, *, rows: int | None = None) -> None:
        """Take in one batch of finite values; both are of one shape.

        With ``rows`` only an output of so many rows is one of (N, classes).
        """
        ours, theirs = (np.asarray(values, dtype=np.float64) for values in (expected, actual))
        self._difference = max(self._difference, float(np.abs(ours - theirs).max(initial=0)))
        self._scale = max(self._scale, float(np.abs(ours).max(initial=0)))
        self._product += float(np.vdot(ours, theirs))
        squares = zip(self._squares, (ours, theirs), strict=True)
        first, second = (total + float(np.vdot(values, values)) for total, values in squares)
        self._squares = first, second
        if is_logits(expected, rows):
            self.rows += len(ours)
            self.classes = ours.shape[1]
            self.same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())

    @property
    def relative_error(self) -> float:
        """Largest difference of a value over the largest magnitude of the reference's."""
        if self._scale == 0:
            return 0.0 if self._difference == 0 else float("inf")
        return self._difference / self._scale

    @property
    def cosine(self) -> float:
        """Cosine similarity of all values."""
        norms = sqrt(self._squares[0]) * sqrt(self._squares[1])
        if norms == 0:
            return 1.0 if self._difference == 0 else 0.0
        # Rounding may carry it past the ends, and a limit may be one of them.
        return min(1.0, max(-1.0, self._product / norms))


def is_logits(output: np.ndarray, rows: int | None = None) -> bool:
    """Tell whether an output is one of (N, classes): so many rows of floating-point numbers."""
    shaped = output.ndim == 2 and output.shape[1] > 0 and output.dtype.kind == "f"
    return shaped and rows in (None, len(output))


@dataclass(frozen=True)
class ParityResult:
    """How closely a candidate follows its reference at one batch size."""

    reference: str
    """Name of the runner that is believed."""
    candidate: str
    """Name of the runner that is judged."""
    batch_size: int
    """Images in a batch."""
    images: int
    """Images in all batches."""
    relative_error: float
    """Largest difference of a logit over the largest logit of the reference."""
    cosine: float
    """Cosine similarity of all logits."""
    top1_agreement: float
    """Share of images, 0 to 1, whose top-1 class is the same."""
    limits: dict[str, float]
    """The limits that these figures keep, by their names."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


def check_parity(
    reference: Runner,
    candidate: Runner,
    images: np.ndarray,
    *,
    batch_sizes: Sequence[int] = (1, 3, 8),
    limits: ParityLimits,
) -> list[ParityResult]:
    """Prove that two entered runners agree, at every batch size.

    Args:
        reference: the runner that is believed.
        candidate: the runner that is judged.
        images: (N, C, H, W) float32; a last batch that is not full is filled from the start.
        batch_sizes: sizes to compare at, one result each.
        limits: what counts as agreement.

    Raises:
        ParityError: at the first batch size where they disagree or one gives NaN or infinity.
        DataError: there are no images, or not of the shape that the network reads.
        ConfigError: there are no batch sizes, or one is below 1.
    """
    if len(images) == 0:
        raise DataError("parity is checked on real images and none were given")
    if min(batch_sizes, default=0) < 1:
        raise ConfigError(
            f"parity needs batch sizes of at least 1, not {list(batch_sizes)}; "
            "set export.parity_batches"
        )
    return [_compare(reference, candidate, images, size, limits) for size in batch_sizes]


@contextmanager
def judging(name: str, precision: str) -> Iterator[None]:
    """Name the file that a ParityError of the block is about, and the limits that it keeps."""
    try:
        yield
    except ParityError as error:
        raise ParityError(
            f"{name} is not written: {error}; export.limits.{precision} holds the limits"
        ) from error


def _compare(
    reference: Runner, candidate: Runner, images: np.ndarray, size: int, limits: ParityLimits
) -> ParityResult:
    names = f"{candidate.name} disagrees with {reference.name} at batch size {size}"
    found = Agreement()
    for batch in _batches(images, size):
        expected, actual = reference.infer(batch), candidate.infer(batch)
        if expected.shape != actual.shape:
            raise ParityError(f"{names}: shape {actual.shape} instead of {expected.shape}")
        for runner, logits in ((reference, expected), (candidate, actual)):
            if not np.isfinite(logits).all():
                raise ParityError(f"{names}: {runner.name} gives NaN or infinity")
        found.add(expected, actual)
    result = ParityResult(
        reference=reference.name,
        candidate=candidate.name,
        batch_size=size,
        images=found.rows,
        relative_error=found.relative_error,
        cosine=found.cosine,
        top1_agreement=found.same / found.rows,
        limits=limits.model_dump(),
    )
    if broken := _broken(result, limits):
        raise ParityError(f"{names}: {broken}")
    return result


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(images), size):
        yield images[np.arange(start, start + size) % len(images)]


def _broken(result: ParityResult, limits: ParityLimits) -> str | None:
    """Return the first limit that a result breaks and all of its figures, as half a sentence."""
    error, agreement = result.relative_error, result.top1_agreement
    if error > limits.relative_error:
        said = f"relative error {error:.1e} exceeds the limit {limits.relative_error:.1e}"
    elif result.cosine < limits.cosine:
        said = f"cosine {result.cosine:.5f} is below the limit {limits.cosine:g}"
    elif agreement < limits.top1_agreement:
        said = f"top-1 agreement {agreement:.0%} is below the limit {limits.top1_agreement:.0%}"
    else:
        return None
    return (
        f"{said} (error {error:.1e}, cosine {result.cosine:.5f}, "
        f"top-1 agrees on {agreement:.0%} of {result.images} images)"
    )


def largest_error(
    names: Sequence[str],
    expected: Sequence[Sequence[np.ndarray]],
    found: Sequence[Sequence[np.ndarray]],
    sizes: Sequence[int],
    limit: float = ParityLimits().relative_error,
) -> float:
    """Return the largest relative error of any output of any shape and type in any batch.

    Args:
        names: the outputs, in order.
        expected: torch's, by batch.
        found: ONNX Runtime's, by batch.
        sizes: of the batches, for messages.
        limit: most that may be.

    Raises:
        ParityError: an output lies outside the limits.
    """
    worst = 0.0
    for believed, judged, size in zip(expected, found, sizes, strict=True):
        for name, ours, theirs in zip(names, believed, judged, strict=True):
            error, fault = _judged(ours, theirs, limit)
            if fault:
                raise ParityError(
                    f"ONNX Runtime and torch disagree about {name!r} at batch size {size}: "
                    f"{fault}; see whether the network computes the same twice, or set parity=False"
                )
            worst = max(worst, error)
    return worst


def _judged(expected: np.ndarray, found: np.ndarray, limit: float) -> tuple[float, str | None]:
    """Return the relative error, and what is wrong with it."""
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        kinds = (f"{array.dtype} of shape {array.shape}" for array in (found, expected))
        return 0.0, " instead of ".join(kinds)
    if expected.dtype.kind != "f":
        differing = int(np.count_nonzero(expected != found))
        allowed = expected.size // TIES
        said = f"{differing} of {expected.size} values differ and {allowed} may"
        return 0.0, said if differing > allowed else None
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return 0.0, "there are NaN or infinities"
    agreement = Agreement()
    agreement.add(expected, found)
    error = agreement.relative_error
    if error <= limit:
        return error, None
    if not expected.any():
        return error, f"torch gives zeros alone and ONNX Runtime up to {np.abs(found).max():.1e}"
    return error, f"the relative error {error:.1e} exceeds the limit {limit:.1e}"
