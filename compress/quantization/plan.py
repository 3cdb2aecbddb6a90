"""What is rounded to 8 bits while a network is trained: places, by the operators that are called.

A network calls its operators in the same order every time, so the number of a call names it. Who
makes a plan knows what the exported file will round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEVELS = 127
"""Largest 8-bit number that a range is mapped to."""


@dataclass(frozen=True)
class Activation:
    """A tensor that is rounded, with one scale for all of it."""

    name: str
    """That of the exported file."""
    positive: bool
    """Whether all 255 steps lie above zero; else they lie around it."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest 8-bit number, counted from zero."""
        return (0, 2 * LEVELS + 1) if self.positive else (-LEVELS - 1, LEVELS)

    @property
    def steps(self) -> int:
        """Steps of its range, of which a scale is one."""
        return self.bounds[1]


@dataclass(frozen=True)
class Layer:
    """A convolution or fully connected layer whose weight is rounded."""

    inputs: tuple[int, ...]
    """The activations that its weight is multiplied with, by number."""
    norm: str | None = None
    """The BatchNorm behind it that goes into its weight, a module by its qualified name."""
    half: bool = False
    """Whether the scales of its weight are numbers of half precision."""


@dataclass(frozen=True)
class Call:
    """One call of an operator in which something is rounded, or that is taken into another."""

    operator: str
    """Its name, by which another path through the network is noticed."""
    reads: Mapping[int, int] = field(default_factory=dict)
    """Which activation each of its arguments is, by the argument's number; all arguments are
    counted, those within lists too."""
    layer: Layer | None = None
    folded: bool = False
    """Whether it is a BatchNorm that a layer before it has taken in."""


@dataclass(frozen=True)
class Plan:
    """What is rounded in one network, for one form of 8-bit file."""

    form: str
    """Name of the form; targets give it as ``int8_form``."""
    weight_levels: int
    """Largest 8-bit number of a weight."""
    half: bool
    """Whether scales of activations are numbers of half precision."""
    activations: tuple[Activation, ...]
    calls: Mapping[int, Call]
    """By number; calls that return no tensor are not counted."""
    total: int
    """How many calls there are."""
