"""Where the time of two networks goes, layer by layer, as a report holds it.

MACs are per image, with one multiply-add counted as one; times are milliseconds per call.
"""

from __future__ import annotations

from pydantic import Field

from bench.record import Record


class LayerFigures(Record):
    """One layer of one network."""

    macs: int = Field(ge=0)
    """Per image; 0 for what applies no weights."""
    milliseconds: float = Field(ge=0)
    """Per call."""
    channels: int | None = None
    """That it writes; None for what is no convolution or linear layer, or several."""


class LayerRecord(Record):
    """One layer of both networks."""

    name: str
    """Of a convolution or linear layer, its path in the network; of other work, its operator, all
    of which is one row. Layers that a runtime cannot tell apart are one row too."""
    kind: str
    """The operator."""
    reference: LayerFigures | None
    """None if the network has no such layer."""
    pruned: LayerFigures | None
    """None if the network has no such layer."""
    misses_multiple: bool
    """Whether the pruned layer reads or writes channels that are no multiple of what the target
    wants. Those of the image and of the logits are given and never count."""


class LayerTimes(Record):
    """Where the time of both networks goes."""

    batch_size: int = Field(ge=1)
    calls: int = Field(ge=1)
    """Profiled calls of each network."""
    multiple: int = Field(ge=1)
    """Channels run best on the target in multiples of this."""
    reference_ms: float = Field(gt=0)
    """All layers of a call together."""
    pruned_ms: float = Field(gt=0)
    """All layers of a call together."""
    layers: tuple[LayerRecord, ...]
    """Convolutions and linear layers in the order of the network, then all other work."""
