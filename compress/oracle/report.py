"""The tables of ``compress oracle``, for the terminal and as Markdown, from one document."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from compress.networks.groups import ChannelGraph
from compress.oracle.correlation import COEFFICIENTS, Values
from compress.terminal.sheet import Sheet, fill, markdown_lines

SCOPE_TITLES = {
    "layers": "mean over layers",
    "all": "all layers",
    "residual": "residual",
    "other": "not residual",
}
MEANING = {
    "spearman": "Spearman's rank correlation with the squared change of the loss",
    "kendall": "Kendall's tau-b with the squared change of the loss",
    "pearson": "Pearson's correlation with the squared change of the loss",
}
UNDEFINED = "-"


def render_tables(document: Mapping[str, Any]) -> RenderableType:
    """Return what ``compress oracle`` prints."""
    parts: list[RenderableType] = [Text(_headline(document)), Text(_costs(document))]
    for sheet in _sheets(document):
        table = Table(
            title=sheet.title,
            title_justify="left",
            caption=Text("\n".join(sheet.notes)) if sheet.notes else None,
            caption_justify="left",
        )
        fill(table, sheet)
        parts += [Text(), table]
    return Stack(*parts)


def render_markdown(document: Mapping[str, Any]) -> str:
    """Return the same tables as a page."""
    lines = [f"# {_headline(document)}", "", _costs(document), ""]
    for sheet in _sheets(document):
        lines += [*markdown_lines(sheet), ""]
        lines += [line for note in sheet.notes for line in (note, "")]
    return "\n".join(lines)


def units_csv(graph: ChannelGraph, changes: Values, importances: Mapping[str, Values]) -> str:
    """Return one row for each unit: its change of the loss, and its importance by each criterion.

    Args:
        graph: the channel graph.
        changes: change of the loss by unit.
        importances: of each criterion, by unit.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "unit", "residual", "loss_change", *importances])
    for group in graph.prunable:
        for index, unit in enumerate(group.units.tolist()):
            numbers = [changes[unit], *(values[unit] for values in importances.values())]
            row = [group.name, index, int(group.residual), *(f"{x:.9g}" for x in numbers)]
            writer.writerow(row)
    return text.getvalue()


def by_spearman(criteria: Mapping[str, Any]) -> list[str]:
    """Return the names of the criteria, the highest mean over layers first."""

    def place(name: str) -> float:
        value = criteria[name]["spearman"]["layers"]
        return np.inf if value is None else -value

    return sorted(criteria, key=place)


def _headline(document: Mapping[str, Any]) -> str:
    images = document["images"]
    return (
        f"{document['architecture']}: importance against the true change of the loss, "
        f"{images['count']:,} images ({images['split']})"
    )


def _costs(document: Mapping[str, Any]) -> str:
    cost = document["cost"]
    return (
        f"{cost['units']:,} units removed one at a time, at the cost of "
        f"{cost['forward_passes']:,.0f} forward passes per image; "
        f"loss of the dense network {document['dense_loss']:.4g}"
    )


def _sheets(document: Mapping[str, Any]) -> list[Sheet]:
    criteria = document["criteria"]
    names = by_spearman(criteria)
    header = ("criterion", *SCOPE_TITLES.values())
    sheets = []
    for coefficient in COEFFICIENTS:
        found = {name: criteria[name][coefficient] for name in names}
        rows = tuple(
            (name, *(_number(found[name][scope]) for scope in SCOPE_TITLES)) for name in names
        )
        sheets.append(Sheet(MEANING[coefficient], header, rows, _notes(found)))
    if document["pairs"]:
        sheets.append(_pair_sheet(document["pairs"]))
    return sheets


def _notes(found: Mapping[str, Any]) -> tuple[str, ...]:
    missing = {
        name: sum(value is None for value in each["by_layer"].values())
        for name, each in found.items()
    }
    left_out = ", ".join(f"{n} of {name}" for name, n in missing.items() if n)
    notes = []
    if any(each[scope] is None for each in found.values() for scope in SCOPE_TITLES):
        notes.append(f"{UNDEFINED}: not defined, because there are under 3 units or all are equal.")
    if left_out:
        notes.append(f"Left out of the mean, for the same reason: {left_out} layers.")
    return tuple(notes)


def _pair_sheet(pairs: Mapping[str, Any]) -> Sheet:
    several = pairs["scope"] == "all"
    rows = tuple(
        (
            pick["by"],
            " + ".join(
                f"{group} {unit}" if several else f"{unit}" for group, unit in pick["units"]
            ),
            f"{pick['loss_change']:+.3g}",
            f"{pick['regret']:.3g}",
            f"{pick['rank']:,}",
        )
        for pick in (pairs["best"], *pairs["picks"])
    )
    note = (
        "The sum of the two single changes against the change of the pair: Pearson "
        f"{_number(pairs['sum_pearson'])}, Spearman {_number(pairs['sum_spearman'])}."
    )
    title = f"The best of {pairs['count']:,} pairs ({pairs['scope']}), and who would choose what"
    header = ("chosen by", "units", "change of the loss", "regret", "rank")
    return Sheet(title, header, rows, (note,))


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"
