"""What pruning has made of a network, for people: in a terminal, in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoints.checkpoint import structure_of
from compress.checkpoints.description import Structure
from compress.networks.groups import ChannelGraph, Mask
from compress.terminal.sheet import Sheet, fill, text_lines

if TYPE_CHECKING:
    from compress.terminal.table import TextTable

HEADER = ("group", "dense", "kept", "note")


@dataclass(frozen=True)
class Summary:
    """Widths and costs of a network, dense and as it is.

    ``print`` shows it as text, rich as a table, a notebook as HTML.
    """

    structure: Structure
    budget: str

    @classmethod
    def of(cls, graph: ChannelGraph, kept: Mask, budget: str) -> Summary:
        """Summarise a mask of the network of a dense graph."""
        return cls(structure_of(graph, kept), budget)

    @property
    def sheet(self) -> Sheet:
        """The costs, then every channel group."""
        dense, now = self.structure.dense, self.structure.now
        names = {"macs": "MACs", "params": "parameters", "channels": "channels"}
        costs = [
            (
                name,
                f"{dense[key]:,}",
                f"{now[key]:,}",
                f"{100 * now[key] / max(1, dense[key]):.1f} %",
            )
            for key, name in names.items()
        ]
        groups = [
            (
                group.name,
                str(group.dense),
                str(group.kept),
                group.frozen or ("residual stream" if group.residual else ""),
            )
            for group in self.structure.groups
        ]
        branches = [
            (b.name, "1", "1" if b.kept else "gone", b.frozen or "branch")
            for b in self.structure.branches
        ]
        unknown = self.structure.unknown_operations
        notes = (f"operators without a rule: {', '.join(unknown)}",) if unknown else ()
        return Sheet(f"Pruning to {self.budget}", HEADER, (*costs, *groups, *branches), notes)

    def __rich__(self) -> TextTable:
        """Return the table that rich shows."""
        from compress.terminal.table import TextTable

        sheet = self.sheet
        table = TextTable(title=sheet.title, caption="\n".join(sheet.notes) or None)
        fill(table, sheet)
        return table

    def __str__(self) -> str:
        sheet = self.sheet
        return "\n".join((sheet.title, *text_lines(sheet, left=(0, 3)), *sheet.notes))

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""

        def row(cells: tuple[str, ...], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        sheet = self.sheet
        body = "".join(row(cells, "td") for cells in sheet.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in sheet.notes)
        caption = f"<caption>{html.escape(sheet.title)}</caption>"
        return f"<table>{caption}{row(HEADER, 'th')}{body}</table>{notes}"
