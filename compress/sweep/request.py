"""What ``compress sweep`` is asked for: the options, and the goal that follows from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.config import Budget, RunConfig
from compress.errors import ConfigError
from compress.files.documents import Section, read_text, validated
from compress.runs.launch import asked_config
from compress.runs.request import SweepRequest
from compress.sweep.plan import Search

SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z]+-[\w.+-]+")
"""Of a point's directory, which ``name_of`` gives it."""
LONGEST = 1e9
"""Seconds of a network; those of thirty years are none that were counted."""


class Goal(Section):
    """What a sweep is to find, as ``sweep.json`` keeps it."""

    budgets: tuple[Budget, ...] = ()
    """The grid; empty for a search."""
    search: Search | None = None
    checkpoint: Path | None = None
    """Where the dense weights came from."""
    weights: str | None = None
    """Which of them, where the file holds several sets."""
    config: RunConfig
    """Of every run, but for the budget and the device."""


def check_options(request: SweepRequest) -> None:
    """Refuse options that contradict each other before anything is loaded.

    Raises:
        ConfigError: the first that does.
    """
    given = bool(request.budgets), request.max_drop is not None
    if request.resume:
        weights = (request.checkpoint, request.weights)
        others = (request.config, request.asked, *weights, request.data)
        if any(given) or request.search_options or any(others):
            raise ConfigError(
                "--resume goes on with what the sweep was asked for: give no more than --output, "
                "--devices and --jobs"
            )
    elif all(given) or not any(given):
        raise ConfigError(
            "compress sweep needs --budget macs=0.7,0.5,0.3 for a grid, or --max-drop PP for the "
            "smallest network within it; one of both"
        )
    elif request.budgets and request.search_options:
        raise ConfigError("--kind, --lowest, --tolerance and --points belong to --max-drop")


def goal_of(request: SweepRequest) -> Goal:
    """Return the goal of a new sweep, before the network and the machine are looked at.

    Raises:
        ConfigError: a configuration, a budget or a figure of the search that cannot be understood.
    """
    _, config = asked_config(request)
    checkpoint = request.checkpoint and request.checkpoint.expanduser().resolve()
    if checkpoint and checkpoint.is_relative_to(request.output.resolve()):
        raise ConfigError(f"{checkpoint} lies in --output {request.output}: give another --output")
    document = {
        "budgets": split_budgets(request.budgets),
        "search": None if request.budgets else request.search_options,
        "checkpoint": checkpoint,
        "weights": request.weights,
        "config": config,
    }
    return validated(Goal, document, source="compress sweep")


def split_budgets(options: Iterable[str]) -> list[str]:
    """Return each budget once: ``macs=0.7,0.5`` stands for macs=0.7 and macs=0.5."""
    found: list[str] = []
    for option in options:
        kind = ""
        for part in option.split(","):
            named, separator, value = part.partition("=")
            kind, number = (named, value) if separator else (kind, named)
            found.append(f"{kind.strip()}={number.strip()}" if kind else number)
    return list(dict.fromkeys(found))


def read_goal(file: Path) -> tuple[Goal, dict[str, Any]]:
    """Return the goal of an earlier sweep, and what its document knows of every network.

    Raises:
        ConfigError: the file is damaged or of another version.
    """
    try:
        document = json.loads(read_text(str(file)))
        version = document["schema_version"]
        goal = document["asked"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged: start anew with --overwrite") from error
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{file} is of schema version {version} and this tool reads {SCHEMA_VERSION}: start "
            "anew with --overwrite"
        )
    return validated(Goal, goal, source=str(file)), _what_is_known(document)


def _what_is_known(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the document of an earlier sweep tells the next: no more, and nothing else."""
    rows = document.get("points")
    points = [_row(row) for row in rows] if isinstance(rows, list) else []
    return {
        "complete": document.get("complete") is True,
        "dense": {**_row(document.get("dense")), "name": "dense"},
        "points": [row for row in points if row["name"]],
    }


def _row(found: Any) -> dict[str, Any]:
    """Return name, seconds and flips of a network."""
    row = found if isinstance(found, dict) else {}
    name: Any = row.get("name")
    seconds: Any = row.get("seconds")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    return {
        # It becomes a directory, which an overwritten sweep empties.
        "name": name if isinstance(name, str) and _NAME.fullmatch(name) else "",
        "seconds": float(seconds) if number and 0 <= seconds <= LONGEST else 0.0,
        "flips": row.get("flips"),
    }
