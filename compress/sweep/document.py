"""What a sweep found, as one JSON document and as rows of a table of figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from compress.checkpoints.checkpoint import tool_versions
from compress.sweep.pareto import pareto_front
from compress.sweep.plan import SearchState
from compress.sweep.points import COSTS, STAGES
from compress.sweep.request import SCHEMA_VERSION, Asked

ON_FRONT = {"macs": "pareto_macs", "params": "pareto_params"}
"""For each cost that networks are compared by, the key that says who is on the front."""


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
    asked: Asked,
    *,
    accuracy: Mapping[str, Any] | None,
    dense_seconds: float,
    points: Sequence[PointState],
    search: SearchState | None,
    chosen: str | None,
) -> dict[str, Any]:
    """Return the document of ``sweep.json``.

    Args:
        asked: what for.
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
        "asked": asked.model_dump(mode="json"),
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
