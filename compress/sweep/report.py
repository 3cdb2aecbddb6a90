"""What a sweep found: one JSON document; and from it rows of figures, a table and a picture.

The picture is accuracy against MACs and parameters, as in Molchanov 2019.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from compress.checkpoints.checkpoint import tool_versions
from compress.runs.plots import (
    BLUE,
    FAINT,
    INK,
    VERMILION,
    count_along,
    new_figure,
    plain_axes,
    plain_legend,
    short_count,
    write_figure,
)
from compress.sweep.plan import SearchState, pareto_front
from compress.sweep.points import COSTS, STAGES
from compress.sweep.request import SCHEMA_VERSION, Goal
from compress.terminal.sheet import Row, Sheet, fill

if TYPE_CHECKING:  # slow to import, so the functions below do it when they draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ON_FRONT = {"macs": "pareto_macs", "params": "pareto_params"}
"""For each cost that networks are compared by, the key that says who is on the front."""
COLUMNS = {"macs": "MACs", "params": "params"}
HEADER = ("network", "MACs", "params", "top-1", "change", "Pareto")
UNKNOWN = "-"
SIZE = (11.0, 4.4)
"""Of the picture, in inches."""
AXES = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True)
class PointState:
    """What is known of one point."""

    name: str
    budget: str
    metrics: Mapping[str, Any] | None
    """None before it is finished."""
    error: str | None
    seconds: float


def sweep_document(
    goal: Goal,
    *,
    accuracy: Mapping[str, Any] | None,
    dense_seconds: float,
    points: Sequence[PointState],
    search: SearchState | None,
    chosen: str | None,
) -> dict[str, Any]:
    """Return the document of ``sweep.json``.

    Args:
        goal: what it was to find.
        accuracy: of the dense network, once it is there.
        dense_seconds: what it took.
        points: in their order.
        search: where the search stands, if it is one.
        chosen: the name of the point that a search which is over has found.
    """
    rows = [_point_row(point, accuracy) for point in points]
    costs = next((point.metrics["dense"] for point in points if point.metrics), None)
    dense: dict[str, Any] = {"name": "dense", "status": "done" if accuracy else "unfinished"}
    dense |= {"seconds": round(dense_seconds, 1), **(costs or dict.fromkeys(COSTS))}
    done = bool(rows) and all(row["status"] == "done" for row in rows)
    dense |= {key: accuracy[key] if accuracy else None for key in ("top1", "top5")}
    for cost, key in ON_FRONT.items():
        _mark_front([row for row in (dense, *rows) if row["status"] == "done"], cost, key)
    return {
        "schema_version": SCHEMA_VERSION,
        "asked": goal.model_dump(mode="json"),
        "complete": done and not (search and search.next),
        "dense": dense,
        "points": rows,
        "search": asdict(search) if search else None,
        "chosen": chosen,
        "tools": tool_versions(),
    }


def top1_of(row: Mapping[str, Any]) -> float:
    """Return the top-1 of a finished row, in percent: of the dense network, or after finetuning."""
    return row["finetuned"]["top1"] if "finetuned" in row else row["top1"]


def _point_row(point: PointState, accuracy: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": point.name,
        "budget": point.budget,
        "status": "failed" if point.error else "unfinished",
        "error": point.error,
        "seconds": round(point.seconds, 1),
    }
    found = point.metrics
    if found is None or accuracy is None:
        return row
    ratios = {f"{key}_ratio": found["costs"][key] / found["dense"][key] for key in COSTS}
    drop = accuracy["top1"] - found["finetuned"]["top1"]
    stages = {stage: found[stage] for stage in STAGES}
    return {**row, "status": "done", **found["costs"], **ratios, **stages, "drop_pp": drop}


def _mark_front(rows: list[dict[str, Any]], cost: str, key: str) -> None:
    known = [row for row in rows if row[cost] is not None]
    front = pareto_front([(row[cost], top1_of(row)) for row in known])
    for row, on_front in zip(known, front, strict=True):
        row[key] = on_front


def sweep_csv(document: Mapping[str, Any]) -> str:
    """Return one row for each network, the dense one first; figures that are not known are empty.

    Accuracies are in percent, ``drop_pp`` in percentage points, ``seconds`` of wall time.
    """
    accuracies = [f"{stage}_{top}" for stage in STAGES for top in ("top1", "top5")]
    ratios = [f"{cost}_ratio" for cost in COSTS]
    header = ["name", "budget", "status", *COSTS, *ratios, *accuracies, "drop_pp"]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*header, *ON_FRONT.values(), "seconds"], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(_flat(row) for row in (document["dense"], *document["points"]))
    return text.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(row)
    if "budget" not in row:  # the dense network is what it is, at every stage
        flat |= {f"finetuned_{top}": row[top] for top in ("top1", "top5")}
        flat |= {f"{cost}_ratio": 1.0 for cost in COSTS if row["status"] == "done"}
    for stage in STAGES:
        flat |= {f"{stage}_{top}": value for top, value in row.get(stage, {}).items()}
    return flat


# The table for the terminal


def render_sweep(document: Mapping[str, Any], folder: Path) -> RenderableType:
    """Return what ``compress sweep`` prints: a row for each network, and which one was found."""
    sheet = sweep_sheet(document, folder)
    table = Table(title=sheet.title, title_justify="left")
    fill(table, sheet)
    return Stack(table, *map(Text, sheet.notes))


def sweep_sheet(document: Mapping[str, Any], folder: Path) -> Sheet:
    """Return the table as text; shares are of the dense network's costs."""
    points = document["points"]
    rows = (_dense_cells(document["dense"]), *map(_point_cells, points))
    title = f"{document['asked']['config']['model']['name']}: accuracy against cost"
    return Sheet(title, HEADER, rows, tuple(_notes(document, folder)))


def _dense_cells(dense: Mapping[str, Any]) -> Row:
    costs = (short_count(dense[key]) if dense[key] else UNKNOWN for key in ON_FRONT)
    top1 = UNKNOWN if dense["top1"] is None else f"{dense['top1']:.2f} %"
    return ("dense", *costs, top1, "", _fronts(dense))


def _point_cells(row: Mapping[str, Any]) -> Row:
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
    on = [title for cost, title in COLUMNS.items() if row.get(ON_FRONT[cost])]
    return "both" if len(on) == len(COLUMNS) else ", ".join(on)


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


# The picture


def plot_sweep(path: Path, document: Mapping[str, Any]) -> None:
    """Draw the finished networks of a sweep, and write a PNG atomically; nothing if there are none.

    Raises:
        OutputError: the file cannot be written; an earlier one is kept.
    """
    if any(row["status"] == "done" for row in document["points"]):
        write_figure(path, draw_sweep(document))


def draw_sweep(document: Mapping[str, Any]) -> Figure:
    """Return the figure of ``plot_sweep``: one panel for each cost."""
    done = [row for row in document["points"] if row["status"] == "done"]
    config = document["asked"]["config"]
    title = f"{config['model']['name']}, {config['prune']['criterion']}: accuracy against cost"
    figure = new_figure(*SIZE, title)
    panels = figure.subplots(1, len(ON_FRONT), sharey=True)
    for axes, cost in zip(panels, ON_FRONT, strict=True):
        _draw_panel(axes, document["dense"], done, cost)
    panels[0].set_ylabel("top-1 after finetuning (%)")
    return figure


def _draw_panel(
    axes: Axes, dense: Mapping[str, Any], done: Sequence[Mapping[str, Any]], cost: str
) -> None:
    key = ON_FRONT[cost]
    front = sorted((row[cost], top1_of(row)) for row in (dense, *done) if row[key])
    axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.3, label="Pareto front", zorder=1)
    for label, on_front, style in (("pruned", True, BLUE), ("pruned, beaten", False, FAINT)):
        shown = [(row[cost], top1_of(row)) for row in done if row[key] == on_front]
        if shown:
            costs, top1 = zip(*shown, strict=True)
            axes.scatter(costs, top1, s=26, color=style, label=label, zorder=2)
    at = dense[cost], top1_of(dense)
    axes.scatter([at[0]], [at[1]], s=44, marker="s", color=VERMILION, label="dense", zorder=2)
    for row in (dense, *done):
        place = (row[cost], top1_of(row))
        name = axes.annotate(
            row.get("budget", "dense"), place, (0, 6), textcoords="offset points", ha="center"
        )
        name.set(fontsize=7, color=INK if row[key] else FAINT)
    axes.set_xlim(0, 1.1 * dense[cost])
    axes.margins(y=0.18)
    count_along(axes.xaxis)
    axes.set_xlabel(AXES[cost])
    plain_legend(axes, loc="lower right")
    plain_axes(axes, "y")
