"""A latency table, as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.latency.table import Grid, LatencyTable, Widths
from compress.networks.layers import LayerShape
from compress.terminal.sheet import Row, Sheet, fill

if TYPE_CHECKING:
    from compress.terminal.table import TextTable

_HEADER = ("layer", "read", "written", "narrowest, ms", "widest, ms")


def table_sheet(table: LatencyTable) -> Sheet:
    """Return one row per kind of layer: its widths, and the time of the narrowest and the widest"""
    rows = tuple(_row(shape, grid) for shape, grid in table.grids.items())
    facts = table.fingerprint
    title = f"{facts.runtime} {facts.version}, {facts.precision}, batch {facts.batch}"
    return Sheet(title, _HEADER, rows, tuple(_notes(table)))


def render_latency(table: LatencyTable, path: Path) -> TextTable:
    """Return a latency table for the terminal."""
    from compress.terminal.table import TextTable

    sheet = table_sheet(table)
    shown = TextTable(
        title=sheet.title, caption="\n".join((*sheet.notes, f"in {path}")), caption_justify="left"
    )
    fill(shown, sheet)
    return shown


def _row(shape: LayerShape, grid: Grid) -> Row:
    known = grid.milliseconds[~np.isnan(grid.milliseconds)]
    ends = (f"{known.min():.4f}", f"{known.max():.4f}")
    written = _span(grid.written) if len(grid.written) else "with it"
    return (str(shape), _span(grid.read), written, *ends)


def _span(axis: Widths) -> str:
    """Return an axis in words: ``8..64 by 8``, or its few widths."""
    steps = set(np.diff(axis).tolist())
    if len(axis) > 3 and len(steps) == 1:
        return f"{axis[0]}..{axis[-1]} by {steps.pop()}"
    return ", ".join(map(str, axis)) if len(axis) <= 3 else f"{axis[0]}..{axis[-1]}, {len(axis)}"


def _notes(table: LatencyTable) -> Iterator[str]:
    facts, count = table.fingerprint, len(table.error.pairs)
    threads = "1 thread" if facts.threads == 1 else f"{facts.threads} threads"
    yield f"on {facts.machine}, {threads}"
    yield f"dense network: {table.dense_ms:.4g} ms, measured"
    yield f"beside the layers: {table.intercept:.4f} ms"
    cold = table.curve.tangent(table.dense_weights)[0]
    if cold > 0:
        yield f"weights of the dense network that no cache keeps: {cold:.3f} ms"
    if count:
        yield (
            f"error on {count} whole networks that had no part in it: mean {table.error.mean:.1%}, "
            f"largest {table.error.largest:.1%}"
        )
    yield f"two halves of the measurements differ by {table.spread:.1%} or less, nine times in ten"
