"""Names for what is put into a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.onnx.check import walk_nodes

if TYPE_CHECKING:
    import onnx


class Names:
    """Names for new tensors of a graph, none of them taken."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        for node in walk_nodes(graph):
            self._taken.update((*node.input, *node.output))

    def new(self, stem: str) -> str:
        """Return ``stem``, with a number if it is taken."""
        name, number = stem, 1
        while name in self._taken:
            name, number = f"{stem}_{number}", number + 1
        self._taken.add(name)
        return name
