"""How closely two networks answer alike, as a report holds it; ``export.verify`` defines it."""

from __future__ import annotations

import math

from pydantic import Field

from bench.record import Record
from bench.statistics.shares import Share, share_of
from export.verify import Agreement


class OutputAgreement(Record):
    """One output of both networks on the same inputs."""

    name: str
    """As the reference calls it."""
    relative_error: float | None = Field(ge=0)
    """Largest difference over the reference's largest value; None where all of these are zero and
    the other network's are not."""
    cosine: float = Field(ge=-1, le=1)
    same_top1: Share | None = None
    """Share of inputs with the same most likely class, where the output is (N, classes)."""


class AgreementRecord(Record):
    """How closely the pruned network answers as the reference does."""

    inputs: int = Field(ge=1)
    outputs: tuple[OutputAgreement, ...]
    """The one that classes are read from first."""

    @property
    def same_top1(self) -> Share | None:
        """Share of inputs with the same class, by the first output that names one."""
        return next((found.same_top1 for found in self.outputs if found.same_top1), None)

    @property
    def largest_error(self) -> float | None:
        """Largest relative error of any output; None where one has none."""
        errors = [found.relative_error for found in self.outputs]
        return None if None in errors else max(filter(None, errors), default=0.0)


def output_agreement(name: str, found: Agreement, *, confidence: float) -> OutputAgreement:
    """Return the figures of one output; a single logit names no class."""
    same = share_of(found.same, found.rows, confidence=confidence) if found.classes > 1 else None
    error = found.relative_error
    return OutputAgreement(
        name=name,
        relative_error=None if math.isinf(error) else error,
        cosine=found.cosine,
        same_top1=same,
    )
