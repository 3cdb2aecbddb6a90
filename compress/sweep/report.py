"""What a sweep found: one JSON document; and from it rows of figures and a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from compress.checkpoints.checkpoint import tool_versions
from compress.config import Budget
from compress.sweep.flips import Flips, ShareInterval, drop_interval
from compress.sweep.plan import SearchState, misses, pareto_front
from compress.sweep.points import COSTS, STAGES
from compress.sweep.request import SCHEMA_VERSION, Goal
from compress.sweep.times import time_words
from compress.terminal.sheet import Row, Sheet, fill, short_count
from compress.terminal.table import TextTable

ON_FRONT = {"macs": "pareto_macs", "params": "pareto_params"}
"""For each cost that networks are compared by, the key that says who is on the front."""
TIME = "measured_share"
"""The cost that they are compared by as well where it was measured of all."""
ON_TIME_FRONT = "pareto_latency"
TIMES = ("predicted_ms", "predicted_share", "measured_ms", "measured_share")
COLUMNS = {ON_TIME_FRONT: "time", "pareto_macs": "MACs", "pareto_params": "params"}
HEADER = ("network", "MACs", "params", "top-1", "change", "Pareto")
TIMED_HEADER = ("network", "MACs", "predicted", "measured", "top-1", "change", "Pareto")
UNKNOWN = "-"
MOST_IMAGES = 2**53
"""More are no count of images, and no float."""
DROP = ("drop_pp", "drop_low_pp", "drop_high_pp")


@dataclass(frozen=True)
class PointState:
    """What is known of one point."""

    name: str
    budget: Budget
    metrics: Mapping[str, Any] | None
    """None before it is finished."""
    error: str | None
    seconds: float
    flips: Flips | None = None
    """None before they are counted."""


def sweep_document(
    goal: Goal,
    *,
    accuracy: Mapping[str, Any] | None,
    dense_seconds: float,
    points: Sequence[PointState],
    search: SearchState | None,
    chosen: str | None,
    interval: ShareInterval,
) -> dict[str, Any]:
    """Return the document of ``sweep.json``.

    Args:
        goal: what it was to find.
        accuracy: of the dense network, once it is there.
        dense_seconds: what it took.
        points: in their order.
        search: where the search stands, if it is one.
        chosen: the name of the point that a search which is over has found.
        interval: gives the drop of accuracy its bounds.
    """
    rows = [_point_row(point, accuracy, interval) for point in points]
    costs = next((point.metrics["dense"] for point in points if point.metrics), None)
    dense: dict[str, Any] = {"name": "dense", "status": "done" if accuracy else "unfinished"}
    dense |= {"seconds": round(dense_seconds, 1), **(costs or dict.fromkeys(COSTS))}
    done = bool(rows) and all(row["status"] == "done" for row in rows)
    dense |= {key: accuracy[key] if accuracy else None for key in ("top1", "top5")}
    dense["images"] = accuracy.get("images") if accuracy else None
    dense |= _dense_time(rows)
    networks = [row for row in (dense, *rows) if row["status"] == "done"]
    for cost, key in ON_FRONT.items():
        _mark_front(networks, [row[cost] for row in networks], key)
    if all(TIME in row.get("latency", {}) for row in networks):
        _mark_front(networks, [row["latency"][TIME] for row in networks], ON_TIME_FRONT)
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


def _point_row(
    point: PointState, accuracy: Mapping[str, Any] | None, interval: ShareInterval
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": point.name,
        "budget": str(point.budget),
        "status": "failed" if point.error else "unfinished",
        "error": point.error,
        "seconds": round(point.seconds, 1),
    }
    found = point.metrics
    if found is None or accuracy is None:
        return row
    ratios = {f"{key}_ratio": found["costs"][key] / found["dense"][key] for key in COSTS}
    drop = accuracy["top1"] - found["finetuned"]["top1"]
    row |= {"status": "done", **found["costs"], **ratios, **{s: found[s] for s in STAGES}}
    row["drop_pp"] = drop
    if point.flips:
        row["drop_interval_pp"] = drop_interval(point.flips, interval)
        row["flips"] = point.flips._asdict()
    if latency := found.get("latency"):
        row["latency"] = latency
        if TIME in latency:
            row["missed"] = misses(point.budget, latency)
    return row


def stored_flips(row: Mapping[str, Any]) -> Flips | None:
    """Return what was counted for a row of a document; None where it says nothing of use."""
    found = row.get("flips")
    try:
        flips = Flips(**found) if isinstance(found, Mapping) else None
    except TypeError:
        return None
    if flips is None or not all(type(count) is int and count >= 0 for count in flips):
        return None
    possible = flips.to_wrong + flips.to_right <= flips.images and 0 < flips.images < MOST_IMAGES
    return flips if possible else None


def _dense_time(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the dense network takes: it was measured beside every point."""
    found = [row["latency"] for row in rows if "latency" in row]
    if not found:
        return {}
    time = {"predicted_ms": found[0]["predicted_ms"] / found[0]["predicted_share"]}
    time["predicted_share"] = 1.0
    if measured := [each["measured_dense_ms"] for each in found if TIME in each]:
        time |= {"measured_ms": median(measured), TIME: 1.0}
    return {"latency": time}


def _mark_front(rows: list[dict[str, Any]], costs: Sequence[float | None], key: str) -> None:
    known = [(row, cost) for row, cost in zip(rows, costs, strict=True) if cost is not None]
    front = pareto_front([(cost, top1_of(row)) for row, cost in known])
    for (row, _), on_front in zip(known, front, strict=True):
        row[key] = on_front


def sweep_csv(document: Mapping[str, Any]) -> str:
    """Return one row for each network, the dense one first; figures that are not known are empty.

    Accuracies are in percent, ``drop_pp`` in percentage points, ``seconds`` of wall time. Where
    budgets are times, there are columns of them.
    """
    accuracies = [f"{stage}_{top}" for stage in STAGES for top in ("top1", "top5")]
    ratios = [f"{cost}_ratio" for cost in COSTS]
    times = [*TIMES, "measured_low", "measured_high", "missed"] if is_timed(document) else []
    fronts = [*ON_FRONT.values(), *([ON_TIME_FRONT] if is_measured(document) else [])]
    header = ["name", "budget", "status", *COSTS, *ratios, *accuracies, *DROP, *times]
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*header, *fronts, "seconds"], extrasaction="ignore", lineterminator="\n"
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
    flat |= row.get("latency", {})
    flat |= zip(("measured_low", "measured_high"), flat.get("measured_interval", ()), strict=False)
    flat |= zip(DROP[1:], flat.get("drop_interval_pp", ()), strict=False)
    return flat


def is_timed(document: Mapping[str, Any]) -> bool:
    """Whether the budget of a network that is there is a time."""
    return "latency" in document["dense"]


def is_measured(document: Mapping[str, Any]) -> bool:
    """Whether the times of all networks that are there were measured."""
    return ON_TIME_FRONT in document["dense"]


# The table for the terminal


def render_sweep(document: Mapping[str, Any], folder: Path) -> RenderableType:
    """Return what ``compress sweep`` prints: a row for each network, and which one was found."""
    sheet = sweep_sheet(document, folder)
    table = TextTable(title=sheet.title, title_justify="left")
    fill(table, sheet)
    return Stack(table, *map(Text, sheet.notes))


def sweep_sheet(document: Mapping[str, Any], folder: Path) -> Sheet:
    """Return the table as text; shares are of the dense network's costs."""
    timed = is_timed(document)
    fronts = (ON_TIME_FRONT, "pareto_macs") if is_measured(document) else tuple(ON_FRONT.values())
    networks = (document["dense"], *document["points"])
    rows = tuple((*_cells(row, timed), _fronts(row, fronts)) for row in networks)
    title = f"{document['asked']['config']['model']['name']}: accuracy against cost"
    notes = tuple(_notes(document, folder))
    return Sheet(title, TIMED_HEADER if timed else HEADER, rows, notes)


def _cells(row: Mapping[str, Any], timed: bool) -> Row:
    """Return name, costs, accuracy and its change of one network."""
    if "budget" not in row:
        costs = _dense_times(row) if timed else _dense_costs(row)
        top1 = UNKNOWN if row["top1"] is None else f"{row['top1']:.2f} %"
        return ("dense", *costs, top1, "")
    if row["status"] != "done":
        return (row["budget"], *(UNKNOWN,) * (3 if timed else 2), row["status"], "")
    costs = _times(row) if timed else _costs(row)
    top1, change = row["finetuned"]["top1"], 0.0 - row["drop_pp"]
    return (row["budget"], *costs, f"{top1:.2f} %", f"{change:+.2f}{_bounds(row)} pp")


def _bounds(row: Mapping[str, Any]) -> str:
    """Return the interval of a change of accuracy, after a blank; nothing where none is known."""
    if "drop_interval_pp" not in row:
        return ""
    low, high = (0.0 - bound for bound in reversed(row["drop_interval_pp"]))
    return f" [{low:+.2f}, {high:+.2f}]"


def drop_words(row: Mapping[str, Any]) -> str:
    """Return the drop of a finished row in a sentence, with its interval where it is known."""
    said = f"It drops by {row['drop_pp']:.2f} pp"
    if "drop_interval_pp" not in row:
        return f"{said}."
    low, high = row["drop_interval_pp"]
    images = row["flips"]["images"]
    return f"{said}, 95 % interval {low:.2f} to {high:.2f} pp on the same {images} images."


def _dense_costs(dense: Mapping[str, Any]) -> Row:
    return tuple(short_count(dense[key]) if dense[key] else UNKNOWN for key in ON_FRONT)


def _costs(row: Mapping[str, Any]) -> Row:
    ratios = ((short_count(row[key]), 100 * row[f"{key}_ratio"]) for key in ON_FRONT)
    return tuple(f"{count} ({share:.1f} %)" for count, share in ratios)


def _dense_times(dense: Mapping[str, Any]) -> Row:
    keys = ("predicted_ms", "measured_ms")
    found = (dense["latency"].get(key) for key in keys)
    times = (UNKNOWN if ms is None else f"{ms:.4g} ms" for ms in found)
    return (short_count(dense["macs"]), *times)


def _times(row: Mapping[str, Any]) -> Row:
    """Return the share of MACs, and times in the unit of the budget."""
    found, in_ms = row.get("latency", {}), row["budget"].endswith("ms")
    unit = "ms" if in_ms else "share"
    times = (found.get(f"{how}_{unit}") for how in ("predicted", "measured"))
    words = (
        UNKNOWN if time is None else f"{time:.4g} ms" if in_ms else f"{100 * time:.1f} %"
        for time in times
    )
    return (f"{100 * row['macs_ratio']:.1f} %", *words)


def _fronts(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    on = [COLUMNS[key] for key in keys if row.get(key)]
    return "both" if len(on) == len(keys) else ", ".join(on)


def _notes(document: Mapping[str, Any], folder: Path) -> list[str]:
    notes = []
    search, chosen = document["asked"]["search"], document["chosen"]
    if chosen:
        row = next(row for row in document["points"] if row["name"] == chosen)
        notes.append(
            f"The smallest network found within {search['max_drop']:g} pp of the dense one: "
            f"{row['budget']}, in {folder / chosen}. {drop_words(row)}"
        )
    for row in document["points"]:
        if row["error"]:
            notes.append(f"{row['budget']} failed: {row['error']}")
        elif row.get("missed"):
            said = time_words(Budget.model_validate(row["budget"]), row["latency"])
            notes.append(f"{row['budget']}: {said}; it is finished and kept.")
    return notes
