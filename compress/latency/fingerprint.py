"""What a latency table was measured on, and for which network."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from compress.errors import TableError
from compress.networks.groups import ChannelGraph

AGAIN = "measure it again with compress profile"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a table was measured on; it holds for nothing else."""

    machine: str
    """Name of the processor or the GPU."""
    runtime: str
    version: str
    """Of the runtime's library."""
    precision: str
    batch: int
    threads: int
    """Of the runtime on the CPU."""
    network: str
    """Digest of its layers and their dense widths; see ``network_digest``."""

    def require(self, other: Fingerprint, what: str) -> None:
        """Refuse to serve another purpose.

        Args:
            other: of what is asked for.
            what: name of the table, for the message.

        Raises:
            TableError: naming the first fact that differs.
        """
        for each in fields(self):
            mine, asked = getattr(self, each.name), getattr(other, each.name)
            if mine == asked:
                continue
            if each.name == "network":
                raise TableError(f"{what} was measured for another network: {AGAIN}")
            raise TableError(
                f"{what} was measured for {each.name} {mine} and {asked} is asked for: {AGAIN}"
            )


def network_digest(graph: ChannelGraph) -> str:
    """Return a digest of the layers of a dense network: their shapes, and both widths of each."""
    everything = graph.everything()
    facts = [[asdict(layer.shape), *layer.widths(everything)] for layer in graph.layers]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
