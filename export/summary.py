"""What an export wrote, as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.terminal.sheet import Row, Sheet, fill, short_size

if TYPE_CHECKING:
    from compress.terminal.table import TextTable
    from export.stage import Exported

_HEADER = ("file", "size", "for", "error", "cosine", "top-1")


def export_sheet(exported: Exported) -> Sheet:
    """Return one row per file: its size and, of its batch sizes, the worst agreement with torch."""
    rows = [
        *map(_onnx_row, exported.onnx.values()),
        *map(_engine_row, exported.engines.values()),
    ]
    return Sheet("Export", _HEADER, tuple(rows), tuple(_notes(exported)))


def render_export(exported: Exported, folder: Path) -> TextTable:
    """Return the files of an export as a table for the terminal."""
    from compress.terminal.table import TextTable

    document = next(iter(exported.onnx.values()))
    title = f"{document['architecture']} for {document['target']}, {document['precision']}"
    sheet, limits = export_sheet(exported), document["parity"][0]["limits"]
    allowed = f"limits: error {limits['relative_error']:.1e}"
    allowed += f", cosine {limits['cosine']:g}" if limits["cosine"] > -1 else ""
    agreement = limits["top1_agreement"]
    allowed += f", top-1 agreement {agreement:.0%}" if agreement else ""
    table = TextTable(
        title=f"{title}: compared with torch in float32",
        caption="\n".join((allowed, f"in {folder}", *sheet.notes)),
        caption_justify="left",
    )
    fill(table, sheet)
    return table


def _onnx_row(document: dict[str, Any]) -> Row:
    onnx = document["onnx"]
    fits = f"opset {onnx['opset']}, IR {onnx['ir_version']}"
    return (onnx["file"], short_size(onnx["bytes"]), fits, *_agreement(document["parity"]))


def _engine_row(document: dict[str, Any]) -> Row:
    engine = document["engine"]
    sm = f"SM {document['sm']}" if document["sm"] else "any GPU"
    return (engine["file"], short_size(engine["bytes"]), sm, *_agreement(document["parity"]))


def _agreement(parity: list[dict[str, Any]] | None) -> Row:
    if not parity:
        return ("not run", "", "")
    return (
        f"{max(found['relative_error'] for found in parity):.1e}",
        f"{min(found['cosine'] for found in parity):.6f}",
        f"{min(found['top1_agreement'] for found in parity):.1%}",
    )


def _notes(exported: Exported) -> Iterator[str]:
    for document in exported.engines.values():
        found = document["inspection"]
        if found is not None:
            fused = sum(count for size, count in found["fused"].items() if int(size) > 1)
            yield f"{document['engine']['file']}: {found['layers']} layers, {fused} of them fused"
        if document["parity"] is None:
            yield f"{document['engine']['file']} was not run: there is no GPU for it here"
    for name, folder in exported.triton.items():
        yield f"Triton serves {name} from {folder}"
