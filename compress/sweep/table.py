"""The table of ``compress sweep`` for the terminal, from its document alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from compress.runs.plots import short_count
from compress.sweep.document import ON_FRONT
from compress.terminal.sheet import Row, Sheet, fill

FRONT_TITLES = {"macs": "MACs", "params": "params"}
HEADER = ("network", "MACs", "params", "top-1", "change", "Pareto")
UNKNOWN = "-"


def render_sweep(document: Mapping[str, Any], folder: Path) -> RenderableType:
    """Return what ``compress sweep`` prints: a row for each network, and which one was found."""
    sheet = sweep_sheet(document, folder)
    table = Table(title=sheet.title, title_justify="left")
    fill(table, sheet)
    return Stack(table, *map(Text, sheet.notes))


def sweep_sheet(document: Mapping[str, Any], folder: Path) -> Sheet:
    """Return the table as text; shares are of the dense network's costs."""
    points = document["points"]
    rows = (_dense_row(document["dense"]), *map(_point_row, points))
    title = f"{document['asked']['config']['model']['name']}: accuracy against cost"
    return Sheet(title, HEADER, rows, tuple(_notes(document, folder)))


def _dense_row(dense: Mapping[str, Any]) -> Row:
    costs = (short_count(dense[key]) if dense[key] else UNKNOWN for key in ON_FRONT)
    top1 = UNKNOWN if dense["top1"] is None else f"{dense['top1']:.2f} %"
    return ("dense", *costs, top1, "", _fronts(dense))


def _point_row(row: Mapping[str, Any]) -> Row:
    if row["status"] != "done":
        return (row["budget"], UNKNOWN, UNKNOWN, row["status"], "", "")
    return (
        row["budget"],
        *(f"{short_count(row[key])} ({100 * row[f'{key}_ratio']:.1f} %)" for key in ON_FRONT),
        f"{row['finetuned']['top1']:.2f} %",
        f"{0.0 - row['drop_pp']:+.2f} pp",
        _fronts(row),
    )


def _fronts(row: Mapping[str, Any]) -> str:
    on = [title for cost, title in FRONT_TITLES.items() if row.get(ON_FRONT[cost])]
    return "both" if len(on) == len(FRONT_TITLES) else ", ".join(on)


def _notes(document: Mapping[str, Any], folder: Path) -> list[str]:
    notes = []
    search, chosen = document["asked"]["search"], document["chosen"]
    if chosen:
        budget = next(row["budget"] for row in document["points"] if row["name"] == chosen)
        notes.append(
            f"The smallest network found within {search['max_drop']:g} pp of the dense one: "
            f"{budget}, in {folder / chosen}."
        )
    notes += [
        f"{row['budget']} failed: {row['error']}" for row in document["points"] if row["error"]
    ]
    return notes
